"""Images and videos alike: what a file holds, which part of it is trained on, and its pixels. No torch."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from diffsynth_core.data.animations import is_animation
from diffsynth_core.data.colour import COLOUR_TRANSFORM, Colours
from diffsynth_core.data.conditions import Condition
from diffsynth_core.data.formats import ending_of, media_kind
from diffsynth_core.data.images import (
    IMAGE_TRANSFORM,
    MASK_TRANSFORM,
    ImageHeader,
    SizeRule,
    load_image,
    load_mask,
    read_image_header,
)
from diffsynth_core.data.video_probe_cache import VideoProbeCache
from diffsynth_core.data.videos import VIDEO_TRANSFORM, load_clip
from diffsynth_core.errors import DiffSynthError
from diffsynth_core.randomness import key_of


@dataclass(frozen=True)
class FrameRule:
    """Which frames of a video are trained on.

    At most `num_frames`, always a multiple of `step` and one more, after resampling to `frame_rate` frames a second
    (None: the file's own frames). Where they begin is drawn, for `random`, from the seed and the row alone: the same in
    every epoch, so that each clip is encoded once.
    """

    num_frames: int
    step: int
    frame_rate: float | None
    start: Literal["first", "middle", "random"]
    seed: int

    @property
    def frames_to_count(self) -> int | None:
        """How far the frames of a file must be counted; None: to the end."""
        return self.num_frames if self.start == "first" else None

    def length(self, available: int) -> int:
        """How many frames of `available` are trained on."""
        return (min(available, self.num_frames) - 1) // self.step * self.step + 1

    def first(self, available: int, row: int) -> int:
        """The frame, from 0, at which the part of row `row` begins."""
        spare = available - self.length(available)
        if self.start == "random":
            return key_of("clip", self.seed, row) * (spare + 1) // 2**64
        return spare // 2 if self.start == "middle" else 0


@dataclass(frozen=True)
class MediaRule:
    """How the files of a metadata column become what is trained on; without `frames` they are images.

    `usual_pixels`: the area that a file of this run is usually trained at; 0: any.
    """

    size: SizeRule
    frames: FrameRule | None = None
    usual_pixels: int = 0


@dataclass(frozen=True)
class MediaHeader:
    """What a file holds: its upright size in pixels, and how many frames, as far as the rule wants them counted."""

    width: int
    height: int
    frames: int
    video: bool
    rotated: bool
    transparent: bool
    frame_rate: float | None = None
    pages: int = 1
    colours: Colours = field(default_factory=Colours)


@dataclass(frozen=True)
class MediaCrop:
    """Which frames of a media file are loaded, and at which size in pixels: of a target or of a reference image.

    `scaled`: (height, width) that an image is scaled to before its centre is cut out; None: until it covers the size.
    `converted`: its colours are converted to sRGB from a profile in the file.
    `mask`: it is loaded as one channel, in which white selects.
    """

    path: Path
    height: int
    width: int
    video: bool = False
    start: int = 0
    frames: int = 1
    frame_rate: float | None = None
    scaled: tuple[int, int] | None = None
    converted: bool = False
    mask: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """(frames, height, width)."""
        return self.frames, self.height, self.width

    @property
    def first_frame(self) -> "MediaCrop":
        """Its first frame alone."""
        return replace(self, frames=1)

    @property
    def transform(self) -> list[object]:
        """All that its pixels depend on, besides the bytes of the file."""
        if not self.video:
            colours = ["sRGB", COLOUR_TRANSFORM] if self.converted else []
            mask = ["mask", MASK_TRANSFORM] if self.mask else []
            return [self.height, self.width, IMAGE_TRANSFORM, *(self.scaled or ()), *colours, *mask]
        return [self.height, self.width, VIDEO_TRANSFORM, self.start, self.frames, self.frame_rate]


def read_media_header(path: Path, rule: MediaRule, videos: VideoProbeCache) -> MediaHeader:
    """What a file holds; a video is decoded for it, once ever.

    Raises:
        DiffSynthError: when the file is neither image nor video, or is damaged.
    """
    if rule.frames and is_clip(path):
        video = videos.header(path)
        frames = videos.count(path, rule.frames.frame_rate, rule.frames.frames_to_count)
        return MediaHeader(video.width, video.height, frames, True, video.rotated, False, video.frame_rate)
    image = read_image_header(path)
    return MediaHeader(
        image.width,
        image.height,
        1,
        False,
        image.rotated,
        image.transparent,
        None,
        image.pages,
        image.colours,
    )


def is_clip(path: Path) -> bool:
    """Whether a file is read as a clip where clips are trained on: a video, a GIF, or an animated image.

    Raises:
        DiffSynthError: when it is neither clip nor image.
    """
    kind = media_kind(path)
    if kind not in ("clip", "image", "unsupported") and path.is_file() and path.stat().st_size:
        raise DiffSynthError(f"`{path}` is neither a video nor an image", "convert it to MP4, or remove its row")
    return kind == "clip" or ending_of(path.name) == ".gif" or is_animation(path)


def choose_target(path: Path, header: MediaHeader, rule: MediaRule, row: int) -> MediaCrop:
    """What of a file is trained on; a side of 0 means that it is too small."""
    height, width = rule.size.target(header.width, header.height)
    if not header.video or rule.frames is None:
        return MediaCrop(path, height, width, converted=bool(header.colours.profile))
    frames = rule.frames.length(header.frames)
    start = rule.frames.first(header.frames, row)
    return MediaCrop(path, height, width, True, start, frames, rule.frames.frame_rate)


def choose_reference(
    path: Path, header: ImageHeader, condition: Condition, target: MediaCrop, max_pixels: int
) -> MediaCrop:
    """How a file of a condition is loaded beside `target`; a side of 0 means that it is too small.

    `max_pixels`: the area that reference images are scaled down to at most, as targets are.

    Raises:
        ValueError: for a condition whose size is not known.
    """
    converted, mask = bool(header.colours.profile), condition.media == "mask"
    if condition.size is None:
        raise ValueError(f"the size of `{condition.name}` is not known")
    if condition.size == "target":
        return MediaCrop(path, target.height, target.width, converted=converted, mask=mask)
    scaled = condition.size(header.width, header.height, max_pixels)
    height, width = (side // condition.factor * condition.factor for side in scaled)
    return MediaCrop(path, height, width, scaled=scaled, converted=converted, mask=mask)


def scale_of(crop: MediaCrop, width: int, height: int) -> float:
    """The factor by which a file of `width` x `height` pixels is scaled for a crop; above 1 it is scaled up."""
    covered = crop.scaled or (crop.height, crop.width)
    return max(covered[1] / width, covered[0] / height)


def load_pixels(crop: MediaCrop) -> NDArray[np.uint8]:
    """Pixels of a media file, `[F, H, W, 3]`, RGB, 0..255, of a mask `[1, H, W, 1]`; one decoding pass.

    Raises:
        DiffSynthError: when the file cannot be decoded, or ends before the last frame asked for.
    """
    if crop.mask:
        return load_mask(crop.path, crop.height, crop.width, crop.scaled)[None]
    if not crop.video:
        return load_image(crop.path, crop.height, crop.width, crop.scaled)[None]
    start, frames = crop.start, crop.frames
    return load_clip(crop.path, start, frames, crop.height, crop.width, crop.frame_rate)
