"""Each way to follow a run, beside each way to carry it out: it changes no weight, and misses no step."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffsynth_core.checkpoints.run_folder import preview_folder, read_previews

RUN = ("--recipe", "qwen-image-lora", "--lora_rank", 2, "--learning_rate", 0.01, "--device", "cpu",
       "--dataset_num_workers", 0)  # fmt: skip
FOLLOWED = {
    "previews": ("--preview_prompts", "a rocket", "--preview_every", 1, "--preview_steps", 2),
    "validation": ("--validation_split", "{photographs}", "--validate_every", 1),
    "averages": ("--ema_decay", 0.5),
    "tracker": ("--log_with", "csv"),
    "mirror": ("--mirror", "{output}-mirror"),
}
PLAIN, TWO_PROCESSES = "plain", "two processes"
WAYS = {
    PLAIN: [("{output}", ("--max_steps", 4))],
    "resumed": [("{output}", ("--max_steps", 2)), ("{output}", ("--max_steps", 4, "--resume", "auto"))],
    TWO_PROCESSES: [("{output}", ("--max_steps", 2))],
    "batches": [("{output}", ("--max_steps", 2, "--batch_size", 2))],
    "split": [
        ("{output}-encoded", ("--task", "sft:data_process")),
        ("{output}", ("--max_steps", 2, "--task", "sft:train", "--dataset_base_path", "{output}-encoded")),
    ],
}
"""The output folder and the flags of each command of a run."""
REFUSED = {("previews", "split"): "preview_prompts", ("validation", "split"): "validation_split"}
"""What is refused, and the parameter that the message names: the second stage has the first one's encodings alone."""


@pytest.fixture
def carry_out(cli, train_in_two, photographs) -> Callable[..., str]:
    """Carry out the commands of a run; only the last may be refused, and what it says is returned."""

    def carry_out(output: str, way: str, flags: tuple = ()) -> str:
        error = ""
        for place, own in WAYS[way]:
            assert not error
            given = (*RUN, *own, *(flags if "sft:data_process" not in own else ()))
            folder, *words = (str(word).format(output=output, photographs=photographs) for word in (place, *given))
            if way == TWO_PROCESSES:
                train_in_two(folder, *words)
                continue
            outcome = cli("train", "--dataset_base_path", photographs, "--output_path", folder, *words)
            assert outcome.code in (0, 2), outcome.err
            error = outcome.err if outcome.code else ""
        return error

    return carry_out


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / json.loads((folder / "run.json").read_text())["checkpoints"][-1]["file"])


def seen(folder: Path) -> dict[str, np.ndarray]:
    """Return what there is to see of a run besides its metrics, by file or step."""
    found = {
        f"{step} {one.file}": np.asarray(Image.open(preview_folder(folder, step) / one.file))
        for step, drawn in read_previews(folder).items()
        for one in drawn.images
    }
    for name in ("validation.jsonl", "metrics.jsonl"):
        for text in (folder / name).read_text().splitlines() if (folder / name).exists() else ():
            line = json.loads(text)
            kept = [line[key] for key in ("loss", "validation_loss") if key in line]
            found[f"{name} {line['step']}"] = np.asarray(kept)
    for path in folder.glob("*.ema.safetensors"):
        found |= {f"average {name}": tensor.numpy() for name, tensor in load_file(path).items()}
    if (folder / "loss.csv").exists():
        with (folder / "loss.csv").open(newline="") as stream:
            rows = [row for row in csv.DictReader(stream) if row["key"] == "loss"]
        found["tracker"] = np.asarray([(int(row["step"]), float(row["value"])) for row in rows])
    return found


@pytest.mark.parametrize("way", [way for way in WAYS if way != PLAIN])
@pytest.mark.parametrize("followed", FOLLOWED)
def test_to_follow_a_run_changes_no_weight(carry_out, followed, way):
    assert not carry_out("without", way)
    refused = carry_out("with", way, FOLLOWED[followed])
    if (followed, way) in REFUSED:
        assert REFUSED[followed, way] in refused
        return
    assert not refused
    without, given = weights(Path("without")), weights(Path("with"))
    assert all(torch.equal(given[name], tensor) for name, tensor in without.items())
    shown = seen(Path("with"))
    if followed == "mirror":
        assert (
            weights(Path("with-mirror")).keys() == without.keys() and seen(Path("with-mirror")).keys() == shown.keys()
        )
    else:
        assert shown.keys() > seen(Path("without")).keys()


@pytest.mark.parametrize("followed", FOLLOWED)
def test_a_resumed_run_shows_what_one_does_that_never_stopped(carry_out, followed):
    for output, way in (("through", PLAIN), ("pieces", "resumed")):
        assert not carry_out(output, way, FOLLOWED[followed])
    through, pieces = seen(Path("through")), seen(Path("pieces"))
    assert through.keys() == pieces.keys() and all(
        np.array_equal(shown, pieces[name]) for name, shown in through.items()
    )
