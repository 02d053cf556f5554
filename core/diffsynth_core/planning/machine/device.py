"""Device and mixed precision of a run."""

import os

from diffsynth_core.config.parameters import Parameters
from diffsynth_core.data.samples import SampleSet
from diffsynth_core.errors import Problem, report, report_missing
from diffsynth_core.progress import pluralize

PRECISIONS_BY_DEVICE = {
    "cpu": ("no", "bf16"),
    "cuda": ("no", "bf16", "fp16"),
    "mps": ("no", "bf16", "fp16"),
    "xpu": ("no", "bf16", "fp16"),
    "npu": ("no", "bf16", "fp16"),
}
"""Device type -> supported values of `mixed_precision`."""


def choose_device(parameters: Parameters) -> str:
    """Return the requested device, or the best available one; report if this machine lacks it.

    Imports torch to query accelerators.
    """
    import torch

    best = torch.accelerator.current_accelerator(check_available=True)
    if parameters.device is None:
        return str(best) if best else "cpu"
    kind, _, number = parameters.device.partition(":")
    if kind not in PRECISIONS_BY_DEVICE or (number and not number.isdigit()):
        report(
            Problem(
                f"`device` takes {', '.join(PRECISIONS_BY_DEVICE)} with an optional `:number`, got `{parameters.device}`",
                wrong_use=True,
            )
        )
    elif kind != "cpu" and (best is None or best.type != kind or int(number or 0) >= torch.accelerator.device_count()):
        found = f"{torch.accelerator.device_count()} of type {best.type}" if best else "none"
        report_missing(
            Problem(
                f"`device` `{parameters.device}` is not available; accelerators found: {found}",
                "remove `--device`, or pass `--device cpu`",
            )
        )
    return parameters.device


def choose_precision(parameters: Parameters, device: str) -> str:
    """Return the requested mixed precision, or bf16 on an accelerator and float32 (`no`) on a CPU."""
    kind = device.partition(":")[0]
    if parameters.mixed_precision is None:
        if kind != "cpu" and not _has_bfloat16(kind):
            report(Problem("this GPU does not support bf16", "pass `--mixed_precision fp16` or `no`"))
        return "no" if kind == "cpu" else "bf16"
    if parameters.mixed_precision not in PRECISIONS_BY_DEVICE.get(kind, ("no", "bf16", "fp16")):
        what = f"`mixed_precision` `{parameters.mixed_precision}` needs a GPU; the device is {device}"
        asked = parameters.device is not None
        problem = Problem(what, "pass `--mixed_precision bf16` or `no`", wrong_use=asked)
        (report if asked else report_missing)(problem)
    return parameters.mixed_precision


def operations_in_tf32() -> tuple[str, ...]:
    """Return the kinds of float32 operations that CUDA devices compute in TF32, with 10 bits of mantissa, in this
    process: PyTorch decides that, and its environment (`TORCH_ALLOW_TF32_CUBLAS_OVERRIDE`).

    Imports torch.
    """
    from torch.backends import cuda, cudnn

    precisions = {"matrix products": cuda.matmul.fp32_precision, "convolutions": cudnn.conv.fp32_precision}  # type: ignore[attr-defined]
    return tuple(name for name, precision in precisions.items() if precision == "tf32")


def noise_problems(samples: SampleSet) -> list[Problem]:
    """Return the problem of samples whose noise must be drawn on a GPU, if there is none."""
    import torch

    drawn = [sample for sample in samples.samples if sample.sampling and sample.sampling.rand_device == "cuda"]
    if not drawn or torch.cuda.is_available():
        return []
    return [
        Problem(
            f"`rand_device` is `cuda` for {pluralize(len(drawn), 'sample')}, but there is no such device to draw the noise; "
            f"the first is {drawn[0].name}",
            "train on a machine that has one, or generate the images again with `cpu`",
        )
    ]


def _has_bfloat16(kind: str) -> bool:
    """Return whether an accelerator computes bfloat16 in hardware.

    Only CUDA can be queried: GPUs before Ampere do not. A missing GPU is assumed to.
    """
    import torch

    return kind != "cuda" or not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)


def device_bytes(parameters: Parameters) -> int | None:
    """Return the memory of the accelerator that the parameters name, or else of the best one of this machine; None if
    there is none whose memory is known.

    Imports torch.
    """
    import torch

    best = torch.accelerator.current_accelerator(check_available=True)
    kind, _, number = (parameters.device or str(best)).partition(":")
    if best is None or kind != best.type or int(number or 0) >= torch.accelerator.device_count():
        return None
    properties = getattr(torch.get_device_module(kind), "get_device_properties", None)
    return int(properties(int(number or 0)).total_memory) if properties else None


def host_bytes() -> int:
    """Return the memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
