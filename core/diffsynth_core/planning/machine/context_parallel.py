"""Whether processes can compute a sample together, each a part of its tokens. No torch."""

import math
from collections.abc import Collection, Iterable, Iterator

from diffsynth_core.config.choices import RECOMPUTATIONS
from diffsynth_core.config.parameters import Parameters
from diffsynth_core.errors import Problem
from diffsynth_core.models.forward_work import count_image_tokens
from diffsynth_core.models.size_facts import MediaSize
from diffsynth_core.planning.model.model_plan import ModelPlan
from diffsynth_core.progress import pluralize, verb

KERNELS = ("auto", "sdpa")
"""Values of `attention` whose exchange of tokens and heads is proven."""
SHOWN_SIZES = 3
WITHOUT = "or pass `--context_parallel 1`"


def can_divide(model: ModelPlan) -> bool:
    """Return whether processes can divide the tokens of the model's samples at all."""
    return model.facts.component(model.facts.denoiser).heads is not None


def context_parallel_problems(
    parameters: Parameters,
    model: ModelPlan,
    trained: Collection[str],
    world_size: int,
    sizes: Iterable[MediaSize],
) -> Iterator[Problem]:
    """Yield why processes cannot compute each sample together.

    Args:
        trained: components that train.
        sizes: of the clips that the model reads or draws.
    """
    count = parameters.context_parallel
    if count == 1 or not can_divide(model):  # that the family has no such parameter is a problem of its own
        return
    if world_size % count:
        are = f"there {verb(world_size, 'is', 'are')} {pluralize(world_size, 'process', 'processes')}"
        what = f"`context_parallel` {count} needs a multiple of {count} processes, and {are}"
        yield Problem(what, f"pass a multiple of {count} as `--num_processes`, {WITHOUT}", wrong_use=True)
    yield from _exclusions(parameters)
    for encoder in model.variant.encoders:
        if encoder.latents and encoder.component in trained:
            # Each process would have its gradient of the target whole, beside its part of that through the model.
            what = f"{encoder.component} does not train with `context_parallel`: it makes what the loss compares with"
            yield Problem(what, f"train without {encoder.component}, {WITHOUT}", wrong_use=True)
    yield from _indivisible(count, model, sizes)


def _exclusions(parameters: Parameters) -> Iterator[Problem]:
    """Yield parameters that do not go with processes that exchange tokens."""
    if parameters.compile:
        what = "`compile` does not go with `context_parallel`, whose processes communicate within blocks"
        yield Problem(what, f"remove `--compile`, {WITHOUT}", wrong_use=True)
    if parameters.attention not in KERNELS:
        what = f"`attention` `{parameters.attention}` is not supported with `context_parallel`"
        yield Problem(what, f"pass `--attention sdpa`, {WITHOUT}", wrong_use=True)
    if parameters.checkpointing and RECOMPUTATIONS[parameters.checkpointing].keeps_attention:
        what = f"`checkpointing` `{parameters.checkpointing}` keeps the output of attention, which `context_parallel` computes again in any case"
        yield Problem(what, f"pass `--checkpointing full`, {WITHOUT}", wrong_use=True)


def _indivisible(count: int, model: ModelPlan, sizes: Iterable[MediaSize]) -> Iterator[Problem]:
    """Yield that the heads of the model, or the tokens of clips of these sizes, cannot be divided by `count`."""
    heads, target = _heads(model), model.variant.target
    if heads and heads % count:
        what = f"`context_parallel` {count} does not divide the {heads} attention heads of {model.facts.denoiser}"
        able = _divisors([heads])
        yield Problem(what, f"pass {able}" if able else "remove it", wrong_use=True)
    tokens = {size: count_image_tokens(size, target) for size in sizes}
    odd = [
        f"{width} x {height} x {frames} frames ({number} tokens)"
        for (frames, height, width), number in tokens.items()
        if number % count
    ]
    if odd:
        more = f" and {len(odd) - SHOWN_SIZES} more" if len(odd) > SHOWN_SIZES else ""
        what = f"`context_parallel` {count} does not divide the tokens of clips of {', '.join(odd[:SHOWN_SIZES])}{more}"
        token = f"a token is {target.size_factor} x {target.size_factor} pixels of {target.frame_step} frames, or of the first"
        able = _divisors([*tokens.values(), *([heads] if heads else [])])
        other = f"pass {able}, or " if able else ""
        yield Problem(what, f"{other}change `--num_frames`, `--height` or `--width`: {token}", wrong_use=True)


def _heads(model: ModelPlan) -> int | None:
    """Return the attention heads of the denoiser; None without its files."""
    facts = model.facts.component(model.facts.denoiser)
    files, shapes = model.components.get(facts.name), model.shapes.get(facts.name)
    return facts.heads(files, shapes) if facts.heads and files and shapes else None


def _divisors(numbers: Iterable[int]) -> str:
    """Return the common divisors of numbers above 1, as a choice in words; empty without any."""
    common = math.gcd(*numbers)
    *others, last = ["", *(str(number) for number in range(2, common + 1) if common % number == 0)]
    return f"{', '.join(others[1:])} or {last}" if others[1:] else last
