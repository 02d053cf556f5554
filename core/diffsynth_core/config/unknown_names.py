"""Messages about names that are not parameters: names of other trainers, and misspelled ones."""

from dataclasses import dataclass
from fnmatch import fnmatchcase

from diffsynth_core.config.parameters import SETTINGS
from diffsynth_core.errors import Problem, suggest

DISTILLATION = "remove it; the supported distillation is `--task direct_distill`"
"""Hint for options of other distillation methods."""
CONTINUE = "`--resume auto` resumes the run in `--output_path` at its last step, including the optimizer state"
"""How to resume a run."""
START_FROM = "`--lora_checkpoint FILE` starts a new run from LoRA weights"
"""How to start from LoRA weights."""
FULL_CHECKPOINT = "to start from a full checkpoint, pass it in `--model_paths` instead of the base"
"""How to start from a full checkpoint."""
RESUME = f"{CONTINUE}; {START_FROM}; {FULL_CHECKPOINT}"
"""Hint for options that resume a run or load a checkpoint."""
LORA = f"{START_FROM}; `--preset_lora_path FILE` merges one into the base before training; {CONTINUE}"
"""Hint for options that load a LoRA."""


@dataclass(frozen=True)
class UnsupportedName:
    """A name that users of other trainers know, and what to use instead.

    Attributes:
        instead: the hint.
        is_switch: whether the flag takes no value.
        documented: whether DiffSynth-Studio documents the name.
    """

    instead: str
    is_switch: bool = False
    documented: bool = True


UNSUPPORTED: dict[str, UnsupportedName] = {
    "audio_processor_path": UnsupportedName("remove it; models with audio are not supported"),
    "dmd2_*": UnsupportedName(DISTILLATION),
    "embedded_guidance": UnsupportedName(DISTILLATION),
    "enable_lora_hot_loading": UnsupportedName("remove it; template models are not supported", is_switch=True),
    "framewise_decoding": UnsupportedName("remove it; Wan Dancer is not supported", is_switch=True),
    "resume_from_checkpoint": UnsupportedName(RESUME),
    "template_model_id_or_path": UnsupportedName("remove it; template models are not supported"),
} | {
    **dict.fromkeys(
        ("resume_from", "resume_path", "resume_checkpoint", "resume_training", "load_checkpoint", "checkpoint_path"),
        UnsupportedName(RESUME, documented=False),
    ),
    **dict.fromkeys(
        ("load_lora", "lora_path", "lora_weights", "network_weights", "pretrained_lora_path", "resume_lora"),
        UnsupportedName(LORA, documented=False),
    ),
}
"""Name, or pattern of names -> what to use instead.

The documented ones are parameters in `diffsynth/diffusion/parsers.py` and `examples/*/model_training/train.py` of
DiffSynth-Studio without a counterpart here; the others are the names of the same things in kohya's scripts,
musubi-tuner and the examples of diffusers.
"""


def find_unsupported(name: str) -> UnsupportedName | None:
    """Return the entry for a flag or key, spelled with `-` or `_`, with or without `--no-`."""
    plain = name.lower().replace("-", "_").removeprefix("no_")
    return next((known for pattern, known in UNSUPPORTED.items() if fnmatchcase(plain, pattern)), None)


def unknown_parameter(name: str, where: str) -> Problem:
    """Return the problem that `name` is not a parameter, with a replacement or the closest name as the hint."""
    if known := find_unsupported(name):
        why = "is a DiffSynth-Studio parameter that is not supported yet" if known.documented else "is not a parameter"
        return Problem(f"`{name}`{where} {why}", known.instead, wrong_use=True)
    near = suggest(name, SETTINGS)
    hint = f"did you mean `{near}`?" if near else "see `diffsynth train --help`"
    return Problem(f"`{name}`{where} is not a parameter", hint, wrong_use=True)
