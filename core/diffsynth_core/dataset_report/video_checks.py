"""Codes VIDEO_…: pure functions from the facts of videos to findings. No torch.

`check_videos` goes through the checks of one video, in `VIDEO_CHECKS`; `check_rates`, which needs all videos, is a
separate entry of CHECKS in validate.py.
"""

import statistics
from collections.abc import Callable, Iterator, Mapping

from diffsynth_core.data.findings import Finding, finding
from diffsynth_core.data.samples import RATE_SPREAD
from diffsynth_core.dataset_report.dataset_facts import DatasetFacts
from diffsynth_core.dataset_report.facts import VideoFacts
from diffsynth_core.dataset_report.rules import Rules
from diffsynth_core.dataset_report.set_checks import header_of
from diffsynth_core.progress import pluralize, verb

FAULTS: Mapping[str, tuple[str, str]] = {
    "VIDEO_UNREADABLE": ("cannot be read as a video", "replace the file or remove its row"),
    "VIDEO_TRUNCATED": ("is incomplete", "download the file again or remove its row"),
}
"""Code of a fault -> what is said of the file, and the hint."""
USUAL_RATES = (5.0, 61.0)
"""Frames per second between which videos are filmed and shown; others are slow motion, slides, or a wrong header."""


def check_videos(dataset: DatasetFacts) -> Iterator[Finding]:
    """Yield the findings about single videos, at the first row that names them."""
    rows = dataset.first_rows()
    for path, facts in dataset.videos.items():
        if facts.fault:
            what, hint = FAULTS[facts.fault.code]
            yield finding(facts.fault.code, f"`{path}` {what}: {facts.fault.reason}", hint, row=rows[path], path=path)
            continue
        for check in VIDEO_CHECKS:
            yield from check(facts, rows[path], dataset.rules)


def check_single_frames(dataset: DatasetFacts) -> Iterator[Finding]:
    """What a model of videos has of files of which one frame is used: VIDEO_TOO_SHORT where it is given that frame,
    else VIDEO_STILL where it learns to copy or learns no motion, else VIDEO_FRAMES."""
    rules, rows, lengths = dataset.rules, dataset.first_rows(), _lengths(dataset)
    for path, frames in lengths.items():
        if _all_given(frames, rules):
            what = f"`{path}` has one frame, and the model conditions on the first frame: nothing is left to predict"
            hint = "remove its row"
            yield finding("VIDEO_TOO_SHORT", what, hint, row=rows[path], path=path, level="error")
    single = [path for path, frames in lengths.items() if frames == 1 and not _all_given(frames, rules)]
    if not single:
        return
    of_all = f"training uses one frame of {len(single)} of {pluralize(len(lengths), 'file')}"
    if rules.shown_frames:
        what = f"{of_all}, which is also the condition ({', '.join(rules.shown_frames)}): the model learns to copy it"
        yield finding("VIDEO_STILL", what, "replace them with videos, or remove their rows")
    elif len(single) == len(lengths):
        yield finding("VIDEO_STILL", f"{of_all}: no motion is learned", "add videos if the model should learn motion")
    elif any(path in dataset.images for path in single):
        yield finding("VIDEO_FRAMES", of_all)


def _all_given(frames: int, rules: Rules) -> bool:
    """Whether the model is given, and so need not learn, all of so many frames."""
    return rules.media.frames is not None and (frames - 1) // rules.media.frames.step < rules.num_conditioning_frames


def _lengths(dataset: DatasetFacts) -> dict[str, int]:
    """How many frames are trained on of each file that can be; empty where images are trained on."""
    if dataset.rules.media.frames is None:
        return {}
    lengths = {}
    for path in sorted(dataset.of_columns((dataset.rows.columns.target,))):
        header = header_of(dataset, path)
        if header:
            lengths[path] = _used(header.frames, dataset.rules)
    return lengths


