"""Engines: what distributes a step over processes.

An engine owns the optimizer, the gradient scaler and clipping, and the training loop calls nothing else of them. All
methods are collective: every process calls them in the same order.
"""

from abc import ABC, abstractmethod
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from diffsynth_core.adapters.tensors import place
from diffsynth_core.checkpoints.saved_states import SavedState
from diffsynth_core.checkpoints.state import StateTensors, restore_state, state_of
from diffsynth_core.optimizers.names import UPDATE
from diffsynth_core.optimizers.per_parameter import MakeOptimizer, PerParameterOptimizer
from diffsynth_core.training.loader import MicroBatch
from diffsynth_core.training.model import TrainingModule


class Engine(ABC):
    """Trains a module whose forward pass is the loss of each sample of a micro-batch, `[B]` float32."""

    @abstractmethod
    def place(self, component: nn.Module, name: str, tensor: Tensor) -> None:
        """Set a parameter or buffer of a component to what this process keeps of a whole tensor.

        At the first tensor of a component all its parameters are still on the meta device, with its LoRA and gradient
        checkpointing in place: the moment to shard it.
        """

    @abstractmethod
    def prepare(self, model: TrainingModule, make_optimizer: MakeOptimizer) -> None:
        """Take over a module whose weights are loaded, and create the optimizer of the parameters, or shards of them,
        that this process updates.
        """

    @abstractmethod
    def try_out(self, micro_batch: MicroBatch, reserved: int) -> Tensor:
        """Run a forward and a backward pass outside of steps, after which weights and gradients are as before.

        Args:
            reserved: bytes of the device that are taken meanwhile, in place of what the first step will add.

        Returns:
            The loss of each sample, `[B]` float32, detached.

        Raises:
            torch.OutOfMemoryError: if the device has not enough memory for them.
        """

    @abstractmethod
    def begin(self, rate: float, number: int) -> None:
        """Begin a step at this learning rate, before its passes.

        Args:
            number: of the step in the run, from which random numbers of the update are drawn.
        """

    @abstractmethod
    def forward_backward(self, micro_batch: MicroBatch, weight: float, last: bool) -> Tensor:
        """Add the gradients of `weight` times the sum of the losses, averaged over processes.

        Args:
            last: whether this is the last micro-batch of the step, after which gradients are complete in all processes.

        Returns:
            The loss of each sample, `[B]` float32, detached.
        """

    @abstractmethod
    def sum_over_processes(self, values: Tensor) -> Tensor:
        """Return the sum of a small tensor over all processes."""

    @abstractmethod
    def gradient_norm(self) -> Tensor:
        """Return the global norm of the gradients before clipping, and clip them if requested.

        Returns:
            Scalar float32 on the device of the module: to read it is to wait for the device, so the loop reads it
            together with the loss.
        """

    @property
    @abstractmethod
    def skips_overflow(self) -> bool:
        """Whether `step` itself skips non-finite gradients, as float16 scaling does."""

    @abstractmethod
    def step(self) -> bool:
        """End the step, after which weights are updated and gradients cleared; return False if it was skipped."""

    @property
    @abstractmethod
    def updating(self) -> bool:
        """Whether some weights may be updated and others not, so that they belong to no step."""

    @abstractmethod
    def state(self) -> StateTensors:
        """Return what a resumed run needs of the weights and the optimizer, whole, on the main process."""

    @abstractmethod
    def scaler_state(self) -> dict[str, int | float]:
        """Return the state of the gradient scaler; empty without one."""

    @abstractmethod
    def restore(self, saved: SavedState) -> None:
        """Continue from a saved state, whatever engine and number of processes saved it.

        Raises:
            DiffSynthError: if the state cannot be read, or belongs to other parameters.
        """

    @abstractmethod
    def wait(self) -> None:
        """Wait until all processes have reached this point."""


