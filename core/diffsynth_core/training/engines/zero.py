"""DeepSpeed ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054), called directly: accelerate only starts processes.

accelerate would step the optimizer within the last backward pass, before the loop has looked at the norm, and clip at
1.0 unless told otherwise, as DeepSpeed itself does.
"""

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs
from torch import Tensor, nn
from torch.nn import functional

from diffsynth_core.adapters.tensors import move_buffers, place
from diffsynth_core.checkpoints.saved_states import SavedState
from diffsynth_core.checkpoints.state import StateTensors, optimizer_values, restore_groups
from diffsynth_core.host_memory import return_freed_memory
from diffsynth_core.optimizers.names import AVERAGE, UPDATE
from diffsynth_core.optimizers.per_parameter import MakeOptimizer
from diffsynth_core.planning.machine.engines import EngineChoice
from diffsynth_core.planning.memory.sharding import REDUCE_BUCKET
from diffsynth_core.training.engines.dividing import DividingEngine
from diffsynth_core.training.engines.sending import read_and_send
from diffsynth_core.training.loader import MicroBatch
from diffsynth_core.training.model import SamplingStep, TrainingModule
from diffsynth_core.weights.writing import LazyStateDict

STAGES = {"zero1": 1, "zero2": 2, "zero3": 3}
"""Engine -> what DeepSpeed divides: optimizer state; gradients too; weights too."""


