"""What the backward pass recomputes of activations, and what contradicts it. No torch."""

from collections.abc import Iterator

from diffsynth_core.config.choices import RECOMPUTATIONS, Checkpointing
from diffsynth_core.config.parameters import Parameters
from diffsynth_core.errors import Problem


def recomputes(parameters: Parameters) -> bool:
    """Return whether activations are recomputed: their offload includes that."""
    return parameters.use_gradient_checkpointing or parameters.use_gradient_checkpointing_offload


def checkpointing_of(parameters: Parameters, is_denoiser: bool) -> Checkpointing | None:
    """Return what is recomputed of a component's blocks: all, unless it is the denoiser; None: nothing."""
    if not recomputes(parameters):
        return None
    return (parameters.checkpointing if is_denoiser else None) or "full"


def recomputation_problems(parameters: Parameters) -> Iterator[Problem]:
    """Yield why activations cannot be recomputed as the parameters say."""
    if parameters.checkpointing and not recomputes(parameters):
        what = f"`checkpointing` is {parameters.checkpointing}, but no activations are recomputed"
        hint = "pass `--use_gradient_checkpointing`, or remove `--checkpointing`"
        yield Problem(what, hint, wrong_use=True)
    kept = parameters.checkpointing and RECOMPUTATIONS[parameters.checkpointing].keeps_attention
    if kept and parameters.use_gradient_checkpointing_offload:
        what = f"`checkpointing` {parameters.checkpointing} keeps the output of attention on the GPU"
        hint = "remove one of them"
        yield Problem(f"{what}, but `use_gradient_checkpointing_offload` frees it", hint, wrong_use=True)
