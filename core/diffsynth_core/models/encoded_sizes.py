"""Sizes of encodings, from image sizes and captions alone. No torch."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from diffsynth_core.config.choices import ENCODER_DTYPES
from diffsynth_core.models.size_facts import BYTES, CaptionFacts, EmbeddingSpec, LatentFacts, MediaSize
from diffsynth_core.models.spec import EncoderFacts, Shapes
from diffsynth_core.models.token_counts import CaptionRule, count_tokens

Shown = Mapping[str, tuple[MediaSize, ...]]
"""Sizes of the target, by its column, and of conditions, by their names."""


@dataclass(frozen=True)
class EncodedSize:
    """How many numbers encoders make: in float32, and in the format that text encoders compute in."""

    wide: int = 0
    narrow: int = 0

    def __add__(self, other: "EncodedSize") -> "EncodedSize":
        return EncodedSize(self.wide + other.wide, self.narrow + other.narrow)

    def __mul__(self, count: int) -> "EncodedSize":
        return EncodedSize(self.wide * count, self.narrow * count)

    def bytes_in(self, precision: str) -> int:
        """Bytes, with what text encoders make in their own format at this `mixed_precision`."""
        return self.wide * BYTES["float32"] + self.narrow * BYTES[ENCODER_DTYPES[precision]]


def encoded_size(
    encoders: Iterable[EncoderFacts], denoiser: Shapes, text_states: int, shown: Shown, frame_step: int
) -> EncodedSize:
    """Return the size of the encodings of one sample, without masks of one number per latent frame.

    Args:
        denoiser: its shapes, which determine embedding widths; if unknown, those of the published model.
        text_states: of the caption and the images read with it; see `count_text_states`.
        frame_step: frames of a clip per latent frame (`TargetSpec`).
    """
    total = EncodedSize()
    for encoder in encoders:
        if encoder.caption:
            total += EncodedSize(narrow=text_states * embedding_dim(encoder.caption, denoiser))
        if encoder.states:
            total += EncodedSize(narrow=encoder.states.count * embedding_dim(encoder.states, denoiser))
        if encoder.latents:
            numbers = partial(_latent_numbers, encoder.latents, frame_step)
            total += EncodedSize(wide=sum(map(numbers, _read(encoder, shown))))
    return total


def embedding_dim(states: CaptionFacts | EmbeddingSpec, denoiser: Shapes) -> int:
    """Return the embedding width: that which the denoiser reads or, if unknown, that of the published model."""
    tensor, axis = states.side
    return denoiser[tensor][axis] if tensor in denoiser else states.width


def caption_encoder(encoders: Iterable[EncoderFacts]) -> EncoderFacts | None:
    """Return the encoder that reads the full caption."""
    return next((encoder for encoder in encoders if encoder.caption), None)


def count_text_states(
    encoders: Iterable[EncoderFacts], tokenizer: Path | None, captions: Sequence[str], shown: Sequence[Shown]
) -> tuple[list[int], bool]:
    """Return the number of text states of each caption with its images, and whether it is exact or an estimate.

    Args:
        tokenizer: folder of the tokenizer; None if it is not on disk.
        shown: media sizes of each caption's sample.
    """
    encoder = caption_encoder(encoders)
    if encoder is None or encoder.caption is None:
        return [0] * len(captions), True
    facts = encoder.caption
    if facts.padded:
        return [facts.most] * len(captions), True
    images = [_read(encoder, sizes) for sizes in shown]
    texts = [_announce(facts, len(seen)) + text for seen, text in zip(images, captions, strict=True)]
    counts, counted = count_tokens(texts, CaptionRule(facts, tokenizer))
    states = [count + _image_tokens(facts, seen) for count, seen in zip(counts, images, strict=True)]
    return [min(count, facts.most) for count in states], counted


def _announce(facts: CaptionFacts, images: int) -> str:
    """Return the text before a caption for a number of images, without image tokens."""
    return "".join(facts.announced.format(number=number, image="") for number in range(1, images + 1))


def _image_tokens(facts: CaptionFacts, images: Iterable[MediaSize]) -> int:
    """Return the number of tokens of images: sides are rounded to whole tokens, too small images are enlarged.

    Source: `smart_resize` of transformers' Qwen2-VL.
    """
    total = 0
    for _, *sides in images:
        tokens = math.prod(max(1, round(side / facts.image_side)) for side in sides)
        if tokens < facts.image_tokens:
            scale = math.sqrt(facts.image_tokens / math.prod(sides))
            tokens = math.prod(math.ceil(side * scale) for side in sides)
        total += tokens
    return total


def _read(encoder: EncoderFacts, shown: Shown) -> list[MediaSize]:
    return [size for column in encoder.columns for size in shown.get(column, ())]


def _latent_numbers(latents: LatentFacts, frame_step: int, size: MediaSize) -> int:
    frames, height, width = size
    latent_frames = (frames - 1) // frame_step + 1
    return latents.channels * latent_frames * (height // latents.factor) * (width // latents.factor)
