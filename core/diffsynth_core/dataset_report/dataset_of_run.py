"""The dataset to check: PATH, or the one in the parameters of a run. No torch."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffsynth_core.config.parameters import SETTINGS
from diffsynth_core.config.resolve import Resolved
from diffsynth_core.data.metadata import READERS
from diffsynth_core.errors import DiffSynthError, FaultsFound, Problem

OF_PATH = ("dataset_base_path", "dataset_metadata_path")
"""Parameters that PATH replaces."""


def as_flags(path: Path | None, flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flags of a run that reads the dataset at PATH, a folder or a metadata file.

    Raises:
        DiffSynthError: if there is nothing at PATH, or a file that is not metadata.
        FaultsFound: if a flag names the dataset too.
    """
    if path is None:
        return dict(flags)
    if path.is_dir():
        named: dict[str, Any] = {"dataset_base_path": path}
    elif not path.is_file():
        raise DiffSynthError(f"`{path}` does not exist", "pass the dataset folder")
    elif path.suffix.lower() not in READERS:
        raise DiffSynthError(
            f"`{path}` is not a metadata file: expected .csv, .json or .jsonl", "pass the dataset folder"
        )
    else:
        named = {"dataset_base_path": path.parent, "dataset_metadata_path": path}
    twice = [name for name in named if name in flags]
    if twice:
        what = f"PATH is `{path}`, and `--{twice[0]}` is `{flags[twice[0]]}`"
        raise FaultsFound([Problem(what, "pass the dataset only once", wrong_use=True)])
    return {**flags, **named}


def choose_stage(stages: Sequence[Resolved]) -> Resolved:
    """Return the only run that all stages are equivalent to, as far as the dataset is concerned.

    Raises:
        FaultsFound: if stages read data differently, or nothing names a dataset.
    """
    first = stages[0]
    if not first.problems and not first.origin("dataset_base_path").is_given:
        hint = "pass its folder: `diffsynth dataset validate PATH`"
        raise FaultsFound([Problem("no dataset given", hint, wrong_use=True)])
    for name, setting in SETTINGS.items():
        values = {getattr(resolved.parameters, name) for resolved in stages}
        if setting.reads_data and name not in ("only", *MODEL_FILES) and len(values) > 1:
            listed = ", ".join(str(resolved.stage) for resolved in stages)
            what = f"`{name}` differs between the stages {listed}"
            raise FaultsFound([Problem(what, "choose one with `--only`", wrong_use=True)])
    return first


MODEL_FILES = ("model_paths", "model_id_with_origin_paths")
"""Parameters of model files, which differ between stages of one variant."""
