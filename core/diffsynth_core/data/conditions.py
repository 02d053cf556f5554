"""What a model reads of a dataset, column by column: the one declaration for training, planning and the report.

A family declares its target and its conditions once (models/*/spec.py); `Columns` is the choice of one run among them.
Light to import: families state their facts without Pillow, ffmpeg or torch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

ReferenceSize = Callable[[int, int, int], tuple[int, int]]
"""(width, height, `max_pixels`) of an image -> (height, width) that it is scaled to; 0 where it is too small."""


@dataclass(frozen=True)
class TargetSpec:
    """The metadata column of what the model is trained on.

    `size_factor`: sides are multiples of it, in pixels.
    `frame_step`: a video has a multiple of it, and one more, as its number of frames.
    `usual_pixels`: the area of a frame that the published models were trained at; far smaller files teach them blur.
    """

    column: str
    kind: Literal["image", "video"]
    size_factor: int
    frame_step: int = 1
    usual_pixels: int = 1024 * 1024


@dataclass(frozen=True)
class Condition:
    """An input of the model beside caption and target, read from a metadata column at one size.

    `name`: what encoders call it; a column that is read at two sizes has two conditions.
    `media`: `image`: loaded as RGB; `mask`: as one channel, in which white selects.
    `size`: how an image gets the size that it is loaded at; `target`: it covers the target and is cropped to its size;
    None: not known without a model.
    `factor`: the loaded sides are multiples of it, cropped at the center.
    `max_count`: how many files a row may list; None: any number.
    `required`: a row without a file is an error.
    """

    name: str
    column: str
    size: ReferenceSize | Literal["target"] | None = None
    media: Literal["image", "mask"] = "image"
    factor: int = 1
    max_count: int | None = None
    required: bool = True

    @property
    def aligned(self) -> bool:
        """Whether it lies over the target, pixel by pixel."""
        return self.size == "target"


@dataclass(frozen=True)
class Columns:
    """The columns of a dataset by what they hold.

    `sampling`: how a sampler made the image, which distillation reads of each row. `others`: columns that this run does
    not read and that are not worth a finding.
    """

    text: str
    target: str
    conditions: tuple[Condition, ...] = ()
    sampling: tuple[str, ...] = ()
    others: tuple[str, ...] = ()

    @cached_property
    def references(self) -> tuple[str, ...]:
        """The columns of reference images."""
        return tuple(dict.fromkeys(one.column for one in self.conditions if one.media == "image"))

    @cached_property
    def masks(self) -> tuple[str, ...]:
        """The columns of masks."""
        return tuple(dict.fromkeys(one.column for one in self.conditions if one.media == "mask"))

    @cached_property
    def media(self) -> tuple[str, ...]:
        """The columns that name files."""
        return tuple(dict.fromkeys((self.target, *(one.column for one in self.conditions))))

    @cached_property
    def required(self) -> tuple[str, ...]:
        """The columns that must be there."""
        conditions = (one.column for one in self.conditions if one.required)
        return tuple(dict.fromkeys((self.target, *conditions, self.text, *self.sampling)))

    @cached_property
    def known(self) -> tuple[str, ...]:
        """The columns that are read, and those that are not worth a finding."""
        return tuple(dict.fromkeys((self.text, *self.media, *self.sampling, *self.others)))

    @cached_property
    def required_media(self) -> frozenset[str]:
        """The columns whose cell must name a file."""
        return frozenset((self.target, *(one.column for one in self.conditions if one.required)))

    @cached_property
    def max_counts(self) -> dict[str, int | None]:
        """Column -> how many files a row may list; None: any number."""
        return {one.column: one.max_count for one in self.conditions} | {self.target: 1}

    def unknown(self, present: Sequence[str]) -> list[str]:
        """The columns of a dataset that are not read."""
        return [name for name in present if name and name not in self.known]
