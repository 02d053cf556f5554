"""Fully sharded data parallelism: `fully_shard` of torch, called FSDP2."""

from contextlib import AbstractContextManager
from functools import partial

import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from diffsynth_core.adapters.tensors import move_buffers, place
from diffsynth_core.checkpoints.saved_states import SavedState
from diffsynth_core.checkpoints.state import StateTensors, restore_optimizer, state_of
from diffsynth_core.host_memory import return_freed_memory
from diffsynth_core.models.checkpointing import blocks_of
from diffsynth_core.models.spec import FamilyFacts
from diffsynth_core.optimizers.averaging import average_of, averages_in_place
from diffsynth_core.optimizers.names import UPDATE
from diffsynth_core.optimizers.per_parameter import MakeOptimizer
from diffsynth_core.planning.machine.engines import EngineChoice
from diffsynth_core.training.engines.dividing import DividingEngine
from diffsynth_core.training.engines.gradients import norm_of
from diffsynth_core.training.engines.sending import read_and_send
from diffsynth_core.training.loader import MicroBatch
from diffsynth_core.training.model import SamplingStep, TrainingModule
from diffsynth_core.weights.writing import LazyStateDict


class ShardedEngine(DividingEngine):
    """Every process holds some rows of each parameter, with their gradients and optimizer state.

    The blocks of a component are gathered one after the other while they compute; everything outside of blocks is
    gathered for the whole step. Frozen parameters are divided like trained ones, in the dtype or the bytes in which
    they are stored; buffers (rotary tables, scales of rows) are whole in every process. Weights are gathered in their
    own dtype and computed with under autocast, as by the other engines, so that the results are theirs. Gradients are
    averaged in float32.

    Optimizers are given the rows of this process as plain tensors: they need not know of DTensors, and are as fast as
    without them.
    """

    def __init__(
        self, accelerator: Accelerator, max_grad_norm: float | None, choice: EngineChoice, facts: FamilyFacts
    ) -> None:
        super().__init__(accelerator)
        self._limit, self._choice, self._facts = max_grad_norm, choice, facts
        return_freed_memory()
        device = accelerator.device
        if not distributed.is_initialized():  # a single process: accelerate makes no group for it
            distributed.init_process_group(store=distributed.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
        self._mesh = init_device_mesh(device.type, (accelerator.num_processes,))

    def place(self, component: nn.Module, name: str, tensor: Tensor) -> None:
        parent, _, leaf = name.rpartition(".")
        is_parameter = isinstance(getattr(component.get_submodule(parent), leaf), nn.Parameter)
        place(component, name, self._share(tensor) if is_parameter else tensor)

    def _share(self, tensor: Tensor) -> DTensor:
        """Return what this process keeps of a whole tensor, which may be freed."""
        rows = tensor[self._rows(len(tensor))].clone(memory_format=torch.contiguous_format)
        return self._of_rows(rows.cpu() if self._choice.offload_weights else rows, tensor.shape)

    def _rows(self, count: int, rank: int | None = None) -> slice:
        """Return the rows of a process, by default of this one, as `torch.chunk` divides them."""
        most = -(-count // self._mesh.size())
        first = min(most * (self._mesh.get_local_rank() if rank is None else rank), count)
        return slice(first, min(first + most, count))

    def _of_rows(self, rows: Tensor, shape: torch.Size) -> DTensor:
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(rows, self._mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)

    def prepare(self, model: TrainingModule, make_optimizer: MakeOptimizer) -> None:
        move_buffers(model, self.accelerator.device)  # from host memory where the weights are offloaded
        self._shard(model)
        self._trained = model.trained()
        # They share memory with the parameters, which FSDP never replaces.
        self._own = {name: nn.Parameter(_rows_of(sharded)) for name, sharded in self._trained.items()}
        self._own_of: dict[Tensor, nn.Parameter] = {self._trained[name]: own for name, own in self._own.items()}
        starts = {
            name: self._rows(len(sharded)).start * (sharded.numel() // len(sharded))
            for name, sharded in self._trained.items()
        }
        self._optimizer = make_optimizer(self._own, starts)
        whole_gradients = sum(sharded.numel() * sharded.itemsize for sharded in self._trained.values())
        weights = sum(_rows_of(parameter).nbytes for parameter in model.parameters())
        self._sums_whole = whole_gradients <= weights

    def _shard(self, model: TrainingModule) -> None:
        """Hand the rows that this process holds over to FSDP."""
        # It divides whole parameters itself, so it is given some on the meta device, and then what it would make of
        # them. Parameters in several places stay the same one.
        shares = dict(model.named_parameters(remove_duplicate=False))
        empty = {
            share: nn.Parameter(torch.empty(share.shape, dtype=share.dtype, device="meta"), share.requires_grad)
            for share in set(shares.values())
        }
        for name, share in shares.items():
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, empty[share])
        policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
        on_gpu = self.accelerator.device.type != "cpu"
        offload = CPUOffloadPolicy(pin_memory=on_gpu) if self._choice.offload_weights else OffloadPolicy()
        shard = partial(fully_shard, mesh=self._mesh, mp_policy=policy, offload_policy=offload)
        for name, component in model.components.items():
            for block in blocks_of(component, self._facts.component(name)):
                shard(block, reshard_after_forward=self._choice.reshards)
        # The rest is gathered together: parts of it are used outside of the forward pass of their component.
        shard(model)
        self._module = model
        model.load_state_dict(shares, strict=False, assign=True)

    def try_out(self, micro_batch: MicroBatch, reserved: int) -> Tensor:
        taken = torch.empty(reserved, dtype=torch.uint8, device=self.accelerator.device)
        losses = self._run(micro_batch, 1.0, True)
        del taken
        self._clear()
        return losses

    def evaluate(self, inputs: MicroBatch | SamplingStep) -> Tensor:
        with torch.no_grad():
            outputs = self._forward(inputs)
        for part in self._module.modules():
            if isinstance(part, FSDPModule):  # some stay gathered for a backward pass, and would be used after updates
                part.reshard()
        return outputs

    def _forward(self, inputs: MicroBatch | SamplingStep) -> Tensor:
        # A cache would keep copies of gathered weights that FSDP frees.
        with self.accelerator.autocast(AutocastKwargs(cache_enabled=False)):
            outputs: Tensor = self._module(inputs)
        return outputs

    def begin(self, rate: float, number: int) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = rate
            if UPDATE in group:
                group[UPDATE] = number

    def forward_backward(self, micro_batch: MicroBatch, weight: float, last: bool) -> Tensor:
        return self._run(micro_batch, weight, last)

    def _run(self, micro_batch: MicroBatch, weight: float, last: bool) -> Tensor:
        # Without communication, every process sums whole gradients. Those of a LoRA are small, and communicated once in
        # a step; those of all weights would take more memory than was saved by dividing the weights.
        assert isinstance(self._module, FSDPModule)
        self._module.set_requires_gradient_sync(last or not self._sums_whole)
        losses = self._forward(micro_batch)
        (losses.sum() * weight).backward()  # type: ignore[no-untyped-call]
        return losses.detach()

    def gradient_norm(self) -> Tensor:
        for name, sharded in self._trained.items():
            if isinstance(sharded.grad, DTensor):
                self._own[name].grad = sharded.grad.to_local()
        norm = norm_of([own.grad for own in self._own.values() if own.grad is not None])
        norm = self.sum_over_processes(norm.to(self.accelerator.device).square()).sqrt()
        if self._limit is not None:
            torch.nn.utils.clip_grads_with_norm_(self._own.values(), self._limit, norm)
        return norm

    def step(self) -> bool:
        self._updating = True
        self._optimizer.step()
        self._clear()
        self._updating = False
        return True

    def _clear(self) -> None:
        for parameter in (*self._trained.values(), *self._own.values()):
            parameter.grad = None

    def whole(self, tensor: Tensor) -> Tensor:
        return self._gather_rows(_rows_of(tensor), tensor.shape) if isinstance(tensor, DTensor) else tensor.detach()

    def average(self, tensor: Tensor) -> Tensor:
        own = self._own_of.get(tensor)
        return self.whole(tensor) if own is None else self._gather_rows(average_of(self._optimizer, own), tensor.shape)

    def averaged(self) -> AbstractContextManager[None]:
        return averages_in_place(self._optimizer)

    def _gather_rows(self, rows: Tensor, shape: torch.Size) -> Tensor:
        first = self._rows(shape[0], rank=0)
        return self.gather(rows, shape, first.stop * shape[1:].numel())

    def state(self) -> StateTensors:
        own = state_of(self._own, self._optimizer)
        weights = {name: partial(self.whole, sharded) for name, sharded in self._trained.items()}
        moments = {key: partial(self._whole_moment, key, moment) for key, moment in own.moments.items()}
        return StateTensors(LazyStateDict(weights), LazyStateDict(moments), own.values)

    def _whole_moment(self, key: str, moment: Tensor) -> Tensor:
        """Return a tensor of the optimizer: either it has a number for each of the parameter, or it is not divided."""
        name = key.rpartition("/")[0]
        return self._gather_rows(moment, self._trained[name].shape) if moment.shape == self._own[name].shape else moment

    def restore(self, saved: SavedState) -> None:
        shapes = {name: tuple(sharded.shape) for name, sharded in self._trained.items()}
        weights, moments = read_and_send(saved, shapes, len(self._optimizer.param_groups), self.accelerator)
        with torch.no_grad():
            for name, own in self._own.items():
                whole = weights[name]
                own.copy_(whole[self._rows(len(whole))])
        own_moments = {
            key: whole[self._rows(len(whole))] if whole.shape == shapes[key.rpartition("/")[0]] else whole
            for key, whole in moments.items()
        }
        restore_optimizer(self._own, self._optimizer, own_moments, saved.loop_state.optimizer)


def _rows_of(parameter: Tensor) -> Tensor:
    """Return the rows of a parameter that this process holds, in the same memory."""
    assert isinstance(parameter, DTensor)
    rows: Tensor = parameter.detach().to_local()  # type: ignore[attr-defined]
    return rows
