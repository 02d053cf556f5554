"""Sizes that a family declares without torch: of published weights, of encodings, of a training step."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

MediaSize = tuple[int, int, int]
"""(frames, height, width) in pixels."""

TOKENS_AT_ONCE = 1024
"""Most tokens of all captions that a frozen text encoder encodes in one pass, unless a single one has more.

With more than some 500, a pass takes longer for its operations than for reading the weights; as many are in the longest
caption of Qwen-Image, so that a batch of short ones needs no more memory.
"""
ENCODED_AT_ONCE = 256 * 256
"""Most pixels of all images or clips that a frozen encoder encodes in one pass, unless a single one has more."""


def encoded_at_once(shapes: Iterable[Sequence[int]]) -> int:
    """Return how many samples a frozen encoder encodes in one pass.

    Args:
        shapes: of the images and clips that it reads of one, `(…, F, H, W)` each.
    """
    pixels = sum(math.prod(shape[-3:]) for shape in shapes)
    return max(1, ENCODED_AT_ONCE // pixels) if pixels else 1


def captions_at_once(tokens: int) -> int:
    """Return how many captions of as many tokens each a frozen text encoder encodes in one pass."""
    return max(1, TOKENS_AT_ONCE // tokens)


BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
"""Bytes per element, by dtype."""

Side = tuple[str, int]
"""A dimension of a tensor of the denoiser: (module key, axis)."""


@dataclass(frozen=True)
class StepSizes:
    """The inputs of one micro-batch.

    Attributes:
        images: size of the target, then of each reference image.
        text_tokens: tokens of the longest text including its images, for families without a fixed length.
    """

    batch: int
    images: tuple[MediaSize, ...]
    text_tokens: int

    @property
    def area(self) -> int:
        """Pixels of a frame of the target."""
        return self.images[0][1] * self.images[0][2]


def as_written(caption: str) -> str:
    """Return the caption unchanged."""
    return caption


@dataclass(frozen=True)
class CaptionFacts:
    """How an encoder reads a caption, and the size of its output.

    Attributes:
        tokenizer: parameter of its tokenizer.
        most: maximum number of tokens; the rest is truncated.
        width: width of the published encoder.
        side: dimension of the denoiser that equals the width.
        template: text around the caption, which replaces `{}`.
        dropped: tokens at the start of the template whose states are dropped.
        around: tokens added by the rest of the template and the tokenizer.
        padded: there are always `most` states.
        clean: preprocessing of the caption.
        announced: text before the caption for each image: `{number}` is its number from 1, `{image}` its tokens, one
            per square of `image_side` pixels a side, and at least `image_tokens`; empty if no images are read.
    """

    tokenizer: str
    most: int
    width: int
    side: Side = ("", 0)
    template: str = "{}"
    dropped: int = 0
    around: int = 0
    padded: bool = False
    clean: Callable[[str], str] = as_written
    announced: str = ""
    image_side: int = 1
    image_tokens: int = 1


@dataclass(frozen=True)
class LatentFacts:
    """Size of the latents of an image or clip: float32 `channels` for each square of `factor` pixels a side."""

    channels: int
    factor: int


@dataclass(frozen=True)
class EmbeddingSpec:
    """A fixed number of states in the encoder's dtype, with the published `width`; `side` as in `CaptionFacts`."""

    count: int
    width: int
    side: Side


@dataclass(frozen=True)
class HubModelSize:
    """The size of a published component, used when its files are missing.

    Attributes:
        files: pattern (fnmatch) of `model_id:file`.
        parameters: number of parameters, tied ones once; 0 if unknown.
        dtype: dtype of the published files.
        config: constructor options of its module; None if unknown.
    """

    component: str
    files: str
    parameters: int
    dtype: Literal["bfloat16", "float32"]
    config: Mapping[str, Any] | None = None


def unknown_size(component: str, entry: str) -> HubModelSize:
    """Return the entry of a component of unknown size."""
    return HubModelSize(component, entry, 0, "bfloat16")
