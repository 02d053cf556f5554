"""Codes CAPTION_…: functions from captions to findings. No torch."""

import re
from collections import Counter
from collections.abc import Iterator

from diffsynth_core.data.findings import Finding, finding
from diffsynth_core.data.records import SURROGATE
from diffsynth_core.dataset_report.dataset_facts import DatasetFacts
from diffsynth_core.errors import truncate
from diffsynth_core.models.size_facts import CaptionFacts
from diffsynth_core.models.token_counts import CaptionRule, count_tokens, may_be_longer
from diffsynth_core.progress import pluralize, verb

CONTROL = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\ufeff\ufffe\uffff]"
)
"""Invisible characters: control characters of ASCII and Latin-1 other than tab and line ends; zero-width spaces,
direction marks and byte order marks. Joiners are allowed, because scripts and emoji need them.
"""
MOST_BYTES = 4
"""Maximum number of bytes of a character in UTF-8."""
SHOWN_ROWS = 5
"""Maximum number of rows in a message."""
WRITE_CAPTION = "write a caption, or remove the row"
"""Hint for missing captions."""


def check_captions(dataset: DatasetFacts) -> Iterator[Finding]:
    """Yield CAPTION_MISSING of cells, and CAPTION_EMPTY."""
    for row, caption, _ in dataset.rows.records:
        if caption is None or (caption and not caption.isspace()):
            continue
        if not caption and not dataset.rows.metadata.captions_in_files:
            yield finding("CAPTION_MISSING", f"row {row} has no caption", WRITE_CAPTION, row=row, level="warning")
        else:
            yield finding("CAPTION_EMPTY", f"row {row}: the caption is blank", WRITE_CAPTION, row=row)


def check_characters(dataset: DatasetFacts) -> Iterator[Finding]:
    """Yield CAPTION_CONTROL_CHARS; unpaired surrogates, which are an error, are reported by data/records.py."""
    for row, caption, _ in dataset.rows.records:
        if not caption or (caption.isascii() and caption.isprintable()) or SURROGATE.search(caption):
            continue
        codes = dict.fromkeys(f"U+{ord(character):04X}" for character in CONTROL.findall(caption))
        if codes:
            what = f"row {row}: the caption contains invisible characters ({', '.join(codes)})"
            yield finding("CAPTION_CONTROL_CHARS", what, "remove them", row=row)


def check_repeated(dataset: DatasetFacts) -> Iterator[Finding]:
    """Yield CAPTION_DUPLICATE and CAPTION_ALL_SAME; one instruction for all edits is the former, an info."""
    captions = {row: caption.strip() for row, caption, _ in dataset.rows.records if caption}
    counted = Counter(captions.values())
    counted.pop("", None)
    if len(counted) == len(captions):
        return
    rows: dict[str, list[int]] = {}
    for row, caption in captions.items():
        if counted[caption] > 1:
            rows.setdefault(caption, []).append(row)
    if len(rows) == 1 and not dataset.rows.columns.references:
        ((caption, sharing),) = rows.items()
        if len(sharing) == len(dataset.rows.records) > 1:
            what = f"all {len(sharing)} captions are `{truncate(caption)}`"
            yield finding("CAPTION_ALL_SAME", what, "describe each image or video")
            return
    for caption, sharing in rows.items():
        listed = ", ".join(str(row) for row in sharing[:SHOWN_ROWS])
        more = f" and {len(sharing) - SHOWN_ROWS} more" if len(sharing) > SHOWN_ROWS else ""
        what = f"rows {listed}{more} share the caption `{truncate(caption)}`"
        yield finding("CAPTION_DUPLICATE", what, row=sharing[0])


def check_lengths(dataset: DatasetFacts) -> Iterator[Finding]:
    """Yield CAPTION_TOO_LONG, with the tokenizer of the recipe if it is on disk."""
    rules = dataset.rules
    rule = rules.captions or CaptionRule(CaptionFacts("", rules.thresholds.max_tokens, 0))
    surely_short = rule.facts.most // MOST_BYTES - len(rule.facts.template)
    long = [
        (row, text)
        for row, text, _ in dataset.rows.records
        if text and len(text) > surely_short and may_be_longer(text, rule.facts)
    ]
    whole = [(row, text) for row, text in long if not SURROGATE.search(text)]
    counts, counted = count_tokens([text for _, text in whole], rule) if whole else ([], True)
    for (row, _), tokens in zip(whole, counts, strict=True):
        if tokens > rule.facts.most:
            how = "has" if counted else "has an estimated"
            what = f"row {row}: the caption {how} {pluralize(tokens, 'token')}, but only {rule.facts.most} {verb(rule.facts.most, 'is', 'are')} used"
            yield finding("CAPTION_TOO_LONG", what, "shorten the caption", row=row)
