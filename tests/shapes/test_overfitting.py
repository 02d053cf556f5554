"""The validation loss tells the shipped model trained on 4 images from that trained on 400."""

import json
from pathlib import Path

import pytest

from tests.shapes.datasets import scene_rows, write_dataset
from tests.shapes.scenes import draw_scenes

FLAGS = (
    "--recipe", "shapes-full", "--device", "cpu", "--dataset_num_workers", 0, "--validate_every", 20,
    "--batch_size", 4, "--max_steps", 40, "--learning_rate", 2e-4, "--lr_scheduler", "constant",
    "--lr_warmup_steps", 0, "--dataset_repeat", 100,
)  # fmt: skip


@pytest.mark.slow
def test_validation_tells_training_on_4_images_from_training_on_400(cli, tmp_path):
    write_dataset(tmp_path / "held", scene_rows(draw_scenes(32, seed=8, held_out=True)))
    losses = {}
    for count in (4, 400):
        write_dataset(tmp_path / str(count), scene_rows(draw_scenes(count, seed=7)))
        places = ("--dataset_base_path", tmp_path / str(count), "--validation_split", tmp_path / "held")
        outcome = cli("train", *FLAGS, *places, "--output_path", f"out-{count}")
        assert outcome.code == 0, outcome.err
        measured = (Path(f"out-{count}") / "validation.jsonl").read_text().splitlines()
        losses[count] = [json.loads(line)["validation_loss"] for line in measured]
    few, many = losses.values()
    assert few[0] == many[0], "the same weights, samples and noise"
    # The first steps at this rate cost any run something, as the model comes from a rate that fell to zero.
    assert few[2] > 1.05 * few[1] > 1.05 * few[0]
    assert many[2] < many[1] < few[1]
