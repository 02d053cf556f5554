"""One process whose backward pass updates the weights."""

import torch
from torch import Tensor, nn

from diffsynth_core.adapters.tensors import move_buffers
from diffsynth_core.optimizers.per_parameter import MakeOptimizer, PerParameterOptimizer
from diffsynth_core.training.engines.replicated import ReplicatedEngine
from diffsynth_core.training.loader import MicroBatch
from diffsynth_core.training.model import SamplingStep, TrainingModule


class FusedEngine(ReplicatedEngine):
    """One process that updates each weight in the backward pass, as soon as its gradient is there, and frees that.

    So it neither accumulates gradients nor clips them by their norm, which is known only afterwards. After a loss or a
    gradient that is not finite the weights are lost: to look at the loss before its backward pass would be a second
    wait for the device in each step, and a run that diverged continues from its last state in any case.
    """

    def prepare(self, model: TrainingModule, make_optimizer: MakeOptimizer) -> None:
        self._trained = model.trained()
        optimizer = make_optimizer(self._trained)
        assert isinstance(optimizer, PerParameterOptimizer)
        self._plain = self._one_by_one = optimizer
        self._swap = model.trained_swap
        # Parameters are where they belong: on the device, or waiting in host memory.
        move_buffers(model, self.accelerator.device)
        # Mixed precision alone: accelerate would wrap the one process of a launcher in DDP, which keeps all gradients.
        self._module = self.accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
        self._norms: dict[nn.Parameter, Tensor] = {}
        self._in_trial = False
        for parameter in self._trained.values():
            parameter.register_post_accumulate_grad_hook(self._take)  # type: ignore[no-untyped-call]

    def try_out(self, micro_batch: MicroBatch, reserved: int) -> Tensor:
        self._in_trial = True
        losses = super().try_out(micro_batch, reserved)
        self._in_trial = False
        self._swap.release()
        return losses

    def evaluate(self, inputs: MicroBatch | SamplingStep) -> Tensor:
        try:
            return super().evaluate(inputs)
        finally:
            self._swap.release()

    def begin(self, rate: float, number: int) -> None:
        super().begin(rate, number)
        self._one_by_one.begin()
        self._norms.clear()

    def forward_backward(self, micro_batch: MicroBatch, weight: float, last: bool) -> Tensor:
        losses: Tensor = self._module(micro_batch)
        self.accelerator.backward(losses.sum() * weight)
        return losses.detach()

    def _take(self, parameter: Tensor) -> None:
        """Use the gradient of a parameter, which is complete: this hook is called once for each backward pass."""
        assert isinstance(parameter, nn.Parameter)
        if not self._in_trial:
            self._update(parameter)
        parameter.grad = None
        self._swap.put_back(parameter)

    def _update(self, parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        self._updating = True
        self._norms[parameter] = torch.linalg.vector_norm(parameter.grad, dtype=torch.float32)
        self._one_by_one.update(parameter)

    def gradient_norm(self) -> Tensor:
        norms = [self._norms[parameter] for parameter in self._trained.values() if parameter in self._norms]
        norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
        return norm

    def step(self) -> bool:
        self._swap.release()
        self._one_by_one.finish()
        self._updating = False
        return True
