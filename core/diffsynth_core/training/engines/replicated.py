"""One process, or DDP."""

from contextlib import AbstractContextManager, nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from diffsynth_core.adapters.tensors import place
from diffsynth_core.checkpoints.saved_states import SavedState
from diffsynth_core.checkpoints.state import StateTensors, put_back, state_of
from diffsynth_core.optimizers.averaging import average_of, averages_in_place
from diffsynth_core.optimizers.names import UPDATE
from diffsynth_core.optimizers.per_parameter import MakeOptimizer
from diffsynth_core.training.engines.engine import Engine
from diffsynth_core.training.engines.gradients import norm_of
from diffsynth_core.training.engines.sending import read_and_send
from diffsynth_core.training.loader import MicroBatch
from diffsynth_core.training.model import SamplingStep, TrainingModule


class ReplicatedEngine(Engine):
    """One process, or DDP: every process holds all weights and the whole optimizer."""

    def __init__(self, accelerator: Accelerator, max_grad_norm: float | None) -> None:
        self.accelerator, self._limit = accelerator, max_grad_norm
        self._updating = False

    def place(self, component: nn.Module, name: str, tensor: Tensor) -> None:
        place(component, name, tensor)

    def prepare(self, model: TrainingModule, make_optimizer: MakeOptimizer) -> None:
        self._trained: dict[str, nn.Parameter] = model.trained()
        self._plain = make_optimizer(self._trained)
        self._module, self._optimizer = self.accelerator.prepare(model, self._plain)

    def try_out(self, micro_batch: MicroBatch, reserved: int) -> Tensor:
        taken = torch.empty(reserved, dtype=torch.uint8, device=self.accelerator.device)
        with self.accelerator.no_sync(self._module):
            losses: Tensor = self._module(micro_batch)
            self.accelerator.backward(losses.sum())
        del taken
        self._plain.zero_grad(set_to_none=True)
        return losses.detach()

    def evaluate(self, inputs: MicroBatch | SamplingStep) -> Tensor:
        with torch.no_grad():
            outputs: Tensor = self._module(inputs)
        return outputs

    def begin(self, rate: float, number: int) -> None:
        for group in self._plain.param_groups:
            group["lr"] = rate
            if UPDATE in group:
                group[UPDATE] = number

    def forward_backward(self, micro_batch: MicroBatch, weight: float, last: bool) -> Tensor:
        with nullcontext() if last else self.accelerator.no_sync(self._module):
            losses: Tensor = self._module(micro_batch)
            self.accelerator.backward(losses.sum() * weight)
        return losses.detach()

    def sum_over_processes(self, values: Tensor) -> Tensor:
        if self.accelerator.num_processes == 1:
            return values
        total: Tensor = self.accelerator.reduce(values, "sum")
        return total

    def gradient_norm(self) -> Tensor:
        self.accelerator.unscale_gradients(self._optimizer)
        gradients = [parameter.grad for parameter in self._trained.values() if parameter.grad is not None]
        norm = norm_of(gradients)
        if self._limit is not None:
            torch.nn.utils.clip_grads_with_norm_(self._trained.values(), self._limit, norm)
        return norm

    @property
    def skips_overflow(self) -> bool:
        return self.accelerator.scaler is not None

    def step(self) -> bool:
        self._updating = True
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._updating = False
        return not self._optimizer.step_was_skipped

    @property
    def updating(self) -> bool:
        return self._updating

    @property
    def gathers(self) -> bool:
        return False

    def whole(self, tensor: Tensor) -> Tensor:
        return tensor.detach()

    def average(self, tensor: Tensor) -> Tensor:
        return average_of(self._plain, tensor)

    def averaged(self) -> AbstractContextManager[None]:
        return averages_in_place(self._plain)

    def state(self) -> StateTensors:
        return state_of(self._trained, self._plain)

    def scaler_state(self) -> dict[str, int | float]:
        scaler = self.accelerator.scaler
        return {} if scaler is None else dict(scaler.state_dict())

    def restore(self, saved: SavedState) -> None:
        # Into the plain optimizer, after prepare(), which would move its step counters to the device: each step would
        # then sync.
        shapes = {name: tuple(parameter.shape) for name, parameter in self._trained.items()}
        weights, moments = read_and_send(saved, shapes, len(self._plain.param_groups), self.accelerator)
        put_back(self._trained, self._plain, weights, moments, saved.loop_state.optimizer)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(saved.loop_state.scaler)

    def wait(self) -> None:
        self.accelerator.wait_for_everyone()
