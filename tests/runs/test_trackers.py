"""Trackers get what `metrics.jsonl` records, as one curve however often a run is killed, and never end a run.

TensorBoard's files are read back by its own reader. Weights & Biases, trackio and SwanLab are not installed for tests:
their place is taken by stubs of the part of their interface that accelerate's trackers and ours call.
"""

import csv
import io
import json
import shutil
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from diffsynth_core.checkpoints.run_folder import PreviewImage, PreviewList
from diffsynth_core.training.observers import trackers
from tests.killing import ForkedRun, steps_done

SMALL = ("--recipe", "qwen-image-lora", "--dataset_num_workers", "0", "--lora_rank", "2", "--device", "cpu",
         "--dataset_repeat", "10", "--save_state_steps", "2", "--keep_states", "9", "--resume", "auto",
         "--output_path", "out")  # fmt: skip


@pytest.fixture
def train(cli, photographs) -> Callable[..., str]:
    def run(*flags: object) -> str:
        outcome = cli("train", *SMALL, "--dataset_base_path", photographs, *flags)
        assert outcome.code == 0, outcome.err
        return " ".join(outcome.err.split())

    return run


def metrics(folder: Path = Path("out")) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def curve_of_csv(folder: Path, key: str) -> list[tuple[int, float]]:
    with (folder / "loss.csv").open(newline="") as stream:
        return [(int(row["step"]), float(row["value"])) for row in csv.DictReader(stream) if row["key"] == key]


