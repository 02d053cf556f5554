"""What the checks of a dataset find: every code that there is, and findings as values. No torch.

`CODES` is the one declaration of the codes; docs/dataset_checks.md is generated from it. A check makes a finding with
`found`, which takes the level from the table.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Level = Literal["error", "warning", "info"]
LEVELS: tuple[Level, ...] = ("error", "warning", "info")
"""The worst first. error: training cannot use the row, or would learn nonsense; warning: worth a look; info: a fact."""
SUBJECTS = {
    "metadata": "Metadata",
    "path": "Paths",
    "image": "Images",
    "caption": "Captions",
    "pair": "Images that belong together",
    "video": "Videos",
    "set": "The set",
}
"""What a code is about, in the order of the reference page."""


@dataclass(frozen=True)
class Code:
    """What a code stands for: a key of `SUBJECTS`, the level of its findings, and a line of explanation.

    `exception`: which of its findings have another level, and which one.
    """

    subject: str
    level: Level
    explanation: str
    exception: str = ""


CODES: Mapping[str, Code] = {
    "NOT_UTF8": Code("metadata", "error", "The metadata, or a text file with a caption, is not UTF-8"),
    "PARSE_ERROR": Code("metadata", "error", "The metadata cannot be parsed at this line"),
    "METADATA_UNUSED": Code("metadata", "warning", "A further file is called metadata, and is not read"),
    "EMPTY": Code("metadata", "error", "There is no row, or no file to make one of"),
    "COLUMN_MISSING": Code("metadata", "error", "A column that training reads is not there"),
    "COLUMN_UNKNOWN": Code("metadata", "warning", "A column that training does not read"),
    "CELL_EMPTY": Code("metadata", "error", "A cell that must name a file is empty"),
    "CELL_TYPE": Code("metadata", "error", "A cell holds another type of value than its column"),
    "ROW_DUPLICATE": Code("metadata", "warning", "A row is there twice"),
    "PATH_MISSING": Code("path", "error", "A file that is named is not there"),
    "PATH_CASE": Code("path", "error", "A file is there under a name in other letters, which most disks tell apart"),
    "PATH_OUTSIDE": Code(
        "path",
        "error",
        "A path is absolute, or leads out of the dataset by `..` or by a link",
        "a warning for links to folders, which are not followed",
    ),
    "FOLDER_UNREADABLE": Code(
        "path",
        "warning",
        "A folder in the dataset cannot be opened, so what is in it is not known",
        "an error where captions stand beside the files, for each file is a row",
    ),
    "FILE_UNREFERENCED": Code("path", "warning", "An image, video or caption lies in the dataset and is not used"),
    "FORMAT_UNSUPPORTED": Code(
        "path",
        "warning",
        "An image or clip is of a format that nothing installed decodes",
        "an error where a caption stands beside it, for it is meant as a sample",
    ),
    "FILE_UNKNOWN": Code("path", "warning", "A file in the dataset is no image, clip, caption or metadata"),
    "FILE_LEFTOVER": Code("path", "info", "What systems and programs leave in folders, which is passed over"),
    "STEM_COLLISION": Code("path", "error", "Two files would share the caption of one text file"),
    "URL": Code("path", "error", "An address stands where a file must be named; nothing is downloaded"),
    "IMAGE_UNREADABLE": Code("image", "error", "An image cannot be decoded"),
    "IMAGE_TRUNCATED": Code("image", "error", "An image ends before its last pixel"),
    "IMAGE_TYPE_MISMATCH": Code("image", "warning", "An image is of another format than its ending says"),
    "IMAGE_BOMB": Code("image", "error", "An image claims more pixels than are ever decoded"),
    "IMAGE_TOO_SMALL": Code("image", "error", "A side of an image is shorter than the least"),
    "IMAGE_ASPECT": Code("image", "warning", "An image is very wide or very high"),
    "IMAGE_CROP_LOSS": Code("image", "warning", "Cutting an image or video to its training size loses much of it"),
    "IMAGE_UPSCALED": Code("image", "warning", "An image or video is scaled up to the size it is trained or shown at"),
    "IMAGE_LOW_RESOLUTION": Code(
        "image", "warning", "An image or video is far smaller than what the model is usually trained at"
    ),
    "IMAGE_EXIF_ROTATED": Code("image", "info", "An image is turned upright as its EXIF orientation says"),
    "IMAGE_ALPHA": Code("image", "warning", "An image has transparent pixels, which are composed on white"),
    "IMAGE_MODE": Code("image", "warning", "An image has a colour mode that loses something on its way to RGB"),
    "IMAGE_COLOURS": Code(
        "image",
        "info",
        "The colours of an image are converted to sRGB from its profile",
        "a warning where what the file says of its colours cannot be followed",
    ),
    "IMAGE_ANIMATED": Code(
        "image",
        "error",
        "An image is animated, where a still is needed",
        "a warning for further pages of a TIFF, of which the first is used",
    ),
    "IMAGE_DUPLICATE": Code("image", "warning", "Images have the same pixels"),
    "IMAGE_NEAR_DUPLICATE": Code("image", "warning", "Images look nearly the same"),
    "IMAGE_BLANK": Code("image", "warning", "An image is of one colour"),
    "CAPTION_AMBIGUOUS": Code("caption", "error", "Several captions stand beside one image or clip"),
    "CAPTION_MISSING": Code(
        "caption",
        "error",
        "A sample has no caption: no text file beside it, or an empty cell",
        "a warning for a cell, which is trained on as an empty caption",
    ),
    "CAPTION_EMPTY": Code("caption", "warning", "A caption is blank: an empty text file, or a cell of spaces"),
    "CAPTION_NAN": Code("caption", "error", "A caption is what programs write for a missing value"),
    "CAPTION_DUPLICATE": Code("caption", "info", "Samples share a caption"),
    "CAPTION_ALL_SAME": Code("caption", "warning", "All samples have one caption"),
    "CAPTION_TOO_LONG": Code("caption", "warning", "A caption has more tokens than the text encoder reads"),
    "CAPTION_CONTROL_CHARS": Code(
        "caption", "warning", "A caption has control characters", "half a character is an error"
    ),
    "PAIR_MISSING": Code("pair", "error", "A row lacks the image that the model is to be shown"),
    "PAIR_COUNT": Code("pair", "error", "A row names more files in a column than are taken"),
    "PAIR_ASPECT": Code("pair", "warning", "An image that is to lie over another has another shape"),
    "PAIR_IDENTICAL": Code("pair", "warning", "What is shown has the same pixels as what is to be made of it"),
    "MASK_EMPTY": Code("pair", "error", "A mask marks nothing, or everything"),
    "MASK_SIZE": Code("pair", "error", "A mask has another size than its image"),
    "VIDEO_UNREADABLE": Code("video", "error", "A video cannot be decoded"),
    "VIDEO_TRUNCATED": Code("video", "error", "A video ends before its last frame"),
    "VIDEO_TOO_SHORT": Code(
        "video",
        "warning",
        "A video has fewer frames than are asked for",
        "an error where the model is given all that there is",
    ),
    "VIDEO_FRAMES": Code("video", "info", "How many frames of videos are used and lost; an image is one frame"),
    "VIDEO_FPS": Code(
        "video",
        "warning",
        "A video has another frame rate than the others, an odd one, or a lower one than is trained at",
    ),
    "VIDEO_VARIABLE_RATE": Code("video", "warning", "The frames of a video do not follow one another evenly"),
    "VIDEO_STILL": Code("video", "warning", "Nothing moves in a video, or in the whole set"),
    "VIDEO_ROTATED": Code("video", "info", "A video is turned upright as its metadata says"),
    "BUCKETS": Code("set", "info", "How many samples there are of each training size"),
    "CACHE_SIZE": Code("set", "info", "How much disk the encodings take, estimated", "a warning where less is free"),
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing found.

    `row` counts samples from 1, as training does; None: it concerns no one row. `path` is relative to the folder of the
    dataset; None: it concerns no one file.
    """

    code: str
    level: Level
    row: int | None
    path: str | None
    message: str
    hint: str | None


