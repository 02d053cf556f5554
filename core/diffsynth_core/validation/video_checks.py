"""Codes VIDEO_…: pure functions from the facts of videos to findings. No torch.

Every check of a set has one form: what has been examined -> findings. `check_videos` is in CHECKS of validate.py and
goes through the checks of one video, in `VIDEO_CHECKS`; what needs all videos (VIDEO_FPS) takes them from
`examined.videos`.
"""

from collections.abc import Callable, Iterator

from diffsynth_core.validation.examined import Examined
from diffsynth_core.validation.facts import VideoFacts
from diffsynth_core.validation.findings import Finding, found
from diffsynth_core.validation.rules import Rules


def check_videos(examined: Examined) -> Iterator[Finding]:
    """All that is to be said of videos, told at the first row that names them."""
    rows = examined.first_rows()
    for path, facts in examined.videos.items():
        if facts.fault:
            what = f"`{path}` cannot be used: {facts.fault.reason}"
            yield found(facts.fault.code, what, "replace the file or take its row out", row=rows[path], path=path)
            continue
        for check in VIDEO_CHECKS:
            yield from check(facts, rows[path], examined.rules)


def _rotated(facts: VideoFacts, row: int, rules: Rules) -> Iterator[Finding]:
    if facts.rotated:
        yield found("VIDEO_ROTATED", f"`{facts.path}` is turned upright as its metadata says", row=row, path=facts.path)


VIDEO_CHECKS: tuple[Callable[[VideoFacts, int, Rules], Iterator[Finding]], ...] = (_rotated,)
"""(facts, the first row that names the file, rules) -> findings"""
