"""The command lines of DiffSynth-Studio's training scripts: the arguments of its `train.py`, passed to `diffsynth
train`.

`tests/documented_commands.csv` lists each with the reason why it is rejected, empty if it is accepted.
"""

import csv
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diffsynth_core.config.parameters import SETTINGS
from diffsynth_core.config.resolve import resolve
from diffsynth_core.hub.model_files import split_entry

UNKNOWN_HERE = (
    "template_model_id_or_path",
    "enable_lora_hot_loading",
    "audio_processor_path",
    "framewise_decoding",
)
DISTILLING = {"seed": 1, "rand_device": "cpu", "num_inference_steps": 4, "cfg_scale": 1}
"""Metadata columns of direct distillation."""
WAN_DEFAULT = "`use_gradient_checkpointing` is on by default for Wan; `--no-use_gradient_checkpointing` turns it off"


@dataclass(frozen=True)
class Command:
    """One command line; `stage` distinguishes several in one script."""

    model: str
    kind: str
    stage: str
    refused_for: str
    flags: str

    @property
    def words(self) -> list[str]:
        return shlex.split(self.flags)

    @property
    def values(self) -> dict[str, str | bool]:
        """Its values by name."""
        words = self.words
        return {
            word.removeprefix("--"): True if following.startswith("--") else following
            for word, following in zip(words, [*words[1:], "--"], strict=True)
            if word.startswith("--")
        }

    @property
    def in_halves(self) -> bool:
        return ":" in str(self.values.get("task", ""))


def read_commands() -> list[Command]:
    with (Path(__file__).parents[1] / "documented_commands.csv").open(encoding="utf-8", newline="") as stream:
        return [Command(**row) for row in csv.DictReader(stream)]


COMMANDS = read_commands()
ACCEPTED = [command for command in COMMANDS if not command.refused_for]
ALONE = [
    command
    for command in ACCEPTED
    if not command.in_halves and not command.values.keys() & {"task", "preset_lora_path"}
]
HALVES = [command for command in ACCEPTED if command.in_halves]


def named(command: Command) -> str:
    return f"{command.model} {command.kind} {command.stage}"


def test_their_number():
    assert (len(COMMANDS), len(ACCEPTED)) == (188, 81)
    assert len(ALONE) + len(HALVES) + 3 == len(ACCEPTED)


def as_typed(name: str, text: str | bool) -> Any:
    """Return the value of a flag, converted without the code under test."""
    kind = SETTINGS[name].type_name
    if kind == "comma list":
        return tuple(str(text).split(","))
    return {"int": int, "float": float, "bool": bool, "path": Path}.get(kind, str)(text)


@pytest.mark.parametrize("command", ACCEPTED, ids=named)
def test_each_gives_the_values_it_says(command):
    parameters = resolve(command.values).parameters
    expected: Mapping[str, Any] = {name: as_typed(name, text) for name, text in command.values.items()}
    assert {name: getattr(parameters, name) for name in expected} == expected


@pytest.mark.parametrize("command", ALONE, ids=named)
def test_each_is_planned_on_tiny_weights(cli, command):
    outcome = cli("train", *command.words, "--rehearse", "--dry_run", "--dataset_num_workers", 0)
    assert outcome.code == 0, outcome.err
    assert (WAN_DEFAULT in outcome.out) == needs_default_of_wan(command)


def needs_default_of_wan(command: Command) -> bool:
    """Return whether it omits what DiffSynth-Studio's Wan trainer always enables."""
    models = str(command.values["model_id_with_origin_paths"])
    return "Wan" in models and "use_gradient_checkpointing" not in command.values