def found(
    code: str,
    message: str,
    hint: str | None = None,
    *,
    row: int | None = None,
    path: str | None = None,
    level: Level | None = None,
) -> Finding:
    """A finding of a code, with the level of that code unless this one is of another."""
    return Finding(code, level or CODES[code].level, row, path, message, hint)


def in_order(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """Findings with the worst first, then grouped by code in the order of the table, then by row and path."""
    places = {code: place for place, code in enumerate(CODES)}
    return tuple(
        sorted(
            findings,
            key=lambda finding: (
                LEVELS.index(finding.level),
                places[finding.code],
                finding.row or 0,
                finding.path or "",
            ),
        )
    )


@dataclass(frozen=True)
class Summary:
    """Numbers of a report.

    `origin`: where the rows were read. `codes`: findings by code. `decoded`: whether files were looked into.
    """

    origin: str
    recipe: str | None
    rows: int
    images: int
    videos: int
    errors: int
    warnings: int
    infos: int
    codes: Mapping[str, int]
    decoded: bool


@dataclass(frozen=True)
class Report:
    """The outcome of the checks; `findings` stand in the order of `in_order`.

    `fingerprint`: sha256 of rows and files; the same dataset has the same one, wherever it lies.
    """

    summary: Summary
    fingerprint: str
    findings: tuple[Finding, ...]

    @property
    def exit_code(self) -> int:
        """0 without errors, 1 with."""
        return 1 if self.summary.errors else 0

    def as_plain(self) -> dict[str, Any]:
        """The report as `--format json` prints it; `pictures` is the name that `images` had first, kept for scripts."""
        return {
            "summary": asdict(self.summary) | {"pictures": self.summary.images},
            "fingerprint": self.fingerprint,
            "findings": [asdict(finding) for finding in self.findings],
        }


def count_levels(findings: Sequence[Finding]) -> dict[Level, int]:
    """How many findings there are of each level."""
    counted = Counter(finding.level for finding in findings)
    return {level: counted[level] for level in LEVELS}
