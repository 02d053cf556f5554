"""Differential training: one LoRA merged into the base, another trained on it, in each family."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.testing import assert_close

from diffsynth_core.config.resolve import resolve
from diffsynth_core.errors import DiffSynthError, FaultsFound
from diffsynth_core.models.registry import load_family
from diffsynth_core.planning.data.encodings import plan_encodings, with_encodings
from diffsynth_core.planning.data.encodings_plan import EncoderPlan
from diffsynth_core.planning.plan import RunPlan, make_plan
from diffsynth_core.progress import SilentReporter
from diffsynth_core.stop import StopRequest
from diffsynth_core.training import loop
from diffsynth_core.training.loader import iterate_micro_batches
from diffsynth_core.training.loading import load_for_run
from diffsynth_core.training.model import build_training_module
from tests.covering import long_ones
from tests.loras import FORMATS, RANK, RECIPES, TinyFamily, random_lora, save_lora

CPU = torch.device("cpu")


class Listener(SilentReporter):
    """Collects messages."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.warned: list[str] = []

    def info(self, message: str) -> None:
        self.messages.append(message)

    def warn(self, message: str) -> None:
        self.warned.append(message)


def run(tiny: TinyFamily, **more: Any) -> Path:
    """Train, and return the folder."""
    plan = tiny.plan(**more)
    return loop.train(plan, SilentReporter(), StopRequest()).folder


def load(plan: RunPlan, component: str = "dit", dtype: torch.dtype = torch.float32, listener=None) -> nn.Module:
    return load_for_run(plan, load_family(plan.model.facts.name), component, dtype, CPU, listener or SilentReporter())


def documented_weights(plan: RunPlan, module: nn.Module) -> dict[str, Tensor]:
    """Return all tensors of a component by documented name, or by module key if they have none."""
    names, own = plan.model.components["dit"].layout.public_keys, module.state_dict()
    return {name: names.fuse(name, own) for name in names.to_sources(own)}


def changes_of(file: Path) -> dict[str, Tensor]:
    """Return B A of each weight, read by hand from a file in the documented format."""
    tensors = load_file(file)
    stems = {key.removesuffix(".lora_A.default.weight") for key in tensors if ".lora_A." in key}
    assert len(tensors) == 2 * len(stems)
    return {
        f"{stem}.weight": tensors[f"{stem}.lora_B.default.weight"].double() @ tensors[f"{stem}.lora_A.default.weight"].double()
        for stem in stems
    }  # fmt: skip


