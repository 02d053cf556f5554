"""Files of earlier versions keep working: a stopped run, a cache of encodings and encoded samples of commit a3f93ed.

Weights are compared with those that a3f93ed itself computed, within rounding: bit-identical on the machine that wrote
the files, whereas another CPU may sum in another order.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

FIXTURES = Path(__file__).parents[1] / "fixtures" / "a3f93ed"
COMMAND = (
    "train", "--recipe", "qwen-image-lora", "--dataset_num_workers", 0, "--dataset_repeat", 3, "--num_epochs", 1,
    "--height", 32, "--width", 32, "--lora_rank", 2, "--learning_rate", 0.02, "--lr_scheduler", "cosine",
    "--lr_warmup_steps", 2, "--save_steps", 2, "--device", "cpu", "--cache_path", "cache",
)  # fmt: skip


@pytest.fixture
def older(cli, monkeypatch):
    """Run a command in a folder with copies of the older files, which are never modified."""
    for folder in FIXTURES.iterdir():
        if folder.is_dir():
            shutil.copytree(folder, folder.name)
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", "models")
    return cli


def metrics_of(folder: Path) -> list[tuple[int, float]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"]) for line in lines]


def check_same_run(folder: Path) -> None:
    """Check that the last checkpoint and all losses are those of a3f93ed's uninterrupted run."""
    expected = FIXTURES / "uninterrupted"
    torch.testing.assert_close(
        load_file(folder / "step-9.safetensors"), load_file(expected / "step-9.safetensors"), rtol=1e-4, atol=1e-6
    )
    assert [step for step, _ in metrics_of(folder)] == list(range(1, 10))
    losses = [[loss for _, loss in metrics_of(of)] for of in (folder, expected)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_stopped_run_goes_on(older):
    outcome = older(*COMMAND, "--dataset_base_path", "dataset", "--output_path", "run", "--resume", "auto")
    assert outcome.code == 0, outcome.err
    assert "Encoding" not in outcome.err
    check_same_run(Path("run"))


def test_a_cache_is_used(older):
    outcome = older(*COMMAND, "--dataset_base_path", "dataset", "--output_path", "fresh")
    assert outcome.code == 0, outcome.err
    assert "Encoding" not in outcome.err and "Loading text_encoder" not in outcome.err
    check_same_run(Path("fresh"))


def test_an_encoded_folder_trains(older):
    shutil.rmtree("cache")
    half = ("--task", "sft:train", "--dataset_base_path", "encoded", "--output_path", "second")
    outcome = older(*COMMAND, *half)
    assert outcome.code == 0, outcome.err
    assert "Encoding" not in outcome.err
    check_same_run(Path("second"))
