"""The largest micro-batch of a plan, and how many numbers are kept of each encoded sample. No torch."""

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from diffsynth_core.config.choices import ENCODER_DTYPES, MOST_COMPILATIONS
from diffsynth_core.data.batches import SampleRef
from diffsynth_core.data.conditions import Condition
from diffsynth_core.data.encoded_samples import EncodedSamples
from diffsynth_core.data.samples import Sample
from diffsynth_core.errors import DiffSynthError
from diffsynth_core.models.encoded_sizes import (
    EncodedSize,
    Shown,
    caption_encoder,
    count_text_states,
    embedding_dim,
    encoded_size,
)
from diffsynth_core.models.size_facts import BYTES, MediaSize, StepSizes
from diffsynth_core.models.spec import EncoderFacts
from diffsynth_core.planning.plan import RunPlan

ASSUMED_CAPTION = 300
"""Characters of a caption, where there is no dataset."""


@dataclass(frozen=True)
class Workload:
    """What a run is made of.

    `largest`: the micro-batch of most pixels that the dataset gives; without one, the largest that the parameters
    allow. Its text is the longest of all.
    `encoded`: numbers that the cache keeps of all samples; of one of the largest size where there is no dataset.
    `counted`: the tokens of captions are known, not estimated by letters.
    """

    largest: StepSizes
    encoded: EncodedSize
    counted: bool


def find_workload(plan: RunPlan) -> Workload:
    """How large what a run works with is."""
    samples = plan.data.samples.samples
    if not samples:
        return _assumed(plan)
    shown = [_shown(plan, sample) for sample in samples]
    states, counted = _text_states(plan, samples, shown)
    kinds = Counter(zip(states, (tuple(sizes.items()) for sizes in shown), strict=True))
    each = [_encoded(plan, text, dict(sizes)) * count for (text, sizes), count in kinds.items()]
    each.append(_encoded_empty_caption(plan, samples, shown))
    largest = largest_batch(plan, range(len(samples)))
    sizes = replace(sizes_of_sample(plan, samples[largest[0].sample], max(states)), batch=len(largest))
    return Workload(sizes, sum(each, EncodedSize()), counted)


