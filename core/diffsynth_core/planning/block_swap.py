"""Blocks of the denoiser that wait in host memory: how many, and which. No torch."""

from diffsynth_core.config.parameters import Parameters
from diffsynth_core.config.tasks import TASKS
from diffsynth_core.errors import Problem, report
from diffsynth_core.models.block_swap import choose_blocks, frozen_blocks, swap_units
from diffsynth_core.planning.model_plan import ModelPlan
from diffsynth_core.planning.targets import Training
from diffsynth_core.progress import pluralize

Units = tuple[tuple[str, ...], ...]
"""Linear layers, by module key, in the groups that are copied together."""


def swappable_blocks(model: ModelPlan, training: Training) -> tuple[str, ...]:
    """Return the blocks of the denoiser that may wait in host memory, in the order of the forward pass."""
    denoiser = model.facts.denoiser
    shapes = model.shapes.get(denoiser)
    if not shapes:
        return ()
    trained = training.weights(denoiser, model.components[denoiser].layout, shapes)
    return frozen_blocks(model.facts.component(denoiser), shapes, trained)


def units_of_blocks(model: ModelPlan, training: Training, number: int, split: float | None) -> Units:
    """Return what is copied together if this many blocks wait in host memory.

    Args:
        split: `cpu_offload_split_threshold`.
    """
    blocks = swappable_blocks(model, training)
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
    if name == "blocks_to_swap":
        return parameters
    return parameters.model_copy(update={"blocks_to_swap": len(blocks), "enable_model_cpu_offload": False})


def _problems(name: str, asked: object, blocks: tuple[str, ...], model: ModelPlan, training: Training) -> list[Problem]:
    """Return why so many blocks cannot be swapped."""
    denoiser = model.facts.denoiser
    if not model.facts.component(denoiser).blocks:
        what = f"`{name}`: the {denoiser} of {model.facts.title} has no blocks that could wait in host memory"
        return [Problem(what, "remove it", wrong_use=True)]
    if not blocks:
        what = f"`{name}`: only frozen blocks can wait in host memory, and those of {denoiser} train"
        hint = f"train a LoRA with `--lora_base_model {denoiser}` instead of `--trainable_models`, or remove it"
        return [Problem(what, hint, wrong_use=True)]
    if isinstance(asked, int) and asked > len(blocks):
        of_all = "frozen block" if {denoiser} & {*training.full, *training.parts} else "block"
        what = f"`{name}` is {asked}, but {denoiser} has {pluralize(len(blocks), of_all)}"
        return [Problem(what, f"pass `--{name} {len(blocks)}` or less", wrong_use=True)]
    return []
