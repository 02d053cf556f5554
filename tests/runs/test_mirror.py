"""Runs with a mirror: from the mirror alone they continue to the bit, and one that fails never ends a run."""

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from safetensors.torch import load_file

from diffsynth_core.training.observers import background
from tests.killing import ForkedRun, steps_done

SMALL = ("--recipe", "qwen-image-lora", "--dataset_num_workers", "0", "--lora_rank", "2", "--device", "cpu",
         "--dataset_repeat", "10", "--save_steps", "2", "--keep_checkpoints", "2", "--resume", "auto",
         "--learning_rate", "0.01")  # fmt: skip


@pytest.fixture
def train(cli, photographs) -> Callable[..., str]:
    def run(*flags: object) -> str:
        outcome = cli("train", *SMALL, "--dataset_base_path", photographs, *flags)
        assert outcome.code == 0, outcome.err
        return " ".join(outcome.err.split())

    return run


class Failing(LocalFileSystem):
    """A folder that cannot be written while `away` is set, and blocks while `blocks` is."""

    protocol = "failing"
    away, blocks = False, threading.Event()

    @classmethod
    def _strip_protocol(cls, path):
        return LocalFileSystem._strip_protocol(str(path).removeprefix("failing://"))

    def _open(self, path, mode="rb", **kwargs):
        while "w" in mode and Failing.blocks.is_set():
            time.sleep(0.01)
        if "w" in mode and Failing.away:
            raise ConnectionError("the network\nis away")
        return super()._open(path, mode, **kwargs)


@pytest.fixture
def failing(tmp_path) -> Iterator[str]:
    """The URL of a mirror in the folder `copy` that fails on demand."""
    fsspec.register_implementation("failing", Failing, clobber=True)
    Failing.away = False
    yield f"failing://{tmp_path}/copy"
    Failing.blocks.clear()


def files_of(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths if path.name != "train.log"}


def test_a_mirror_holds_the_run_as_it_ended(train):
    train("--max_steps", 6, "--output_path", "out", "--mirror", "copy")
    assert files_of(Path("copy")) == files_of(Path("out"))
    assert json.loads(Path("copy/run.json").read_text())["status"] == "completed"
    assert sorted(path.name for path in Path("copy/state").iterdir()) == ["step-4", "step-6"]
    assert len(list(Path("copy").glob("*.safetensors"))) == 2


def test_a_machine_dies_and_the_run_continues_from_the_mirror_to_the_bit(train, photographs, tiny_models):
    train("--max_steps", 8, "--output_path", "through")
    words = [*SMALL, "--dataset_base_path", str(photographs), "--output_path", "out", "--mirror", "copy"]
    with ForkedRun([*words, "--max_steps", "40"], tiny_models, Path.cwd()) as run:
        arrived = Path("copy/state/step-2/state.json").exists
        assert run.wait_until(lambda: arrived() or steps_done(Path("out")) >= 7), run.stderr()
        run.process.kill()
        run.process.wait()
    states = sorted(int(path.parent.name[5:]) for path in Path("copy/state").glob("*/state.json"))
    assert states and states[-1] < 8
    shutil.rmtree("out")
    shutil.copytree("copy", "elsewhere")
    said = train("--max_steps", 8, "--output_path", "elsewhere", "--mirror", "copy")
    assert "resumed after step" in said
    one, other = (load_file(f"{folder}/step-8.safetensors") for folder in ("through", "elsewhere"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert files_of(Path("copy")) == files_of(Path("elsewhere"))


def test_an_outage_is_told_once_and_made_up_for(train, failing, monkeypatch):
    """The network is away from the third step to the fifth."""
    real = background.BackgroundObserver.on_step

    def on_step(observer, report):
        Failing.away = 3 <= report.step < 6
        while report.step in (4, 7) and not observer.wait(60):
            pass
        real(observer, report)

    monkeypatch.setattr(background.BackgroundObserver, "on_step", on_step)
    said = train("--max_steps", 8, "--output_path", "out", "--mirror", failing)
    assert said.count("the network is away; the run continues, and tries again with the next save") == 1
    assert said.count(f"Updated the mirror `{failing}` after an outage") == 1
    assert "lacks" not in said
    assert files_of(Path(failing.removeprefix("failing://"))) == files_of(Path("out"))


def test_a_mirror_that_stays_away_ends_no_run(train, failing, monkeypatch):
    monkeypatch.setattr(background.BackgroundObserver, "on_state", lambda *_: setattr(Failing, "away", True))
    said = train("--max_steps", 4, "--output_path", "out", "--mirror", failing)
    assert said.count("the network is away") == 1
    assert f"the mirror `{failing}` lacks what was saved last; copy `out` there" in said


def test_no_step_waits_and_the_end_waits_for_a_limited_time(train, failing, monkeypatch):
    monkeypatch.setattr(background, "WAIT_SECONDS", 1.5)
    monkeypatch.setattr(background.BackgroundObserver, "on_step", lambda *_: Failing.blocks.set())
    said = train("--max_steps", 4, "--output_path", "out", "--mirror", failing)
    assert f"Waiting for the mirror `{failing}`, at most 2 s" in said
    assert f"the mirror `{failing}` lacks what was saved last" in said
    assert json.loads(Path("out/run.json").read_text())["status"] == "completed"


def test_a_second_interrupt_waits_for_no_mirror(cli, photographs, failing, monkeypatch):
    def on_step(observer, report):
        if report.step == 3:
            Failing.blocks.set()
            raise KeyboardInterrupt

    monkeypatch.setattr(background, "WAIT_SECONDS", 5)
    monkeypatch.setattr(background.BackgroundObserver, "on_step", on_step)
    outcome = cli("train", *SMALL, "--dataset_base_path", photographs, "--output_path", "out", "--mirror", failing)
    assert outcome.code == 130
    assert "Waiting" not in outcome.err and "lacks what was saved last" in " ".join(outcome.err.split())


def test_the_mirror_of_a_folder_that_goes_away_keeps_everything(cli, photographs, monkeypatch):
    """The run saves its last state in a new folder, which is no reason to delete the rest."""
    there: dict[str, bytes] = {}

    def on_step(observer, report):
        while report.step == 3 and not observer.wait(60):
            pass
        if report.step == 3:
            there.update(files_of(Path("copy")))
            Path("out").rename("moved")

    monkeypatch.setattr(background.BackgroundObserver, "on_step", on_step)
    outcome = cli("train", *SMALL, "--dataset_base_path", photographs, "--output_path", "out", "--mirror", "copy")
    said = " ".join(outcome.err.split())
    assert outcome.code == 1 and "the mirror `copy` cannot be updated: `out` was removed or renamed" in said
    assert sorted(path.name for path in Path("out/state").iterdir()) == ["step-4"]
    assert "state/step-2/state.json" in there and files_of(Path("copy")) == there


def test_a_rehearsal_stays_in_its_folder(cli):
    outcome = cli("train", "--recipe", "qwen-image-lora", "--rehearse", "--mirror", "copy", "--max_steps", 2)
    assert outcome.code == 0, outcome.err
    assert "The rehearsal does not use `mirror`" in " ".join(outcome.err.split())
    assert "--mirror copy" in outcome.out
    assert not Path("copy").exists()
