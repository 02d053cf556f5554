"""What the activations of a plan's steps take: each kind of step is measured once and remembered. No torch."""

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from diffsynth_core.errors import DiffSynthError, list_names
from diffsynth_core.models.activation_cache import StepActivations, remembered
from diffsynth_core.models.attention import ATTENTION_KERNELS
from diffsynth_core.models.registry import load_family
from diffsynth_core.models.shapes import count_blocks
from diffsynth_core.models.size_facts import ENCODED_AT_ONCE
from diffsynth_core.models.spec import EncoderFacts, is_below
from diffsynth_core.planning.memory.block_swap import units_of_blocks
from diffsynth_core.planning.memory.memory_config import MemoryConfig
from diffsynth_core.planning.plan import RunPlan
from diffsynth_core.planning.training.recomputation import checkpointing_of

if TYPE_CHECKING:
    from diffsynth_core.models.activation_memory import MeasuredComponent
    from diffsynth_core.models.family import Family
    from diffsynth_core.models.prepare import ComponentSetup

MEASURED_BLOCKS = 3
"""Blocks of each kind that are built of a transformer: the first, one for all between, and the last."""


def component_setup(plan: RunPlan, name: str, parameters: Collection[str], rank: int) -> "ComponentSetup":
    """How a component takes part in a step, as the plan says.

    Args:
        parameters: the names of those of its module.
        rank: of its LoRA, if it has one.
    """
    from diffsynth_core.models.prepare import ComponentSetup

    settings, layout = plan.parameters, plan.model.components[name].layout
    is_denoiser = name == plan.model.facts.denoiser
    blocks = settings.blocks_to_swap if is_denoiser else 0
    assert isinstance(blocks, int), "`auto` is resolved in planning"
    return ComponentSetup(
        trainable_weights(plan, name, parameters),
        plan.training.lora_modules if name == plan.training.lora_component else (),
        layout.public_keys,
        rank,
        settings.seed,
        checkpointing_of(settings, is_denoiser),
        units_of_blocks(plan.model, plan.training, blocks, settings.cpu_offload_split_threshold),
        settings.attention,
    )


def trainable_weights(plan: RunPlan, name: str, weights: Collection[str]) -> frozenset[str]:
    """Those of a component's weights that take gradients, without LoRA: named to train, and reached by a gradient."""
    asked = plan.training.weights(name, plan.model.components[name].layout, weights)
    dead = plan.model.variant.unused_params(plan.model.facts.component(name), frozenset(weights))
    return frozenset(weight for weight in asked if not is_below(weight, dead))


def step_activations(plan: RunPlan, config: MemoryConfig) -> StepActivations:
    """What the largest micro-batch of a step keeps for its backward pass."""
    names = step_components(plan)
    parts = {name: _part(plan, name, config) for name in sorted(names)}
    online = measured_encoders(plan)
    question = {
        "components": parts,
        "encoders": [encoder.name for encoder in online],
        "target": plan.model.variant.title,
        "inputs": plan.parameters.extra_inputs,
        "sizes": asdict(config.sizes),
        "precision": config.precision,
        "device": config.device,
        "checkpointing": config.checkpointing,
    }

    def measure() -> StepActivations:
        from diffsynth_core.models.activation_memory import StepInputs, measure_step
        from diffsynth_core.models.family import frozen_dtype

        family = load_family(plan.model.facts.name)
        components = {name: _measured(plan, family, name, config) for name in parts}
        autocast = None if config.precision == "no" else frozen_dtype(config.precision)
        inputs = StepInputs(plan.model.variant, tuple(online), config.sizes)
        with _errors_of_configurations(plan, components):
            return measure_step(family, components, inputs, autocast, config.device)

    return remembered(question, StepActivations, measure)


def encoder_activations(plan: RunPlan, component: str, config: MemoryConfig) -> int:
    """Bytes that a frozen VAE works with at its fullest, while it encodes the largest sample, or a batch of smaller
    ones; 0 for other encoders.
    """
    encoders = [
        encoder for encoder in plan.model.variant.encoders if encoder.component == component and encoder.latents
    ]
    if not encoders or not _is_known(plan, component):
        return 0
    question = {
        "encoder": _identity(plan, component),
        "encoders": [encoder.name for encoder in encoders],
        "inputs": plan.parameters.extra_inputs,
        "images": config.sizes.images,
        "precision": config.precision,
    }

    def measure() -> int:
        from diffsynth_core.models.activation_memory import StepInputs, measure_encoders
        from diffsynth_core.models.family import encoder_dtype

        family, dtype = load_family(plan.model.facts.name), encoder_dtype(config.precision)
        settings = _constructor_settings(plan, family, component)

        def peak(frames: int) -> int:
            images = tuple((min(frames, length), height, width) for length, height, width in config.sizes.images)
            inputs = StepInputs(plan.model.variant, tuple(encoders), replace(config.sizes, images=images))
            with _errors_of_configurations(plan, (component,)):
                return measure_encoders(family, component, settings, dtype, inputs)

        return _of_clip(peak, config.sizes.images[0][0], plan.model.variant.target.frame_step)

    return math.ceil(remembered(question, int, measure) * _encoded_together(config))


