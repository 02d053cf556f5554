"""`lora_checkpoint` in each family: every format and spelling starts the same LoRA, and unsuitable files are
rejected.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close

from diffsynth_core.adapters.lora import LoraWeights, add_lora, load_lora, lora_weights
from diffsynth_core.errors import FaultsFound, Problem
from diffsynth_core.models.loading import load_component
from diffsynth_core.models.registry import load_family
from diffsynth_core.progress import SilentReporter
from diffsynth_core.stop import StopRequest
from diffsynth_core.training.loop import train
from tests.loras import FORMATS, RANK, TinyFamily, random_lora, save_lora

SPELLINGS: Mapping[str, Callable[[str], str]] = {
    "pipe.dit.": lambda key: f"pipe.dit.{key}",
    "without the adapter's name": lambda key: key.replace(".default.", "."),
    "both": lambda key: f"pipe.dit.{key.replace('.default.', '.')}",
}
"""Variants of the documented format in files: with the prefix kept, or without peft's adapter name."""


def with_lora(tiny: TinyFamily, modules: Mapping[str, object]) -> tuple[nn.Module, object]:
    """Return the transformer with a fresh LoRA, and its documented names."""
    files = tiny.plan(output_path="unused").model.components["dit"]
    module = load_component(load_family(tiny.name), files, torch.float32, torch.device("cpu"), SilentReporter())
    add_lora(module, sorted(modules), RANK, 0, files.layout.public_keys)
    return module, files.layout.public_keys


def start(tiny: TinyFamily, path: Path, modules: Mapping[str, object]) -> dict[str, LoraWeights]:
    module, public_keys = with_lora(tiny, modules)
    assert load_lora(module, path, tiny.facts.component("dit").lora_naming, public_keys) == len(modules)
    return lora_weights(module, public_keys)


def check(found: Mapping[str, LoraWeights], expected: Mapping[str, LoraWeights], scale: float = 1.0) -> None:
    assert found.keys() == expected.keys()
    for module, halves in expected.items():
        assert torch.equal(found[module].A, halves.A)
        assert_close(found[module].B, halves.B * scale, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("family", "lora_format"), FORMATS)
def test_every_dialect_is_read(tiny_families, tmp_path, family, lora_format):
    tiny = tiny_families(family)
    lora = random_lora(tiny.module_shapes())
    check(start(tiny, save_lora(tmp_path / "lora.safetensors", lora, family, lora_format), lora), lora)


@pytest.mark.parametrize(("family", "lora_format"), [pair for pair in FORMATS if pair[1] in ("comfyui", "kohya")])
def test_a_stored_scale_is_read(tiny_families, tmp_path, family, lora_format):
    tiny = tiny_families(family)
    lora = random_lora(tiny.module_shapes())
    check(
        start(tiny, save_lora(tmp_path / "lora.safetensors", lora, family, lora_format, alpha=1), lora), lora, 1 / RANK
    )


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_other_spellings_of_the_documented_dialect_are_read(tiny, tmp_path, spelling):
    lora = random_lora(tiny.module_shapes())
    path = save_lora(tmp_path / "lora.safetensors", lora, tiny.name, "diffsynth")
    rewrite(path, lambda tensors: {SPELLINGS[spelling](key): tensor for key, tensor in tensors.items()})
    check(start(tiny, path, lora), lora)


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    save_file({key: tensor.contiguous() for key, tensor in change(load_file(path)).items()}, path)


def problems_of(tiny: TinyFamily, **more: object) -> list[Problem]:
    with pytest.raises(FaultsFound) as caught:
        tiny.plan(output_path="unused", **more)
    return list(caught.value.problems)


@pytest.mark.parametrize(("family", "lora_format"), FORMATS)
def test_a_missing_half_is_refused(tiny_families, tmp_path, family, lora_format):
    tiny = tiny_families(family)
    path = save_lora(tmp_path / "lora.safetensors", random_lora(tiny.module_shapes()), family, lora_format)
    half = next(key for key in load_file(path) if "lora_B" in key or "lora_up" in key)
    rewrite(path, lambda tensors: {key: tensor for key, tensor in tensors.items() if key != half})
    for parameters in ({"lora_checkpoint": path}, {"preset_lora_path": path, "preset_lora_model": "dit"}):
        [problem] = problems_of(tiny, **parameters)
        assert problem.message.startswith(f"`{path}`: the LoRA of `") and problem.message.endswith(
            " has lora_A but no lora_B"
        )


@pytest.mark.parametrize(("family", "lora_format"), FORMATS)
def test_another_rank_is_refused_with_the_rank_to_give(tiny_families, tmp_path, family, lora_format):
    tiny = tiny_families(family)
    path = save_lora(tmp_path / "lora.safetensors", random_lora(tiny.module_shapes(), rank=3), family, lora_format)
    assert problems_of(tiny, lora_checkpoint=path) == [
        Problem(f"`{path}` has rank 3, but `lora_rank` is {RANK}", "pass `--lora_rank 3`", wrong_use=True)
    ]


