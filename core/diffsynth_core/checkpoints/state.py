"""Saving and restoring the state of a run: trained weights, optimizer, loop state.

A new state is complete before an older one is removed.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from diffsynth_core.checkpoints.saved_states import (
    OPTIMIZER,
    STATE_FOLDER,
    TRAINED,
    LoopState,
    OptimizerValues,
    state_folders,
    write_loop_state,
)
from diffsynth_core.checkpoints.tensor_files import write_tensors
from diffsynth_core.errors import DiffSynthError
from diffsynth_core.files import sync_folder
from diffsynth_core.optimizers.names import UPDATE
from diffsynth_core.optimizers.per_parameter import PerParameterOptimizer, host_copy, is_moved
from diffsynth_core.progress import pluralize

SET_EVERY_STEP = ("params", "lr", "initial_lr", UPDATE)
"""Options of the optimizer's parameter groups that the training loop sets itself."""


@dataclass(frozen=True)
class StateTensors:
    """What a state holds of weights and optimizer, whole: the same for every engine and number of processes.

    Attributes:
        weights: trained weights by `<component>.<parameter>`, in the dtype in which they train.
        moments: tensors of the optimizer by `<component>.<parameter>/<kind>`, such as `…/exp_avg`.
        values: everything else of the optimizer.
    """

    weights: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]
    values: OptimizerValues


