"""Two processes compute one clip together: each a part of its tokens."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from diffsynth_core.data.videos import load_clip
from tests.clips import detailed, write_clip
from tests.covering import long_ones
from tests.runs.engines import COMMON, ENGINES, RECIPES, TASKS, TwoProcesses, difference, noise_of, train_here
from tests.runs.test_processes import end_of, launch, launch_all

Case = tuple[str, str, tuple[str, ...]]
"""Recipe without its task, task, and further flags."""

TOGETHER = ("--context_parallel", "2")
ACCUMULATING = ("--gradient_accumulation_steps", "4")
SIZE = ("--height", "32", "--width", "64", "--num_frames", "9")
"""Twelve tokens of three latent frames; of TI2V, whose VAE is coarser, six."""
T2V, I2V, TI2V = RECIPES["wan"], "wan2.1-i2v-14b-480p", "wan2.2-ti2v-5b"
DIT = "Wan-AI/Wan2.1-T2V-1.3B:diffusion_pytorch_model*.safetensors"
# Of TI2V some gradients are near zero: see `TASKS`.
LARGE_EPS = ("--optimizer_args", "eps=1e-3")
WATCHED = (
    *("--validation_split", "0.4", "--validate_every", "1"),
    *("--preview_prompts", "dataset", "--preview_every", "2", "--preview_steps", "2"),
)
CASES: dict[str, Case] = {
    "LoRA": (T2V, "lora", ()),
    "full": (T2V, "full", ()),
    "frames shown to CLIP": (I2V, "lora", ()),
    "a timestep for each token": (TI2V, "lora", LARGE_EPS),
    "text encoder and LoRA": (
        T2V,
        "full",
        (
            *("--trainable_models", "text_encoder", "--lora_base_model", "dit", "--lora_rank", "3"),
            *("--lora_target_modules", "q,k,v"),
        ),
    ),
    "distillation": (T2V, "lora", ("--task", "direct_distill", "--dataset_metadata_path", "{clips}/distilled.csv")),
    "a block in host memory": (T2V, "lora", ("--blocks_to_swap", "1")),
    "two samples": (T2V, "lora", ("--batch_size", "2")),
    "no checkpointing": (T2V, "full", ("--no-use_gradient_checkpointing",)),
    "nested checkpoints": (T2V, "lora", ("--checkpointing", "nested")),
    "every second block kept": (T2V, "lora", ("--checkpointing", "keep_every_2")),
    "8-bit floats": (T2V, "lora", ("--fp8_models", DIT)),
    "nf4": (T2V, "lora", ("--quant_options", f"{DIT}:nf4")),
    "watched": (T2V, "lora", WATCHED),
    "averages": (T2V, "full", ("--ema_decay", "0.5")),
    "clipped": (T2V, "full", ("--max_grad_norm", "0.01")),
}


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    for number in range(3):
        write_clip(folder / f"{number}.mov", detailed(9 + 3 * number, 32, 64)[3 * number :])
    rows = [f"{number}.mov,clip {number}" for number in range(3)]
    (folder / "metadata.csv").write_text("\n".join(["video,prompt", *rows]))
    sampled = [f"{row},{seed},cpu,2,1" for seed, row in enumerate(rows)]
    columns = "video,prompt,seed,rand_device,num_inference_steps,cfg_scale"
    (folder / "distilled.csv").write_text("\n".join([columns, *sampled]))
    return folder


@dataclass
class Place:
    """Where the cases train."""

    models_of: Callable[..., Path]
    clips: Path
    folder: Path
    two_processes: TwoProcesses
    alone: dict[Case, Path] = field(default_factory=dict)

    def models(self, case: Case) -> Path:
        return self.models_of(f"{case[0]}-{case[1]}")

    def flags(self, case: Case) -> tuple[str, ...]:
        recipe, task, more = case
        dataset = ("--dataset_base_path", str(self.clips), *SIZE)
        more = tuple(flag.replace("{clips}", str(self.clips)) for flag in more)
        return ("--recipe", f"{recipe}-{task}", *COMMON, *dataset, *TASKS[task], *more)

    def output(self) -> Path:
        """A folder that does not exist."""
        return self.folder / f"out-{len(list(self.folder.iterdir()))}"

    def train_alone(self, case: Case, output: Path) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(self.models(case)))
            train_here({output: (*self.flags(case), *ACCUMULATING)})
        return output

    def train_together(self, case: Case, engine: str = "ddp") -> Path:
        output = self.output()
        flags = (*self.flags(case), *ACCUMULATING, *TOGETHER)
        self.two_processes.train(engine, {output: flags}, self.models(case))
        return output

    def reference(self, case: Case) -> Path:
        """The folder of a case in one process, which trains it once."""
        if case not in self.alone:
            self.alone[case] = self.train_alone(case, self.output())
        return self.alone[case]


@pytest.fixture(scope="module")
def place(recipe_models, clips, two_processes, tmp_path_factory) -> Place:
    return Place(recipe_models, clips, tmp_path_factory.mktemp("together"), two_processes)


QUICK = {"LoRA", "a timestep for each token"}
"""Cases that run in every run of the tests."""


@pytest.mark.parametrize("case", long_ones(CASES, long=CASES.keys() - QUICK))
def test_two_processes_compute_a_clip_as_one_does(place, case):
    alone, together = place.reference(CASES[case]), place.train_together(CASES[case])
    losses, weights = difference(alone, together)
    print(f"{case}: losses off by {losses:.1e}, weights by {weights:.1e}")
    assert losses < 1e-5 and weights < 1e-5
    if case == "watched":
        check_watched(alone, together)


def check_watched(alone: Path, together: Path) -> None:
    """Check that a run has validated and drawn what another one has."""
    losses = [
        [json.loads(line)["validation_loss"] for line in (output / "validation.jsonl").read_text().splitlines()]
        for output in (alone, together)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    drawn = {path.relative_to(alone) for path in alone.glob("samples/*/*.mp4")}
    assert drawn and drawn <= {path.relative_to(together) for path in together.glob("samples/*/*.mp4")}
    for path in drawn:
        frames = [load_clip(output / path, 0, 9, 32, 64, None).astype(int) for output in (alone, together)]
        assert np.abs(frames[0] - frames[1]).mean() < 1, "of 256 levels: a last bit may change what is compressed"


@pytest.mark.parametrize("engine", long_ones(list(ENGINES)[1:], long=ENGINES.keys() - {"fsdp2", "zero3"}))
@pytest.mark.parametrize("case", long_ones(("LoRA", "full"), long=("LoRA",)))
def test_every_engine_sums_the_gradients_of_a_clip(place, case, engine):
    losses, weights = difference(place.reference(CASES[case]), place.train_together(CASES[case], engine))
    print(f"{case}, {engine}: losses off by {losses:.1e}, weights by {weights:.1e}")
    assert losses < 1e-5 and weights < 1e-5


BF16 = ("--mixed_precision", "bf16")
IN_BF16: dict[str, Case] = {
    "LoRA": (T2V, "lora", (*BF16, *LARGE_EPS)),
    "full": (T2V, "full", BF16),
    "full in bf16": (T2V, "full", (*BF16, "--trained_dtype", "bf16")),
}


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")  # of autocast on a CPU
@pytest.mark.parametrize("case", IN_BF16)
def test_in_bf16_they_differ_no_more_than_one_does_in_another_order(place, case):
    reference = place.reference(IN_BF16[case])
    losses, weights = difference(reference, place.train_together(IN_BF16[case]))
    of_losses, of_weights = noise_of(reference, lambda: place.train_alone(IN_BF16[case], place.output()))
    print(f"{case}: losses {losses:.1e} ({of_losses:.1e}), weights {weights:.1e} ({of_weights:.1e})")
    assert losses <= 2 * of_losses and weights <= 2 * of_weights


@pytest.mark.long
def test_two_pairs_of_processes_begin_what_one_process_ends(place, tmp_path):
    recipe, task, more = CASES["watched"]
    case: Case = (recipe, task, (*more, "--dataset_repeat", "8", "--save_steps", "3"))
    alone, pairs = place.reference(case), place.output()
    four = ("--num_processes", "4", *TOGETHER, "--gradient_accumulation_steps", "2", "--max_steps", "3")
    flags = [*place.flags(case), *four, "--output_path", str(pairs)]
    launch_all(flags, place.models(case), tmp_path)
    assert len((pairs / "metrics.jsonl").read_text().splitlines()) == 3
    place.train_alone((recipe, task, (*case[2], "--resume", "auto")), pairs)
    losses, weights = difference(alone, pairs)
    print(f"two pairs, then one process: losses off by {losses:.1e}, weights by {weights:.1e}")
    assert losses < 1e-5 and weights < 1e-5
    check_watched(alone, pairs)


FULL_IN_RANK_1 = """
import os

if os.environ.get("RANK") == "1":
    import torch
    from diffsynth_core.training.model import TrainingModule

    def full(self, inputs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    TrainingModule.forward = full
"""


@pytest.mark.long
@pytest.mark.parametrize("more", [TOGETHER, ("--accelerate_config", "fsdp2")], ids=["together", "fsdp2"])
def test_a_process_without_memory_ends_the_one_that_waits_in_the_same_pass(place, tmp_path, monkeypatch, more):
    (tmp_path / "sitecustomize.py").write_text(FULL_IN_RANK_1)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    case = CASES["LoRA"]
    flags = [*place.flags(case), "--num_processes", "2", *more, "--output_path", str(tmp_path / "out")]
    code, _, errors = end_of(launch(flags, place.models(case), tmp_path))
    assert code == 1, errors
    assert errors.count("error: ") == 1 and "has not enough memory for the largest micro-batch" in errors, errors
