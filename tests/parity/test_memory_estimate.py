"""The estimate of memory against what tiny models really take on the CPU, for each family; it ends in a table."""

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from weakref import WeakSet, finalize

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffsynth_core.config.choices import RECOMPUTATIONS
from diffsynth_core.config.resolve import resolve_stages
from diffsynth_core.models.checkpointing import ATTENTION, block_caller, blocks_of, checkpoint_parts, parts_of
from diffsynth_core.models.loading import build_empty
from diffsynth_core.models.registry import load_family
from diffsynth_core.planning.data.encodings import with_encodings
from diffsynth_core.planning.memory.disk import disk_use
from diffsynth_core.planning.memory.estimate import count_parameters, device_memory, training_memory, unknown_parts
from diffsynth_core.planning.memory.memory_config import memory_config
from diffsynth_core.planning.memory.sizes import find_workload, sizes_of_sample
from diffsynth_core.planning.plan import RunPlan
from diffsynth_core.planning.training.optimizer_choice import OptimizerChoice
from diffsynth_core.planning.training.optimizers import OPTIMIZERS
from diffsynth_core.progress import SilentReporter
from diffsynth_core.stop import StopRequest
from diffsynth_core.training.loader import iterate_micro_batches
from diffsynth_core.training.precompute import precompute
from diffsynth_core.training.setup import make_optimizer
from tests.covering import covering
from tests.parity.float8_runs import Step, plan_step

WITHIN = 0.1
RECIPES = {
    "qwen-image": "qwen-image-{}",
    "qwen-image edit": "qwen-image-edit-2509-{}",
    "wan": "wan2.1-t2v-1.3b-{}",
    "wan i2v": "wan2.1-i2v-14b-480p-{}",
    "wan ti2v": "wan2.2-ti2v-5b-{}",
    "flux": "flux.1-dev-{}",
    "flux2": "flux.2-klein-4b-{}",
}
SIZES = {
    "160 x 128": {"width": 160, "height": 128, "max_pixels": 160 * 128},
    "256 x 192": {"width": 256, "height": 192, "max_pixels": 256 * 192},
}
FURTHER_KINDS = ("wan i2v", "wan ti2v")
INPUTS = {"small": ("160 x 128", "no"), "large": ("256 x 192", "no"), "small in bf16": ("160 x 128", "bf16")}
"""Of a step: size and precision, by title."""
CASES = [
    *covering([name for name in RECIPES if name not in FURTHER_KINDS], ("lora", "full"), INPUTS),
    *((name, "lora", "small") for name in FURTHER_KINDS),
]
TABLE = Path(__file__).parents[2] / "docs" / "memory.md"
BLOCK = re.compile(r"(.*\.)?((single_)?(transformer_)?blocks?|layers)\.\d+")


class Saved:
    """A tensor that autograd keeps, and the block in whose forward pass it was kept."""

    def __init__(self, tensor: Tensor, block: str | None) -> None:
        self.tensor, self.block = tensor, block

    @property
    def memory(self) -> int:
        return self.tensor.untyped_storage().data_ptr()

    @property
    def bytes(self) -> int:
        return self.tensor.untyped_storage().nbytes()


@dataclass(frozen=True)
class Kept:
    """Bytes that a forward pass keeps, each memory once, without weights; and those of the block that keeps most."""

    everything: int
    largest_block: int