def state_of(trained: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> StateTensors:
    """Return the state of whole parameters and their optimizer."""
    states = {name: optimizer.state.get(parameter, {}) for name, parameter in trained.items()}
    return StateTensors(trained, _tensors(trained, optimizer), optimizer_values(states, optimizer))


def save_state(folder: Path, loop_state: LoopState, tensors: StateTensors, keep: int) -> None:
    """Write the state of a run below `folder`, and remove all but the latest `keep` states.

    States of later steps, left by a run that was resumed from an earlier one, are removed too.

    Raises:
        DiffSynthError: if the disk refuses; existing states are unchanged.
    """
    target = folder / STATE_FOLDER / f"step-{loop_state.step}"
    # Written under a hidden name and renamed: `state_folders` never sees an incomplete state.
    fresh = target.with_name(f".{target.name}.new")
    for unfinished in (folder / STATE_FOLDER).glob(".step-*.new"):
        shutil.rmtree(unfinished, ignore_errors=True)
    try:
        files = {
            TRAINED: write_tensors(fresh / TRAINED, tensors.weights, {}),
            OPTIMIZER: write_tensors(fresh / OPTIMIZER, tensors.moments, {}),
        }
        write_loop_state(fresh, replace(loop_state, optimizer=tensors.values, files=files))
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    shutil.rmtree(target, ignore_errors=True)
    fresh.rename(target)
    sync_folder(target.parent)
    states = state_folders(folder)
    index = states.index(target)
    for other in (*states[:index], *states[index + keep :]):
        shutil.rmtree(other, ignore_errors=True)


def restore_state(
    state: Path, loop_state: LoopState, trained: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    """Restore whole parameters and their optimizer in place.

    Raises:
        DiffSynthError: if the state cannot be read, or belongs to other parameters.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in trained.items()}
    weights, moments = read_state(state, loop_state, shapes, len(optimizer.param_groups))
    put_back(trained, optimizer, weights, moments, loop_state.optimizer)


def put_back(
    trained: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    weights: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
    values: OptimizerValues,
) -> None:
    """Set whole parameters and their optimizer, in place, to what a state holds; accesses each tensor once."""
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(weights[name])
    restore_optimizer(trained, optimizer, moments, values)


def read_state(
    state: Path, loop_state: LoopState, shapes: Mapping[str, tuple[int, ...]], groups: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the whole weights and moments of a state, which stay in the file until they are used.

    Args:
        shapes: of the parameters that train, whole.
        groups: number of the optimizer's parameter groups.

    Raises:
        DiffSynthError: if the state cannot be read, or belongs to other parameters.
    """
    try:
        weights, moments = load_file(state / TRAINED), load_file(state / OPTIMIZER)
    except (OSError, SafetensorError) as error:
        raise DiffSynthError(
            f"cannot read the state `{state}`: {error}", "rerun the command: it resumes from another state"
        ) from error
    if weights.keys() != shapes.keys():
        raise DiffSynthError(
            f"the state `{state}` has {pluralize(len(weights), 'trained tensor')}, but this run has {len(shapes)}",
            "resume with the original parameters of the run",
        )
    wrong = [name for name, shape in shapes.items() if weights[name].shape != shape]
    if wrong:
        raise DiffSynthError(
            f"the state `{state}` has `{wrong[0]}` with shape {list(weights[wrong[0]].shape)}, but this run has {list(shapes[wrong[0]])}",
            "resume with the original parameters of the run",
        )
    unknown = [name for name in _names_in(moments, loop_state.optimizer) if name not in shapes]
    if unknown or len(loop_state.optimizer.groups) not in (0, groups):
        raise DiffSynthError(
            f"the state `{state}` has the optimizer state of another run{f': `{unknown[0]}`' if unknown else ''}",
            "resume with the original parameters of the run",
        )
    return weights, moments


def _names_in(moments: Mapping[str, Tensor], values: OptimizerValues) -> list[str]:
    """Return the parameters that an optimizer's state mentions."""
    return [*(key.rpartition("/")[0] for key in moments), *values.parameters]


def _tensors(trained: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's tensors as `<parameter>/<kind>`, such as `…/exp_avg`."""
    return {
        f"{name}/{kind}": value
        for name, parameter in trained.items()
        for kind, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def optimizer_values(states: Mapping[str, Mapping[str, Any]], optimizer: torch.optim.Optimizer) -> OptimizerValues:
    """Return the optimizer's state other than tensors: per parameter, and changed options of its groups.

    Args:
        states: of the parameters by name.
    """
    parameters = {
        name: {kind: value for kind, value in state.items() if not isinstance(value, Tensor)}
        for name, state in states.items()
    }
    groups = [
        {
            kind: _plain(value, optimizer.defaults.get(kind))
            for kind, value in group.items()
            if kind not in SET_EVERY_STEP and not _is(value, optimizer.defaults.get(kind))
        }
        for group in optimizer.param_groups
    ]
    return OptimizerValues({name: values for name, values in parameters.items() if values}, groups)


def restore_optimizer(
    trained: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, Tensor],
    values: OptimizerValues,
) -> None:
    """Restore an optimizer of parameters, or of parts of them, from tensors of the same parts and the other values."""
    # Optimizers of torch keep their step count on the CPU, unless they are fused.
    counted_on_device = {id(one) for group in optimizer.param_groups if group.get("fused") for one in group["params"]}
    for key, value in tensors.items():
        name, _, kind = key.rpartition("/")
        parameter = trained[name]
        on_host = kind == "step" and id(parameter) not in counted_on_device
        device = optimizer.device if isinstance(optimizer, PerParameterOptimizer) else parameter.device
        # Copied, because tensors of load_file are mapped to a file that a later save removes.
        if isinstance(optimizer, PerParameterOptimizer) and optimizer.state_waits(parameter) and is_moved(value):
            optimizer.state[parameter][kind] = host_copy(value, optimizer.device)
        else:
            optimizer.state[parameter][kind] = value.to("cpu" if on_host else device, copy=True)
    for name, kinds in values.parameters.items():
        optimizer.state[trained[name]].update(kinds)
    first = next(iter(trained.values()))
    restore_groups(
        optimizer, values.groups, optimizer.device if isinstance(optimizer, PerParameterOptimizer) else first.device
    )


def restore_groups(optimizer: torch.optim.Optimizer, groups: Sequence[Mapping[str, Any]], device: torch.device) -> None:
    """Restore changed options of the optimizer's parameter groups; tensors among them on this device."""
    for group, changed in zip(optimizer.param_groups, groups, strict=bool(groups)):
        group.update({kind: _like(group.get(kind), value, device) for kind, value in changed.items()})


def _is(value: Any, initial: Any) -> bool:
    """Return whether an option of a group is as it was at the start."""
    return bool(_plain(value, initial) == _plain(initial, initial))


def _plain(value: Any, initial: Any) -> Any:
    """Convert a value to JSON, which has neither tuples nor tensors.

    Args:
        initial: the value at the start of the run; a tensor that replaces none is described, for there will be none
            when it is restored.
    """
    if isinstance(value, Tensor) and not isinstance(initial, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return {"dtype": dtype, "shape": list(value.shape), "values": value.flatten().tolist()}
    return value.tolist() if isinstance(value, Tensor) else list(value) if isinstance(value, tuple) else value


def _like(before: Any, value: Any, device: torch.device) -> Any:
    """Invert `_plain`, for a value that replaces `before`."""
    if isinstance(value, dict):
        values: Tensor = torch.tensor(value["values"], dtype=getattr(torch, value["dtype"]), device=device)
        return values.reshape(value["shape"])
    if isinstance(before, Tensor):
        return before.new_tensor(value)
    return tuple(value) if isinstance(before, tuple) else value
