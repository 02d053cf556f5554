"""Inputs of a model from a dataset, column by column, declared once for training, planning and the report.

A family declares its target and conditions in models/*/spec.py; `Columns` is the selection of one run. Light to
import: without Pillow, ffmpeg or torch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

ReferenceSize = Callable[[int, int, int], tuple[int, int]]
"""(width, height, `max_pixels`) of an image -> (height, width) to scale it to; 0 if it is too small."""


@dataclass(frozen=True)
class TargetSpec:
    """The metadata column of the target.

    Attributes:
        size_factor: sides are multiples of it, in pixels.
        frame_step: the number of frames of a video is a multiple of it, plus one.
        usual_pixels: training area of the published models; training on much smaller files teaches blur.
    """

    column: str
    kind: Literal["image", "video"]
    size_factor: int
    frame_step: int = 1
    usual_pixels: int = 1024 * 1024


@dataclass(frozen=True)
class Condition:
    """An input of the model besides caption and target, read from a metadata column at one size.

    Attributes:
        name: name for encoders; a column that is read at two sizes has two conditions.
        media: `image`: loaded as RGB; `mask`: loaded as one channel, in which white selects; `video`: the frames that
            belong to those of the target, at its size.
        size: how an image is resized; `target`: it covers the target and is cropped to its size; None: unknown without
            a model.
        factor: sides are multiples of it, center-cropped.
        max_count: maximum number of files in a row; None: unlimited.
        required: a row without a file is an error.
    """

    name: str
    column: str
    size: ReferenceSize | Literal["target"] | None = None
    media: Literal["image", "mask", "video"] = "image"
    factor: int = 1
    max_count: int | None = None
    required: bool = True

    @property
    def aligned(self) -> bool:
        """Whether it overlays the target pixel by pixel."""
        return self.size == "target"


@dataclass(frozen=True)
class ValueCondition:
    """An input of the model besides caption and target that is written in the metadata itself.

    Attributes:
        kind: `number`: finite; `text`: not empty.
        required: an empty cell is an error.
    """

    column: str
    kind: Literal["number", "text"]
    required: bool = True


@dataclass(frozen=True)
class Columns:
    """The columns of a dataset by content.

    Attributes:
        conditions: those with files.
        values: those with numbers and texts.
        sampling: sampler parameters of each row, for distillation.
        others: columns that this run ignores without a finding.
    """

    text: str
    target: str
    conditions: tuple[Condition, ...] = ()
    sampling: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    values: tuple[ValueCondition, ...] = ()

    @cached_property
    def references(self) -> tuple[str, ...]:
        """Columns of reference images."""
        return tuple(dict.fromkeys(one.column for one in self.conditions if one.media == "image"))

    @cached_property
    def masks(self) -> tuple[str, ...]:
        """Columns of masks."""
        return tuple(dict.fromkeys(one.column for one in self.conditions if one.media == "mask"))

    @cached_property
    def clips(self) -> frozenset[str]:
        """Columns of videos that are conditions."""
        return frozenset(one.column for one in self.conditions if one.media == "video")

    @cached_property
    def media(self) -> tuple[str, ...]:
        """Columns with file names."""
        return tuple(dict.fromkeys((self.target, *(one.column for one in self.conditions))))

    @cached_property
    def required(self) -> tuple[str, ...]:
        """Required columns."""
        conditions = (one.column for one in self.conditions if one.required)
        values = (one.column for one in self.values if one.required)
        return tuple(dict.fromkeys((self.target, *conditions, *values, self.text, *self.sampling)))

    @cached_property
    def known(self) -> tuple[str, ...]:
        """Columns that are read, or ignored without a finding."""
        values = (one.column for one in self.values)
        return tuple(dict.fromkeys((self.text, *self.media, *values, *self.sampling, *self.others)))

    @cached_property
    def required_media(self) -> frozenset[str]:
        """Columns whose cells must name a file."""
        return frozenset((self.target, *(one.column for one in self.conditions if one.required)))

    @cached_property
    def max_counts(self) -> dict[str, int | None]:
        """Column -> maximum number of files in a row; None: unlimited."""
        return {one.column: one.max_count for one in self.conditions} | {self.target: 1}

    def unknown(self, present: Sequence[str]) -> list[str]:
        """Return the columns of a dataset that are not read."""
        return [name for name in present if name and name not in self.known]