@pytest.mark.parametrize("off", [False, True])
def test_checkpointing_of_wan_is_counted_unless_it_is_turned_off(cli, monkeypatch, tmp_path, off):
    """At real size, without files: the family follows from the entries alone."""
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tmp_path / "models"))
    (command,) = [c for c in ALONE if (c.model, c.kind) == ("Wan2.1-T2V-1.3B", "lora")]
    assert needs_default_of_wan(command)
    outcome = cli(
        "train", *command.words, "--dry_run", "--verbose", *(["--no-use_gradient_checkpointing"] if off else [])
    )
    assert (WAN_DEFAULT in outcome.out) != off
    assert ("activations (all stored)" if off else "activations (recomputed block by block)") in outcome.out


def test_the_command_of_the_real_run_turns_off_what_was_turned_off(cli):
    off = ("--no-use_gradient_checkpointing", "--dataset_num_workers", 0, "--max_steps", 2)
    outcome = cli("train", "--recipe", "wan2.1-t2v-1.3b-lora", "--rehearse", *off)
    assert outcome.code == 0, outcome.err
    assert "  --no-use_gradient_checkpointing" in outcome.out.partition("The real run:")[2]


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.refused_for], ids=named)
def test_the_others_are_refused_by_what_is_not_supported(cli, command):
    outcome = cli("train", *command.words, "--rehearse", "--dry_run")
    assert outcome.code == 2
    reported = [line for line in outcome.err.splitlines() if line.startswith("error: ") and command.refused_for in line]
    assert reported, outcome.err
    assert "Traceback" not in outcome.err


@pytest.fixture
def small(cli, entry_models, photographs, tmp_path, monkeypatch):
    """Run a command on tiny models and a small dataset; `more` overrides its values."""
    (tmp_path / "data").mkdir()
    for name in ("a.png", "b.png"):
        Image.open(photographs / "chelsea.png").resize((64, 32)).save(tmp_path / "data" / name)
    rows = [{"image": name, "video": name, "prompt": name, **DISTILLING} for name in ("a.png", "b.png")]
    (tmp_path / "data" / "metadata.json").write_text(json.dumps(rows))

    def run(command: Command, *more: object):
        entries = str(command.values["model_id_with_origin_paths"]).split(",")
        monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(entry_models(*entries)))
        sized = ("--height", 32, "--width", 64) if "height" in command.values else ()
        settings = ("--dataset_base_path", tmp_path / "data", "--dataset_num_workers", 0, "--max_steps", 1, *sized)
        return cli("train", *command.words, *settings, *more)

    return run


@pytest.mark.parametrize("command", [c for c in HALVES if c.stage == "data_process"], ids=named)
def test_both_halves_of_split_training_run(small, command):
    second = next(
        other
        for other in HALVES
        if (other.model, other.kind) == (command.model, command.kind) and other.stage == "train_from_cache"
    )
    first = small(command, "--output_path", "encoded")
    assert first.code == 0, first.err
    outcome = small(second, "--dataset_base_path", "encoded", "--output_path", "out", "--lora_rank", 2)
    assert outcome.code == 0, outcome.err
    assert Path("out/run.json").is_file()


@pytest.mark.parametrize("command", [c for c in ACCEPTED if c.values.get("task") == "direct_distill"], ids=named)
def test_distillation_is_planned(small, command):
    outcome = small(command, "--dry_run")
    assert outcome.code == 0, outcome.err


def test_the_second_step_of_differential_training_lacks_only_its_file(small):
    (command,) = [c for c in ACCEPTED if "preset_lora_path" in c.values]
    outcome = small(command, "--dry_run")
    (problem,) = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert "`preset_lora_path`" in problem and "does not exist" in problem


@pytest.mark.parametrize("name", UNKNOWN_HERE)
def test_flags_that_are_not_supported_stand_in_some_command(name):
    assert name not in SETTINGS
    assert any(name in command.values and command.refused_for for command in COMMANDS)


def test_every_entry_is_one_of_a_hub():
    entries = [e for command in COMMANDS for e in str(command.values["model_id_with_origin_paths"]).split(",")]
    assert all(split_entry(entry) for entry in entries)
