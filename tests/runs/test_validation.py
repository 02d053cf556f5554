"""The loss on held-out samples: fixed for fixed weights, and without an effect on training."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from diffsynth_core.training.timesteps import TIMESTEPS, DrawKey, draw_uniform

RUN = ("--recipe", "qwen-image-lora", "--dataset_num_workers", "0", "--lora_rank", "2", "--device", "cpu")


@pytest.fixture
def train(train_into) -> Callable[..., Path]:
    """Train on the photographs, and return the folder of the run."""
    return lambda folder, *flags: train_into(folder, *RUN, *flags)


@pytest.fixture
def others(photographs: Path, tmp_path: Path) -> Path:
    """A folder of three of the photographs, mirrored, to validate on."""
    from PIL import Image, ImageOps

    folder = tmp_path / "others"
    folder.mkdir()
    for name in ("chelsea", "coffee", "rocket"):
        ImageOps.mirror(Image.open(photographs / f"{name}.png")).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"a photograph of {name}")
    return folder


def lines(folder: Path, name: str = "validation.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    record = json.loads((folder / "run.json").read_text())
    return load_file(folder / record["checkpoints"][-1]["file"])


def test_the_loss_of_constant_weights_is_constant_to_the_bit(train):
    """Measured on a quarter of the dataset, on which no step trains."""
    folder = train("out", "--validation_split", 0.25, "--validate_every", 2, "--learning_rate", 0, "--dataset_repeat", 5,
                   "--num_epochs", 1)  # fmt: skip
    assert len(lines(folder, "metrics.jsonl")) == 15, "3 of 4 samples, 5 times"
    measured = lines(folder)
    assert [line.pop("step") for line in measured] == [0, 2, 4, 6, 8, 10, 12, 14, 15]
    assert all(line == measured[0] for line in measured)
    bands = [measured[0][f"validation_loss_band_{number}"] for number in (1, 2, 3, 4)]
    assert measured[0]["validation_loss"] == pytest.approx(sum(bands) / 4) and len(set(bands)) == 4
    (entry,) = json.loads((folder / "run.json").read_text())["checkpoints"]
    assert entry["validation_loss"] == measured[0]["validation_loss"]


FULL = ("--recipe", "qwen-image-full", "--use_gradient_checkpointing", "--fused_backward", "--blocks_to_swap", 1)


@pytest.mark.parametrize(
    "flags",
    [(), ("--blocks_to_swap", 1, "--use_gradient_checkpointing_offload", "--batch_size", 2), FULL],
    ids=["plain", "swapped", "trained swapped"],
)
def test_validation_changes_no_weight(train, others, flags):
    short = ("--max_steps", 3, "--learning_rate", 0.01, *flags)
    without = tensors(train("without", *short))
    folder = train("with", *short, "--validation_split", others, "--validate_every", 1)
    assert [line["step"] for line in lines(folder)] == [0, 1, 2, 3]
    assert len({line["validation_loss"] for line in lines(folder)}) == 4
    given = tensors(folder)
    assert all(torch.equal(tensor, given[name]) for name, tensor in without.items())


def test_a_resumed_run_has_one_curve_and_the_best_checkpoint(train, others):
    """A metadata file of the dataset's folder validates too; the csv tracker shows the same curve."""
    flags = ("--validation_split", others, "--validate_every", 1, "--learning_rate", 0.05, "--save_steps", 2,
             "--save_state_steps", 1, "--keep_states", 9, "--enable_csv_log", "--dataset_repeat", 9)  # fmt: skip
    through = train("through", *flags, "--max_steps", 5)
    folder = train("out", *flags, "--max_steps", 4)
    for step in (3, 4):
        shutil.rmtree(folder / f"state/step-{step}")
    train("out", *flags, "--max_steps", 5, "--resume", "auto")
    assert lines(folder) == lines(through) and [line["step"] for line in lines(folder)] == [0, 1, 2, 3, 4, 5]
    with (folder / "loss.csv").open(newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["key"] == "validation_loss"]
    assert [(int(row["step"]), float(row["value"])) for row in rows] == [
        (line["step"], line["validation_loss"]) for line in lines(folder)
    ]
    record = json.loads((folder / "run.json").read_text())
    measured = {f"step-{line['step']}.safetensors": line["validation_loss"] for line in lines(folder)}
    assert {entry["file"]: entry["validation_loss"] for entry in record["checkpoints"]} == {
        name: measured[name] for name in ("step-2.safetensors", "step-4.safetensors", "step-5.safetensors")
    }
    best = min(record["checkpoints"], key=lambda entry: entry["validation_loss"])
    assert record["best_checkpoint"] == best["file"]