def measure_kept(step: Step) -> tuple[Kept, Tensor]:
    """What autograd keeps at the end of a forward pass, and the losses."""
    alive: WeakSet[Saved] = WeakSet()
    weights = {weight.untyped_storage().data_ptr() for weight in step.model.parameters()}
    inputs: dict[str, set[int]] = {}
    place: list[str | None] = [None]

    def keep(tensor: Tensor) -> Saved:
        saved = Saved(tensor, place[0])
        alive.add(saved)
        return saved

    handles = []
    for name, module in step.model.named_modules():
        if BLOCK.fullmatch(name):
            handles.append(module.register_forward_pre_hook(_enter(name, place, inputs), with_kwargs=True))
            handles.append(module.register_forward_hook(_leave(place)))
    with saved_tensors_hooks(keep, lambda saved: saved.tensor), step.accelerator.autocast():
        losses = step.model(step.micro_batch)
    for handle in handles:
        handle.remove()
    found = {saved.memory: saved.bytes for saved in alive if saved.memory not in weights}
    blocks: dict[str, dict[int, int]] = defaultdict(dict)
    for saved in alive:
        if saved.block and saved.memory not in weights | inputs[saved.block]:
            blocks[saved.block][saved.memory] = saved.bytes
    return Kept(sum(found.values()), max((sum(block.values()) for block in blocks.values()), default=0)), losses


def _enter(name, place, inputs):
    def hook(module, arguments, keywords):
        place[0] = name
        given = [value for value in (*arguments, *keywords.values()) if isinstance(value, Tensor)]
        inputs[name] = {tensor.untyped_storage().data_ptr() for tensor in given}

    return hook


def _leave(place):
    def hook(module, arguments, result):
        place[0] = None

    return hook


def measure(step: Step, plan: RunPlan) -> dict[str, int]:
    """Bytes by part, of one step carried out."""
    kept, losses = measure_kept(step)
    losses.sum().backward()
    trained = step.model.trained()
    gradients = sum(weight.grad.nbytes for weight in trained.values() if weight.grad is not None)
    optimizer = make_optimizer(plan, trained)
    optimizer.step()
    state = (value for values in optimizer.state.values() for name, value in values.items() if name != "step")
    named = dict(step.model.components.named_parameters())
    adapters = sum(weight.nbytes for name, weight in named.items() if ".lora_" in name)
    optimizer_bytes = sum(value.nbytes for value in state)
    step.model.zero_grad(set_to_none=True)
    family = load_family(plan.model.facts.name)
    for name, component in step.model.components.items():
        family.checkpoint_gradients(name, component)
    recomputed, losses = measure_kept(step)
    losses.sum().backward()
    return {
        "weights": sum(weight.nbytes for weight in named.values()) - adapters,
        "adapters": adapters,
        "gradients": gradients,
        "optimizer": optimizer_bytes,
        "activations": kept.everything,
        "activations recomputed": recomputed.everything + kept.largest_block,
    }


def estimate(plan: RunPlan, step: Step, **changes: object) -> dict[str, int]:
    """The same parts from sizes alone; of the texts only how many tokens they are."""
    micro_batch = step.micro_batch
    sample = plan.data.samples.samples[micro_batch.refs[0].sample]
    tokens = max(_text_states(encoded) for encoded in texts_of(step))
    sizes = replace(sizes_of_sample(plan, sample, 0), batch=len(micro_batch.encoded), text_tokens=tokens)
    config = replace(memory_config(plan, sizes), **changes)
    kept, recomputed = (training_memory(plan, replace(config, recompute=way)) for way in (False, True))
    return {
        "weights": sum(kept.weights.values()),
        "adapters": kept.adapters,
        "gradients": kept.gradients,
        "optimizer": kept.optimizer,
        "activations": kept.activations,
        "activations recomputed": recomputed.activations,
    }


def texts_of(step: Step) -> list[Mapping[str, Tensor]]:
    """Encodings of the captions of a micro-batch, those of encoders in training too."""
    model, batch = step.model, step.micro_batch
    made = [
        model._family.encode(encoder, model._known(), raw[encoder.name])
        for encoder in model._online
        for raw in batch.raw
    ]
    return [encoded for encoded in (*batch.encoded, *made) if "prompt_embeds" in encoded]


