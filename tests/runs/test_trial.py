"""The trial before the first step: it changes nothing, and what does not fit in memory is told at once."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from diffsynth_core.config.resolve import resolve
from diffsynth_core.planning.plan import make_plan
from diffsynth_core.progress import SilentReporter
from diffsynth_core.stop import StopRequest
from diffsynth_core.training import loop
from diffsynth_core.training.engines.replicated import ReplicatedEngine
from diffsynth_core.training.loader import MicroBatch
from diffsynth_core.training.model import TrainingModule
from diffsynth_core.training.trial import is_out_of_memory
from tests.shapes.datasets import scene_rows, write_dataset
from tests.shapes.scenes import draw_scenes
from tests.shapes.untrained import FILES, MODEL_ID

SWAPPED = {"use_gradient_checkpointing": True, "fused_backward": True, "blocks_to_swap": 1}
KINDS = {
    "lora": {"recipe": "qwen-image-lora", "lora_rank": 4, "gradient_accumulation_steps": 2},
    "full, fused, swapped": {"recipe": "qwen-image-full", **SWAPPED},
}
LAST = 3
SHAPES = Path(__file__).parents[2] / "recipes/models" / MODEL_ID


@pytest.fixture
def run(tiny_models: Path, dataset: Path, tmp_path: Path) -> Callable[..., Path]:
    """Train in a folder of this name, and return the folder."""

    def run(folder: str, **flags: object) -> Path:
        given = {"dataset_base_path": str(dataset), "max_steps": LAST, "dataset_repeat": 4, "num_epochs": 1,
                 "device": "cpu", "dataset_num_workers": 0, "save_steps": LAST, "learning_rate": 0.01,
                 "output_path": str(tmp_path / folder)}  # fmt: skip
        plan = make_plan(resolve(given | flags), SilentReporter(), base=tiny_models)
        return loop.train(plan, SilentReporter(), StopRequest()).folder

    return run


def files(folder: Path) -> list[bytes]:
    """The checkpoint, weights and optimizer of the last step."""
    state = folder / f"state/step-{LAST}"
    names = (folder / f"step-{LAST}.safetensors", state / "trained.safetensors", state / "optimizer.safetensors")
    return [path.read_bytes() for path in names]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_with_a_trial_is_the_run_without_to_the_bit(run, monkeypatch, kind):
    """Also where it resumes, with a trial of its own."""
    run("tried", **KINDS[kind], max_steps=1)
    tried = run("tried", **KINDS[kind], resume="auto")
    monkeypatch.setattr(loop, "try_largest", lambda *_: None)
    assert files(tried) == files(run("untried", **KINDS[kind]))


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[tuple[MicroBatch, int]]:
    """What was tried out, and the bytes reserved beside it."""
    found: list[tuple[MicroBatch, int]] = []
    real = ReplicatedEngine.try_out

    def kept(self: ReplicatedEngine, micro_batch: MicroBatch, reserved: int) -> torch.Tensor:
        found.append((micro_batch, reserved))
        losses = real(self, micro_batch, reserved)
        assert all(parameter.grad is None for parameter in self._trained.values())
        return losses

    monkeypatch.setattr(ReplicatedEngine, "try_out", kept)
    return found


def test_the_largest_micro_batch_of_the_steps_to_come_is_tried(run, dataset, tried):
    """With room for the state of the optimizer, which a resumed run has already: two moments of each weight."""
    row = 3
    Image.open(dataset / "coffee.png").resize((96, 96)).save(dataset / "coffee.png")
    given = {**KINDS["lora"], "batch_size": 2, "max_steps": 2, "gradient_accumulation_steps": 4, "num_epochs": 2}
    run("out", **given)
    run("out", **given | {"max_steps": 4}, resume="auto")
    for micro_batch, _ in tried:
        assert [ref.sample for ref in micro_batch.refs] == [row - 1] * 2
        assert len({ref.repeat for ref in micro_batch.refs}) == 2
    (first, again) = (reserved for _, reserved in tried)
    assert again == 0 < first


def test_a_micro_batch_that_does_not_fit_is_told_with_what_takes_less(cli, photographs, monkeypatch):
    """And leaves no folder behind, so that the command may be given again with a flag."""

    def full(self: TrainingModule, micro_batch: MicroBatch) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(TrainingModule, "forward", full)
    outcome = cli(
        "train", "--recipe", "qwen-image-full", "--dataset_base_path", photographs, "--output_path", "out", "--batch_size", 2
    )  # fmt: skip
    assert outcome.code == 1 and not list(Path().iterdir())
    told = outcome.err[outcome.err.index("error: ") :].replace(f"{photographs}/", "").splitlines()
    assert told == [
        "error: `cpu` has not enough memory for the largest micro-batch, tried out before step 1: 2 samples of 64 x 64, "
        "row 3 `coffee.png`, row 1 `astronaut.png`; a step was estimated at 2.0 MiB",
        "  hint: pass `--fused_backward` (then 1.8 MiB), `--enable_optimizer_cpu_offload` (then 1.4 MiB), "
        "`--trained_dtype bf16` (then 1.6 MiB), `--optimizer adamw8bit` (then 1.7 MiB), "
        "or `--fit` with a `--gpu_memory` below what was not enough, which finds all that it takes",
    ]


LIMITED = """
import resource, sys
from diffsynth_cli.main import main
from diffsynth_core.training.engines.replicated import ReplicatedEngine