def decoder_activations(plan: RunPlan, config: MemoryConfig) -> int:
    """Bytes that the VAE works with at its fullest, while it decodes a preview; 0 if it is unknown."""
    component, job, target = plan.model.variant.decoder, plan.previews[0], plan.model.variant.target
    if not _is_known(plan, component):
        return 0
    encoder = next(one for one in plan.model.variant.encoders if target.column in one.columns)
    question = {
        "decoder": _identity(plan, component),
        "encoder": encoder.name,
        "inputs": plan.parameters.extra_inputs,
        "image": [job.num_frames, job.height, job.width],
        "precision": config.precision,
    }

    def measure() -> int:
        from diffsynth_core.models.activation_memory import StepInputs, measure_decoder
        from diffsynth_core.models.family import encoder_dtype

        family, dtype = load_family(plan.model.facts.name), encoder_dtype(config.precision)
        settings = _constructor_settings(plan, family, component)

        def peak(frames: int) -> int:
            sizes = replace(config.sizes, images=((frames, job.height, job.width),))
            with _errors_of_configurations(plan, (component,)):
                return measure_decoder(
                    family, component, settings, dtype, StepInputs(plan.model.variant, (encoder,), sizes)
                )

        return _of_clip(peak, job.num_frames, target.frame_step)

    return remembered(question, int, measure)


def _of_clip(peak: Callable[[int], int], frames: int, step: int) -> int:
    """Return what a VAE works with at its fullest for a clip, of which long ones are not measured whole: it takes the
    first frame, then `step` at a time, and from the third piece on each adds the same.

    Args:
        peak: number of frames -> what was measured for a clip of it.
    """
    two, three = 2 * step + 1, 3 * step + 1
    if frames <= three:
        return peak(frames)
    return peak(three) + (frames - three) // step * (peak(three) - peak(two))


def _encoded_together(config: MemoryConfig) -> float:
    """Return the pixels that a VAE encodes in one pass, as a multiple of those of the largest sample: small ones are
    encoded together, on a CPU in float32 only.
    """
    if config.device == "cpu" and config.precision != "no":
        return 1
    return max(1, ENCODED_AT_ONCE / math.prod(config.sizes.images[0]))


@contextmanager
def _errors_of_configurations(plan: RunPlan, components: Collection[str]) -> Iterator[None]:
    """Report what modules raise in the block as a fault of their configuration files, if they have any.

    Their shapes have been compared with those of the weights, which says nothing of settings without weights, such as
    axes of rotary embeddings and latent statistics.
    """
    try:
        yield
    except DiffSynthError:
        raise
    except Exception as error:  # a model raises anything
        paths = [str(path) for name in sorted(components) if (path := plan.model.components[name].config_path)]
        if not paths:
            raise
        names, reason = list_names(paths), " ".join(str(error).split()) or type(error).__name__
        raise DiffSynthError(
            f"a model built from {names} cannot process a sample: {reason}",
            "if the file was changed, download it again; otherwise, put the config.json of these weights in its place",
        ) from error


def step_components(plan: RunPlan) -> frozenset[str]:
    """Components that take part in a step: the denoiser, those beside it, and encoders that train."""
    names = {plan.model.facts.denoiser, *plan.model.variant.step_components, *plan.training.components}
    return frozenset(name for name in names & plan.model.components.keys() if plan.model.shapes.get(name))


def measured_encoders(plan: RunPlan) -> list[EncoderFacts]:
    """Encoders that encode in every step, because their components train, as far as they can be measured."""
    online = plan.training.components & step_components(plan)
    return [
        encoder for encoder in plan.model.variant.encoders if encoder.component in online and not encoder.reads_values
    ]


def _is_known(plan: RunPlan, component: str) -> bool:
    """Whether a component can be built: its files are there, or its configuration is published."""
    return component not in plan.model.published or plan.model.published[component].config is not None