@pytest.fixture(scope="module")
def rows() -> Iterator[list[str]]:
    """The lines of the table, printed behind the last test, and written where that is asked for."""
    lines: list[str] = []
    yield lines
    table = "\n".join([*HEAD, *lines, ""])
    print(f"\n{table}")
    if os.environ.get("WRITE_MEMORY_TABLE"):
        TABLE.write_text(table, encoding="utf-8")


HEAD = """\
# Memory, estimated and measured

One step of the tiny models of a rehearsal, run on the CPU, compared with the estimate of `train --dry_run`, which knows only
sizes. All figures are bytes. `activations` is what autograd keeps at the end of the forward pass, counting shared memory
once, without weights; `activations recomputed` is the same with `--use_gradient_checkpointing`, plus what the largest block
keeps while it is recomputed. Written by `WRITE_MEMORY_TABLE=1 pytest tests/parity/test_memory_estimate.py`.

On GPUs, autocast computes norms in float32 and attention uses its own kernels. That part of the estimate follows PyTorch's
lists of operations and has not been measured. Kernel workspace and driver overhead are not included.

ControlNets and text encoders in training are compared by the same tests, within 10 %.

| model | trained | size | precision | part | measured | estimated | off |
|---|---|---|---|---|---|---|---|""".splitlines()


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize(("name", "kind", "inputs"), CASES)
def test_estimate_is_what_a_step_takes(name, kind, inputs, folder, rows):
    size, precision = INPUTS[inputs]
    given = {**SIZES[size], "mixed_precision": precision, "use_gradient_checkpointing": False}
    plan = plan_step(RECIPES[name].format(kind), folder, **given)
    step = Step(plan)
    estimated, measured = estimate(plan, step), measure(step, plan)
    wrong = {}
    for part, found in measured.items():
        off = estimated[part] / found - 1 if found else float(estimated[part])
        rows.append(
            f"| {name} | {kind} | {size} | {precision} | {part} | {found:,} | {estimated[part]:,} | {off:+.1%} |"
        )
        if abs(off) > WITHIN:
            wrong[part] = (found, estimated[part])
    assert not wrong


def split_step(recipe: str, folder: Path) -> Step:
    """A second half on the longest text of what a first half has encoded, in micro-batches of 2."""
    split = {"use_gradient_checkpointing": False, "batch_size": 2, **SIZES["160 x 128"]}
    first = plan_step(recipe, folder, task="sft:data_process", output_path=folder / "encoded" / recipe, **split)
    encoded = precompute(first, SilentReporter(), StopRequest())
    second = {"task": "sft:train", "dataset_base_path": encoded.folder, "max_steps": len(encoded.samples)}
    plan = plan_step(recipe, folder, **second, **split)
    step = Step(plan)
    micro_batches = iterate_micro_batches(with_encodings(plan, SilentReporter()), 0)
    step.micro_batch = max(micro_batches, key=lambda batch: max(map(_text_states, batch.encoded)))
    return step


@pytest.mark.parametrize("name", ["qwen-image", "wan", "flux", "flux2"])
def test_the_estimate_of_a_second_half_is_what_a_step_on_encoded_samples_takes(name, folder):
    step = split_step(RECIPES[name].format("lora"), folder)
    plan = step.plan
    run = find_workload(plan)
    config = memory_config(plan, run.largest)
    told, measured = device_memory(plan, config), measure(step, plan)
    assert told.encoding == () and run.counted
    assert disk_use(plan, config, run.encoded).cache == 0
    assert (run.largest.batch, run.largest.text_tokens) == (2, max(map(_text_states, step.micro_batch.encoded)))
    parts = ("adapters", "gradients", "optimizer", "activations")
    assert sum(told.training.weights.values()) == pytest.approx(measured["weights"], rel=WITHIN)
    for part in parts:
        assert getattr(told.training, part) == pytest.approx(measured[part], rel=WITHIN), part