def check_rates(dataset: DatasetFacts) -> Iterator[Finding]:
    """VIDEO_FPS: rates unlike the others' where each frame counts as the next step in time, and odd ones anywhere."""
    rows = dataset.first_rows()
    videos = [facts for facts in dataset.videos.values() if facts.frame_rate]
    frames = dataset.rules.media.frames
    trained_at = frames.frame_rate if frames else None
    others = statistics.median_low([facts.frame_rate for facts in videos]) if videos else 0.0
    for facts in videos:
        odd_rate = _odd_rate(facts.frame_rate, trained_at, others)
        if odd_rate:
            what, hint = odd_rate
            message = f"`{facts.path}` has {facts.frame_rate:g} frames per second{what}"
            yield finding("VIDEO_FPS", message, hint, row=rows[facts.path], path=facts.path)


def _odd_rate(rate: float, trained_at: float | None, others: float) -> tuple[str, str] | None:
    """What to say of a frame rate, and what to do; None: nothing."""
    if trained_at and trained_at > RATE_SPREAD * rate:
        return (
            f", below the {trained_at:g} of training: frames are duplicated",
            "train at a lower `--frame_rate`",
        )
    if not trained_at and max(rate, others) > RATE_SPREAD * min(rate, others):
        return f", but most others have {others:g}", "resample all of them with `--frame_rate`"
    if not USUAL_RATES[0] <= rate <= USUAL_RATES[1]:
        return ", which is unusual", "check that it plays at its natural speed"
    return None


def _rotated(facts: VideoFacts, row: int, rules: Rules) -> Iterator[Finding]:
    if facts.rotated:
        yield finding("VIDEO_ROTATED", f"`{facts.path}`: rotation metadata is applied", row=row, path=facts.path)


def _too_short(facts: VideoFacts, row: int, rules: Rules) -> Iterator[Finding]:
    """Without a recipe no number is asked for, but one frame is no video."""
    asked = rules.media.frames.num_frames if rules.media.frames else 2
    available = _available(facts)
    if available < asked and not _all_given(_used(available, rules), rules):
        what = f"`{facts.path}` has {pluralize(available, 'frame')}, expected {asked}"
        hint = (
            f"replace it, or train with `--num_frames {_used(available, rules)}`"
            if rules.media.frames
            else "replace it"
        )
        yield finding("VIDEO_TOO_SHORT", what, hint, row=row, path=facts.path)


def _frames(facts: VideoFacts, row: int, rules: Rules) -> Iterator[Finding]:
    """VIDEO_FRAMES, where frames are lost."""
    if rules.media.frames is None:
        return
    available = _available(facts)
    used = _used(available, rules)
    if used < available:
        rate = "" if facts.resampled is None else f" at {rules.media.frames.frame_rate:g} per second"
        what = f"`{facts.path}`: {used} of {pluralize(available, 'frame')}{rate} {verb(used, 'is', 'are')} used, {available - used} dropped"
        yield finding("VIDEO_FRAMES", what, row=row, path=facts.path)


def _variable(facts: VideoFacts, row: int, rules: Rules) -> Iterator[Finding]:
    if facts.variable_rate:
        shortest, longest = (f"{1000 * seconds:.0f}" for seconds in facts.spacing)
        what = f"`{facts.path}` has a variable frame rate: {shortest} to {longest} ms per frame"
        hint = "resample it to a constant rate with `--frame_rate`"
        if rules.media.frames is None or rules.media.frames.frame_rate is None:
            yield finding("VIDEO_VARIABLE_RATE", what, hint, row=row, path=facts.path)


def _still(facts: VideoFacts, row: int, rules: Rules) -> Iterator[Finding]:
    if facts.still:
        what = f"nothing moves in `{facts.path}`"
        yield finding("VIDEO_STILL", what, "train on it as an image, or remove its row", row=row, path=facts.path)


def _available(facts: VideoFacts) -> int:
    """How many frames training can take from a video."""
    return facts.frames if facts.resampled is None else facts.resampled


def _used(available: int, rules: Rules) -> int:
    """How many of these frames are trained on."""
    return rules.media.frames.length(available) if rules.media.frames else available


VIDEO_CHECKS: tuple[Callable[[VideoFacts, int, Rules], Iterator[Finding]], ...] = (
    _rotated,
    _too_short,
    _frames,
    _variable,
    _still,
)
"""(facts, the first row that names the file, rules) -> findings"""