def curve_of_tensorboard(folder: Path, key: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard_log"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(key)]


def test_a_killed_run_goes_on_as_one_curve(train, photographs, tiny_models):
    """In the csv and in TensorBoard; with the names in them that `metrics.jsonl` has."""
    flags = ("--enable_csv_log", "--enable_tensorboard_log")
    words = [*SMALL, "--dataset_base_path", str(photographs), *flags]
    train("--max_steps", 1, "--output_path", "first")  # imports what the fork would
    with ForkedRun([*words, "--max_steps", "40"], tiny_models, Path.cwd()) as run:
        assert run.wait_until(lambda: steps_done(Path("out")) >= 5), run.stderr()
        run.process.kill()
        run.process.wait()
    killed = steps_done(Path("out"))
    shutil.rmtree(newest := max(Path("out/state").glob("step-*"), key=lambda path: int(path.name[5:])))
    first = int(newest.name[5:]) - 2
    assert 0 < first < killed - 1
    train(*flags, "--max_steps", killed + 1)
    lines = metrics()
    assert [line["step"] for line in lines] == [*range(1, killed + 2)]
    for key in ("loss", "lr", "grad_norm", "seconds", "samples_seen"):
        expected = [(line["step"], pytest.approx(line[key], rel=1e-6)) for line in lines]
        assert curve_of_csv(Path("out"), key) == expected, key
        assert curve_of_tensorboard(Path("out"), key) == expected, key


def test_previews_are_images_of_tensorboard(train):
    train("--max_steps", 2, "--enable_tensorboard_log", "--preview_prompts", "a cat", "--preview_steps", 1,
          "--preview_every", 2)  # fmt: skip
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator("out/tensorboard_log", size_guidance={"images": 0})
    events.Reload()
    sent = events.Images("preview_0001")
    assert [(event.step, event.width, event.height) for event in sent] == [(0, 64, 64), (2, 64, 64)]
    shown = Image.open(io.BytesIO(sent[1].encoded_image_string))
    assert np.array_equal(np.asarray(shown), np.asarray(Image.open("out/samples/step-2/0001.png")))


class Service:
    """Stands for the module of a service: a run is opened with `init`, and then gets values."""

    def __init__(self, name: str) -> None:
        self.opened: list[dict[str, Any]] = []
        self.logged: list[tuple[int, float]] = []
        self.configured: list[dict[str, Any]] = []
        self.finished = 0
        self.module = ModuleType(name)
        self.module.__spec__ = ModuleSpec(name, None)
        config = SimpleNamespace(update=lambda values, allow_val_change: self.configured.append(values))
        if name == "swanlab":
            config = type(
                "Config", (dict,), {"update": lambda _, values, allow_val_change: self.configured.append(values)}
            )()
        vars(self.module).update(init=self.init, config=config, Settings=dict, login=lambda prompt: prompt)

    def init(self, **arguments: Any) -> "Service":
        self.opened.append(arguments)
        return self

    def log(self, values: dict[str, Any], step: int) -> None:
        self.logged.append((step, values["loss"]))

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def service(monkeypatch) -> Callable[[str], Service]:
    """Put a stub in the place of the package of a tracker."""

    def put(name: str) -> Service:
        stub = Service(name)
        monkeypatch.setitem(sys.modules, name, stub.module)
        for variable in ("MODE", "PROJECT"):
            monkeypatch.delenv(f"{name.upper()}_{variable}", raising=False)
        return stub

    return put


SERVICES = {
    "wandb": ("--enable_wandb_log", "--wandb_project", "mine"),
    "swanlab": ("--enable_swanlab_log", "--swanlab_project", "mine"),
    "trackio": ("--log_with", "trackio", "--trackio_project", "mine"),
}


@pytest.mark.parametrize("name", SERVICES)
def test_the_calls_of_a_service(train, service, name):
    """A run that resumes before steps that were sent does not send them again, nor its parameters."""
    stub = service(name)
    train("--max_steps", 3, *SERVICES[name])
    shutil.rmtree("out/state/step-3")
    train("--max_steps", 5, *SERVICES[name])
    assert stub.logged == [(line["step"], line["loss"]) for line in metrics()]
    assert [step for step, _ in stub.logged] == [1, 2, 3, 4, 5] and stub.finished == 2
    first, again = stub.opened
    assert (first["project"], first["resume"]) == ("mine", "allow")
    same = "name" if name == "trackio" else "id"
    assert first[same] == again[same] and json.loads(Path("out/run.json").read_text())["id"][:8] in first[same]
    (parameters,) = stub.configured
    assert (parameters["lora_rank"], parameters["data_file_keys"]) == (2, "image,video")
    if name == "wandb":  # a run does not wait for a key at the terminal
        assert first["mode"] == "offline"
        assert Path(first["dir"]) == Path("out/wandb_log") and Path(first["dir"]).is_dir()


def test_a_project_of_the_environment(train, service, monkeypatch):
    stub = service("trackio")
    monkeypatch.setenv("TRACKIO_PROJECT", "theirs")
    train("--max_steps", 1, "--log_with", "trackio")
    assert stub.opened[0]["project"] == "theirs"


class Failing:
    """A tracker that fails in one of its methods."""

    def __init__(self, where: str) -> None:
        self.where, self.calls = where, []

    def __getattr__(self, name: str) -> Callable[..., None]:
        def call(*arguments: object, **named: object) -> None:
            self.calls.append(name)
            if name == self.where:
                raise ConnectionError("the service is away")

        return call


@pytest.mark.parametrize(
    ("where", "told", "calls"),
    [
        ("start", "`trackio` does not start", ["start"]),
        ("log", "`trackio` has failed at step 1", ["start", "store_init_configuration", "log"]),
        ("finish", "`trackio` has not finished", ["start", "store_init_configuration", "log", "log", "finish"]),
    ],
)
def test_a_tracker_that_fails_is_told_once_and_ends_no_run(train, service, monkeypatch, where, told, calls):
    service("trackio")
    failing = Failing(where)
    monkeypatch.setitem(trackers.BUILDERS, "trackio", lambda run: failing)
    said = train("--max_steps", 2, "--log_with", "trackio,csv")
    assert (
        said.count("the service is away") == 1 and f"the tracker {told}: the service is away; the run continues" in said
    )
    assert failing.calls == calls
    assert curve_of_csv(Path("out"), "loss") == [(line["step"], line["loss"]) for line in metrics()]
    assert len(metrics()) == 2


def test_a_preview_that_cannot_be_read_ends_no_run(tmp_path, monkeypatch):
    told, tracker = [], Failing("nowhere")
    monkeypatch.setitem(trackers.BUILDERS, "tensorboard", lambda run: tracker)
    PreviewList(2, (PreviewImage("0001.png", "a cat", 0, 64, 64, 1),)).save(tmp_path)
    (tmp_path / "0001.png").write_text("truncated")
    run = trackers.TrackedRun(tmp_path, "a", 0, {})
    observer = trackers.TrackerObserver("tensorboard", run, None, SimpleNamespace(warn=told.append))
    observer.on_preview(tmp_path, 2)
    observer.on_preview(tmp_path, 4)
    (only,) = told
    assert only.startswith("the tracker `tensorboard` has failed at step 2: ")
    assert tracker.calls == ["start", "store_init_configuration"]


def test_offline_runs_of_wandb(train, monkeypatch):
    """With the package itself, where it is installed."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    train("--max_steps", 2, "--log_with", "wandb")
    (file,) = Path("out/wandb_log/wandb").glob("offline-run-*/run-*.wandb")
    assert file.stat().st_size > 0
