"""What engines have in common that divide the trained numbers among processes."""

from accelerate import Accelerator
from torch import Tensor

from diffsynth_core.training.engines.engine import Engine


class DividingEngine(Engine):
    """An engine each process of which updates a part of the trained numbers, so that all are needed to save.

    It refuses float16, which scales the loss by whole gradients (`planning/machine/engines.py`).
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self._updating = False

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
