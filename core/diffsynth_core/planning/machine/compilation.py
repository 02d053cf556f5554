"""Whether a run can compile its blocks. No torch."""

import os
import shutil
import sys
from collections.abc import Iterator
from importlib.util import find_spec

from diffsynth_core.config.parameters import Parameters
from diffsynth_core.errors import Problem
from diffsynth_core.planning.model.model_plan import ModelPlan

REMEDY = "remove `--compile`"
INSIDE_BLOCKS = {"nested": "recomputes parts", "keep_attention": "keeps the output of attention"}
"""Kind of gradient checkpointing -> what it does inside of blocks."""
SWAPPED = "fetches the weights of each layer when it computes: a compiled block computes as a whole"


def compilation_problems(device: str) -> Iterator[Problem]:
    """Yield why blocks cannot be compiled; what another machine may have is not `wrong_use`."""
    kind, what = device.partition(":")[0], "`compile` needs"
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")  # as torch/_inductor/config.py
    if kind not in ("cpu", "cuda"):
        yield Problem(f"{what} a CPU or a CUDA device; the device is {device}", REMEDY)
    elif kind == "cpu" and shutil.which(compiler) is None:
        yield Problem(f"{what} a C++ compiler on a CPU: there is no `{compiler}`", f"install it, or {REMEDY}")
    elif kind == "cuda" and find_spec("triton") is None:
        yield Problem(f"{what} the package triton, which is not installed", f"install it, or {REMEDY}")


def contradictions(parameters: Parameters, model: ModelPlan) -> Iterator[Problem]:
    """Yield parameters that compiled blocks do not go with."""
    denoiser = model.facts.denoiser
    if denoiser in model.components and model.components[denoiser].storage.partition("/")[0] == "nf4":
        what = f"`compile` is set, but bitsandbytes widens the nf4 weights of {denoiser} outside of what is compiled"
        yield Problem(what, f"quantize them to int8 or fp8, or {REMEDY}", wrong_use=True)
    if parameters.checkpointing in INSIDE_BLOCKS:
        reason = f"{INSIDE_BLOCKS[parameters.checkpointing]} of a block: it is compiled whole"
        what = f"`compile` does not go with `checkpointing` `{parameters.checkpointing}`, which {reason}"
        yield Problem(what, f"{REMEDY}, or pass `--checkpointing full`", wrong_use=True)
    reasons = {
        "blocks_to_swap": SWAPPED,
        "enable_model_cpu_offload": SWAPPED,
        "fused_backward": "frees each gradient before the next is there: a compiled block has all of its gradients at once",
        "use_gradient_checkpointing_offload": "moves what autograd keeps: compiled blocks choose that themselves",
    }
    for name, reason in reasons.items():
        if getattr(parameters, name):
            what = f"`compile` does not go with `{name}`, which {reason}"
            yield Problem(what, f"{REMEDY} or `--{name}`", wrong_use=True)
