"""The states of a run on disk: which there are, whether one is whole, and which one to go on from. No torch.

`state/step-N/` holds `trained.safetensors`, `optimizer.safetensors` and, written last, `state.json` with the sha256 of
both and of itself.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from diffsynth_core.errors import DiffSynthError
from diffsynth_core.files import write_json
from diffsynth_core.json_files import read_json
from diffsynth_core.weights.headers import read_header

STATE_FOLDER = "state"
TRAINED, OPTIMIZER, LOOP_STATE = "trained.safetensors", "optimizer.safetensors", "state.json"

Hashes = Callable[[Sequence[Path]], Sequence[str]]
"""The sha256 of each of some files."""
Scalar = None | bool | int | float | str


@dataclass(frozen=True)
class OptimizerValues:
    """What an optimizer holds beside tensors.

    `parameters`: parameter -> kind -> value. `groups`: of each group of parameters, what is no longer as it was made.
    """

    parameters: dict[str, dict[str, Scalar]]
    groups: list[dict[str, Scalar | list[Scalar]]]


@dataclass(frozen=True)
class LoopState:
    """`state.json`: how far a run is, what is kept beside its tensors, and what says that the state is whole.

    `step`: optimizer steps done. `scaler`: of mixed precision in float16. `files`: name -> sha256. `run`: the `id` of
    the run's record. `sha256`: of all the rest. One from before states had hashes has none of the three.
    """

    step: int
    samples_seen: int
    scaler: dict[str, int | float]
    optimizer: OptimizerValues = OptimizerValues({}, [])
    files: dict[str, str] | None = None
    run: str = ""
    sha256: str | None = None

    def digest(self) -> str:
        """What `sha256` must be."""
        content: dict[str, Any] = asdict(replace(self, sha256=None))
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class SavedState:
    """A whole state."""

    path: Path
    loop_state: LoopState


@dataclass(frozen=True)
class DamagedState:
    """A state that cannot be gone on from, and why: the file, and what is wrong with it."""

    step: int
    reason: str


@dataclass(frozen=True)
class FoundStates:
    """The newest whole state, if any, and the damaged ones after it, the newest first."""

    newest: SavedState | None
    damaged: tuple[DamagedState, ...]


def state_folders(folder: Path) -> list[Path]:
    """The states of the run in `folder`, whole or not, the newest first; what else lies beside them is not ours."""
    found = [path for path in (folder / STATE_FOLDER).glob("step-*") if path.is_dir() and _number(path) is not None]
    return sorted(found, key=lambda path: _number(path) or 0, reverse=True)


def _number(path: Path) -> int | None:
    digits = path.name.removeprefix("step-")
    return int(digits) if digits.isascii() and digits.isdecimal() else None


def find_states(folder: Path, run: str, hashes: Hashes, below: int | None = None) -> FoundStates:
    """Read states back from the newest to the first whole one.

    Args:
        run: the `id` of the record of the run.
        below: pass over states of this step and later ones.

    Raises:
        DiffSynthError: when the folder cannot be read.
    """
    damaged: list[DamagedState] = []
    for path in state_folders(folder):
        if below is not None and (_number(path) or 0) >= below:
            continue
        try:
            return FoundStates(SavedState(path, read_complete_state(path, run, hashes)), tuple(damaged))
        except DiffSynthError as error:
            damaged.append(DamagedState(_number(path) or 0, _without(path, error.problems[0].message)))
    return FoundStates(None, tuple(damaged))


def _without(state: Path, message: str) -> str:
    """What is wrong with a file of a state, without the folder, which is told once."""
    return message.replace(f"`{state}/", "`")


def read_complete_state(state: Path, run: str, hashes: Hashes) -> LoopState:
    """The position of a state of the run of that `id`, whose files are read back and compared with their hashes.

    Raises:
        DiffSynthError: names the file that is damaged.
    """
    loop_state = read_json(state / LOOP_STATE, LoopState, "resume from another state")
    if loop_state.step != _number(state) or loop_state.samples_seen < 0:
        raise DiffSynthError(f"`{state / LOOP_STATE}`: it belongs to step {loop_state.step}")
    if loop_state.run != run:
        raise DiffSynthError(f"`{state / LOOP_STATE}`: it belongs to another run")
    for name in (TRAINED, OPTIMIZER):
        if not (state / name).is_file():
            raise DiffSynthError(f"`{state / name}` is missing")
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
    """Write `state.json`, with its own hash, whole or not at all."""
    write_json(state / LOOP_STATE, asdict(replace(loop_state, sha256=loop_state.digest())))
