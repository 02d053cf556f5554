"""Table of the attention kernels that a run may name, without torch, and the switch that has modules use one."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from diffsynth_core.config.choices import AttentionName, MixedPrecision

if TYPE_CHECKING:
    from torch import nn

ON_GPUS: Mapping[str, tuple[MixedPrecision, ...]] = {"cuda": ("bf16", "fp16")}


@dataclass(frozen=True, kw_only=True)
class AttentionKernel:
    """A way to compute attention.

    All go through `torch.nn.functional.scaled_dot_product_attention`, whose inputs autocast converts: packages of their
    own would get float32 queries and keys from norms, beside bfloat16 values, and reject them.

    Attributes:
        backend: `AttentionBackendName` of diffusers; None: what diffusers chooses.
        precisions: device type -> values of `mixed_precision` that it computes in; empty: all on all devices.
        masks: whether it takes the masks of padded captions.
        no_gradients: why it cannot train; empty: it can.
    """

    backend: str | None
    precisions: Mapping[str, tuple[MixedPrecision, ...]] = field(default_factory=dict)
    masks: bool = False
    no_gradients: str = ""


ATTENTION_KERNELS: dict[AttentionName, AttentionKernel] = {
    "auto": AttentionKernel(backend=None, masks=True),
    "sdpa": AttentionKernel(backend="native", masks=True),
    "flash": AttentionKernel(backend="_native_flash", precisions={**ON_GPUS, "cpu": ("no", "bf16")}),
    "efficient": AttentionKernel(backend="_native_efficient", precisions={"cuda": ("no", "bf16", "fp16")}),
    "cudnn": AttentionKernel(backend="_native_cudnn", precisions=ON_GPUS),
    "flash3": AttentionKernel(
        backend="_flash_3", no_gradients="diffusers calls FlashAttention 3 in an operation without a backward pass"
    ),
    "sage": AttentionKernel(
        backend="sage", no_gradients="SageAttention quantizes queries and keys, and has no backward pass"
    ),
}
"""Value of `attention` -> kernel."""


def set_attention(module: "nn.Module", name: AttentionName) -> None:
    """Have the attention of a diffusers model computed by a kernel; others, such as text encoders, stay as they are.

    `ModelMixin.set_attention_backend` would set the default of the whole process as well, and write a warning; the
    private attribute is the one that it sets.
    """
    backend = ATTENTION_KERNELS[name].backend
    if backend is None:
        return
    from diffusers.models.attention_dispatch import AttentionBackendName

    for part in module.modules():
        processor = getattr(part, "processor", None)
        if processor is not None and hasattr(processor, "_attention_backend"):
            processor._attention_backend = AttentionBackendName(backend)
