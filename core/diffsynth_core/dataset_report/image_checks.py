"""Codes IMAGE_…: pure functions from the facts of images to findings. No torch.

`check_images` applies the checks of single images, `IMAGE_CHECKS`; those of several images (IMAGE_DUPLICATE,
IMAGE_NEAR_DUPLICATE) are separate entries of CHECKS in validate.py.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from diffsynth_core.data.findings import Finding, finding
from diffsynth_core.data.formats import ending_of, format_of_ending
from diffsynth_core.data.images import EXTRACT_FRAME
from diffsynth_core.data.media import MediaCrop, MediaHeader, choose_reference, choose_target, scale_of
from diffsynth_core.data.samples import LOW_RESOLUTION_HINT
from diffsynth_core.dataset_report.dataset_facts import DatasetFacts
from diffsynth_core.dataset_report.facts import ImageFacts
from diffsynth_core.dataset_report.near_duplicates import near_images, same_images
from diffsynth_core.dataset_report.rules import Rules
from diffsynth_core.dataset_report.set_checks import CropBox, crop_box, header_of, sizes_of

FAULTS: Mapping[str, tuple[str, str]] = {
    "IMAGE_UNREADABLE": ("cannot be read as an image", "replace the file or remove its row"),
    "IMAGE_TRUNCATED": ("is truncated", "download the file again or remove its row"),
    "IMAGE_BOMB": ("is too large to decode", "replace the file or remove its row"),
}
"""Code of a fault -> message and hint."""
ALSO_CALLED: Mapping[str, str] = {"MPO": "JPEG", "DIB": "BMP"}
"""Pillow format -> format whose suffix its files use too."""
LOSING_MODES: Mapping[tuple[str, ...], str] = {
    ("I", "I;16", "I;16B", "I;16L", "I;16N"): "only 8 of its 16 bits are used",
    ("CMYK", "LAB", "HSV"): "converted to RGB without a color profile",
}
"""Pillow mode -> what is lost in the conversion to RGB."""


def check_images(dataset: DatasetFacts) -> Iterator[Finding]:
    """Yield the findings about single images, at the first row that names them."""
    rows = dataset.first_rows()
    targets = dataset.of_columns((dataset.rows.columns.target,))
    for path, facts in dataset.images.items():
        if facts.fault and facts.fault.code == "FORMAT_UNSUPPORTED":
            what, hint = f"`{path}` has an unsupported format", facts.fault.reason
            yield finding("FORMAT_UNSUPPORTED", what, hint, row=rows[path], path=path, level="error")
            continue
        if facts.fault:
            what, hint = FAULTS[facts.fault.code]
            yield finding(facts.fault.code, f"`{path}` {what}: {facts.fault.reason}", hint, row=rows[path], path=path)
            continue
        for check in (*IMAGE_CHECKS, *(TARGET_CHECKS if path in targets else ())):
            yield from check(facts, rows[path], dataset.rules)


def check_same(dataset: DatasetFacts) -> Iterator[Finding]:
    """Yield IMAGE_DUPLICATE and IMAGE_NEAR_DUPLICATE of targets; a pair is reported at its later row.

    Reference images may repeat: one may belong to many targets.
    """
    rows = dataset.first_rows()
    targets = dataset.of_columns((dataset.rows.columns.target,))
    images = [facts for path, facts in dataset.images.items() if path in targets and not facts.fault]
    same = same_images(dataset.rows.metadata.base, images)
    for path, other in same.items():
        what = f"`{path}` has the same pixels as `{other}` (row {rows[other]})"
        yield finding("IMAGE_DUPLICATE", what, "remove one of the rows", row=rows[path], path=path)
    thresholds = dataset.rules.thresholds
    single = [facts for facts in images if facts.path not in same and facts.spread]
    near = near_images(single, thresholds.near_duplicate_distance, thresholds.near_duplicate_colour)
    for path, (other, bits) in near.items():
        what = f"`{path}` is nearly identical to `{other}` (row {rows[other]}): {bits} of 64 hash bits differ"
        hint = "keep the better one, or lower `--near_duplicate_distance`"
        yield finding("IMAGE_NEAR_DUPLICATE", what, hint, row=rows[path], path=path)


def check_sizes(dataset: DatasetFacts) -> Iterator[Finding]:
    """Yield IMAGE_TOO_SMALL, IMAGE_CROP_LOSS, IMAGE_UPSCALED and IMAGE_LOW_RESOLUTION, of videos too, by their
    training sizes.
    """
    rows = dataset.first_rows()
    for path in dict.fromkeys(
        name for record in dataset.rows.records for name in record.files.get(dataset.rows.columns.target, ())
    ):
        header = header_of(dataset, path)
        if header is None:
            continue
        crop = choose_target(Path(path), header, dataset.rules.media, rows[path])
        small = _too_small(header, crop, dataset.rules)
        if small:
            what = f"`{path}` is {header.width} x {header.height} pixels{small}"
            yield finding("IMAGE_TOO_SMALL", what, "replace the file or remove its row", row=rows[path], path=path)
        else:
            yield from _crop_loss(path, rows[path], header, crop_box(header, crop), dataset.rules)
            yield from _resolution(path, rows[path], header, crop, dataset.rules)


def check_references(dataset: DatasetFacts) -> Iterator[Finding]:
    """Yield IMAGE_TOO_SMALL and IMAGE_UPSCALED of reference images, once for each size at which a file is read."""
    targets, seen = sizes_of(dataset), set[tuple[str, str]]()
    for row, _, files in dataset.rows.records:
        for condition in dataset.rules.sized_conditions if row in targets else ():
            for name in files.get(condition.column, ()):
                header = header_of(dataset, name)
                if header is None or (condition.name, name) in seen:
                    continue
                seen.add((condition.name, name))
                crop = choose_reference(
                    Path(name), header, condition, targets[row], dataset.rules.media.size.max_pixels
                )
                if min(crop.height, crop.width) == 0:
                    what = f"`{name}` is {header.width} x {header.height} pixels, too small or too narrow for a reference image"
                    yield finding("IMAGE_TOO_SMALL", what, "replace the file or remove its row", row=row, path=name)
                else:
                    yield from _resolution(name, row, header, crop, dataset.rules, shown=True)


def _resolution(
    path: str, row: int, header: MediaHeader, crop: MediaCrop, rules: Rules, shown: bool = False
) -> Iterator[Finding]:
    """Yield IMAGE_UPSCALED, and IMAGE_LOW_RESOLUTION of targets (not `shown`)."""
    factor, size = scale_of(crop, header.width, header.height), f"{header.width} x {header.height} pixels"
    if factor > rules.thresholds.max_upscale:
        height, width = crop.scaled or (crop.height, crop.width)
        what = (
            f"`{path}` is {size}, upscaled {factor:.3g}x to {'the reference size ' if shown else ''}{width} x {height}"
        )
        hint = "use a larger file, or train at a smaller size"
        yield finding("IMAGE_UPSCALED", what, hint, row=row, path=path)
    area, usual = header.width * header.height, rules.media.usual_pixels
    if not shown and area < rules.thresholds.min_area_share * usual:
        what = f"`{path}` is {size}, {area / usual:.2%} of the {usual:,} pixels of the usual training size"
        yield finding("IMAGE_LOW_RESOLUTION", what, LOW_RESOLUTION_HINT, row=row, path=path)


def _too_small(header: MediaHeader, crop: MediaCrop, rules: Rules) -> str:
    """Return why an image or video is too small for training; empty if it is not."""
    factor = rules.media.size.factor
    least = max(factor, rules.thresholds.min_side)
    if min(header.width, header.height) < least:
        return f"; a side is below the minimum of {least}"
    if min(crop.width, crop.height) < factor:
        return f"; with `max_pixels` {rules.media.size.max_pixels} a side falls below the minimum of {factor}"
    return ""


def _crop_loss(path: str, row: int, header: MediaHeader, box: CropBox, rules: Rules) -> Iterator[Finding]:
    lost = 1 - (box.right - box.left) * (box.bottom - box.top) / (header.width * header.height)
    if lost > rules.thresholds.max_crop_loss:
        what = f"`{path}` is {header.width} x {header.height} pixels, {lost:.0%} of which are cropped for {box.width} x {box.height}"
        hint = f"crop it yourself, or raise `--max_crop_loss` (now {rules.thresholds.max_crop_loss:g})"
        yield finding("IMAGE_CROP_LOSS", what, hint, row=row, path=path)


def _rotated(facts: ImageFacts, row: int, rules: Rules) -> Iterator[Finding]:
    if facts.orientation != 1:
        what = f"`{facts.path}` : EXIF orientation {facts.orientation} is applied"
        yield finding("IMAGE_EXIF_ROTATED", what, row=row, path=facts.path)


def _animated(facts: ImageFacts, row: int, rules: Rules) -> Iterator[Finding]:
    if facts.frames > 1:
        what = f"`{facts.path}` is animated ({facts.frames} frames)"
        yield finding("IMAGE_ANIMATED", what, EXTRACT_FRAME, row=row, path=facts.path)
    if facts.pages > 1:
        what = f"`{facts.path}` has {facts.pages} pages; only the first is used"
        hint = "save the page to train on as an image"
        yield finding("IMAGE_ANIMATED", what, hint, row=row, path=facts.path, level="warning")


def _transparent(facts: ImageFacts, row: int, rules: Rules) -> Iterator[Finding]:
    if facts.transparent:
        what = f"`{facts.path}` has transparent pixels, which are composited on white"
        yield finding("IMAGE_ALPHA", what, "save it on the background it should have", row=row, path=facts.path)


def _aspect(facts: ImageFacts, row: int, rules: Rules) -> Iterator[Finding]:
    aspect = max(facts.width, facts.height) / min(facts.width, facts.height)
    if aspect > rules.thresholds.max_aspect:
        what = f"`{facts.path}` is {facts.width} x {facts.height} pixels, {aspect:.3g} : 1"
        hint = f"crop it, or raise `--max_aspect` (now {rules.thresholds.max_aspect:g})"
        yield finding("IMAGE_ASPECT", what, hint, row=row, path=facts.path)


def _blank(facts: ImageFacts, row: int, rules: Rules) -> Iterator[Finding]:
    if not facts.spread:
        what = f"`{facts.path}` has a single color"
        yield finding("IMAGE_BLANK", what, "replace the file or remove its row", row=row, path=facts.path)


def _type_mismatch(facts: ImageFacts, row: int, rules: Rules) -> Iterator[Finding]:
    ending = ending_of(facts.path)
    expected = format_of_ending(ending)
    if expected and ALSO_CALLED.get(facts.format, facts.format) != ALSO_CALLED.get(expected, expected):
        what = f"`{facts.path}` is a {facts.format} file, but its extension is `{ending}`"
        yield finding("IMAGE_TYPE_MISMATCH", what, "rename the file", row=row, path=facts.path)


def _mode(facts: ImageFacts, row: int, rules: Rules) -> Iterator[Finding]:
    lost = next((lost for modes, lost in LOSING_MODES.items() if facts.mode in modes), None)
    if lost and not (facts.color_profile.profile and facts.mode in ("CMYK", "LAB")):
        what = f"`{facts.path}` has the color mode {facts.mode}: {lost}"
        yield finding("IMAGE_MODE", what, "convert it to 8-bit RGB", row=row, path=facts.path)


def _colors(facts: ImageFacts, row: int, rules: Rules) -> Iterator[Finding]:
    if facts.color_profile.profile:
        what = f"`{facts.path}` is converted from `{facts.color_profile.profile}` to sRGB"
        yield finding("IMAGE_COLOURS", what, row=row, path=facts.path)
    if facts.color_profile.doubt:
        what = f"the colors of `{facts.path}` are treated as sRGB: {facts.color_profile.doubt}"
        yield finding("IMAGE_COLOURS", what, "save it as sRGB", row=row, path=facts.path, level="warning")


Check = Callable[[ImageFacts, int, Rules], Iterator[Finding]]
"""(facts, first row that names the file, rules) -> findings"""
IMAGE_CHECKS: tuple[Check, ...] = (_rotated, _animated, _transparent, _type_mismatch, _mode, _colors)
"""Checks of every image."""
TARGET_CHECKS: tuple[Check, ...] = (_aspect, _blank)
"""Checks of target images."""
