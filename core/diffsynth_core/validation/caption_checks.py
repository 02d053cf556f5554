"""Codes CAPTION_…: functions from captions to findings. No torch."""

from collections.abc import Iterator

from diffsynth_core.validation.examined import Examined
from diffsynth_core.validation.findings import Finding, found

MISSING_VALUES = frozenset({"nan", "null", "none", "<na>", "#n/a"})
"""What programs write where a value is missing, in small letters."""


def check_captions(examined: Examined) -> Iterator[Finding]:
    """CAPTION_EMPTY and CAPTION_NAN."""
    for row, caption, _ in examined.records:
        if caption is None:
            continue
        if not caption or caption.isspace():
            yield found("CAPTION_EMPTY", f"row {row} has no caption", "write one", row=row)
        elif len(caption) < 10 and caption.strip().lower() in MISSING_VALUES:
            what = f"row {row}: the caption is `{caption.strip()}`, which programs write for a missing value"
            yield found("CAPTION_NAN", what, "write the caption", row=row)
