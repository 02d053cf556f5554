"""Unsupported direct distillation: reported together with other problems, before reading weights."""

import csv
from pathlib import Path

import pytest
import torch

from tests.conftest import CAPTIONS
from tests.naming import names

COLUMNS = {"seed": "1", "rand_device": "cpu", "num_inference_steps": "4", "cfg_scale": "1"}
TASK = ("--task", "direct_distill", "--output_path", "out")


@pytest.fixture
def rows(dataset):
    """Write metadata for the photographs with these columns in all rows, or other values in some."""

    def write(columns: dict[str, str], **of_row: dict[str, str]) -> Path:
        with (dataset / "metadata.csv").open("w", newline="") as stream:
            writer = csv.DictWriter(stream, ["image", "prompt", *columns])
            writer.writeheader()
            for name, caption in CAPTIONS.items():
                writer.writerow({"image": f"{name}.png", "prompt": caption, **columns, **of_row.get(name, {})})
        return dataset / "metadata.csv"

    return write


def test_missing_columns_are_told_together(refuse, rows):
    metadata = rows({"seed": "1", "rand_device": "cpu"})
    listed = "`image`, `prompt`, `seed`, `rand_device`"
    assert refuse(*TASK) == (
        1,
        [
            (names(metadata, "no column", "num_inference_steps", listed), "add the column"),
            (names(metadata, "no column", "cfg_scale", listed), "add the column"),
        ],
    )


def test_guidance_and_unreadable_cells_are_told_by_row(refuse, rows):
    metadata = rows(COLUMNS, chelsea={"cfg_scale": "4"}, coffee={"seed": "x"})
    assert refuse(*TASK) == (
        1,
        [
            (names(metadata, "row 2", "cfg_scale", 4, "expected 1"), "set it to 1"),
            (names(metadata, "row 3", "seed", "x", "an integer", 0, 2**63 - 1), "fix the cell"),
        ],
    )


def test_captions_that_the_targets_were_made_from_are_not_dropped(refuse, rows):
    rows(COLUMNS)
    assert refuse(*TASK, "--caption_dropout", 0.1) == (
        2,
        [(names("caption_dropout", "direct_distill", "captions"), "remove it")],
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to draw it")
def test_noise_that_only_a_gpu_draws(refuse, rows, dataset):
    rows(COLUMNS, chelsea={"rand_device": "cuda"})
    assert refuse(*TASK) == (
        1,
        [(names("rand_device", "cuda", "1 sample", "row 2", dataset / "chelsea.png"), names("generate", "cpu"))],
    )


def test_a_range_of_timesteps(refuse, rows):
    rows(COLUMNS)
    assert refuse(*TASK, "--max_timestep_boundary", 0.5) == (
        2,
        [(names("max_timestep_boundary", "no effect", "direct_distill"), "remove it")],
    )


def test_supervised_training_is_not_shown_a_seed(refuse, rows):
    rows(COLUMNS)
    code, [(message, _)] = refuse("--extra_inputs", "seed", "--output_path", "out")
    assert code == 2 and message == names("extra_inputs", "seed", "Qwen-Image", "not support")


def test_a_drawn_dataset_has_no_seeds(cli, tmp_path):
    outcome = cli("train", "--recipe", "qwen-image-lora", "--task", "direct_distill", "--rehearse", "--device", "cpu")
    assert outcome.code == 2
    assert outcome.err.count("error: ") == 1
    assert outcome.err == names("error:", "no columns", "seed", "rand_device", "num_inference_steps", "cfg_scale")
    assert outcome.err == names("hint:", "--dataset_base_path")
