"""How weights are updated: in which dtype, when, and where the state of the optimizer is. No torch."""

from collections.abc import Iterator

from diffsynth_core.config.choices import TrainedDtype
from diffsynth_core.config.parameters import Parameters
from diffsynth_core.errors import Problem
from diffsynth_core.planning.machine.engines import EngineSpec
from diffsynth_core.planning.training.optimizer_choice import OptimizerChoice
from diffsynth_core.planning.training.optimizers import OPTIMIZERS

WITHOUT = "remove one of them"


def update_problems(
    parameters: Parameters, optimizer: OptimizerChoice, mixed_precision: str, world_size: int
) -> Iterator[Problem]:
    """Yield why weights cannot be updated by a fused kernel, in the backward pass, or with a state in host memory.

    Args:
        mixed_precision: in which the run computes.
    """
    if optimizer.fused and mixed_precision == "fp16":
        what = "`optimizer_args` `fused=true` hides which steps were skipped, of which `mixed_precision` fp16 counts those in a row"
        yield Problem(what, "pass `fused=false`, or `--mixed_precision bf16`", wrong_use=True)
    if parameters.fused_backward:
        yield from _fused_problems(parameters, mixed_precision, world_size)
        yield from by_tensor_problems("`fused_backward`", "remove `--fused_backward`, or pass", optimizer)
    if parameters.enable_optimizer_cpu_offload:
        remedy = "remove `--enable_optimizer_cpu_offload`, or pass"
        yield from by_tensor_problems("`enable_optimizer_cpu_offload`", remedy, optimizer)


def choose_dtype(parameters: Parameters, mixed_precision: str, engine: EngineSpec) -> TrainedDtype:
    """Return what weights that train in full are kept in: float32 unless something else is asked for, or the engine
    divides a float32 copy that it updates, but not the weights themselves.

    Args:
        mixed_precision: in which the run computes.
    """
    if parameters.trained_dtype or not parameters.trainable_models:
        return parameters.trained_dtype or "float32"
    whole = engine.updates_copies and not engine.shards_weights
    return "bf16" if whole and mixed_precision == "bf16" else "float32"


def dtype_problems(parameters: Parameters, optimizer: OptimizerChoice, mixed_precision: str) -> Iterator[Problem]:
    """Yield why weights cannot train in another dtype than float32.

    Args:
        mixed_precision: in which the run computes, on this machine.
    """
    if parameters.trained_dtype in (None, "float32"):
        return
    asked = f"`trained_dtype` `{parameters.trained_dtype}`"
    if mixed_precision != "bf16":
        what = f"{asked} needs `mixed_precision` bf16, but the run computes in {mixed_precision}"
        yield Problem(
            what.replace("in no", "in float32"),
            "pass `--mixed_precision bf16`",
            wrong_use=parameters.mixed_precision is not None,
        )
    yield from by_tensor_problems(asked, "pass `--trained_dtype float32`, or", optimizer)


def by_tensor_problems(asked: str, remedy: str, optimizer: OptimizerChoice) -> Iterator[Problem]:
    """Yield the problem of an optimizer that couples tensors; the remedy is followed by the optimizers that do not."""
    if optimizer.spec.by_tensor:
        return
    able = ", ".join(name for name, spec in OPTIMIZERS.items() if spec.by_tensor)
    what = f"{asked} updates one tensor after the other, which the optimizer `{optimizer.name}` may not be able to"
    yield Problem(what, f"{remedy} one of the optimizers {able}", wrong_use=True)


def _fused_problems(parameters: Parameters, mixed_precision: str, world_size: int) -> Iterator[Problem]:
    steps = parameters.gradient_accumulation_steps
    if steps > 1:
        what = f"`gradient_accumulation_steps` {steps} sums gradients over {steps} backward passes"
        yield Problem(f"{what}, but `fused_backward` updates weights in each", WITHOUT, wrong_use=True)
    if parameters.max_grad_norm is not None:
        what = "`max_grad_norm` clips by the norm of all gradients"
        yield Problem(f"{what}, but `fused_backward` uses each before the others are there", WITHOUT, wrong_use=True)
    if world_size > 1:
        what = f"{world_size} processes average their gradients after the backward pass"
        hint = "train in one process, or remove `--fused_backward`"
        yield Problem(f"{what}, but `fused_backward` updates weights in it", hint, wrong_use=True)
    if mixed_precision == "fp16":
        what = "`mixed_precision` fp16 skips steps whose gradients overflow"
        hint = "pass `--mixed_precision bf16`, or remove `--fused_backward`"
        yield Problem(
            f"{what}, but `fused_backward` updates weights before all gradients are there", hint, wrong_use=True
        )