def check_merged(before: Mapping[str, Tensor], after: Mapping[str, Tensor], *files: Path) -> None:
    expected = {name: tensor.double() for name, tensor in before.items()}
    for file in files:
        for name, change in changes_of(file).items():
            expected[name] = expected[name] + change
    assert after.keys() == expected.keys()
    for name, tensor in after.items():
        assert_close(tensor.double(), expected[name], rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize(("family", "lora_format"), FORMATS)
def test_merged_weights_are_the_base_and_b_a(tiny_families, tmp_path, family, lora_format):
    """From every format, with the scale of the file; weights that it does not name stay bit-identical."""
    tiny = tiny_families(family)
    lora = random_lora(tiny.module_shapes())
    plain = save_lora(tmp_path / "plain.safetensors", lora, family, "diffsynth")
    alpha = None if lora_format in ("diffsynth", "diffusers") else RANK
    file = save_lora(tmp_path / "lora.safetensors", lora, family, lora_format, alpha)
    base = tiny.plan(output_path="out")
    plan = tiny.plan(output_path="out", preset_lora_path=file, preset_lora_model="dit")
    before, after = documented_weights(base, load(base)), documented_weights(plan, load(plan))
    check_merged(before, after, plain)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == {f"{module}.weight" for module in lora}


@pytest.mark.parametrize(
    ("family", "lora_format"),
    [(family, lora_format) for family, lora_format in FORMATS if lora_format in ("comfyui", "kohya")],
)
def test_the_stored_scale_is_merged(tiny_families, tmp_path, family, lora_format):
    tiny = tiny_families(family)
    lora = random_lora(tiny.module_shapes())
    whole = save_lora(tmp_path / "whole.safetensors", lora, family, lora_format)
    half = save_lora(tmp_path / "half.safetensors", lora, family, lora_format, alpha=RANK / 2)
    base = documented_weights(tiny.plan(output_path="out"), load(tiny.plan(output_path="out")))
    merged = []
    for file in (whole, half):
        plan = tiny.plan(output_path="out", preset_lora_path=file, preset_lora_model="dit")
        merged.append(documented_weights(plan, load(plan)))
    for module in lora:
        name = f"{module}.weight"
        assert_close(merged[1][name] - base[name], (merged[0][name] - base[name]) / 2, rtol=1e-4, atol=1e-6)


@pytest.fixture
def trained_model(monkeypatch) -> list[Any]:
    """Return the model of a run at the time of its checkpoint."""
    seen: list[Any] = []
    content = loop.checkpoint_content
    monkeypatch.setattr(
        loop, "checkpoint_content", lambda plan, model, *rest: seen.append(model) or content(plan, model, *rest)
    )
    return seen


@pytest.mark.parametrize("tiny", long_ones(RECIPES, long=("flux", "flux2")), indirect=True)
def test_the_chain_of_two_loras(tiny, tmp_path, trained_model):
    """The second file contains only the second LoRA; base, first and second together are the trained model."""
    first = run(tiny, output_path=tmp_path / "first") / "epoch-0.safetensors"
    second_flags = {
        "output_path": tmp_path / "second",
        "preset_lora_path": first,
        "preset_lora_model": "dit",
        "seed": 1,
    }
    second = run(tiny, **second_flags) / "epoch-0.safetensors"
    one, other = load_file(first), load_file(second)
    assert one.keys() == other.keys()
    assert all(tensor.any() for name, tensor in other.items() if ".lora_B." in name)
    assert not any(torch.equal(one[name], other[name]) for name in one)

    plan = tiny.plan(output_path=tmp_path / "third", preset_lora_path=first, preset_lora_model="dit", seed=1)
    plan = with_encodings(plan, SilentReporter())
    batch = next(iterate_micro_batches(plan, 0))
    full = tiny.plan(output_path=tmp_path / "third", trainable_models="dit", seed=1)
    family = load_family(tiny.name)
    whole = build_training_module(with_encodings(full, SilentReporter()), family, CPU, SilentReporter())
    with torch.no_grad():
        untouched = whole(batch)
        put(full, whole.components["dit"], first, second)
        expected, actual = whole(batch), trained_model[-1](batch)
    assert (actual - untouched).abs().max() > 1e-4, "the LoRAs do something"
    assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def put(plan: RunPlan, module: nn.Module, *files: Path) -> None:
    """Add the LoRAs of files to a model's weights, by hand."""
    names = plan.model.components["dit"].layout.public_keys
    own = {name.replace(".base_layer.", "."): tensor for name, tensor in module.state_dict().items()}
    for file in files:
        for name, change in changes_of(file).items():
            for part, rows in names.split(name, change.float()).items():
                own[part].add_(rows)


def test_a_full_training_starts_from_the_merged_weights(tiny, tmp_path):
    """Its checkpoint contains both: with a learning rate of 0, base plus LoRA."""
    first = run(tiny, output_path=tmp_path / "first") / "epoch-0.safetensors"
    flags = tiny.flags(
        output_path=tmp_path / "full", trainable_models="dit", save_dtype="float32", learning_rate=0,
        preset_lora_path=first, preset_lora_model="dit", remove_prefix_in_ckpt="pipe.dit.",
    )  # fmt: skip
    recipe = flags.pop("recipe").replace("-lora", "-full")
    resolved = resolve(
        {"recipe": recipe, **{name: value for name, value in flags.items() if name not in ("lora_rank", "lora_format")}}
    )
    plan = make_plan(resolved, SilentReporter(), base=tiny.base)
    loop.train(plan, SilentReporter(), StopRequest())
    base = tiny.plan(output_path=tmp_path / "x")
    files = base.model.components["dit"]
    own = load(base).state_dict()
    put(base, module := load(base), first)
    written = load_file(tmp_path / "full" / "epoch-0.safetensors")
    names = files.layout.checkpoint_keys
    assert written.keys() == set(names.to_sources(own))
    for name, tensor in written.items():
        assert_close(tensor, names.fuse(name, module.state_dict()), rtol=1e-6, atol=1e-6)


def save_for(component: str, tiny: TinyFamily, path: Path, seed: int = 0, **more: Any) -> Path:
    """Save a random LoRA on two linear layers of another component."""
    from safetensors.torch import save_file

    shapes = tiny.module_shapes(component, lora_base_model=component, lora_target_modules="", **more)
    chosen = random_lora({name: shapes[name] for name in list(shapes)[:2]}, seed=seed, spread=0.5)
    tensors = {f"{name}.lora_A.default.weight": halves.A for name, halves in chosen.items()}
    tensors |= {f"{name}.lora_B.default.weight": halves.B for name, halves in chosen.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    return path


def text_encoder_of(tiny: TinyFamily) -> str:
    return next(name for name in tiny.facts.component_names if name.startswith("text_encoder"))


def encodings_of(plan: RunPlan) -> dict[str, EncoderPlan]:
    return {part.encoder.name: part for part in plan_encodings(plan, SilentReporter()).encoders}


def test_encodings_of_a_merged_text_encoder_are_its_own(tiny, tmp_path):
    """By the content of the LoRA file: a moved one is the same, another is not; other encoders keep theirs."""
    component = text_encoder_of(tiny)
    common = {"output_path": tmp_path / "out", "cache_path": tmp_path / "cache"}
    files = [save_for(component, tiny, tmp_path / f"{seed}" / "lora.safetensors", seed) for seed in range(2)]
    moved = tmp_path / "moved.safetensors"
    shutil.copy(files[0], moved)
    without = encodings_of(tiny.plan(**common))
    first, second, third = (
        encodings_of(tiny.plan(**common, preset_lora_path=file, preset_lora_model=component))
        for file in (*files, moved)
    )
    for name, part in without.items():
        assert first[name].keys == third[name].keys
        its_own = part.encoder.component == component
        assert (first[name].keys != part.keys) == (first[name].keys != second[name].keys) == its_own


@pytest.mark.parametrize("tiny", long_ones(RECIPES, long=("flux2", "wan")), indirect=True)
def test_a_merged_text_encoder_encodes(tiny, tmp_path):
    component = text_encoder_of(tiny)
    common = {"cache_path": tmp_path / "cache", "max_steps": 1}
    file = save_for(component, tiny, tmp_path / "lora.safetensors")
    plans = [
        tiny.plan(**common, output_path=tmp_path / "plain"),
        tiny.plan(**common, output_path=tmp_path / "merged", preset_lora_path=file, preset_lora_model=component),
    ]
    for plan in plans:
        loop.train(plan, SilentReporter(), StopRequest())
    without, merged = map(encodings_of, plans)
    for name, part in without.items():
        index = min(part.keys)
        before, after = (each.cache.read(each.keys[index]) for each in (part, merged[name]))
        same = before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
        assert same == (part.encoder.component != component), name


@pytest.mark.parametrize("component", ["dit", "text_encoder"])
def test_a_resumed_run_goes_on_with_the_same_preset(tiny_families, tmp_path, component):
    """The record has its hash; a moved file is accepted, another one or none is rejected before loading weights."""
    tiny = tiny_families("qwen-image")
    files = [save_for(component, tiny, tmp_path / f"{seed}" / "lora.safetensors", seed) for seed in range(2)]
    flags = {"output_path": tmp_path / "out", "preset_lora_model": component, "max_steps": 1}
    run(tiny, preset_lora_path=files[0], **flags)
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    digests = {name: files.get("preset_lora_path") for name, files in record["components"].items()}
    assert digests == dict.fromkeys(digests) | {component: sha256(files[0])}
    assert record["parameters"]["preset_lora_path"] == str(files[0])

    moved = tmp_path / "moved.safetensors"
    shutil.move(files[0], moved)
    flags |= {"resume": "auto", "max_steps": 2}
    with pytest.raises(DiffSynthError) as caught:
        run(tiny, preset_lora_path=files[1], **flags)
    assert f"the files of {component} changed since the run in" in str(caught.value)
    with pytest.raises(FaultsFound, match="`preset_lora_model` was"):
        run(tiny, **{name: value for name, value in flags.items() if name != "preset_lora_model"})
    run(tiny, preset_lora_path=moved, **flags)
    assert json.loads((tmp_path / "out" / "run.json").read_text())["step"] == 2


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("precision", "spread", "lost"), [("no", 1e-3, False), ("bf16", 3e-3, True), ("bf16", 0.3, False)]
)
def test_what_the_rounding_loses_is_told(tiny_families, tmp_path, precision, spread, lost):
    tiny = tiny_families("qwen-image")
    lora = random_lora(tiny.module_shapes(), spread=spread)
    file = save_lora(tmp_path / "lora.safetensors", lora, tiny.name, "diffsynth")
    plan = tiny.plan(output_path="out", preset_lora_path=file, preset_lora_model="dit", mixed_precision=precision)
    listener = Listener()
    module = load(plan, dtype=torch.bfloat16 if precision == "bf16" else torch.float32, listener=listener)
    assert {parameter.dtype for parameter in module.parameters()} == {
        torch.bfloat16 if precision == "bf16" else torch.float32
    }
    assert f"Preset LoRA `{file}` merged into {len(lora)} modules of dit" in listener.messages
    assert len(listener.warned) == lost
    if lost:
        assert "rounding to bfloat16 loses" in listener.warned[0] and "`--mixed_precision no`" in listener.warned[0]