class ReplicatedEngine(Engine):
    """One process, or DDP: every process holds all weights and the whole optimizer."""

    def __init__(self, accelerator: Accelerator, max_grad_norm: float | None) -> None:
        self._accelerator, self._limit = accelerator, max_grad_norm
        self._updating = False

    def place(self, component: nn.Module, name: str, tensor: Tensor) -> None:
        place(component, name, tensor)

    def prepare(self, model: TrainingModule, make_optimizer: MakeOptimizer) -> None:
        self._trained: dict[str, nn.Parameter] = model.trained()
        self._plain = make_optimizer(self._trained)
        self._module, self._optimizer = self._accelerator.prepare(model, self._plain)

    def try_out(self, micro_batch: MicroBatch, reserved: int) -> Tensor:
        taken = torch.empty(reserved, dtype=torch.uint8, device=self._accelerator.device)
        with self._accelerator.no_sync(self._module):
            losses: Tensor = self._module(micro_batch)
            self._accelerator.backward(losses.sum())
        del taken
        self._plain.zero_grad(set_to_none=True)
        return losses.detach()

    def begin(self, rate: float, number: int) -> None:
        for group in self._plain.param_groups:
            group["lr"] = rate
            if UPDATE in group:
                group[UPDATE] = number

    def forward_backward(self, micro_batch: MicroBatch, weight: float, last: bool) -> Tensor:
        with nullcontext() if last else self._accelerator.no_sync(self._module):
            losses: Tensor = self._module(micro_batch)
            self._accelerator.backward(losses.sum() * weight)
        return losses.detach()

    def sum_over_processes(self, values: Tensor) -> Tensor:
        if self._accelerator.num_processes == 1:
            return values
        total: Tensor = self._accelerator.reduce(values, "sum")
        return total

    def gradient_norm(self) -> Tensor:
        self._accelerator.unscale_gradients(self._optimizer)
        gradients = [parameter.grad for parameter in self._trained.values() if parameter.grad is not None]
        if any(gradient.dtype != torch.float32 for gradient in gradients):  # of bfloat16 it would be in bfloat16
            norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
            norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
        else:
            norm = torch.nn.utils.get_total_norm(gradients)
        if self._limit is not None:
            torch.nn.utils.clip_grads_with_norm_(self._trained.values(), self._limit, norm)
        return norm

    @property
    def skips_overflow(self) -> bool:
        return self._accelerator.scaler is not None

    def step(self) -> bool:
        self._updating = True
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._updating = False
        return not self._optimizer.step_was_skipped

    @property
    def updating(self) -> bool:
        return self._updating

    def state(self) -> StateTensors:
        return state_of(self._trained, self._plain)

    def scaler_state(self) -> dict[str, int | float]:
        scaler = self._accelerator.scaler
        return {} if scaler is None else dict(scaler.state_dict())

    def restore(self, saved: SavedState) -> None:
        # Into the plain optimizer, after prepare(), which would move its step counters to the device: each step would
        # then sync.
        restore_state(saved.path, saved.loop_state, self._trained, self._plain)
        if self._accelerator.scaler is not None:
            self._accelerator.scaler.load_state_dict(saved.loop_state.scaler)

    def wait(self) -> None:
        self._accelerator.wait_for_everyone()


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
        for part in model.modules():  # parameters are where they belong: on the device, or waiting in host memory
            for name, buffer in part.named_buffers(recurse=False):
                setattr(part, name, buffer.to(self._accelerator.device))
        # Mixed precision alone: accelerate would wrap the one process of a launcher in DDP, which keeps all gradients.
        self._module = self._accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
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

    def begin(self, rate: float, number: int) -> None:
        super().begin(rate, number)
        self._one_by_one.begin()
        self._norms.clear()

    def forward_backward(self, micro_batch: MicroBatch, weight: float, last: bool) -> Tensor:
        losses: Tensor = self._module(micro_batch)
        self._accelerator.backward(losses.sum() * weight)
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