def _identity(plan: RunPlan, component: str) -> Any:
    """What a component's module is built from, as JSON."""
    files = plan.model.components[component]
    settings = [component, plan.model.facts.name, dict(files.settings)]
    if component in plan.model.published:
        return [*settings, plan.model.published[component].config]
    config = files.config_path.read_text(encoding="utf-8") if files.config_path else None
    return [*settings, config, sorted(plan.model.shapes[component].items())]


def _constructor_settings(plan: RunPlan, family: "Family", component: str) -> dict[str, Any]:
    files = plan.model.components[component]
    config = plan.model.published[component].config if component in plan.model.published else None
    if config is None:
        config = family.config_of(files, plan.model.shapes[component])
    return dict(config) | dict(files.settings)


def _part(plan: RunPlan, component: str, config: MemoryConfig) -> Any:
    """All that a component's part in a step depends on, as JSON."""
    training = config.training(plan)
    lora = [training.lora_modules, config.rank] if component == training.lora_component else None
    whole = component in training.full
    parts = [_identity(plan, component), lora, whole, training.parts.get(component), config.storage[component]]
    kernel = ATTENTION_KERNELS[plan.parameters.attention].backend
    return [*parts, *([] if training.dtype == "float32" else [training.dtype]), *([kernel] if kernel else [])]


def _measured(plan: RunPlan, family: "Family", component: str, config: MemoryConfig) -> "MeasuredComponent":
    """A component for the measurement, with as few blocks as tell of all."""
    from diffsynth_core.models.activation_memory import MeasuredComponent
    from diffsynth_core.models.family import frozen_dtype

    shapes, layout = plan.model.shapes[component], plan.model.components[component].layout
    setup, settings = (
        component_setup(plan, component, shapes, config.rank),
        _constructor_settings(plan, family, component),
    )
    depths = plan.model.facts.component(component).blocks
    blocks = {name: count for name in depths if (count := count_blocks(shapes, f"{name}."))}
    own = {module: layout.public_keys.to_targets(module) or () for module in setup.lora_modules}
    carriers = frozenset(name for names in own.values() for name in names)
    if blocks and _are_alike(blocks, setup.trained | carriers):
        settings |= {
            option: min(settings[option], MEASURED_BLOCKS) for option in depths.values() if settings.get(option)
        }
        built = tuple(module for module, names in own.items() if _built(names, carriers, blocks))
        setup = replace(setup, lora_modules=built, trained=_built(shapes, setup.trained, blocks))
    else:
        blocks = {}
    return MeasuredComponent(
        settings,
        frozen_dtype(config.precision),
        replace(setup, checkpointing=config.checkpointing if component == plan.model.facts.denoiser else "full"),
        config.training(plan).float32_weights(component, layout, shapes),
        config.storage[component],
        blocks,
    )


def _are_alike(blocks: Mapping[str, int], trained: Collection[str]) -> bool:
    """Whether the same trains in each block of a list but the last.

    Args:
        blocks: lists and their lengths.
        trained: weights, and modules with a LoRA.
    """
    of_block: dict[tuple[str, int], set[str]] = defaultdict(set)
    for name in trained:
        if found := _block_of(name, blocks):
            of_block[found[:2]].add(found[2])
    return all(
        of_block[name, index] == of_block[name, 0] for name, count in blocks.items() for index in range(count - 1)
    )


def _built(names: Collection[str], chosen: Collection[str], blocks: Mapping[str, int]) -> frozenset[str]:
    """Those of the names that are chosen, in what is built: the last built block of a list stands for its last."""
    found = set()
    for name in names:
        stands_for = name
        block = _block_of(name, blocks)
        if block and blocks[block[0]] > MEASURED_BLOCKS:
            outer, index, rest = block
            if index >= MEASURED_BLOCKS:
                continue
            if index == MEASURED_BLOCKS - 1:
                stands_for = f"{outer}.{blocks[outer] - 1}.{rest}"
        if stands_for in chosen:
            found.add(name)
    return frozenset(found)


def _block_of(name: str, blocks: Iterable[str]) -> tuple[str, int, str] | None:
    """The list of blocks that a weight stands in, its place there, and its name below; None outside of them."""
    outer = next((outer for outer in blocks if name.startswith(f"{outer}.")), None)
    if outer is None:
        return None
    index, _, rest = name.removeprefix(f"{outer}.").partition(".")
    return outer, int(index), rest
