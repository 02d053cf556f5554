"""The largest micro-batch of a plan, and how many numbers are kept of each encoded sample. No torch."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from diffsynth_core.data.samples import Sample
from diffsynth_core.families.interface import EncodedSize, References
from diffsynth_core.families.tape import Picture, StepSizes
from diffsynth_core.planning.plan import Plan

ASSUMED_CAPTION = 300
"""Characters of a caption, where there is no dataset."""
CHARACTERS_PER_TOKEN = 4
"""Of text in ASCII; other letters are counted as a token each."""


def largest_micro_batch(plan: Plan) -> StepSizes:
    """The micro-batch of most pixels that the dataset gives; without one, the largest that the parameters allow."""
    samples = plan.samples.samples
    if not samples:
        return _assumed(plan)
    members = Counter(sample.bucket for sample in samples)

    def batch(sample: Sample) -> int:
        return min(plan.parameters.batch_size, members[sample.bucket] * plan.parameters.dataset_repeat)

    largest = max(samples, key=lambda sample: batch(sample) * sum(map(math.prod, sample.shape)))
    caption = max(caption_tokens(sample.caption) for sample in samples)
    return replace(sizes_of_sample(plan, largest, caption), batch=batch(largest))


def sizes_of_sample(plan: Plan, sample: Sample, caption: int) -> StepSizes:
    """What one sample brings to the transformer, with a caption of so many tokens."""
    shown = {name: tuple(excerpt.shape for excerpt in found) for name, found in sample.references.items()}
    return _sizes(plan, sample.target.shape, shown, caption)


def encoded_size(plan: Plan) -> EncodedSize:
    """Numbers kept of all samples together; of one of the largest size where there is no dataset."""
    shapes = plan.shapes.get(plan.facts.denoiser)
    if not shapes:
        return EncodedSize(0, 0)
    if not plan.samples.samples:
        return plan.facts.memory.encoded(shapes, replace(_assumed(plan), batch=1))
    kinds: Counter[StepSizes] = Counter(
        sizes_of_sample(plan, sample, caption_tokens(sample.caption)) for sample in plan.samples.samples
    )
    sizes = [(plan.facts.memory.encoded(shapes, kind), count) for kind, count in kinds.items()]
    return EncodedSize(
        sum(size.wide * count for size, count in sizes), sum(size.narrow * count for size, count in sizes)
    )


def caption_tokens(caption: str) -> int:
    """About how many tokens a caption is, told by its letters alone."""
    latin = sum(letter.isascii() for letter in caption)
    return -(-latin // CHARACTERS_PER_TOKEN) + len(caption) - latin


def shrink(sizes: StepSizes, share: float, factor: int) -> StepSizes:
    """The same pictures at a share of their area, sides multiples of `factor`."""
    scale = math.sqrt(share)

    def side(length: int) -> int:
        return max(factor, int(length * scale) // factor * factor)

    pictures = tuple((frames, side(height), side(width)) for frames, height, width in sizes.pictures)
    return replace(sizes, pictures=pictures)


def _assumed(plan: Plan) -> StepSizes:
    """The largest sample that the parameters allow, with a picture of each kind that the model is shown."""
    parameters, medium = plan.parameters, plan.variant.medium
    side = math.isqrt(parameters.max_pixels) // medium.size_factor * medium.size_factor
    height, width = parameters.height or side, parameters.width or side
    frames = parameters.num_frames if medium.kind == "video" else 1
    shown = {
        reference.name: (_assumed_reference(reference, height, width, parameters.max_pixels),)
        for reference in plan.variant.references
    }
    sizes = _sizes(plan, (frames, height, width), shown, -(-ASSUMED_CAPTION // CHARACTERS_PER_TOKEN))
    return replace(sizes, batch=parameters.batch_size)


def _assumed_reference(reference: References, height: int, width: int, max_pixels: int) -> Picture:
    if reference.size is None:
        return 1, height, width
    return 1, *reference.size(width, height, max_pixels)


def _sizes(plan: Plan, target: Picture, shown: Mapping[str, tuple[Picture, ...]], caption: int) -> StepSizes:
    variant, text_column = plan.variant, plan.facts.text_column
    seen_with_text = {name for part in variant.encoders if text_column in part.columns for name in part.columns}
    encoded = {name for part in variant.encoders if text_column not in part.columns for name in part.columns}
    beside = () if variant.in_step else tuple(p for name, found in shown.items() if name in encoded for p in found)
    with_text = tuple(picture for name, found in shown.items() if name in seen_with_text for picture in found)
    settings = plan.components[plan.facts.denoiser].settings if plan.facts.denoiser in plan.components else {}
    return StepSizes(
        1,
        (target, *beside),
        plan.facts.memory.text_tokens(caption, with_text),
        frozenset(settings),
        bool(variant.given_frames),
    )
