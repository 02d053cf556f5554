"""What is measured on a GPU: a row is a recipe with other parameters. Most important first: a rented GPU may be short
of minutes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """One line of the page.

    Attributes:
        parameters: other than those of the recipe.
        storage: `fp8`, `int8` or `nf4` for the frozen weights of the transformer; empty: bf16.
        tolerance: the largest relative difference of a loss to that of the same steps with `plain` parameters: the
            backward pass of FlashAttention adds in any order, and other kernels round otherwise in bf16; None: the row
            measures speed and memory.
        plain: parameters of these other steps.
        warm_up, steps: steps before those that are timed, and those; a row of correctness compares all of them.
        minutes: limit of its process.
    """

    name: str
    recipe: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    storage: str = ""
    tolerance: float | None = None
    plain: Mapping[str, Any] = field(default_factory=dict)
    warm_up: int = 2
    steps: int = 5
    minutes: float = 4


SMALL, QWEN, FLUX, WAN = "wan2.1-t2v-1.3b", "qwen-image", "flux.1-dev", "wan2.1-t2v-14b"
SHORT_CLIP = {"height": 256, "width": 256, "num_frames": 17}
CLIP = {"height": 480, "width": 832, "num_frames": 81}
CHECKPOINTED = {"use_gradient_checkpointing": True}
COMPILED = {"compile": True, **CHECKPOINTED}
FUSED = {"optimizer": "adafactor", "trained_dtype": "bf16", **CHECKPOINTED}
ROWS = (
    Row("same losses: 15 of 30 blocks swapped", f"{SMALL}-lora", {"blocks_to_swap": 15, **SHORT_CLIP}, tolerance=1e-3),
    Row("same losses: frozen weights in nf4", f"{SMALL}-lora", SHORT_CLIP, "nf4", tolerance=0.1),
    Row(
        "same losses: fused backward pass",
        f"{SMALL}-full",
        {"fused_backward": True, **FUSED, **SHORT_CLIP},
        tolerance=1e-3,
        plain={"fused_backward": False},
    ),
    Row(
        "same losses: fused AdamW",
        f"{SMALL}-lora",
        {"optimizer_args": "fused=true", **SHORT_CLIP},
        tolerance=1e-3,
        plain={"optimizer_args": "fused=false"},
    ),
    Row(
        "same losses: compiled blocks",
        f"{SMALL}-lora",
        {"compile": True, **SHORT_CLIP},
        tolerance=1e-2,
        plain={"compile": False},
    ),
    *(
        Row(
            f"same losses: {words}",
            f"{SMALL}-lora",
            {"attention": kind, **SHORT_CLIP},
            tolerance=1e-2,
            plain={"attention": "sdpa"},
        )
        for kind, words in (("cudnn", "attention of cuDNN"), ("flash", "FlashAttention"))
    ),
    Row("Qwen-Image LoRA, bf16", f"{QWEN}-lora", CHECKPOINTED),
    Row("FLUX.1 LoRA, bf16", f"{FLUX}-lora", CHECKPOINTED),
    Row("Qwen-Image LoRA, bf16, compiled", f"{QWEN}-lora", COMPILED, minutes=6),
    Row("FLUX.1 LoRA, bf16, compiled", f"{FLUX}-lora", COMPILED, minutes=6),
    Row("Qwen-Image LoRA, fp8", f"{QWEN}-lora", CHECKPOINTED, "fp8"),
    Row("Qwen-Image LoRA, bf16, 16 blocks swapped", f"{QWEN}-lora", {"blocks_to_swap": 16, **CHECKPOINTED}),
    Row("Wan 14B LoRA, 480 x 832 x 81, bf16", f"{WAN}-lora", {**CLIP, **CHECKPOINTED}, warm_up=1, steps=2),
    Row(
        "Wan 14B LoRA, 480 x 832 x 81, bf16, compiled",
        f"{WAN}-lora",
        {**CLIP, **COMPILED},
        warm_up=1,
        steps=2,
        minutes=6,
    ),
    Row("Qwen-Image LoRA, nf4", f"{QWEN}-lora", CHECKPOINTED, "nf4"),
    Row("Qwen-Image LoRA, bf16, 45 blocks swapped", f"{QWEN}-lora", {"blocks_to_swap": 45, **CHECKPOINTED}),
    Row(
        "Qwen-Image full, bf16, fused backward pass",
        f"{QWEN}-full",
        {"fused_backward": True, **FUSED},
    ),
    Row("Qwen-Image LoRA, bf16, kept attention", f"{QWEN}-lora", {"checkpointing": "keep_attention", **CHECKPOINTED}),
    Row(
        "Wan 14B LoRA, 480 x 832 x 81, kept attention",
        f"{WAN}-lora",
        {"checkpointing": "keep_attention", **CLIP, **CHECKPOINTED},
        warm_up=1,
        steps=2,
    ),
    Row("Qwen-Image LoRA, bf16, attention of cuDNN", f"{QWEN}-lora", {"attention": "cudnn", **CHECKPOINTED}),
    Row("Qwen-Image LoRA, bf16, FlashAttention", f"{QWEN}-lora", {"attention": "flash", **CHECKPOINTED}),
    Row(
        "Qwen-Image LoRA, bf16, every 2nd block kept", f"{QWEN}-lora", {"checkpointing": "keep_every_2", **CHECKPOINTED}
    ),
    Row("Qwen-Image LoRA, bf16, nested checkpointing", f"{QWEN}-lora", {"checkpointing": "nested", **CHECKPOINTED}),
    Row("Qwen-Image LoRA, int8", f"{QWEN}-lora", CHECKPOINTED, "int8"),
    Row("Qwen-Image LoRA, fp8, compiled", f"{QWEN}-lora", COMPILED, "fp8", minutes=6),
    Row("FLUX.1 LoRA, fp8", f"{FLUX}-lora", CHECKPOINTED, "fp8"),
    Row("FLUX.1 LoRA, nf4", f"{FLUX}-lora", CHECKPOINTED, "nf4"),
    Row("FLUX.1 LoRA, int8", f"{FLUX}-lora", CHECKPOINTED, "int8"),
    Row("Wan 14B LoRA, 480 x 832 x 81, fp8", f"{WAN}-lora", {**CLIP, **CHECKPOINTED}, "fp8", warm_up=1, steps=2),
    Row(
        "Wan 14B LoRA, 480 x 832 x 81, attention of cuDNN",
        f"{WAN}-lora",
        {"attention": "cudnn", **CLIP, **CHECKPOINTED},
        warm_up=1,
        steps=2,
    ),
    Row("same losses: frozen weights in int8", f"{SMALL}-lora", SHORT_CLIP, "int8", tolerance=0.1),
    Row("same losses: frozen weights in fp8", f"{SMALL}-lora", SHORT_CLIP, "fp8", tolerance=0.1),
)
REHEARSED = {
    "attention": "sdpa",
    "blocks_to_swap": 1,
    "height": 64,
    "width": 64,
    "num_frames": 5,
}
"""What a rehearsal on a CPU has in the place of the parameters of a row, if that has them."""


def find_row(name: str) -> Row:
    """Return the row of a name."""
    return next(row for row in ROWS if row.name == name)
