"""The state that resume needs: trained weights, optimizer, position.

`state/step-N/` holds `trained.safetensors`, `optimizer.safetensors` and, written last, `state.json`: a folder without
it is no state. The next state is complete before the last one is removed.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from diffsynth_core.checkpoints.tensor_files import write_tensors
from diffsynth_core.errors import DiffSynthError
from diffsynth_core.files import sync_folder, write_json

STATE_FOLDER = "state"
TRAINED, OPTIMIZER, POSITION = "trained.safetensors", "optimizer.safetensors", "state.json"


@dataclass(frozen=True)
class Position:
    """How far a run is: optimizer steps done, samples seen, and what mixed precision keeps beside them."""

    step: int
    samples_seen: int
    scaler: dict[str, Any] = field(default_factory=dict)


def save_state(
    folder: Path, position: Position, trained: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    """Write the state of a run below `folder`, then remove the states before it."""
    target = folder / STATE_FOLDER / f"step-{position.step}"
    if (target / POSITION).is_file():
        return  # a run that saves one step twice has nothing new to say
    for unfinished in (folder / STATE_FOLDER).glob(".step-*.new"):
        shutil.rmtree(unfinished, ignore_errors=True)
    fresh = target.with_name(f".{target.name}.new")
    write_tensors(fresh / TRAINED, trained, {})
    write_tensors(fresh / OPTIMIZER, _flatten(trained, optimizer), {})
    write_json(fresh / POSITION, asdict(position))
    shutil.rmtree(target, ignore_errors=True)
    fresh.rename(target)
    sync_folder(target.parent)
    for other in _states(folder):
        if other != target:
            shutil.rmtree(other, ignore_errors=True)


def last_state(folder: Path) -> Path | None:
    """The folder of the last whole state; None when there is none."""
    whole = [path for path in _states(folder) if (path / POSITION).is_file()]
    return max(whole, key=lambda path: int(path.name.removeprefix("step-")), default=None)


def _states(folder: Path) -> list[Path]:
    """The folders of states, whole or not; what somebody else put beside them is theirs."""
    found = (folder / STATE_FOLDER).glob("step-*")
    return [path for path in found if path.name.removeprefix("step-").isdecimal()]


def read_position(state: Path) -> Position:
    """Raises: DiffSynthError: when the file is damaged."""
    try:
        return Position(**json.loads((state / POSITION).read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise DiffSynthError(
            f"`{state / POSITION}` cannot be read: {error}", "start the run anew in another folder"
        ) from error


def restore_state(state: Path, trained: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Put trained weights and optimizer back as they were.

    Raises:
        DiffSynthError: when the state is damaged or belongs to other parameters.
    """
    try:
        weights, moments = load_file(state / TRAINED), load_file(state / OPTIMIZER)
    except (OSError, SafetensorError) as error:
        raise DiffSynthError(
            f"the state `{state}` cannot be read: {error}", "start the run anew in another folder"
        ) from error
    if weights.keys() != trained.keys():
        raise DiffSynthError(
            f"the state `{state}` holds {len(weights)} trained tensors, this run has {len(trained)}",
            "resume with the parameters of the run",
        )
    wrong = [name for name, parameter in trained.items() if weights[name].shape != parameter.shape]
    if wrong:
        raise DiffSynthError(
            f"the state `{state}` holds `{wrong[0]}` as {list(weights[wrong[0]].shape)}, this run has {list(trained[wrong[0]].shape)}",
            "resume with the parameters of the run",
        )
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(weights[name])
    _unflatten(trained, optimizer, moments)


def _flatten(trained: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's tensors as `<parameter>/<kind>`, such as `…/exp_avg`."""
    return {
        f"{name}/{kind}": value
        for name, parameter in trained.items()
        for kind, value in optimizer.state.get(parameter, {}).items()
    }


def _unflatten(
    trained: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    for key, value in tensors.items():
        name, _, kind = key.rpartition("/")
        parameter = trained[name]
        # AdamW keeps its step count on the CPU.
        # Copies: what load_file gives is tied to a file that the next save removes.
        optimizer.state[parameter][kind] = value.clone() if kind == "step" else value.to(parameter.device, copy=True)
