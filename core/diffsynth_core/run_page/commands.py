"""The commands that go on from a run, as a shell takes them. No torch."""

import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffsynth_core.config.documents import command_line
from diffsynth_core.config.parameters import SETTINGS, as_plain
from diffsynth_core.config.resolve import resolve_stages
from diffsynth_core.errors import DiffSynthError
from diffsynth_core.run_page.facts import RunFacts

SOURCES = ("recipe", "config", "only")
"""Parameters that say where the others come from."""
OF_STAGE = {"output_path": "/", "mirror": "/", "push_to_hub": "-"}
"""Parameters to which resolving adds the name of the stage -> what joins them."""
COMMAND_STARTS = "diffsynth"
TITLES = {"comfyui": "ComfyUI", "diffusers": "diffusers"}
"""LoRA format -> the program that reads it."""


@dataclass(frozen=True)
class NextCommand:
    """A command, and what it is for; lines after the first are continuations."""

    purpose: str
    line: str


def next_commands(facts: RunFacts) -> list[NextCommand]:
    """Return what can be done with a run next, the most urgent first.

    Relative paths in them are those of the folder where the run was started.
    """
    record, folder = facts.record, facts.folder
    commands = []
    rehearsed = bool(record.parameters.get("rehearse"))
    if facts.status in ("interrupted", "failed", "killed") and record.step < record.total_steps and not rehearsed:
        commands.append(NextCommand("Resume", resume_command(record.parameters, record.family, folder)))
    if facts.status == "running":
        commands.append(NextCommand("Follow in a terminal", f"{COMMAND_STARTS} run show {_quoted(folder)} --follow"))
    chosen = facts.best or facts.latest_checkpoint
    if chosen is None:
        return commands
    checkpoint = folder / chosen.file
    if len(record.checkpoints) > 1:
        purpose, option = "Draw with all checkpoints, side by side", " --grid"
    else:
        purpose, option = "Draw with the checkpoint", ""
    commands.append(NextCommand(purpose, f"{COMMAND_STARTS} generate --run {_quoted(folder)}{option}"))
    trains_lora, in_full = record.parameters.get("lora_base_model"), record.parameters.get("trainable_models")
    if trains_lora and not in_full:
        name = "diffusers" if record.parameters.get("lora_format") == "comfyui" else "comfyui"
        target = checkpoint.with_name(f"{checkpoint.stem}-{name}.safetensors")
        line = f"{COMMAND_STARTS} convert-lora {_quoted(checkpoint)} --to {name} --output_path {_quoted(target)}"
        commands.append(NextCommand(f"Convert the LoRA for {TITLES[name]}", line))
    else:
        target = folder / f"{checkpoint.stem}-parts"
        line = f"{COMMAND_STARTS} split-ckpt {_quoted(checkpoint)} --output_path {_quoted(target)}"
        commands.append(NextCommand("Split the checkpoint by component", line))
    return commands


def resume_command(recorded: Mapping[str, Any], family: str, folder: Path) -> str:
    """Return the command that resumes a run: its recipe or configuration file, and flags for all that differs."""
    known = {name: value for name, value in recorded.items() if name in SETTINGS}
    sources = {name: known[name] for name in SOURCES if known.get(name)}
    values = _values_of(sources)
    if values is None:  # of another version, or a file that does not exist here
        sources, values = {}, {name: as_default(name, family) for name in SETTINGS}
    changed = {name: known[name] for name in _kept(known) if known[name] != values[name]}
    flags = sources | changed | {"output_path": str(folder), "resume": "auto"}
    if stage := sources.get("only"):
        flags |= {
            name: value.removesuffix(f"{joint}{stage}")
            for name, joint in OF_STAGE.items()
            if (value := flags.get(name))
        }
    return command_line(flags, f"{COMMAND_STARTS} train", overriding=True)


def as_default(name: str, family: str) -> Any:
    """Return the default of a parameter in plain form."""
    value = SETTINGS[name].default_of(family)
    return list(value) if isinstance(value, tuple) else value


def _kept(known: Iterable[str]) -> Iterator[str]:
    """Return the parameters that belong to the run, and not to the command that started it: also where it is copied."""
    for name in known:
        setting = SETTINGS[name]
        if setting.in_recipes or setting.changes == "speed" or setting.rehearsal == "unused":
            yield name


def _values_of(sources: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return all parameters in plain form as recipe and configuration file alone set them; None if they do not."""
    if not sources:
        return None
    try:
        stages = resolve_stages(sources)
    except DiffSynthError:
        return None
    if len(stages) != 1 or stages[0].incomplete or stages[0].problems:
        return None
    return as_plain(stages[0].parameters)


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