def largest_batch(plan: RunPlan, among: Iterable[int]) -> list[SampleRef]:
    """Return a micro-batch of most pixels that some samples may form, of those with the longest captions.

    Args:
        among: indices of samples, at least one.
    """
    params, samples = plan.parameters, plan.data.samples.samples
    buckets: dict[Hashable, list[int]] = {}
    for index in among:
        buckets.setdefault(samples[index].bucket, []).append(index)

    def batch(members: Sequence[int]) -> int:
        return min(params.batch_size, len(members) * params.dataset_repeat)

    largest = max(buckets.values(), key=lambda members: batch(members) * sum(map(math.prod, samples[members[0]].shape)))
    ordered = sorted(largest, key=lambda index: max(map(len, samples[index].captions)), reverse=True)
    return [SampleRef(ordered[place % len(ordered)], place // len(ordered)) for place in range(batch(largest))]


def count_batch_shapes(plan: RunPlan) -> tuple[int, bool]:
    """Return how many shapes micro-batches may have at most, and whether the tokens of captions are known.

    Shapes differ in bucket, number of samples, tokens of the longest caption, and in whether shorter ones are masked.
    """
    batches, samples, size = plan.data.steps.batches, plan.data.samples.samples, plan.parameters.batch_size
    shown = [_shown(plan, sample) for sample in samples]
    lengths, counted = _text_lengths(plan, samples, shown)
    if any(sample.with_empty_caption for sample in samples):
        encoder = caption_encoder(plan.model.variant.encoders)
        tokenizer = plan.model.tokenizers.get(encoder.caption.tokenizer) if encoder and encoder.caption else None
        empty, _ = count_text_states(plan.model.variant.encoders, tokenizer, [""] * len(samples), shown)
        lengths = [{*own, length} for own, length in zip(lengths, empty, strict=True)]
    total = 0
    for bucket in batches.buckets:
        different = len(set().union(*(lengths[member] for member in bucket.members)))
        full, rest = divmod(len(bucket.members) * plan.parameters.dataset_repeat, size)
        for number in {size if full else 0, rest} - {0}:
            total += different if number == 1 else 2 * different - 1
    return total, counted


def check_compilations(plan: RunPlan) -> None:
    """Check that blocks need not be compiled more often than PyTorch does.

    Raises:
        DiffSynthError: if there are too many batch shapes for it.
    """
    if not plan.parameters.compile:
        return
    shapes, _ = count_batch_shapes(plan)
    most = most_batch_shapes(plan)
    if shapes > most:
        raise DiffSynthError(
            f"`compile` compiles blocks for up to {shapes} batch shapes, but PyTorch does for {most} at most",
            "train on fewer image sizes or lengths of captions, or remove `--compile`",
        )


def most_batch_shapes(plan: RunPlan) -> int:
    """Return for how many batch shapes the blocks of the denoiser can be compiled: the first block of a list, whose
    inputs may have no gradient, the last one, of which less may train, and those between are compiled apart.
    """
    lists = len(plan.model.facts.component(plan.model.facts.denoiser).blocks)
    return MOST_COMPILATIONS // (3 * max(1, lists))


def sizes_of_sample(plan: RunPlan, sample: Sample, text_states: int) -> StepSizes:
    """Inputs of the transformer for one sample, with this many text tokens."""
    return _sizes(plan, _shown(plan, sample), text_states)


def cached_encoders(plan: RunPlan) -> list[EncoderFacts]:
    """Encoders that are frozen, so that what they make is kept."""
    return [encoder for encoder in plan.model.variant.encoders if encoder.component not in plan.training.components]


def _shown(plan: RunPlan, sample: Sample) -> Shown:
    shown = {name: tuple(crop.shape for crop in found) for name, found in sample.conditions.items()}
    return {plan.model.variant.target.column: (sample.target.shape,), **shown}


def _text_states(plan: RunPlan, samples: Sequence[Sample], shown: Sequence[Shown]) -> tuple[list[int], bool]:
    """States of each sample's longest text, and whether they were counted."""
    lengths, counted = _text_lengths(plan, samples, shown)
    return [max(own) for own in lengths], counted


def _text_lengths(plan: RunPlan, samples: Sequence[Sample], shown: Sequence[Shown]) -> tuple[list[set[int]], bool]:
    """States of each sample's texts, and whether they were counted: with the tokenizer, or when they were encoded."""
    encoder = caption_encoder(plan.model.variant.encoders)
    if plan.data.encoded and encoder and encoder.caption and encoder.name in plan.data.encoded.origin.encoders:
        width = embedding_dim(encoder.caption, plan.model.shapes.get(plan.model.facts.denoiser, {}))
        return _states_in_files(plan.data.encoded, encoder.name, width), True
    tokenizer = plan.model.tokenizers.get(encoder.caption.tokenizer) if encoder and encoder.caption else None
    encoders, first = plan.model.variant.encoders, [sample.caption for sample in samples]
    counts, counted = count_text_states(encoders, tokenizer, first, shown)
    lengths = [{count} for count in counts]
    for place, sample in enumerate(samples):
        if sample.other_captions:
            others, _ = count_text_states(
                encoders, tokenizer, sample.other_captions, [shown[place]] * len(sample.other_captions)
            )
            lengths[place].update(others)
    return lengths, counted


def _states_in_files(encoded: EncodedSamples, encoder: str, width: int) -> list[set[int]]:
    """States that the files of an encoder for each sample hold, whose heads are smaller than a state."""
    each = width * BYTES[ENCODER_DTYPES[encoded.origin.precision.partition(",")[0]]]
    return [{file.bytes // each for file in files[encoder]} for files in encoded.files]


def _encoded(plan: RunPlan, text_states: int, shown: Shown) -> EncodedSize:
    denoiser = plan.model.shapes.get(plan.model.facts.denoiser, {})
    return encoded_size(cached_encoders(plan), denoiser, text_states, shown, plan.model.variant.target.frame_step)


def _encoded_empty_caption(plan: RunPlan, samples: Sequence[Sample], shown: Sequence[Shown]) -> EncodedSize:
    """What is kept of the empty caption, if samples are trained with it: once of encoders that read nothing besides,
    once a sample of those that read its images too.
    """
    if plan.data.encoded or not any(sample.with_empty_caption for sample in samples):
        return EncodedSize()
    variant, text_column = plan.model.variant, plan.model.facts.text_column
    reading = [encoder for encoder in cached_encoders(plan) if text_column in encoder.columns]
    alone = [encoder for encoder in reading if encoder.columns == (text_column,)]
    beside = [encoder for encoder in reading if encoder not in alone]
    facts = caption_encoder(variant.encoders)
    tokenizer = plan.model.tokenizers.get(facts.caption.tokenizer) if facts and facts.caption else None
    denoiser, step = plan.model.shapes.get(plan.model.facts.denoiser, {}), variant.target.frame_step
    states, _ = count_text_states(variant.encoders, tokenizer, [""] * len(samples), shown)
    size = encoded_size(alone, denoiser, states[0], {}, step)
    if beside:
        size = sum((encoded_size(beside, denoiser, count, {}, step) for count in states), size)
    return size


def shrink(sizes: StepSizes, share: float, factor: int) -> StepSizes:
    """The same images at a share of their area, sides multiples of `factor`."""
    scale = math.sqrt(share)

    def side(length: int) -> int:
        return max(factor, int(length * scale) // factor * factor)

    images = tuple((frames, side(height), side(width)) for frames, height, width in sizes.images)
    return replace(sizes, images=images)


def _assumed(plan: RunPlan) -> Workload:
    """Of the largest sample that the parameters allow, with an image of each kind that the model is shown."""
    parameters, target = plan.parameters, plan.model.variant.target
    side = math.isqrt(parameters.max_pixels) // target.size_factor * target.size_factor
    height, width = parameters.height or side, parameters.width or side
    frames = parameters.num_frames if target.kind == "video" else 1
    images = {
        condition.name: (_assumed_size(condition, height, width, parameters.max_pixels),)
        for condition in plan.model.variant.conditions
    }
    shown = {target.column: ((frames, height, width),), **images}
    (states,), counted = count_text_states(plan.model.variant.encoders, None, ["x" * ASSUMED_CAPTION], [shown])
    largest = replace(_sizes(plan, shown, states), batch=parameters.batch_size)
    return Workload(largest, _encoded(plan, states, shown), counted)


def _assumed_size(condition: Condition, height: int, width: int, max_pixels: int) -> MediaSize:
    if condition.size is None or condition.size == "target":
        return 1, height, width
    return 1, *condition.size(width, height, max_pixels)


def _sizes(plan: RunPlan, shown: Mapping[str, tuple[MediaSize, ...]], text_states: int) -> StepSizes:
    variant, text_column = plan.model.variant, plan.model.facts.text_column
    encoded = {name for part in variant.encoders if text_column not in part.columns for name in part.columns}
    target = shown[variant.target.column]
    others = {name: found for name, found in shown.items() if name in encoded and name != variant.target.column}
    beside = () if variant.step_components else tuple(image for found in others.values() for image in found)
    return StepSizes(1, (*target, *beside), text_states)
