"""Runs with blocks of frozen weights in host memory: the numbers of a run without, however many they are."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from diffsynth_core.adapters import swap as swapping
from diffsynth_core.adapters.swap import BlockSwap, swaps_of
from diffsynth_core.config.resolve import resolve
from diffsynth_core.models.qwen_image.tiny import TinySizes, write_tiny_weights
from diffsynth_core.planning.memory.estimate import device_memory, host_memory
from diffsynth_core.planning.memory.memory_config import memory_config
from diffsynth_core.planning.memory.sizes import find_workload
from diffsynth_core.planning.plan import RunPlan, make_plan
from diffsynth_core.progress import SilentReporter
from diffsynth_core.stop import StopRequest
from diffsynth_core.training import loop
from tests.conftest import ENTRIES, MODEL_ID, PLACES

BLOCKS, STEPS, FEW_STEPS = 5, 8, 2
FILES = ("epoch-0.safetensors", f"state/step-{STEPS}/optimizer.safetensors", f"state/step-{STEPS}/trained.safetensors")
IN_PARTS = {"cpu_offload_split_threshold": 0}
ALONE = {"use_gradient_checkpointing": False}
KINDS: dict[str, tuple[dict[str, object], ...]] = {
    "recomputed": ({"max_steps": STEPS}, {"blocks_to_swap": 3}, {"enable_model_cpu_offload": True}),
    "kept": ({"max_steps": STEPS, **ALONE}, {"blocks_to_swap": 4, **IN_PARTS}),
    "offloaded": ({"use_gradient_checkpointing_offload": True}, {"blocks_to_swap": 5}),
    "accumulated": ({"gradient_accumulation_steps": 2, "batch_size": 2}, {"blocks_to_swap": 4}),
    "float8": ({"fp8_models": [ENTRIES["dit"]], **ALONE}, {"blocks_to_swap": 4}),
    "nested": (
        {"checkpointing": "nested", "fp8_models": [ENTRIES["dit"]]},
        {"blocks_to_swap": 4},
        {"blocks_to_swap": 5, **IN_PARTS},
    ),
    "attention kept": ({"checkpointing": "keep_attention", "mixed_precision": "bf16"}, {"blocks_to_swap": 4}),
    "every 2nd block kept": ({"checkpointing": "keep_every_2", "fp8_models": [ENTRIES["dit"]]}, {"blocks_to_swap": 4}),
    "nf4": ({"quant_options": f"{ENTRIES['dit']}:nf4"}, {"blocks_to_swap": 4, **IN_PARTS}),
    "int8": ({"quant_options": f"{ENTRIES['dit']}:int8", "mixed_precision": "bf16"}, {"blocks_to_swap": 5}),
    "bf16": ({"mixed_precision": "bf16"}, {"blocks_to_swap": 4, **IN_PARTS}),
    "with a text encoder": ({"trainable_models": ["text_encoder"]}, {"blocks_to_swap": 4}),
    "with a block in training": ({"trainable_models": ["dit.transformer_blocks.1"]}, {"blocks_to_swap": 4}),
    "distilled": ({"task": "direct_distill", **ALONE}, {"blocks_to_swap": 4}),
}
"""What a run does -> its parameters, and those that have blocks wait in different ways."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen-Image with more blocks than two are."""
    folder = tmp_path_factory.mktemp("blocks")
    for component, place in PLACES.items():
        write_tiny_weights(folder, component, MODEL_ID, place, TinySizes(blocks=BLOCKS))
    return folder


