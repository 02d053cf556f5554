"""What a family states about sizes without torch: of published weights, of what encoders make, of a step's memory."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

MediaSize = tuple[int, int, int]
"""(frames, height, width) in pixels."""

BYTES = {"float8": 1, "bfloat16": 2, "float16": 2, "float32": 4}
"""Of a number, by dtype."""

Side = tuple[str, int]
"""A side of a tensor of the denoiser: (name in our module, axis)."""


@dataclass(frozen=True)
class StepSizes:
    """What one micro-batch brings to the transformer.

    `images`: what is trained on, then each image shown.
    `text_tokens`: of the longest text, with images read with it, where the family's are not all of one length.
    """

    batch: int
    images: tuple[MediaSize, ...]
    text_tokens: int

    @property
    def area(self) -> int:
        """Pixels of a frame of what is trained on."""
        return self.images[0][1] * self.images[0][2]


def as_written(caption: str) -> str:
    """For encoders that read a caption as it is."""
    return caption


@dataclass(frozen=True)
class CaptionFacts:
    """How an encoder reads a caption, and how large what it makes of it is.

    `tokenizer`: the parameter that names its tokenizer.
    `most`: tokens of which it keeps a state; what is behind them is cut off.
    `width`: values of a state in published models; the `side` of a denoiser tells how many it reads.
    `template`: the text that the caption stands in, at `{}`. `dropped`: tokens at its start whose states are not kept.
    `around`: tokens that the rest of the template and the tokenizer add.
    `padded`: there are always `most` states. `clean`: what is done to the caption first.
    `announced`: what stands before the caption for each image read with it: its `{number}` from 1, and its tokens at
    `{image}`, one for each square of `image_side` pixels a side and no fewer than `image_tokens`; blank where no
    images are read.
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
    """How large the latents of an image or clip are: float32 `channels` for each square of `factor` pixels a side."""

    channels: int
    factor: int


@dataclass(frozen=True)
class EmbeddingSpec:
    """So many states of the encoder's dtype, of `width` values in published models; `side` as in CaptionFacts."""

    count: int
    width: int
    side: Side


@dataclass(frozen=True)
class HubModelSize:
    """The size of a published component, for when its files are not there.

    `files`: pattern (fnmatch) of `model_id:file`. `parameters`: how many numbers its weights are, tied ones once; 0
    where that is not known.
    `dtype`: the format they are published in. `config`: the constructor settings of its module; None: not known.
    """

    component: str
    files: str
    parameters: int
    dtype: Literal["bfloat16", "float32"]
    config: Mapping[str, Any] | None = None


def unknown_size(component: str, entry: str) -> HubModelSize:
    """A component of which nothing tells the size."""
    return HubModelSize(component, entry, 0, "bfloat16")