@pytest.mark.parametrize(
    ("name", "kind", "precision"),
    [
        ("qwen-image", "lora", "no"),
        ("wan", "full", "no"),
        ("flux", "lora", "no"),
        ("flux2", "full", "no"),
        ("wan", "lora", "bf16"),
    ],
)
def test_the_estimate_of_parts_that_are_recomputed_once_more_is_what_a_block_takes(name, kind, precision, folder):
    given = {**SIZES["160 x 128"], "mixed_precision": precision, "use_gradient_checkpointing": False}
    plan = plan_step(RECIPES[name].format(kind), folder, **given)
    step = Step(plan)
    estimated = estimate(plan, step, checkpointing="nested")["activations recomputed"]
    whole = estimate(plan, step)["activations recomputed"]
    block, found = largest_block_of_parts(step), measure(step, plan)["activations recomputed"]
    kept, _ = measure_kept(step)  # with recomputed blocks
    assert estimated == pytest.approx(kept.everything + block, rel=WITHIN)
    assert estimated < whole == pytest.approx(found, rel=WITHIN)


class AttentionOutputs(TorchDispatchMode):
    """Bytes of what attention returns."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        if function in ATTENTION:
            self.bytes += sum(tensor.nbytes for tensor in tree_leaves(result) if isinstance(tensor, Tensor))
        return result


@pytest.mark.parametrize("checkpointing", ["keep_attention", "keep_every_2"])
@pytest.mark.parametrize(("name", "kind"), [("qwen-image", "lora"), ("flux", "lora"), ("wan", "full")])
def test_the_estimate_of_what_is_kept_beside_inputs_is_what_a_step_keeps(name, kind, checkpointing, folder):
    plan = plan_step(RECIPES[name].format(kind), folder, use_gradient_checkpointing=False, **SIZES["160 x 128"])
    step, recomputation = Step(plan), RECOMPUTATIONS[checkpointing]
    estimated = estimate(plan, step, checkpointing=checkpointing)["activations recomputed"]
    stored, _ = measure_kept(step)
    family, denoiser = load_family(plan.model.facts.name), step.model.components["dit"]
    blocks = list(blocks_of(denoiser, family.facts.component("dit")))
    family.checkpoint_gradients("dit", denoiser, block_caller(blocks, recomputation))
    with AttentionOutputs() as attention:
        kept, _ = measure_kept(step)
    outputs = attention.bytes if recomputation.keeps_attention else 0
    measured = kept.everything + outputs + stored.largest_block - outputs // len(blocks)
    assert kept.everything < stored.everything
    assert estimated == pytest.approx(measured, rel=WITHIN)
    assert estimated > estimate(plan, step)["activations recomputed"]


def largest_block_of_parts(step: Step) -> int:
    """Bytes of the block that keeps most while its parts are recomputed one after the other: all but one of them keep
    their inputs alone.
    """
    blocks = [block for name, block in step.model.named_modules() if BLOCK.fullmatch(name)]
    names = {name for block in blocks for name, part in block.named_children() if part in parts_of(block)}
    most = 0
    for stored in sorted(names):
        for block in blocks:
            checkpoint_parts(block)
            if stored in dict(block.named_children()):
                vars(block.get_submodule(stored)).pop("forward")
        most = max(most, measure_kept(step)[0].largest_block)
        for block in blocks:
            for part in parts_of(block):
                vars(part).pop("forward", None)
    return most


CONTROLNETS = {
    "qwen-image": "InstantX/Qwen-Image-ControlNet-Union:diffusion_pytorch_model.safetensors",
    "flux": "jasperai/Flux.1-dev-Controlnet-Upscaler:diffusion_pytorch_model.safetensors",
}
CONTROLLED = {"extra_inputs": ["controlnet_image"], "data_file_keys": ["image", "controlnet_image"]}
TEXT_ENCODERS = {
    "qwen-image": ["text_encoder"],
    "wan": ["text_encoder"],
    "flux": ["text_encoder_1", "text_encoder_2"],
}
"""That of FLUX.2 is not measured, and the plan says so."""


@pytest.mark.parametrize("lora", [None, "dit"])
@pytest.mark.parametrize("name", CONTROLNETS)
def test_the_estimate_of_a_controlnet_in_training_is_what_a_step_takes(name, lora, folder):
    recipe = RECIPES[name].format("lora")
    entries = resolve_stages({"recipe": recipe})[0].parameters.model_id_with_origin_paths
    models = {"model_id_with_origin_paths": [*entries, CONTROLNETS[name]], "trainable_models": ["controlnet"]}
    check_estimate(recipe, folder, lora_base_model=lora, align_to_opensource_format=False, **models, **CONTROLLED)


@pytest.mark.parametrize("name", TEXT_ENCODERS)
def test_the_estimate_of_text_encoders_in_training_is_what_a_step_takes(name, folder):
    check_estimate(RECIPES[name].format("lora"), folder, trainable_models=TEXT_ENCODERS[name])


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize("name", ["qwen-image", "wan"])
def test_the_estimate_of_training_in_bf16_is_what_a_step_takes(name, folder):
    """That of Wan keeps some weights in float32."""
    check_estimate(RECIPES[name].format("full"), folder, trained_dtype="bf16", mixed_precision="bf16")


def check_estimate(recipe: str, folder: Path, **given: object) -> None:
    plan = plan_step(recipe, folder, use_gradient_checkpointing=False, **SIZES["160 x 128"], **given)
    assert not [part for part in unknown_parts(plan) if "activations" in part]
    step = Step(plan)
    estimated, measured = estimate(plan, step), measure(step, plan)
    assert estimated == {part: pytest.approx(found, rel=WITHIN) for part, found in measured.items()}


def _text_states(encoded: Mapping[str, Tensor]) -> int:
    return len(encoded["prompt_embeds"])


class LiveBytes(TorchDispatchMode):
    """The most bytes at once of memory that operations make, and that was not there before."""

    def __init__(self, before: Iterable[Tensor]) -> None:
        super().__init__()
        self.before = {tensor.untyped_storage().data_ptr() for tensor in before}
        self.online: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is not None and storage.data_ptr() not in self.before | self.online.keys():
                self.online[storage.data_ptr()] = storage.nbytes()
                finalize(storage, self.online.pop, storage.data_ptr())
                self.most = max(self.most, sum(self.online.values()))
        return result


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_step_of_an_optimizer_works_with_as_much_as_the_estimate_says(name):
    """On an accelerator, where all but a few work on all tensors at once; what one tensor takes is not counted."""
    shape, count = (100, 10), 50
    weights = [nn.Parameter(torch.randn(shape)) for _ in range(count)]
    optimizer = OptimizerChoice(name, {"weight_decay": 0.01}).build(0.01, weights)
    for group in optimizer.param_groups:
        # What an accelerator would choose; the others do the same everywhere.
        group.update({"foreach": True} if name in ("adamw", "prodigy") else {})
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer.step()
    there = [tensor for weight in weights for tensor in (weight, weight.grad, *optimizer.state[weight].values())]
    with LiveBytes(tensor for tensor in there if isinstance(tensor, Tensor)) as made:
        optimizer.step()
    single = weights[0].nbytes
    assert 0 <= made.most - count * OPTIMIZERS[name].update_bytes(shape, {}, "cuda") <= 6 * single


@pytest.mark.parametrize("name", RECIPES)
def test_parameters_are_counted_as_the_modules_have_them(name, folder):
    plan = plan_step(RECIPES[name].format("lora"), folder)
    family = load_family(plan.model.facts.name)
    for component, files in plan.model.components.items():
        module: nn.Module = build_empty(family, files)
        expected = sum(weight.numel() for weight in module.parameters())
        assert count_parameters(plan, component) == pytest.approx(expected, rel=0.001), component
