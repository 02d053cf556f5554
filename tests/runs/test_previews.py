"""Images drawn while a run goes on: those that its checkpoints draw, and without an effect on training."""

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffsynth_core.checkpoints.run_folder import PreviewImage, PreviewList, read_previews
from diffsynth_core.config.resolve import resolve
from diffsynth_core.errors import Interrupted, OutOfTime
from diffsynth_core.generation.encoding import EncodedJob
from diffsynth_core.models.registry import load_family
from diffsynth_core.planning.plan import make_plan
from diffsynth_core.progress import SilentReporter
from diffsynth_core.stop import StopRequest
from diffsynth_core.training.loop import train as train_plan
from diffsynth_core.training.model import TrainingModule
from diffsynth_core.training.observers.observer import Observer, StepReport
from diffsynth_core.training.pace import Pace
from diffsynth_core.training.previews import encode_previews
from diffsynth_core.training.setup import make_accelerator

RUN = ("--recipe", "qwen-image-lora", "--dataset_num_workers", "0", "--lora_rank", "2", "--device", "cpu", "--seed", 5)
SHORT = ("--max_steps", 3, "--learning_rate", 0.05, "--save_steps", 2, "--dataset_repeat", 9)
DRAW = ("--preview_prompts", "a cat", "--preview_every", 1, "--preview_steps", 2)


@pytest.fixture
def train(train_into) -> Callable[..., Path]:
    """Train on the photographs, and return the folder of the run."""
    return lambda folder, *flags: train_into(folder, *RUN, *flags)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    record = json.loads((folder / "run.json").read_text())
    return load_file(folder / record["checkpoints"][-1]["file"])


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def files(folder: Path) -> dict[str, bytes]:
    """Path -> content of everything below `samples/`."""
    found = sorted((folder / "samples").rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in found if path.is_file()}


def assert_equal(given: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert given.keys() == expected.keys()
    assert all(torch.equal(tensor, given[name]) for name, tensor in expected.items())


def test_a_preview_is_what_the_checkpoint_draws(train, cli, tmp_path):
    """With the model's own guidance, from the noise of the run's seed."""
    (tmp_path / "prompts.csv").write_text("prompt,negative_prompt,seed\na cat,,\na rocket,a cat,7\n")
    folder = train("out", *SHORT, "--preview_prompts", tmp_path / "prompts.csv", "--preview_steps", 2)
    listed = read_previews(folder)
    assert list(listed) == [0, 2, 3], "before the first step, with each checkpoint, after the last"
    first, second = (
        PreviewImage("0001.png", "a cat", 5, 64, 64, 1),
        PreviewImage("0002.png", "a rocket", 7, 64, 64, 1),
    )
    assert listed[2] == PreviewList(2, (first, second))
    size = ("--height", 64, "--width", 64, "--steps", 2, "--seed", 5, "--device", "cpu", "--recipe", "qwen-image-lora")
    for step in (0, 2, 3):
        lora = ("--lora", folder / f"step-{step}.safetensors") if step else ()
        drawn = cli("generate", *size, *lora, "--prompts", tmp_path / "prompts.csv", "--out", f"drawn-{step}")
        assert drawn.code == 0, drawn.err
        for name in ("0001.png", "0002.png"):
            expected = pixels(Path(f"drawn-{step}") / name).astype(int)
            assert np.abs(pixels(folder / f"samples/step-{step}" / name) - expected).max() <= 1
    before, after = (pixels(folder / f"samples/step-{step}/0001.png") for step in (0, 3))
    assert (before != after).any(), "training has an effect"
    details = json.loads(Image.open(folder / "samples/step-2/0002.png").text["diffsynth"])
    assert (details["step"], details["prompt"], details["negative_prompt"]) == (2, "a rocket", "a cat")


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--blocks_to_swap", 1, "--use_gradient_checkpointing_offload", "--batch_size", 2),
        ("--recipe", "qwen-image-full", "--use_gradient_checkpointing", "--fused_backward", "--blocks_to_swap", 1),
    ],
    ids=["plain", "swapped", "trained swapped"],
)
def test_previews_change_no_weight_and_no_random_state(train, flags):
    states = []
    for name, draw in (("without", ()), ("with", DRAW)):
        torch.manual_seed(3)
        train(name, *SHORT, *flags, *draw)
        states.append(torch.random.get_rng_state())
    assert list(read_previews(Path("with"))) == [0, 1, 2, 3]
    assert torch.equal(*states)
    assert_equal(tensors(Path("with")), tensors(Path("without")))