class ZeroEngine(DividingEngine):
    """Several processes, each of which updates its part of all trained numbers, flattened, in float32.

    From stage 3 on each holds only its part of the weights as well, frozen ones too, which are gathered for the time of
    their use.
    """

    def __init__(self, accelerator: Accelerator, max_grad_norm: float | None, choice: EngineChoice) -> None:
        super().__init__(accelerator)
        self._stage = STAGES[choice.name]
        if self._stage == 3:
            return_freed_memory()
        self._deepspeed = _open_deepspeed(accelerator)
        self._settings = _settings(choice, self._stage, max_grad_norm, accelerator.device)
        self._divide: Callable[[list[nn.Parameter]], None] | None = None
        """Keeps this process's part of whole parameters, which are the same in all processes."""
        self._engine: Any = None
        """Of DeepSpeed, once the module is prepared."""
        self._linked = False
        """Whether DeepSpeed knows the optimizer's state of each parameter."""

    def place(self, component: nn.Module, name: str, tensor: Tensor) -> None:
        place(component, name, tensor)
        parent, _, leaf = name.rpartition(".")
        parameter = getattr(component.get_submodule(parent), leaf)
        if self._stage < 3 or not isinstance(parameter, nn.Parameter):
            return
        if self._divide:
            self._divide([parameter])
        else:
            self._deepspeed.zero.Init(module=nn.ParameterList([parameter]), config_dict_or_path=self._settings)
            self._divide = parameter.convert_to_zero_parameters  # type: ignore[attr-defined]

    def prepare(self, model: TrainingModule, make_optimizer: MakeOptimizer) -> None:
        self._trained: dict[str, nn.Parameter] = model.trained()
        move_buffers(model, self.accelerator.device)  # from host memory where the weights are offloaded
        # A cache would keep copies of gathered weights that DeepSpeed frees.
        module = _UnderAutocast(model, self.accelerator, AutocastKwargs(cache_enabled=self._stage < 3))
        self._optimizer = make_optimizer(self._trained)
        _split_by_dtype(self._optimizer)
        self._settings["zero_optimization"]["reduce_bucket_size"] = min(
            self._settings["zero_optimization"]["reduce_bucket_size"],
            sum(_shape(parameter).numel() for parameter in self._trained.values()),
        )
        self._engine, *_ = self._deepspeed.initialize(model=module, optimizer=self._optimizer, config=self._settings)

    def try_out(self, micro_batch: MicroBatch, reserved: int) -> Tensor:
        taken = torch.empty(reserved, dtype=torch.uint8, device=self.accelerator.device)
        # The gradients are zeros, to which those of the first step are added: DeepSpeed can forget none.
        losses = self.forward_backward(micro_batch, weight=0.0, last=False)
        del taken
        return losses

    def evaluate(self, inputs: MicroBatch | SamplingStep) -> Tensor:
        with torch.no_grad():
            outputs: Tensor = self._engine(inputs)
        return outputs

    def begin(self, rate: float, number: int) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = rate
            if UPDATE in group:
                group[UPDATE] = number

    def forward_backward(self, micro_batch: MicroBatch, weight: float, last: bool) -> Tensor:
        self._engine.set_gradient_accumulation_boundary(last)
        losses: Tensor = self._engine(micro_batch)
        self._engine.backward(losses.sum() * weight, scale_wrt_gas=False)
        return losses.detach()

    def gradient_norm(self) -> Tensor:
        # Computed once more in the step, which clips by it. DeepSpeed tells it publicly only after the step.
        norm: Tensor
        if self._stage == 3:
            from deepspeed.runtime.utils import combine_grad_norm_groups

            norm = combine_grad_norm_groups(self._engine.optimizer._get_norm_groups())
        else:
            norm = self._engine.optimizer.scaled_global_norm()
        return norm.to(self.accelerator.device)

    def step(self) -> bool:
        self._updating = True
        self._engine.step()
        self._updating = False
        if self._stage < 3 and not self._linked:
            self._link_state()
        return True

    def _link_state(self) -> None:
        """Let DeepSpeed find the optimizer's state of each parameter. By itself it does so once, after it has updated
        the first group, when those of the others have none.
        """
        self._engine.optimizer._hp_optimizer_states_linked = False
        self._engine.optimizer._lazy_init_hp_params_optimizer_state()
        self._linked = True

    def whole(self, tensor: Tensor) -> Tensor:
        updated = tensor.requires_grad and self._engine is not None
        tools = self._deepspeed.utils
        if hasattr(tensor, "ds_id"):  # divided, in stage 3
            divided: Any = tensor
            own = tools.safe_get_local_fp32_param(tensor) if updated else divided.ds_tensor
            return self.gather(own.detach(), divided.ds_shape, divided.ds_tensor.numel())
        return (tools.safe_get_full_fp32_param(tensor) if updated else tensor).detach()

    def average(self, tensor: Tensor) -> Tensor:
        is_averaged = tensor.requires_grad and any(AVERAGE in state for state in self._optimizer.state.values())
        return self._moment(tensor, AVERAGE) if is_averaged else self.whole(tensor)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        # The module computes with copies of the weights that are updated, which stay.
        try:
            for parameter in self._trained.values():
                self._set_copy(parameter, self.average(parameter))
            yield
        finally:
            for parameter in self._trained.values():
                self._set_copy(parameter, self.whole(parameter))

    def state(self) -> StateTensors:
        weights = {name: partial(self.whole, parameter) for name, parameter in self._trained.items()}
        # Every part has the same kinds, and counters of the same value.
        part: Mapping[str, Any] = next(iter(self._optimizer.state.values()), {})
        moments = {
            f"{name}/{kind}": partial(self._moment, parameter, kind)
            for name, parameter in self._trained.items()
            for kind, value in part.items()
            if isinstance(value, Tensor)
        }
        values = optimizer_values(dict.fromkeys(self._trained, part), self._optimizer)
        values = replace(values, groups=values.groups[:1])
        return StateTensors(LazyStateDict(weights), LazyStateDict(moments), values)

    def _moment(self, parameter: Any, kind: str) -> Tensor:
        """Return a tensor of the optimizer's state of one parameter, whole; a counter as it is."""
        value: Tensor = next(iter(self._optimizer.state.values()))[kind]
        if not value.dim():
            return value
        tools = self._deepspeed.utils
        if self._stage == 3:
            own = tools.safe_get_local_optimizer_state(parameter, kind)
            return self.gather(own, parameter.ds_shape, parameter.ds_tensor.numel())
        whole: Tensor = tools.safe_get_full_optimizer_state(parameter, kind)
        return whole

    def restore(self, saved: SavedState) -> None:
        shapes = {name: tuple(_shape(parameter)) for name, parameter in self._trained.items()}
        values = saved.loop_state.optimizer
        weights, moments = read_and_send(saved, shapes, 1, self.accelerator)
        kinds = {kind: moments[key] for kind, key in {key.rpartition("/")[2]: key for key in moments}.items()}
        for part in self._parts():
            state = self._optimizer.state[part]
            state |= {kind: torch.zeros_like(part) for kind, value in kinds.items() if value.dim()}
            # Counters are on the CPU, unless the optimizer is fused.
            device = part.device if self._optimizer.defaults.get("fused") else torch.device("cpu")
            state |= {kind: value.to(device, copy=True) for kind, value in kinds.items() if not value.dim()}
            state |= next(iter(values.parameters.values()), {})
        if kinds and self._stage < 3:
            self._link_state()
        with torch.no_grad():
            for name, parameter in self._trained.items():
                weight = weights[name]
                self._set_copy(parameter, weight)
                self._set_part(parameter, weight)
                for kind, example in kinds.items():
                    key = f"{name}/{kind}"
                    if example.dim() and key in moments:
                        self._set_part(parameter, moments[key], kind)
                    elif kind == AVERAGE:  # it has had no gradient
                        self._set_part(parameter, weight, kind)
        groups = [*values.groups] * len(self._optimizer.param_groups)
        restore_groups(self._optimizer, groups, self.accelerator.device)

    def _parts(self) -> list[Tensor]:
        """Return the flat parts of the trained numbers that this process updates."""
        optimizer = self._engine.optimizer
        parts: list[Tensor] = (
            optimizer.fp32_partitioned_groups_flat if self._stage == 3 else optimizer.single_partition_of_fp32_groups
        )
        return parts

    @torch.no_grad()
    def _set_copy(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Set the weight that the module computes with, from the whole."""
        if self._stage == 3:
            with self._deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                if self.accelerator.is_main_process:
                    parameter.copy_(value)
        else:
            parameter.copy_(value)

    def _set_part(self, parameter: nn.Parameter, value: Tensor, kind: str | None = None) -> None:
        """Set this process's part of a float32 weight, or of one kind of the optimizer's state, from the whole."""
        tools = self._deepspeed.utils
        if self._stage == 3:
            # Cut here, because `safe_set_full_…` of DeepSpeed 0.19 fails where the number of processes does not divide
            # the size.
            size, index = parameter.ds_tensor.numel(), self.accelerator.process_index  # type: ignore[attr-defined]
            own = value.flatten()[size * index : size * (index + 1)]
            own = functional.pad(own, (0, size - own.numel()))
            set_weight, set_moment = tools.safe_set_local_fp32_param, tools.safe_set_local_optimizer_state
        else:
            own, set_weight, set_moment = value, tools.safe_set_full_fp32_param, tools.safe_set_full_optimizer_state
        if kind is None:
            set_weight(parameter, own)
        else:
            set_moment(parameter, own, kind)


class _UnderAutocast(nn.Module):
    """A module with mixed precision within it: DeepSpeed turns autocast off around its modules."""

    def __init__(self, module: nn.Module, accelerator: Accelerator, autocast: AutocastKwargs) -> None:
        super().__init__()
        self.module = module
        self._autocast = partial(accelerator.autocast, autocast)

    def forward(self, inputs: MicroBatch | SamplingStep) -> Tensor:
        with self._autocast():
            outputs: Tensor = self.module(inputs)
        return outputs


def _split_by_dtype(optimizer: torch.optim.Optimizer) -> None:
    """Split the only group of an optimizer: DeepSpeed flattens those of a group, which must have one dtype.

    The parameters in float32 are first, since it takes the dtype of the gradients from the first one.
    """
    (group,) = optimizer.param_groups
    by_dtype: dict[torch.dtype, list[Tensor]] = {torch.float32: []}
    for parameter in group["params"]:
        by_dtype.setdefault(parameter.dtype, []).append(parameter)
    optimizer.param_groups[:] = [{**group, "params": parameters} for parameters in by_dtype.values() if parameters]


def _shape(parameter: nn.Parameter) -> torch.Size:
    """Return the shape of a whole parameter, which is empty itself where it is divided."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def _open_deepspeed(accelerator: Accelerator) -> Any:
    """Return the module DeepSpeed, set up for the device and the group of the processes that run."""
    on_cpu = accelerator.device.type == "cpu"
    if on_cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if on_cpu:
        # Reductions through shared memory, which are compiled with g++ when they are first used, for a minute or more.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed calls functions that torch has renamed.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    deepspeed.init_distributed(auto_mpi_discovery=False)
    return deepspeed


def _settings(choice: EngineChoice, stage: int, max_grad_norm: float | None, device: torch.device) -> dict[str, Any]:
    """Return the configuration of DeepSpeed."""
    offload = {"device": "cpu", "pin_memory": device.type != "cpu"}
    zero: dict[str, Any] = {"reduce_bucket_size": REDUCE_BUCKET, **dict(choice.tuning)}
    zero |= {"stage": stage, "memory_efficient_linear": False}
    if choice.offload_optimizer:
        zero["offload_optimizer"] = offload
    if choice.offload_weights:
        zero["offload_param"] = offload
    return {
        "train_micro_batch_size_per_gpu": 1,  # required, and used for its own reports alone
        "gradient_clipping": max_grad_norm or 0.0,  # its default is 1.0
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # keeps the optimizer of the run
        "zero_optimization": zero,
    }
