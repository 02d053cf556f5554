"""Blocks of the denoiser that wait in host memory: how many, and which. No torch."""

from collections.abc import Iterator

from diffsynth_core.config.choices import RECOMPUTATIONS
from diffsynth_core.config.parameters import Parameters
from diffsynth_core.config.tasks import TASKS
from diffsynth_core.errors import Problem, report
from diffsynth_core.models.block_swap import choose_blocks, frozen_blocks, swap_units
from diffsynth_core.planning.memory.remembered import remembered
from diffsynth_core.planning.model.model_plan import ModelPlan
from diffsynth_core.planning.training.recomputation import recomputes
from diffsynth_core.planning.training.targets import Training
from diffsynth_core.progress import pluralize

Units = tuple[tuple[str, ...], ...]
"""Linear layers, by module key, in the groups that are copied together."""


def swappable_blocks(model: ModelPlan, training: Training) -> tuple[str, ...]:
    """Return the blocks of the denoiser that may wait in host memory, in the order of the forward pass: the frozen
    ones, or all if all train.
    """
    return _frozen_blocks(model, training) or _frozen_blocks(model, None)


def trained_blocks(model: ModelPlan, training: Training, number: int | str) -> tuple[str, ...]:
    """Return the blocks of which trained weights wait in host memory if this many blocks do: none if some are frozen.

    They are module keys, in the order of the forward pass.
    """
    blocks = () if _frozen_blocks(model, training) else _frozen_blocks(model, None)
    assert isinstance(number, int), "`auto` is resolved in planning"
    return choose_blocks(blocks, min(number, len(blocks))) if number and blocks else ()


@remembered
def _frozen_blocks(model: ModelPlan, training: Training | None) -> tuple[str, ...]:
    """Return the frozen blocks of the denoiser; None: all, as if nothing trained."""
    denoiser = model.facts.denoiser
    shapes = model.shapes.get(denoiser)
    if not shapes:
        return ()
    trained = training.weights(denoiser, model.components[denoiser].layout, shapes) if training else ()
    return frozen_blocks(model.facts.component(denoiser), shapes, trained)


def units_of_blocks(model: ModelPlan, training: Training, number: int, split: float | None) -> Units:
    """Return what is copied together if this many frozen blocks wait in host memory.

    Args:
        split: `cpu_offload_split_threshold`.
    """
    blocks = _frozen_blocks(model, training)
    if not number or not blocks:
        return ()
    facts, shapes = model.facts.component(model.facts.denoiser), model.shapes[model.facts.denoiser]
    return swap_units(facts, shapes, choose_blocks(blocks, min(number, len(blocks))), split)


def with_number_of_blocks(parameters: Parameters, model: ModelPlan, training: Training) -> Parameters:
    """Return the parameters with the number of blocks to swap in `blocks_to_swap`, where it may still be `auto`.

    Reports problems.
    """
    if not TASKS[parameters.task].trains:
        return parameters
    asked, name = parameters.blocks_to_swap, "blocks_to_swap"
    if parameters.enable_model_cpu_offload and asked:
        what = "`enable_model_cpu_offload` swaps all blocks, but `blocks_to_swap` is set too"
        report(Problem(what, "remove one of them", wrong_use=True))
    elif parameters.enable_model_cpu_offload:
        name = "enable_model_cpu_offload"
    elif not asked:
        if parameters.cpu_offload_split_threshold is not None:
            what = "`cpu_offload_split_threshold` is set, but no blocks wait in host memory"
            report(Problem(what, "set `--blocks_to_swap`, or remove it", wrong_use=True))
        return parameters
    if asked == "auto" and not parameters.gpu_memory:
        what = "`blocks_to_swap` `auto` is the fewest blocks that fit in `gpu_memory`, which is not set"
        report(Problem(what, "set `--gpu_memory`, such as 24GB or 4090", wrong_use=True))
    if not model.shapes.get(model.facts.denoiser):
        return parameters  # of unknown size, because its files are missing or wrong
    blocks = swappable_blocks(model, training)
    report(*_problems(name, asked, blocks, model, training))
    if blocks and not _frozen_blocks(model, training):
        report(*_training_problems(name, parameters, model.facts.denoiser))
    if name == "blocks_to_swap":
        return parameters
    return parameters.model_copy(update={"blocks_to_swap": len(blocks), "enable_model_cpu_offload": False})


def _problems(name: str, asked: object, blocks: tuple[str, ...], model: ModelPlan, training: Training) -> list[Problem]:
    """Return why so many blocks cannot be swapped."""
    denoiser, count = model.facts.denoiser, len(_frozen_blocks(model, None))
    if not model.facts.component(denoiser).blocks:
        what = f"`{name}`: the {denoiser} of {model.facts.title} has no blocks that could wait in host memory"
        return [Problem(what, "remove it", wrong_use=True)]
    if isinstance(asked, int) and asked > len(blocks):
        of_all = "frozen block" if denoiser in {*training.full, *training.parts} and len(blocks) < count else "block"
        what = f"`{name}` is {asked}, but {denoiser} has {pluralize(len(blocks), of_all)}"
        return [Problem(what, f"pass `--{name} {len(blocks)}` or less", wrong_use=True)]
    return []


def _training_problems(name: str, parameters: Parameters, denoiser: str) -> Iterator[Problem]:
    """Yield why blocks that train cannot wait in host memory."""
    needed = {
        "--fused_backward": parameters.fused_backward,
        "--use_gradient_checkpointing": recomputes(parameters),
    }
    if missing := [flag for flag, given in needed.items() if not given]:
        flags = " and ".join(f"`{flag}`" for flag in missing)
        what = f"`{name}`: the blocks of {denoiser} train, and can wait in host memory only with {flags}"
        yield Problem(what, f"pass `{' '.join(missing)}`, or remove `--{name}`", wrong_use=True)
    if parameters.checkpointing and RECOMPUTATIONS[parameters.checkpointing].keeps_more:
        what = f"`{name}`: the blocks of {denoiser} train, and can wait in host memory only if nothing of them is kept"
        hint = f"remove `--checkpointing {parameters.checkpointing}`, or `--{name}`"
        yield Problem(what, hint, wrong_use=True)
    if parameters.task.startswith("direct_distill"):
        what = f"`{name}`: the blocks of {denoiser} train, and distillation needs their weights in all steps of its sampler"
        yield Problem(what, f"remove `--{name}`", wrong_use=True)
    if parameters.cpu_offload_split_threshold is not None:
        what = f"`cpu_offload_split_threshold`: the blocks of {denoiser} train, and are copied as a whole"
        yield Problem(what, "remove it", wrong_use=True)
