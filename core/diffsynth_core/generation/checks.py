"""Checks of sizes and guidance against the model that draws. No torch."""

from collections.abc import Sequence

from diffsynth_core.errors import Problem, report
from diffsynth_core.generation.request import GenerationRequest
from diffsynth_core.models.dataset_columns import size_problems
from diffsynth_core.models.spec import Variant
from diffsynth_core.planning.drawing.jobs import ImageSize
from diffsynth_core.planning.drawing.prompts import PromptRow

MOST_ENLARGED = 16
"""An image or clip of more than this many times the usual number of pixels is a mistake: attention would take 256 times
as long."""


def check_size(size: ImageSize, variant: Variant) -> None:
    """Report a size that the model cannot draw."""
    problems = size_problems(size.height, size.width, size.num_frames, variant)
    usual = variant.sampling.height * variant.sampling.width * variant.sampling.num_frames
    if size.height * size.width * size.num_frames > MOST_ENLARGED * usual:
        frames = f" x {size.num_frames} frames" if variant.target.kind == "video" else ""
        usually = f"{variant.sampling.height} x {variant.sampling.width}"
        usually += f" x {variant.sampling.num_frames} frames" if variant.target.kind == "video" else ""
        what = f"{size.height} x {size.width}{frames} is more than {MOST_ENLARGED} times the usual {usually}"
        problems.append(
            Problem(f"{what} of {variant.title}", "pass a smaller `--height` and `--width`", wrong_use=True)
        )
    report(*problems)


def check_guidance(request: GenerationRequest, rows: Sequence[PromptRow], cfg_scale: float, variant: Variant) -> None:
    """Report a guidance that has no effect."""
    if request.guidance is not None and variant.sampling.guidance is None:
        what = f"`guidance` has no effect: {variant.title} has no guidance embedder"
        report(Problem(what, "remove it, or set `--cfg_scale`", wrong_use=True))
    negative = next((row.where for row in rows if row.negative_prompt), "")
    if request.negative_prompt:
        negative = "`--negative_prompt`"
    if negative and cfg_scale == 1:
        where = negative if negative.startswith("`--") else f"the negative prompt of {negative}"
        what = f"{where} has no effect without classifier-free guidance: `cfg_scale` is 1"
        report(Problem(what, "pass `--cfg_scale` above 1, such as 4, or remove it", wrong_use=True))