def test_a_resumed_run_draws_what_is_missing(train):
    """Nothing twice, and again what comes after the state that it continues from."""
    flags = (*SHORT, *DRAW, "--save_state_steps", 1, "--keep_states", 9)
    through = train("through", *flags, "--max_steps", 4)
    folder = train("out", *flags)
    shutil.rmtree(folder / "state/step-3")
    kept = folder / "samples/step-2/0001.png"
    wrong = folder / "samples/step-3/0001.png"
    written = kept.stat().st_mtime_ns
    wrong.write_bytes(b"of another course")
    train("out", *flags, "--max_steps", 4, "--resume", "auto")
    assert kept.stat().st_mtime_ns == written
    assert files(folder) == files(through)


def test_the_first_captions_of_the_dataset_with_their_images(cli, photographs, recipe_models, tmp_path, monkeypatch):
    """At the most frequent size of the samples."""
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(recipe_models("qwen-image-edit-lora")))
    folder = Path(shutil.copytree(photographs, tmp_path / "edits"))
    Image.new("RGB", (96, 64), "teal").save(folder / "wide.png")
    rows = [f"{name}.png,edit {name},chelsea.png" for name in ("wide", "astronaut", "coffee")]
    (folder / "metadata.csv").write_text("\n".join(["image,prompt,edit_image", *rows]))
    flags = ("--recipe", "qwen-image-edit-lora", "--device", "cpu", "--dataset_base_path", folder, "--max_steps", 1)
    trained = cli("train", *flags, "--output_path", "out", "--preview_prompts", "dataset", "--preview_steps", 1)
    assert trained.code == 0, trained.err
    images = read_previews(Path("out"))[1].images
    assert [(one.prompt, one.height, one.width) for one in images] == [
        (f"edit {name}", 64, 64) for name in ("wide", "astronaut", "coffee")
    ]


class Follower(Observer):
    """Asks the run to stop when the previews of a step are drawn."""

    def __init__(self, stop: StopRequest, step: int) -> None:
        self.seen: list[tuple[str, int]] = []
        self._stop, self._step = stop, step

    def on_preview(self, folder: Path, step: int) -> None:
        self.seen.append((folder.name, step))
        if step == self._step:
            self._stop.signal_number = 15


def planned(photographs: Path, world_size: int = 1, **flags: Any) -> Any:
    values = {"recipe": "qwen-image-lora", "dataset_base_path": photographs, "device": "cpu", "dataset_num_workers": 0}
    values |= {"max_steps": 3, "preview_prompts": "a cat", "preview_every": 1, "preview_steps": 1, "output_path": "out"}
    return make_plan(resolve(values | flags), SilentReporter(), world_size)


def test_a_run_that_is_to_stop_draws_when_it_is_resumed(cli, photographs):
    stop = StopRequest()
    follower = Follower(stop, 1)
    with pytest.raises(Interrupted):
        train_plan(planned(photographs), SilentReporter(), stop, observers=[follower])
    assert follower.seen == [("step-0", 0), ("step-1", 1)], "none of step 2, before which it was asked to stop"
    follower = Follower(StopRequest(), 9)
    train_plan(planned(photographs, resume="auto"), SilentReporter(), StopRequest(), observers=[follower])
    assert [step for _, step in follower.seen] == [2, 3]


def test_a_run_that_is_to_stop_in_its_last_step_is_complete_without_its_last_previews(cli, photographs):
    stop = StopRequest()
    follower = Follower(stop, 1)
    ended = train_plan(planned(photographs, max_steps=2), SilentReporter(), stop, observers=[follower])
    assert (ended.record.status, [step for _, step in follower.seen]) == ("completed", [0, 1])


def test_previews_after_the_last_step_are_drawn_though_time_allows_no_other_step(cli, photographs, monkeypatch):
    monkeypatch.setattr(Pace, "allows_another", lambda *_: False)
    stop, follower = StopRequest(), Follower(StopRequest(), 9)
    stop.limit_time(600)
    ended = train_plan(planned(photographs, max_steps=1), SilentReporter(), stop, observers=[follower])
    assert (ended.record.status, [step for _, step in follower.seen]) == ("completed", [0, 1])