try_out = ReplicatedEngine.try_out

def limited(self, *given):
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**24, hard))
    try:
        return try_out(self, *given)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))

ReplicatedEngine.try_out = limited
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="limits the memory of a process as Linux does")
def test_a_process_that_gets_no_more_memory_says_so(tiny_models, dataset, tmp_path):
    Image.open(dataset / "coffee.png").resize((512, 512)).save(dataset / "coffee.png")
    command = (
        "train",
        "--recipe",
        "qwen-image-full",
        "--dataset_base_path",
        dataset,
        "--output_path",
        tmp_path / "out",
    )
    # glibc: give the memory of each freed tensor back, so that none of what the encoders had is left for the passes.
    given_back = {"MALLOC_MMAP_THRESHOLD_": "65536"}
    environment = {**os.environ, **given_back, "DIFFSYNTH_MODEL_BASE_PATH": str(tiny_models), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", LIMITED, *map(str, command), "--batch_size", "16", "--dataset_num_workers", "0"],
        env=environment, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 1, ended.stderr
    assert "`cpu` has not enough memory for the largest micro-batch, tried out before step 1: 16 samples of 512 x 512" in ended.stderr  # fmt: skip
    assert "Traceback" not in ended.stderr


def test_other_errors_are_not_taken_for_full_memory():
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert is_out_of_memory(MemoryError())
    with pytest.raises(RuntimeError) as caught:
        torch.ones(2) @ torch.ones(3)
    assert not is_out_of_memory(caught.value)
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**62, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


class _Warnings(SilentReporter):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, message: str) -> None:
        self.warnings.append(message)


@pytest.mark.parametrize("shuffled", [False, True], ids=["as trained", "shuffled"])
def test_a_model_that_predicts_no_better_than_zero_is_told(tmp_path, shuffled):
    """The model that draws shapes, and the same with the numbers of each weight shuffled; no longer when it resumes."""
    base, scenes = tmp_path / "models", tmp_path / "scenes"
    shutil.copytree(SHAPES, base / "mine/shapes")
    if shuffled:
        file, generator = base / "mine/shapes" / FILES["dit"], torch.Generator().manual_seed(0)
        weights = load_file(file)
        save_file({name: _shuffle(weight, generator) for name, weight in weights.items()}, file)
    write_dataset(scenes, scene_rows(draw_scenes(8, seed=0)))
    given = {"recipe": "shapes-lora", "dataset_base_path": str(scenes), "device": "cpu", "dataset_num_workers": 0,
             "model_id_with_origin_paths": [f"mine/shapes:{file}" for file in FILES.values()],
             "batch_size": 8, "output_path": str(tmp_path / "out")}  # fmt: skip
    reporter = _Warnings()
    for more in ({"max_steps": 1}, {"max_steps": 2, "resume": "auto"}):
        loop.train(make_plan(resolve(given | more), SilentReporter(), base=base), reporter, StopRequest())
    told = [warning for warning in reporter.warnings if "of predicting zero" in warning]
    assert len(told) == shuffled


def _shuffle(weight: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return weight.flatten()[torch.randperm(weight.numel(), generator=generator)].view(weight.shape)
