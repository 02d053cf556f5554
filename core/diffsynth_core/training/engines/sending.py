"""Restoring a state in all processes: the first one reads it, and sends one tensor at a time to the others."""

from collections.abc import Mapping
from functools import partial

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor

from diffsynth_core.checkpoints.saved_states import SavedState
from diffsynth_core.checkpoints.state import read_state
from diffsynth_core.errors import DiffSynthError
from diffsynth_core.training.machines import of_first
from diffsynth_core.weights.writing import LazyStateDict


def read_and_send(
    saved: SavedState, shapes: Mapping[str, tuple[int, ...]], groups: int, accelerator: Accelerator
) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    """Return the whole weights and moments of a state, as `read_state`, in all processes.

    Those of several are sent at each access: every process accesses the same ones in the same order.

    Raises:
        DiffSynthError: in all processes, as `read_state`.
    """
    if accelerator.num_processes == 1:
        return read_state(saved.path, saved.loop_state, shapes, groups)
    found: list[Mapping[str, Tensor]] = []
    outcome: object = None
    if accelerator.is_main_process:
        try:
            found = list(read_state(saved.path, saved.loop_state, shapes, groups))
            outcome = [{name: (tensor.shape, tensor.dtype) for name, tensor in part.items()} for part in found]
        except DiffSynthError as error:
            outcome = error
    kinds = of_first(outcome, accelerator)
    if isinstance(kinds, DiffSynthError):
        raise kinds

    def send(part: int, name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        if accelerator.is_main_process:
            tensor = found[part][name].to(accelerator.device)
        else:
            tensor = torch.empty(shape, dtype=dtype, device=accelerator.device)
        sent: Tensor = broadcast(tensor.contiguous())
        return sent

    assert isinstance(kinds, list)
    weights, moments = (
        LazyStateDict({name: partial(send, part, name, *kind) for name, kind in of_part.items()})
        for part, of_part in enumerate(kinds)
    )
    return weights, moments
