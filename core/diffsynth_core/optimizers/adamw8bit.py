"""AdamW of bitsandbytes with moments in 8 bits, whose state holds nothing but what it has learned.

Importing this module imports bitsandbytes, which takes as long as importing torch.
"""

from collections.abc import Callable
from typing import Any

import bitsandbytes
import torch
from torch import nn

MAPS = {"qmap1": "dynamic", "qmap2": "udynamic"}
"""Entry of a parameter's state in bitsandbytes -> the table of the 256 values that its bytes stand for."""


class AdamW8bit(bitsandbytes.optim.AdamW8bit):  # type: ignore[misc]
    """AdamW with blockwise quantized moments (Dettmers et al. 2022, arXiv:2110.02861).

    bitsandbytes keeps two constant tables in the state of each parameter. All share the same two in memory, but each
    would be saved, 2 KiB for each parameter, and be a copy after a resume. Here they are in the state only in a step.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update all parameters that have a gradient.

        As the method that it overrides, which waits for the device after each parameter; only paged state needs that.
        """
        for gindex, group in enumerate(self.param_groups):
            for pindex, parameter in enumerate(group["params"]):
                if parameter.grad is not None:
                    if not self.state[parameter]:
                        self.init_state(group, parameter, gindex, pindex)
                    self.update_step(group, parameter, gindex, pindex)
        return None

    def update_step(self, group: dict[str, Any], p: nn.Parameter, gindex: int, pindex: int) -> None:
        """Update one parameter."""
        state = self.state[p]
        if "absmax1" in state:
            for entry, table in MAPS.items():
                self.name2qmap[table] = state[entry] = self.name2qmap[table].to(p.device)
        super().update_step(group, p, gindex, pindex)
        for entry in MAPS:
            state.pop(entry, None)
