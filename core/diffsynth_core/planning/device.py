"""Where a run computes, in which dtype, and how processes share the work."""

import os

from diffsynth_core.config.parameters import Parameters
from diffsynth_core.data.samples import SampleSet
from diffsynth_core.errors import Problem
from diffsynth_core.progress import pluralize

PRECISIONS_BY_DEVICE = {
    "cpu": ("no", "bf16"),
    "cuda": ("no", "bf16", "fp16"),
    "mps": ("no", "bf16", "fp16"),
    "xpu": ("no", "bf16", "fp16"),
    "npu": ("no", "bf16", "fp16"),
}


SHARDED_LAUNCHES = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}
"""What `accelerate launch` puts into the environment for engines that share weights, gradients or optimizer out."""


def check_launch(problems: list[Problem]) -> None:
    """Add a problem when the launcher asks for what the gradient norm, the state and checkpoints do not know yet."""
    for variable, engine in SHARDED_LAUNCHES.items():
        if os.environ.get(variable, "false").lower() == "true":
            problems.append(sharded_launch(engine, "launched"))


def sharded_launch(engine: str, how: str) -> Problem:
    """The problem that processes are, or would be, launched with an engine that shares weights out."""
    return Problem(
        f"{how} with {engine}: sharding is not supported yet",
        "use DDP (`recipes/accelerate/ddp.yaml`), or a single process",
        wrong_use=True,
    )


def choose_device(parameters: Parameters, problems: list[Problem], absent: list[Problem]) -> str:
    """The device asked for, else the best there is. Adds to `problems`; imports torch to ask for accelerators.

    `absent`: takes the problem that this machine has no such device.
    """
    import torch

    best = torch.accelerator.current_accelerator(check_available=True)
    if parameters.device is None:
        return str(best) if best else "cpu"
    kind, _, number = parameters.device.partition(":")
    if kind not in PRECISIONS_BY_DEVICE or (number and not number.isdigit()):
        problems.append(
            Problem(
                f"`device` takes {', '.join(PRECISIONS_BY_DEVICE)} with an optional `:number`, got `{parameters.device}`",
                wrong_use=True,
            )
        )
    elif kind != "cpu" and (best is None or best.type != kind or int(number or 0) >= torch.accelerator.device_count()):
        there = f"{torch.accelerator.device_count()} of type {best.type}" if best else "none"
        absent.append(
            Problem(
                f"`device` `{parameters.device}` is not available; accelerators found: {there}",
                "remove `--device`, or pass `--device cpu`",
            )
        )
    return parameters.device


def choose_precision(parameters: Parameters, device: str, problems: list[Problem], absent: list[Problem]) -> str:
    """The dtype asked for, else bf16 on an accelerator and float32 (`no`) on a CPU. Adds to `problems`.

    `absent`: takes the problem that this machine has no GPU for the format.
    """
    kind = device.partition(":")[0]
    if parameters.mixed_precision is None:
        if kind != "cpu" and not _has_bfloat16(kind):
            problems.append(Problem("this GPU does not support bf16", "pass `--mixed_precision fp16` or `no`"))
        return "no" if kind == "cpu" else "bf16"
    if parameters.mixed_precision not in PRECISIONS_BY_DEVICE.get(kind, ("no", "bf16", "fp16")):
        what = f"`mixed_precision` `{parameters.mixed_precision}` needs a GPU; the device is {device}"
        asked = parameters.device is not None
        problem = Problem(what, "pass `--mixed_precision bf16` or `no`", wrong_use=asked)
        (problems if asked else absent).append(problem)
    return parameters.mixed_precision


def noise_problems(samples: SampleSet) -> list[Problem]:
    """Samples whose noise only a GPU can draw, where there is none."""
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
    """Whether an accelerator computes bfloat16 in hardware; only CUDA tells, and cards before Ampere do not.

    One that is not there is taken to do so.
    """
    import torch

    return kind != "cuda" or not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)
