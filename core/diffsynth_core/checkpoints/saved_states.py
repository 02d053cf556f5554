"""The saved states of a run: which exist, which are intact, and which one to resume from. No torch.

`state/step-N/` contains `trained.safetensors`, `optimizer.safetensors` and, written last, `state.json` with the sha256
of both and of itself.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePath
from typing import Any

from diffsynth_core.errors import DiffSynthError
from diffsynth_core.files import write_json
from diffsynth_core.json_files import read_json
from diffsynth_core.weights.headers import read_header

STATE_FOLDER = "state"
"""Folder of the states in the folder of a run."""
TRAINED, OPTIMIZER, LOOP_STATE = "trained.safetensors", "optimizer.safetensors", "state.json"
"""Files of a state."""

Hashes = Callable[[Sequence[Path]], Sequence[str]]
"""Computes the sha256 of files."""
Scalar = None | bool | int | float | str
"""A value of JSON without structure."""
GroupValue = Scalar | list[Scalar] | dict[str, Scalar | list[Scalar]]
"""An option of a parameter group; an object is a tensor: its dtype, shape and values."""


@dataclass(frozen=True)
class OptimizerValues:
    """The state of an optimizer other than tensors.

    Attributes:
        parameters: parameter -> kind -> value.
        groups: of each parameter group, the options that differ from their initial values.
    """

    parameters: dict[str, dict[str, Scalar]]
    groups: list[dict[str, GroupValue]]


@dataclass(frozen=True)
class LoopState:
    """`state.json`: the progress of a run, its state other than tensors, and checksums.

    Attributes:
        step: completed optimizer steps.
        scaler: state of the gradient scaler of float16.
        files: name -> sha256; None, like `sha256` and an empty `run`, in states of versions without checksums.
        run: the `id` of the run's record.
        sha256: checksum of all other attributes.
    """

    step: int
    samples_seen: int
    scaler: dict[str, int | float]
    optimizer: OptimizerValues = OptimizerValues({}, [])
    files: dict[str, str] | None = None
    run: str = ""
    sha256: str | None = None

    def digest(self) -> str:
        """Return the expected value of `sha256`."""
        content: dict[str, Any] = asdict(replace(self, sha256=None))
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class SavedState:
    """An intact state."""

    path: Path
    loop_state: LoopState


@dataclass(frozen=True)
class DamagedState:
    """A state that cannot be resumed from; `reason` names the file and its fault."""

    step: int
    reason: str


@dataclass(frozen=True)
class FoundStates:
    """The latest intact state, if any, and the damaged ones after it, latest first."""

    newest: SavedState | None
    damaged: tuple[DamagedState, ...]


def state_folders(folder: Path) -> list[Path]:
    """Return the state folders of a run, intact or not, latest first; other names are ignored."""
    found = [
        path for path in (folder / STATE_FOLDER).glob("step-*") if path.is_dir() and step_of_state(path) is not None
    ]
    return sorted(found, key=lambda path: step_of_state(path) or 0, reverse=True)


def step_of_state(path: PurePath) -> int | None:
    """Return the step in the name of a state folder; None for another name."""
    digits = path.name.removeprefix("step-")
    return int(digits) if digits.isascii() and digits.isdecimal() else None


def find_states(folder: Path, run: str, hashes: Hashes, below: int | None = None) -> FoundStates:
    """Verify states from the latest to the first intact one.

    Args:
        run: the `id` of the run's record.
        hashes: computes the sha256 of files.
        below: ignore states of this step and later ones.

    Raises:
        DiffSynthError: if the folder cannot be read.
    """
    damaged: list[DamagedState] = []
    for path in state_folders(folder):
        if below is not None and (step_of_state(path) or 0) >= below:
            continue
        try:
            return FoundStates(SavedState(path, read_complete_state(path, run, hashes)), tuple(damaged))
        except DiffSynthError as error:
            damaged.append(DamagedState(step_of_state(path) or 0, _without(path, error.problems[0].message)))
    return FoundStates(None, tuple(damaged))


def _without(state: Path, message: str) -> str:
    """Remove the folder of a state from a message that is shown with it."""
    return message.replace(f"`{state}/", "`")


def read_complete_state(state: Path, run: str, hashes: Hashes) -> LoopState:
    """Return the loop state of a saved state, after verifying that it belongs to the run and that its files are
    intact.

    Raises:
        DiffSynthError: names the damaged file.
    """
    loop_state = read_json(state / LOOP_STATE, LoopState, "resume from another state")
    if loop_state.step != step_of_state(state) or loop_state.samples_seen < 0:
        raise DiffSynthError(f"`{state / LOOP_STATE}`: it belongs to step {loop_state.step}")
    if loop_state.run != run:
        raise DiffSynthError(f"`{state / LOOP_STATE}`: it belongs to another run")
    for name in (TRAINED, OPTIMIZER):
        if not (state / name).is_file():
            raise DiffSynthError(f"`{state / name}` is missing")
    # A state of a version without checksums: check at least that the files are not truncated.
    if loop_state == LoopState(loop_state.step, loop_state.samples_seen, loop_state.scaler):
        for name in (TRAINED, OPTIMIZER):
            read_header(state / name)
        return loop_state
    if loop_state.sha256 != loop_state.digest() or set(loop_state.files or ()) != {TRAINED, OPTIMIZER}:
        raise DiffSynthError(f"`{state / LOOP_STATE}`: checksum mismatch")
    expected: Mapping[str, str] = loop_state.files or {}
    try:
        found = hashes([state / name for name in expected])
    except OSError as error:
        raise DiffSynthError(f"`{state / TRAINED}`: {error.strerror}") from error
    for name, digest in zip(expected, found, strict=True):
        if digest != expected[name]:
            raise DiffSynthError(f"`{state / name}`: checksum mismatch")
    return loop_state


def write_loop_state(state: Path, loop_state: LoopState) -> None:
    """Write `state.json` with its own checksum, atomically."""
    write_json(state / LOOP_STATE, asdict(replace(loop_state, sha256=loop_state.digest())))
