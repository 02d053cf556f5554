"""Images and videos: the content of a file, the part that is used, and its pixels. No torch."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from diffsynth_core.data.animations import is_animation
from diffsynth_core.data.color import COLOR_TRANSFORM, Colors
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
    """The frames of a video to use.

    Up to `num_frames`, always a multiple of `step` plus one, after resampling to `frame_rate` (None: the file's own
    frames). With `random`, the start is drawn from seed and row only: the same in every epoch, so that each clip is
    encoded once.
    """

    num_frames: int
    step: int
    frame_rate: float | None
    start: Literal["first", "middle", "random"]
    seed: int

    @property
    def frames_to_count(self) -> int | None:
        """Number of frames up to which a file must be counted; None: to the end."""
        return self.num_frames if self.start == "first" else None

    def length(self, available: int) -> int:
        """Return how many of `available` frames are used."""
        return (min(available, self.num_frames) - 1) // self.step * self.step + 1

    def first(self, available: int, row: int) -> int:
        """Return the first used frame, from 0, for row `row`."""
        spare = available - self.length(available)
        if self.start == "random":
            return key_of("clip", self.seed, row) * (spare + 1) // 2**64
        return spare // 2 if self.start == "middle" else 0


@dataclass(frozen=True)
class MediaRule:
    """How files of a column become targets; without `frames` they are images.

    Attributes:
        usual_pixels: usual training area of a file; 0: any.
    """

    size: SizeRule
    frames: FrameRule | None = None
    usual_pixels: int = 0


@dataclass(frozen=True)
class MediaHeader:
    """Content of a file: its upright size in pixels, and its number of frames, as far as the rule requires it."""

    width: int
    height: int
    frames: int
    video: bool
    rotated: bool
    transparent: bool
    frame_rate: float | None = None
    pages: int = 1
    colors: Colors = field(default_factory=Colors)


@dataclass(frozen=True)
class MediaCrop:
    """The frames of a media file to load, and their size in pixels, for a target or a condition.

    Attributes:
        scaled: (height, width) to which an image is scaled before it is center-cropped; None: until it covers the
            size.
        converted: its colors are converted to sRGB from an embedded profile.
        mask: it is loaded as one channel, in which white selects.
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
        """Its first frame only."""
        return replace(self, frames=1)

    @property
    def transform(self) -> list[object]:
        """Everything that its pixels depend on, besides the bytes of the file."""
        if not self.video:
            colors = ["sRGB", COLOR_TRANSFORM] if self.converted else []
            mask = ["mask", MASK_TRANSFORM] if self.mask else []
            return [self.height, self.width, IMAGE_TRANSFORM, *(self.scaled or ()), *colors, *mask]
        return [self.height, self.width, VIDEO_TRANSFORM, self.start, self.frames, self.frame_rate]


def read_media_header(path: Path, rule: MediaRule, videos: VideoProbeCache) -> MediaHeader:
    """Return the content of a file; a video is decoded for it once, and the result cached.

    Raises:
        DiffSynthError: if the file is neither an image nor a video, or is damaged.
    """
    if rule.frames and is_clip(path):
        video = videos.header(path)
        frames = videos.count(path, rule.frames.frame_rate, rule.frames.frames_to_count)
        return MediaHeader(
            width=video.width,
            height=video.height,
            frames=frames,
            video=True,
            rotated=video.rotated,
            transparent=False,
            frame_rate=video.frame_rate,
        )
    image = read_image_header(path)
    return MediaHeader(
        width=image.width,
        height=image.height,
        frames=1,
        video=False,
        rotated=image.rotated,
        transparent=image.transparent,
        pages=image.pages,
        colors=image.colors,
    )


def is_clip(path: Path) -> bool:
    """Return whether a file counts as a clip in a dataset of clips: a video, a GIF, or an animated image.

    Raises:
        DiffSynthError: if the file is neither a clip nor an image.
    """
    kind = media_kind(path)
    if kind not in ("clip", "image", "unsupported") and path.is_file() and path.stat().st_size:
        raise DiffSynthError(f"`{path}` is neither a video nor an image", "convert it to MP4, or remove its row")
    return kind == "clip" or ending_of(path.name) == ".gif" or is_animation(path)


def choose_target(path: Path, header: MediaHeader, rule: MediaRule, row: int) -> MediaCrop:
    """Return the part of a file to train on; a side of 0 means that the file is too small."""
    height, width = rule.size.target(header.width, header.height)
    if not header.video or rule.frames is None:
        return MediaCrop(path, height, width, converted=bool(header.colors.profile))
    frames = rule.frames.length(header.frames)
    start = rule.frames.first(header.frames, row)
    return MediaCrop(path, height, width, True, start, frames, rule.frames.frame_rate)


def choose_reference(
    path: Path, header: ImageHeader | MediaHeader, condition: Condition, target: MediaCrop, max_pixels: int
) -> MediaCrop:
    """Return how a file of a condition is loaded with `target`; a side of 0 means that it is too small.

    Args:
        max_pixels: maximum area of reference images, as for targets.

    Raises:
        ValueError: for a condition of unknown size.
    """
    converted, mask = bool(header.colors.profile), condition.media == "mask"
    if condition.size is None:
        raise ValueError(f"the size of `{condition.name}` is not known")
    if condition.media == "video" and isinstance(header, MediaHeader) and header.video:
        return replace(target, path=path, video=True, converted=False)
    if condition.size == "target":
        return MediaCrop(path, target.height, target.width, converted=converted, mask=mask)
    scaled = condition.size(header.width, header.height, max_pixels)
    height, width = (side // condition.factor * condition.factor for side in scaled)
    return MediaCrop(path, height, width, scaled=scaled, converted=converted, mask=mask)


def scale_of(crop: MediaCrop, width: int, height: int) -> float:
    """Return the factor by which a file of `width` x `height` pixels is scaled for a crop; above 1 it is upscaled."""
    covered = crop.scaled or (crop.height, crop.width)
    return max(covered[1] / width, covered[0] / height)


def load_pixels(crop: MediaCrop) -> NDArray[np.uint8]:
    """Load the pixels of a media file, `[F, H, W, 3]`, RGB, 0..255, or of a mask, `[1, H, W, 1]`, in one decoding
    pass.

    Raises:
        DiffSynthError: if the file cannot be decoded, or ends before the last requested frame.
    """
    if crop.mask:
        return load_mask(crop.path, crop.height, crop.width, crop.scaled)[None]
    if not crop.video:
        return load_image(crop.path, crop.height, crop.width, crop.scaled)[None]
    start, frames = crop.start, crop.frames
    return load_clip(crop.path, start, frames, crop.height, crop.width, crop.frame_rate)
