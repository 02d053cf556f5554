"""What engines have in common that divide the trained numbers among processes."""

import torch
from accelerate import Accelerator
from torch import Tensor, distributed

from diffsynth_core.training.engines.engine import Engine


class DividingEngine(Engine):
    """An engine each process of which updates a part of the trained numbers, so that all are needed to save.

    It refuses float16, which scales the loss by whole gradients (`planning/machine/engines.py`).
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self._updating = False

    def gather(self, own: Tensor, shape: torch.Size, size: int) -> Tensor:
        """Return a tensor of which each process holds the next `size` numbers, the last ones fewer or none.

        Args:
            own: the numbers of this process, on any device; what is beyond the end of the tensor is left out.
        """
        # On the device, where processes communicate. Each sends its numbers to their place: an all-gather of gloo holds
        # the tensor twice.
        whole = torch.empty(shape, dtype=own.dtype, device=self.accelerator.device)
        for rank, part in enumerate(torch.split(whole.view(-1), size)):
            if rank == self.accelerator.process_index:
                part.copy_(own.flatten()[: len(part)])
            distributed.broadcast(part, src=rank)
        return whole

    def sum_over_processes(self, values: Tensor) -> Tensor:
        total: Tensor = self.accelerator.reduce(values, "sum")
        return total

    @property
    def skips_overflow(self) -> bool:
        return False

    @property
    def updating(self) -> bool:
        return self._updating

    @property
    def gathers(self) -> bool:
        return True

    def scaler_state(self) -> dict[str, int | float]:
        return {}

    def wait(self) -> None:
        self.accelerator.wait_for_everyone()
