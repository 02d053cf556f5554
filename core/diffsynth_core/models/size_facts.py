"""What a family states about sizes without torch: of published weights, of what encoders make, of a step's memory."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from diffsynth_core.models.tape import MediaSize, StepSizes, Tape

Side = tuple[str, int]
"""A side of a tensor of the denoiser: (name in our module, axis)."""


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
    `dtype`: the format they are published in. `shapes`: those of its tensors, by the names of our module, where more
    than their number is needed.
    """

    component: str
    files: str
    parameters: int
    dtype: Literal["bfloat16", "float32"]
    shapes: Callable[[], Mapping[str, tuple[int, ...]]] = dict


def unknown_size(component: str, entry: str) -> HubModelSize:
    """A component of which nothing tells the size."""
    return HubModelSize(component, entry, 0, "bfloat16")


@dataclass(frozen=True)
class MemoryFacts:
    """What the memory of a step depends on.

    `play`: the forward pass of the denoiser on a tape.
    `encoding_numbers`: the latents, and what they are made of -> numbers in memory at once, weights apart, while the
    published VAE's encoder works, at the fullest moment.
    `wide`: parts of the names of weights that stay float32 in a frozen denoiser.
    """

    play: Callable[[Tape, StepSizes], None]
    encoding_numbers: Callable[[LatentFacts, MediaSize], int]
    wide: frozenset[str] = frozenset()