@pytest.fixture(scope="module")
def plan(base: Path, photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., RunPlan]:
    folder = tmp_path_factory.mktemp("runs")
    rows = [f"{image}.png,a cat,{seed},cpu,2,1" for seed, image in enumerate(("chelsea", "coffee"))]
    distilled = folder / "distilled.csv"
    distilled.write_text("\n".join(["image,prompt,seed,rand_device,num_inference_steps,cfg_scale", *rows]) + "\n")
    count = iter(range(999))

    def plan(**flags: object) -> RunPlan:
        given = {"recipe": "qwen-image-lora", "dataset_base_path": str(photographs), "dataset_repeat": 8,
                 "num_epochs": 1, "max_steps": FEW_STEPS, "lora_rank": 4, "learning_rate": 0.01, "device": "cpu",
                 "dataset_num_workers": 0, "cache_path": str(folder / "cache"),
                 "output_path": str(folder / str(next(count)))}  # fmt: skip
        if flags.get("task") == "direct_distill":
            given |= {"dataset_metadata_path": str(distilled)}
        return make_plan(resolve(given | flags), SilentReporter(), base=base)

    return plan


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Fill buffers that are given back with NaN."""
    given_back: list[int] = []
    monkeypatch.setattr(swapping, "give_back", lambda memory: given_back.append(1) or memory.fill_(0xFF))
    return given_back


def run(plan: RunPlan) -> Path:
    return loop.train(plan, SilentReporter(), StopRequest()).folder


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def written(folder: Path) -> dict[str, bytes]:
    files = (*folder.glob("*.safetensors"), *folder.glob("state/*/*.safetensors"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def without(plan) -> Callable[[str], Path]:
    """The run of a kind without blocks in host memory, once."""
    return cache(lambda kind: run(plan(**KINDS[kind][0])))


@pytest.mark.parametrize(
    ("kind", "flags"), [(kind, flags) for kind, (_, *ways) in KINDS.items() for flags in ways], ids=str
)
def test_losses_and_weights_are_those_of_a_run_without(plan, without, poisoned, kind, flags):
    ours, theirs = run(plan(**KINDS[kind][0], **flags)), without(kind)
    assert losses(ours) == losses(theirs) and len(losses(ours)) in (FEW_STEPS, STEPS)
    assert written(ours) == written(theirs) and len(written(ours)) >= 3
    assert len(poisoned) > FEW_STEPS


@pytest.mark.parametrize("numbers", [(0, 5), (5, 3)])
def test_a_run_resumes_to_the_bit_with_another_number(plan, without, tmp_path, numbers):
    for steps, number in zip((3, STEPS), numbers, strict=True):
        flags = {"resume": "auto", "max_steps": steps, "save_state_steps": steps, "blocks_to_swap": number}
        folder = run(plan(output_path=str(tmp_path / "out"), **flags))
    assert json.loads((folder / "run.json").read_text())["parameters"]["blocks_to_swap"] == numbers[1]
    assert [(folder / name).read_bytes() for name in FILES] == [
        (without("recomputed") / name).read_bytes() for name in FILES
    ]


@pytest.mark.parametrize(
    ("number", "precision", "flags"), [(3, "bf16", {}), (5, "no", {"fp8_models": [ENTRIES["dit"]]})], ids=str
)
def test_no_more_is_on_the_device_than_the_estimate_says(plan, monkeypatch, number, flags, precision):
    made = plan(blocks_to_swap=number, mixed_precision=precision, max_steps=1, **flags)
    seen: list[tuple[int, int]] = []
    models = []
    content, fetch = loop.checkpoint_content, BlockSwap.fetch

    def counting(self, layer):
        found = fetch(self, layer)
        seen.append((sum(buffer.unit is not None for buffer in self._buffers), self.device_bytes))
        return found

    monkeypatch.setattr(BlockSwap, "fetch", counting)
    monkeypatch.setattr(
        loop, "checkpoint_content", lambda plan, model, *rest: models.append(model) or content(plan, model, *rest)
    )
    run(made)
    dit = models[0].components["dit"]
    (swap,) = swaps_of(dit)
    assert max(units for units, _ in seen) == 2 and len({size for _, size in seen}) == 1
    stay = [
        index
        for index, block in enumerate(dit.transformer_blocks)
        if not any(getattr(layer, "source", None) for layer in block.modules())
    ]
    assert len(stay) == BLOCKS - number, "and with the two in the buffers blocks - N + 2"
    block = swap.host_bytes // number
    frozen = sum(tensor.nbytes for name, tensor in dit.named_parameters() if ".lora_" not in name) + swap.device_bytes

    config = memory_config(made, find_workload(made).largest)
    memory = device_memory(made, config)
    told = memory.training
    assert told.weights["dit"] + told.swap_buffers == pytest.approx(frozen, rel=0.01)
    assert told.swapped == pytest.approx(swap.host_bytes, rel=0.01) and told.swap_buffers == pytest.approx(
        2 * block, rel=0.01
    )
    host = host_memory(made, config, memory, find_workload(made).encoded)
    assert host["swapped blocks of dit, in each process"] == told.swapped
    plain = device_memory(made, memory_config(plan(mixed_precision=precision, **flags), config.sizes)).training
    assert plain.weights["dit"] - told.weights["dit"] == told.swapped
    assert plain.total - told.total == told.swapped - told.swap_buffers


def test_parts_of_blocks_take_less_room_on_the_device(plan):
    """Of a threshold between the numbers of a block and of its parts, and of one that no block exceeds."""
    whole, parts, not_split = (
        device_memory(made, memory_config(made, find_workload(made).largest)).training
        for made in (plan(blocks_to_swap=4, cpu_offload_split_threshold=split) for split in (None, 0.01, 10))
    )
    assert whole == not_split and parts.swapped == whole.swapped
    assert 0 < parts.swap_buffers < whole.swap_buffers / 2