def test_the_latest_checkpoints_are_kept_and_the_best(train, others):
    """Of equal losses the first is the best."""
    flags = ("--validation_split", others, "--learning_rate", 0, "--save_steps", 1, "--max_steps", 4)
    for name, keep, kept in (("latest", (), [3, 4]), ("best", ("--keep_best",), [1, 3, 4])):
        folder = train(name, *flags, "--keep_checkpoints", 2, *keep)
        files = [f"step-{step}.safetensors" for step in kept]
        assert sorted(path.name for path in folder.glob("*.safetensors")) == files
        record = json.loads((folder / "run.json").read_text())
        assert [entry["file"] for entry in record["checkpoints"]] == files
        assert record["best_checkpoint"] == files[0]


def test_a_file_names_samples_of_the_datasets_folder(train, tmp_path, monkeypatch):
    """Each is measured at a timestep of each band, with draws that no step has."""
    drawn: list[tuple[int, range]] = []

    def draw(key: DrawKey, indices: range) -> int:
        drawn.append((key[1], indices))
        return draw_uniform(key, indices)

    monkeypatch.setitem(TIMESTEPS, "uniform", draw)
    (tmp_path / "held.csv").write_text("image,prompt\nrocket.png,a rocket\n")
    folder = train("out", "--validation_split", tmp_path / "held.csv", "--max_steps", 1)
    assert [line["step"] for line in lines(folder)] == [0, 1]
    quarters = [range(250), range(250, 500), range(500, 750), range(750, 1000)]
    assert [indices for epoch, indices in drawn if epoch == -1] == quarters * 2
    assert {indices for epoch, indices in drawn if epoch != -1} == {range(1000)}


def test_the_same_samples_are_measured_alike_beside_any_dataset(train, others, photographs, tmp_path):
    fewer = shutil.copytree(photographs, tmp_path / "fewer")
    (fewer / "metadata.csv").write_text("image,prompt\nrocket.png,a rocket\n")
    flags = ("--validation_split", others, "--learning_rate", 0, "--max_steps", 1)
    assert lines(train("out", *flags)) == lines(train("with fewer", *flags, "--dataset_base_path", fewer))


def test_two_stages_hold_out_what_one_does(train):
    share = ("--validation_split", 0.25, "--max_steps", 1)
    train("encoded", *share, "--task", "sft:data_process")
    two = train("two", *share, "--dataset_base_path", "encoded", "--task", "sft:train")
    assert lines(two) == lines(train("one", *share)) and len(lines(two)) == 2


def test_two_processes_measure_what_one_does_to_the_bit(train, train_in_two, others):
    """Of three samples, the second process gets one and a stand-in that does not count."""
    flags = ("--validation_split", others, "--learning_rate", 0)
    one = train("one", *flags, "--max_steps", 1)
    two = train_in_two("two", *RUN, *flags, "--max_steps", 1)
    assert lines(one) == lines(two) and len(lines(one)) == 2


@pytest.mark.parametrize(
    "engine",
    ["fsdp2 kept", "zero3", *(pytest.param(engine, marks=pytest.mark.long) for engine in ("zero1", "zero2"))],
)
def test_sharded_weights_are_measured_and_train_on_as_without(train, train_in_two, others, engine):
    """Nothing is kept gathered from one validation to the next step."""
    flags = ("--max_steps", 2, "--learning_rate", 0.01)
    without = train_in_two("without", *RUN, *flags, engine=engine)
    validated = (*flags, "--validation_split", others, "--validate_every", 1)
    folder = train_in_two("with", *RUN, *validated, engine=engine)
    given = tensors(folder)
    assert all(torch.equal(tensor, given[name]) for name, tensor in tensors(without).items())
    whole = train("whole", "--gradient_accumulation_steps", 2, *validated)
    measured, expected = ([line["validation_loss"] for line in lines(run)] for run in (folder, whole))
    assert measured == pytest.approx(expected, rel=1e-5) and len(set(measured)) == 3
