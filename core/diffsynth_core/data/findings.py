"""Findings of dataset checks: all codes, and findings as values. No torch.

`CODES` declares all codes; docs/dataset_checks.md is generated from it. Checks create findings with `finding`, which
takes the level from the table. Training rejects errors; `dataset validate` reports everything.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Level = Literal["error", "warning", "info"]
"""Severity of a finding."""
LEVELS: tuple[Level, ...] = ("error", "warning", "info")
"""Worst first. error: training cannot use the row, or would learn nonsense; warning: should be checked; info: a
fact.
"""
SUBJECTS = {
    "metadata": "Metadata",
    "path": "Paths",
    "image": "Images",
    "caption": "Captions",
    "pair": "Image pairs",
    "video": "Videos",
    "set": "Whole dataset",
}
"""Subject of a code -> title, in the order of the reference page."""


@dataclass(frozen=True)
class Code:
    """A code: its subject, its level, and a line of explanation.

    Attributes:
        exception: findings with another level, and which.
    """

    subject: str
    level: Level
    explanation: str
    exception: str = ""


CODES: Mapping[str, Code] = {
    "NOT_UTF8": Code("metadata", "error", "The metadata file or a caption file is not UTF-8"),
    "PARSE_ERROR": Code("metadata", "error", "The metadata cannot be parsed at this line"),
    "METADATA_UNUSED": Code("metadata", "warning", "Another metadata file exists and is not read"),
    "EMPTY": Code("metadata", "error", "The dataset has no samples"),
    "COLUMN_MISSING": Code("metadata", "error", "A column that training reads is missing"),
    "COLUMN_UNKNOWN": Code("metadata", "warning", "A column is not read by training"),
    "CELL_EMPTY": Code("metadata", "error", "A cell that must name a file is empty"),
    "CELL_TYPE": Code("metadata", "error", "A cell has the wrong type for its column"),
    "ROW_DUPLICATE": Code("metadata", "warning", "A row is duplicated"),
    "PATH_MISSING": Code("path", "error", "A listed file does not exist"),
    "PATH_CASE": Code(
        "path",
        "error",
        "A file name differs only in case or accents from the one listed, which matters on most filesystems",
    ),
    "PATH_OUTSIDE": Code(
        "path",
        "error",
        "A path is absolute, or leaves the dataset through `..` or a symbolic link",
        "a warning for links to folders, which are not followed",
    ),
    "FOLDER_UNREADABLE": Code(
        "path",
        "warning",
        "A folder in the dataset cannot be read, so its contents are unknown",
        "an error without a metadata file, where each media file is a row",
    ),
    "FILE_UNREFERENCED": Code("path", "warning", "An image, video or caption in the dataset folder is not used"),
    "FORMAT_UNSUPPORTED": Code(
        "path",
        "warning",
        "An image or clip has a format that no installed decoder supports",
        "an error where it has a caption file, because it is meant as a sample",
    ),
    "FILE_UNKNOWN": Code("path", "warning", "A file in the dataset is not an image, clip, caption or metadata file"),
    "FILE_LEFTOVER": Code("path", "info", "Files left by operating systems and other programs are skipped"),
    "STEM_COLLISION": Code("path", "error", "Two media files share one caption file"),
    "URL": Code("path", "error", "A URL is given instead of a file; nothing is downloaded"),
    "IMAGE_UNREADABLE": Code("image", "error", "An image cannot be decoded"),
    "IMAGE_TRUNCATED": Code("image", "error", "An image file is truncated"),
    "IMAGE_TYPE_MISMATCH": Code("image", "warning", "The format of an image does not match its file extension"),
    "IMAGE_BOMB": Code("image", "error", "An image declares more pixels than the decoding limit"),
    "IMAGE_TOO_SMALL": Code("image", "error", "A side of an image is below the minimum"),
    "IMAGE_ASPECT": Code("image", "warning", "An image has an extreme aspect ratio"),
    "IMAGE_CROP_LOSS": Code("image", "warning", "Cropping an image or video to its training size removes much of it"),
    "IMAGE_UPSCALED": Code("image", "warning", "An image or video is upscaled to its training or reference size"),
    "IMAGE_LOW_RESOLUTION": Code("image", "warning", "An image or video is far below the model's usual training size"),
    "IMAGE_EXIF_ROTATED": Code("image", "info", "The EXIF orientation of an image is applied"),
    "IMAGE_ALPHA": Code("image", "warning", "An image has transparent pixels, which are composited on white"),
    "IMAGE_MODE": Code("image", "warning", "Converting the color mode of an image to RGB is lossy"),
    "IMAGE_COLOURS": Code(
        "image",
        "info",
        "An image is converted to sRGB from its embedded color profile",
        "a warning where its color information cannot be applied",
    ),
    "IMAGE_ANIMATED": Code(
        "image",
        "error",
        "An image is animated, but a still image is needed",
        "a warning for a TIFF with several pages, of which the first is used",
    ),
    "IMAGE_DUPLICATE": Code("image", "warning", "Images have identical pixels"),
    "IMAGE_NEAR_DUPLICATE": Code("image", "warning", "Images are nearly identical"),
    "IMAGE_BLANK": Code("image", "warning", "An image has a single color"),
    "CAPTION_AMBIGUOUS": Code("caption", "error", "One image or clip has several caption files"),
    "CAPTION_MISSING": Code(
        "caption",
        "error",
        "A sample has no caption: no caption file, or an empty cell",
        "a warning for a cell, which trains with an empty caption",
    ),
    "CAPTION_EMPTY": Code("caption", "warning", "A caption is blank: an empty caption file, or a cell of spaces"),
    "CAPTION_NAN": Code("caption", "error", "A caption is a placeholder for a missing value, such as `nan`"),
    "CAPTION_DUPLICATE": Code("caption", "info", "Several samples have the same caption"),
    "CAPTION_ALL_SAME": Code("caption", "warning", "All samples have the same caption"),
    "CAPTION_TOO_LONG": Code("caption", "warning", "A caption has more tokens than the text encoder uses"),
    "CAPTION_CONTROL_CHARS": Code(
        "caption", "warning", "A caption has control characters", "an error for an unpaired surrogate"
    ),
    "PAIR_MISSING": Code("pair", "error", "A row lacks the reference image that the model needs"),
    "PAIR_COUNT": Code("pair", "error", "A row lists more files in a column than are supported"),
    "PAIR_ASPECT": Code("pair", "warning", "An image has another aspect ratio than the target it must align with"),
    "PAIR_IDENTICAL": Code("pair", "warning", "A reference image has the same pixels as its target"),
    "MASK_EMPTY": Code("pair", "error", "A mask selects nothing, or everything"),
    "MASK_SIZE": Code("pair", "error", "A mask and its image differ in size"),
    "VIDEO_UNREADABLE": Code("video", "error", "A video cannot be decoded"),
    "VIDEO_TRUNCATED": Code("video", "error", "A video file is truncated"),
    "VIDEO_TOO_SHORT": Code(
        "video",
        "warning",
        "A video has fewer frames than `num_frames`",
        "an error where all of its frames are conditioning frames",
    ),
    "VIDEO_FRAMES": Code("video", "info", "How many frames of a video are used and dropped; an image is one frame"),
    "VIDEO_FPS": Code(
        "video",
        "warning",
        "The frame rate of a video is unusual, differs from the others, or is below the training frame rate",
    ),
    "VIDEO_VARIABLE_RATE": Code("video", "warning", "A video has a variable frame rate"),
    "VIDEO_STILL": Code("video", "warning", "Nothing moves in a video, or in the whole dataset"),
    "VIDEO_ROTATED": Code("video", "info", "The rotation metadata of a video is applied"),
    "BUCKETS": Code("set", "info", "How many samples each training size has"),
    "CACHE_SIZE": Code("set", "info", "Estimated disk space of the encodings", "a warning where less is free"),
}
"""Code -> its declaration."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One finding.

    Attributes:
        row: number of the sample from 1, as in training; None if it concerns no single row.
        path: relative to the folder of the dataset; None if it concerns no single file.
    """

    code: str
    level: Level
    row: int | None
    path: str | None
    message: str
    hint: str | None


def finding(
    code: str,
    message: str,
    hint: str | None = None,
    *,
    row: int | None = None,
    path: str | None = None,
    level: Level | None = None,
) -> Finding:
    """Return a finding of a code, with the code's level unless another is given."""
    return Finding(code, level or CODES[code].level, row, path, message, hint)
