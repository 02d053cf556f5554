"""Whether a run can compute its attention with the kernel that it names. No torch."""

from collections.abc import Iterator

from diffsynth_core.config.parameters import Parameters
from diffsynth_core.errors import Problem
from diffsynth_core.models.attention import ATTENTION_KERNELS
from diffsynth_core.models.spec import FamilyFacts


def attention_problems(
    parameters: Parameters, facts: FamilyFacts, device: str, mixed_precision: str
) -> Iterator[Problem]:
    """Yield why a run cannot use its kernel; those that another machine may not have are not `wrong_use`.

    Args:
        device, mixed_precision: what the run is planned for.
    """
    name, kind = parameters.attention, device.partition(":")[0]
    kernel, asked = ATTENTION_KERNELS[name], f"`attention` `{name}`"
    if kernel.no_gradients:
        able = ", ".join(other for other, one in ATTENTION_KERNELS.items() if not one.no_gradients)
        yield Problem(f"{asked} cannot train: {kernel.no_gradients}", f"pass one of {able}", wrong_use=True)
        return
    if kernel.precisions and kind not in kernel.precisions:
        what = f"{asked} computes on {' and '.join(kernel.precisions)}; the device is {device}"
        yield Problem(what, "pass `--attention sdpa`", wrong_use=parameters.device is not None)
    elif kernel.precisions and mixed_precision not in kernel.precisions[kind]:
        able = " or ".join(kernel.precisions[kind]).replace("no", "float32")
        what = f"{asked} computes in {able} on {kind}, but the run in {mixed_precision}".replace("in no", "in float32")
        hint = f"pass `--mixed_precision {kernel.precisions[kind][0]}`, or `--attention sdpa`"
        yield Problem(what, hint, wrong_use=parameters.mixed_precision is not None)
    if facts.masks_captions and parameters.batch_size > 1 and not kernel.masks:
        what = f"{asked} takes no masks, which {facts.title} needs for captions of different lengths in a batch"
        yield Problem(what, "pass `--batch_size 1`, or `--attention sdpa`", wrong_use=True)
