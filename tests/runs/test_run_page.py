"""A run writes its page, which changes nothing in training."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffsynth_core.checkpoints.run_folder import PAGE, RECORD
from diffsynth_core.training import loop
from diffsynth_core.training.observers import every_run
from diffsynth_core.training.observers.observer import Observer
from tests.naming import names

RUN = ("--recipe", "qwen-image-lora", "--dataset_num_workers", "0", "--lora_rank", "2", "--device", "cpu",
       "--validation_split", "0.25", "--max_steps", "6", "--save_steps", "3", "--dataset_repeat", "10")  # fmt: skip


@pytest.fixture
def train(cli, photographs):
    def run(name: str, *flags: object):
        return cli("train", *RUN, "--dataset_base_path", photographs, "--output_path", name, *flags)

    return run


def _verdict(folder: Path) -> str:
    return re.search(r'<p class="verdict \w+">(.*?)</p>', (folder / PAGE).read_text())[1]


def test_the_page_is_that_of_the_end_and_the_weights_are_the_same_without_it(train, monkeypatch):
    previews = ("--preview_prompts", "a cat", "--preview_steps", "2")
    assert train("with", *previews).code == 0
    assert _verdict(Path("with")) == "Completed: 6 of 6 (100%)"
    page = (Path("with") / PAGE).read_text()
    assert "step-6.safetensors" in page and 'data-chart="bands"' in page and "6 steps; all 3 previews" in page
    assert page.count("<li data-prompt") == 1 and 'href="samples/step-6/0001.png"' in page
    monkeypatch.setattr(every_run, "PageObserver", lambda *_: Observer())
    assert train("without", *previews).code == 0
    assert not (Path("without") / PAGE).exists()
    one, other = (load_file(Path(name) / "step-6.safetensors") for name in ("with", "without"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_that_ends_otherwise_says_so(train):
    assert train("out", "--learning_rate", "1e30").code == 1
    assert _verdict(Path("out")).startswith("Failed: ")
    assert '<p class="reason error">Diverged: the loss is not finite in step' in (Path("out") / PAGE).read_text()


def test_a_resumed_run_has_one_curve(cli, train, tmp_path):
    first = train("out", "--max_steps", "3")
    assert first.code == 0 and _verdict(Path("out")) == "Completed: 3 of 3 (100%)"
    assert train("out", "--resume", "auto").code == 0
    page = (Path("out") / PAGE).read_text()
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])
    assert [point[0] for point in data["charts"]["loss"]["curves"][0]["points"]] == [1, 2, 3, 4, 5, 6]


def test_a_page_that_cannot_be_written_ends_no_run(train):
    Path("out").mkdir()
    (Path("out") / PAGE).mkdir()
    outcome = train("out")
    assert outcome.code == 0 and outcome.err.count("is not up to date") == 1
    assert outcome.err == names(Path("out") / PAGE, "is not up to date", "the run continues")


def test_the_memory_of_a_gpu_is_recorded_against_its_estimate(train, monkeypatch):
    peaks = iter(range(1 << 20, 1 << 30))
    monkeypatch.setattr(loop, "peak_memory", lambda device: next(peaks))
    assert train("out").code == 0
    memory = json.loads((Path("out") / RECORD).read_text())["memory"]
    assert memory["estimated"] > 1 << 20 and memory["peak"] == next(peaks) - 1
    assert "1.0 MiB at most, estimated as" in (Path("out") / PAGE).read_text()