@pytest.mark.parametrize(("family", "lora_format"), FORMATS)
def test_ranks_that_differ_by_module_start_a_lora_of_the_highest(tiny_families, tmp_path, family, lora_format):
    """For a module with a lower rank, additional rows of A are fresh and columns of B zero."""
    tiny = tiny_families(family)
    shapes = tiny.module_shapes()
    first, *others = shapes
    low = random_lora({first: shapes[first]}, rank=2)
    path = save_lora(tmp_path / "lora.safetensors", random_lora(shapes) | low, family, lora_format)
    [problem] = problems_of(tiny, lora_checkpoint=path, lora_rank=2)
    assert problem.message == (
        f"`{path}` has several ranks: 2 at `{first}` (1 in total), {RANK} at `{others[0]}` ({len(others)} in total); "
        f"the trained LoRA needs the highest, but `lora_rank` is 2"
    )
    assert problem.hint == f"pass `--lora_rank {RANK}`"
    plan = tiny.plan(output_path="unused", lora_checkpoint=path)
    assert plan.training.start.ranks == dict.fromkeys(others, RANK) | {first: 2}
    found = start(tiny, path, shapes)[first]
    assert_close(found.B.flatten(1) @ found.A.flatten(1), low[first].B.flatten(1) @ low[first].A.flatten(1))
    assert not found.B[:, 2:].any() and found.A[2:].any()


@pytest.mark.parametrize("family", ["qwen-image", "wan", "flux", "flux2"])
def test_the_lora_of_another_model_is_refused(tiny_families, tmp_path, family):
    tiny, other = tiny_families(family), "wan" if family != "wan" else "flux"
    path = save_lora(
        tmp_path / "lora.safetensors", random_lora(tiny_families(other).module_shapes()), other, "diffsynth"
    )
    keys = len(load_file(path))
    [problem] = problems_of(tiny, lora_checkpoint=path)
    assert problem.message.startswith(f"`{path}`: {keys} of {keys} keys match no module: ")


def test_a_lora_of_modules_that_do_not_train_is_refused(tiny, tmp_path):
    """Each of its keys matches a module, but none that trains."""
    shapes = tiny.module_shapes()
    first, *others = shapes
    path = save_lora(tmp_path / "lora.safetensors", random_lora({first: shapes[first]}), tiny.name, "diffsynth")
    [problem] = problems_of(tiny, lora_checkpoint=path, lora_target_modules=",".join(others))
    assert problem.message == f"`{path}` has no LoRA for the {len(others)} trained modules; it has `{first}`"


def test_separate_loras_of_fused_modules_start_one_of_their_joint_rank(tiny_families, tmp_path):
    """q, k and v of FLUX.1 are one matrix in documented names; the run continues from there."""
    tiny = tiny_families("flux")
    path = save_lora(tmp_path / "lora.safetensors", random_lora(tiny.module_shapes()), "flux", "diffusers")
    key = "transformer.transformer_blocks.0.attn.to_k.lora_A.weight"
    rewrite(path, lambda tensors: {**tensors, key: tensors[key] + 1})
    [problem] = problems_of(tiny, lora_checkpoint=path)
    assert problem.hint == f"pass `--lora_rank {2 * RANK}`"
    assert tiny.plan(output_path="unused", preset_lora_path=path, preset_lora_model="dit").model.fused_lora
    plan = tiny.plan(output_path=tmp_path / "out", lora_checkpoint=path, lora_rank=2 * RANK)
    assert plan.training.start.joined == 1
    written = load_file(train(plan, SilentReporter(), StopRequest()).folder / "epoch-0.safetensors")
    assert written["blocks.0.attn.a_to_qkv.lora_A.default.weight"].shape[0] == 2 * RANK


def test_a_checkpoint_with_full_weights_beside_its_lora_is_refused(tiny, tmp_path):
    """Such files are written if several modules train; neither parameter silently drops a part of them."""
    component = next(name for name in reversed(tiny.facts.component_names) if name.startswith("text_encoder"))
    plan = tiny.plan(output_path=tmp_path / "out", trainable_models=component, max_steps=1, save_steps=1)
    path = train(plan, SilentReporter(), StopRequest()).folder / "step-1.safetensors"
    number = sum(key.startswith(f"pipe.{component}.") for key in load_file(path))
    expected = f"`{path}` contains {number} full weights of {component} besides the LoRA of dit, but only a LoRA is supported here"
    for parameters in ({"lora_checkpoint": path}, {"preset_lora_path": path, "preset_lora_model": "dit"}):
        assert [problem.message for problem in problems_of(tiny, **parameters)] == [expected]
