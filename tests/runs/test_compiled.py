"""Runs with compiled blocks, against plain ones."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from diffsynth_core.config.resolve import resolve
from diffsynth_core.models.family import Family
from diffsynth_core.models.registry import load_family
from diffsynth_core.planning.data.encodings import with_encodings
from diffsynth_core.planning.memory.sizes import count_batch_shapes
from diffsynth_core.planning.plan import RunPlan, make_plan
from diffsynth_core.progress import SilentReporter
from diffsynth_core.stop import StopRequest
from diffsynth_core.training.encode import fill_cache
from diffsynth_core.training.loader import iterate_micro_batches
from diffsynth_core.training.loop import train
from diffsynth_core.training.setup import make_accelerator

pytestmark = [  # PyTorch hides the first, if it may be shown; the second is about its own code, the third about rotations
    pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]
LAST = 8


@pytest.fixture
def plan(tiny_models: Path, photographs: Path, tmp_path: Path, monkeypatch) -> Callable[..., RunPlan]:
    """Plan a run on the photographs in a folder of this name."""
    monkeypatch.chdir(tmp_path)

    def plan(folder: str, **flags: object) -> RunPlan:
        given = {"recipe": "qwen-image-lora", "dataset_base_path": str(photographs), "lora_rank": 4, "device": "cpu",
                 "dataset_num_workers": 0, "output_path": str(tmp_path / folder)}  # fmt: skip
        return make_plan(resolve(given | flags), SilentReporter(), base=tiny_models)

    return plan


def figures(folder: Path) -> torch.Tensor:
    """Loss and gradient norm of each step, `[steps, 2]`."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([(line["loss"], line["grad_norm"]) for line in lines])


@pytest.mark.long
def test_compiled_blocks_train_to_the_same_end(plan, photographs, tmp_path):
    """With the compiler of users; relative tolerance 1e-4, the rounding of 8 updates at a high rate."""
    one = tmp_path / "one.csv"
    one.write_text("\n".join((photographs / "metadata.csv").read_text().splitlines()[:2]) + "\n")
    for name, compile in (("plain", False), ("compiled", True)):
        flags = {
            "max_steps": LAST,
            "dataset_repeat": LAST,
            "num_epochs": LAST,
            "learning_rate": 0.01,
            "compile": compile,
        }
        train(plan(name, **flags, dataset_metadata_path=str(one)), SilentReporter(), StopRequest())
    plain, compiled = figures(tmp_path / "plain"), figures(tmp_path / "compiled")
    assert len(plain) == LAST
    torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=0)


def shapes_of(plan: RunPlan, family: Family) -> set[object]:
    """Shapes of the batches of an epoch."""
    plan = with_encodings(plan, SilentReporter())
    fill_cache(plan, family, make_accelerator(plan), SilentReporter(), StopRequest())
    batches, found = iterate_micro_batches(plan, 0), set()
    for _ in range(plan.data.steps.batches.batches_per_epoch):
        batch = family.collate(next(batches).encoded)
        found.add(tuple((name, tensor.shape) for name, tensor in sorted(batch.items())))
    return found


@pytest.mark.parametrize("batch_size", [1, 3])
def test_shapes_are_counted(plan, batch_size):
    made = plan("unused", batch_size=batch_size, dataset_repeat=4, max_pixels=32 * 64)
    count, counted = count_batch_shapes(made)
    found = shapes_of(made, load_family("qwen-image"))
    assert counted and 1 < len(found) <= count
    assert batch_size > 1 or len(found) == count