class LimitAfter(Observer):
    """Leaves so little time after a step."""

    def __init__(self, stop: StopRequest, step: int, seconds: float) -> None:
        self._stop, self._step, self._seconds = stop, step, seconds

    def on_step(self, report: StepReport) -> None:
        if report.step == self._step:
            self._stop.limit_time(self._seconds)


def test_the_first_drawing_of_a_resumed_run_leaves_time_for_a_save(cli, photographs):
    """Nothing was drawn before that would say how long it takes: with these steps, far longer than the time left."""
    train_plan(planned(photographs, max_steps=1), SilentReporter(), StopRequest())
    stop, follower = StopRequest(), Follower(StopRequest(), 9)
    plan = planned(photographs, max_steps=5, preview_steps=1000, resume="auto")
    with pytest.raises(OutOfTime, match="after step 3 of 5"):
        train_plan(plan, SilentReporter(), stop, observers=[follower, LimitAfter(stop, 2, seconds=5)])
    assert not follower.seen, "it was not drawn to the end"


def two_processes(rank: int, folder: Path, photographs: Path, models: Path, port: int) -> None:
    """One of two processes: another is asked to stop while it encodes, and this one cannot read what it draws."""
    rendezvous = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in rendezvous.items()}
    os.environ |= {"ACCELERATE_USE_CPU": "true", "DIFFSYNTH_MODEL_BASE_PATH": str(models)}
    os.chdir(folder)
    plan = planned(photographs, world_size=2, max_steps=1, cache_path="cache")
    stop, reporter = StopRequest(), Warned()
    stop.signal_number = None if rank else 15
    with pytest.raises(Interrupted):
        encode_previews(plan, load_family(plan.model.facts.name), make_accelerator(plan), reporter, stop)
    if rank:
        EncodedJob.read = None  # type: ignore[assignment, method-assign]
    ended = train_plan(plan, reporter, StopRequest())
    assert (ended.record.status, rank or [text for text in reporter.warnings if "previews" in text]) == (
        "completed",
        rank or ["no previews after step 0: another process cannot begin to draw; the run continues without previews"],
    )
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_processes_are_interrupted_and_give_up_together(tmp_path, photographs, tiny_models):
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    torch.multiprocessing.spawn(two_processes, (tmp_path, photographs, tiny_models, port), nprocs=2)


class Warned(SilentReporter):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, message: str) -> None:
        self.warnings.append(message)


def test_a_disk_that_refuses_ends_the_previews_and_not_the_run(cli, photographs):
    Path("out").mkdir()
    Path("out/samples").write_text("in the way")
    reporter = Warned()
    train_plan(planned(photographs), reporter, StopRequest())
    (warning,) = (text for text in reporter.warnings if "preview" in text)
    assert "step 0" in warning and "samples" in warning and "continues" in warning
    assert json.loads(Path("out/run.json").read_text())["status"] == "completed"


def test_what_is_not_a_number_is_not_drawn(cli, photographs, monkeypatch):
    """It is a fact about the model: the next step may draw again."""
    monkeypatch.setattr(TrainingModule, "_velocities", lambda self, step: torch.full_like(step.noisy, torch.nan)[None])
    reporter = Warned()
    train_plan(planned(photographs, max_steps=1, preview_prompts="a cat"), reporter, StopRequest())
    assert [read.images for read in read_previews(Path("out")).values()] == [(), ()]
    assert [text for text in reporter.warnings if "NaN" in text and "preview 1" in text and "dit" in text]


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero3"])
def test_processes_draw_together_what_one_does(train, train_in_two, tmp_path, engine):
    """Of three previews, the second process draws one and a stand-in that does not count."""
    (tmp_path / "prompts.txt").write_text("a cat\na rocket on its launch pad\na cup\n")
    draw = ("--preview_prompts", tmp_path / "prompts.txt", *DRAW[2:])
    flags = (*RUN, "--max_steps", 2, "--learning_rate", 0.01)
    without = train_in_two("without", *flags, engine=engine)
    folder = train_in_two("with", *flags, *draw, engine=engine)
    assert_equal(tensors(folder), tensors(without))
    one = train("one", "--gradient_accumulation_steps", 2, "--max_steps", 2, "--learning_rate", 0.01, *draw)
    assert read_previews(folder) == read_previews(one) and len(read_previews(one)) == 3
    for path in sorted(one.glob("samples/step-*/*.png")):
        expected = pixels(path).astype(int)
        assert np.abs(pixels(folder / path.relative_to(one)) - expected).max() <= 1
