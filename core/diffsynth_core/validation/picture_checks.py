"""Codes IMAGE_…: pure functions from the facts of pictures to findings. No torch.

`check_pictures` goes through the checks of one picture, in `PICTURE_CHECKS`; those that need several pictures
(IMAGE_DUPLICATE, IMAGE_NEAR_DUPLICATE) stand beside it in CHECKS of validate.py.
"""

from collections.abc import Callable, Iterator, Mapping

from diffsynth_core.validation.examined import Examined
from diffsynth_core.validation.facts import PictureFacts
from diffsynth_core.validation.findings import Finding, found
from diffsynth_core.validation.rules import Rules

FAULTS: Mapping[str, tuple[str, str]] = {
    "IMAGE_UNREADABLE": ("cannot be read as a picture", "replace the file or take its row out"),
    "IMAGE_TRUNCATED": ("is cut off", "fetch the file again or take its row out"),
    "IMAGE_BOMB": ("is not decoded", "replace the file or take its row out"),
}
"""Code of a fault -> what is said of the file, and the hint."""


def check_pictures(examined: Examined) -> Iterator[Finding]:
    """All that is to be said of single pictures, told at the first row that names them."""
    rows = examined.first_rows()
    targets = examined.of_columns((examined.columns.target,))
    for path, facts in examined.pictures.items():
        if facts.fault:
            what, hint = FAULTS[facts.fault.code]
            yield found(facts.fault.code, f"`{path}` {what}: {facts.fault.reason}", hint, row=rows[path], path=path)
            continue
        for check in (*PICTURE_CHECKS, *(TARGET_CHECKS if path in targets else ())):
            yield from check(facts, rows[path], examined.rules)


def _rotated(facts: PictureFacts, row: int, rules: Rules) -> Iterator[Finding]:
    if facts.orientation != 1:
        what = f"`{facts.path}` is turned upright as its EXIF orientation {facts.orientation} says"
        yield found("IMAGE_EXIF_ROTATED", what, row=row, path=facts.path)


def _animated(facts: PictureFacts, row: int, rules: Rules) -> Iterator[Finding]:
    if facts.frames > 1:
        what = f"`{facts.path}` has {facts.frames} frames, of which the first is used"
        yield found("IMAGE_ANIMATED", what, "save the frame that is meant as a picture", row=row, path=facts.path)


def _transparent(facts: PictureFacts, row: int, rules: Rules) -> Iterator[Finding]:
    if facts.transparent:
        what = f"`{facts.path}` has transparent pixels, which are composed on white"
        yield found("IMAGE_ALPHA", what, "save it on the background that is meant", row=row, path=facts.path)


def _aspect(facts: PictureFacts, row: int, rules: Rules) -> Iterator[Finding]:
    aspect = max(facts.width, facts.height) / min(facts.width, facts.height)
    if aspect > rules.thresholds.max_aspect:
        what = f"`{facts.path}` is {facts.width} x {facts.height} pixels, {aspect:.3g} : 1"
        hint = f"cut it, or raise `--max_aspect` (now {rules.thresholds.max_aspect:g})"
        yield found("IMAGE_ASPECT", what, hint, row=row, path=facts.path)


def _blank(facts: PictureFacts, row: int, rules: Rules) -> Iterator[Finding]:
    if facts.blank:
        what = f"`{facts.path}` is of one colour"
        yield found("IMAGE_BLANK", what, "replace the file or take its row out", row=row, path=facts.path)


Check = Callable[[PictureFacts, int, Rules], Iterator[Finding]]
"""(facts, the first row that names the file, rules) -> findings"""
PICTURE_CHECKS: tuple[Check, ...] = (_rotated, _animated, _transparent)
"""For every picture."""
TARGET_CHECKS: tuple[Check, ...] = (_aspect, _blank)
"""For pictures that are trained on."""
