"""Names that several options and the code behind them share."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

LoraFormat = Literal["diffsynth", "diffusers", "comfyui", "kohya"]
"""Key formats of LoRA files, by the program that defines them."""
LayoutName = Literal["documented", "diffusers", "original", "comfyui"]
"""Key names of full weights: those of DiffSynth-Studio's modules, of diffusers' and transformers' modules, of the files
that the makers of a model publish, or of those that ComfyUI reads."""
SplitLayout = Literal["documented", "diffusers", "original", "comfyui", "pretrained"]
"""What `split-ckpt` writes a component as: a file in a layout, or a folder that `from_pretrained` opens."""
SplitDtype = Literal["float32", "bfloat16", "float16", "fp8_scaled"]
"""Dtypes of full weights that `split-ckpt` writes; `fp8_scaled`: layers of blocks in 8-bit floats, with scales."""
WeightDtype = Literal["float32", "bfloat16", "float16"]
"""Dtypes of weights and of the computation."""

HubName = Literal["modelscope", "huggingface"]
"""Hubs that files are downloaded from and uploaded to."""
TrainedDtype = Literal["float32", "bf16"]
"""Dtypes of weights that train in full."""
MixedPrecision = Literal["no", "bf16", "fp16"]
AttentionName = Literal["auto", "sdpa", "flash", "efficient", "cudnn", "flash3", "sage"]
"""Attention kernels; models/attention.py says what each can do."""
COMPUTE_DTYPES: Mapping[str, WeightDtype] = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""`mixed_precision` -> the dtype of frozen weights and of the computation."""
ENCODER_DTYPES: Mapping[str, WeightDtype] = {**COMPUTE_DTYPES, "fp16": "float32"}
"""`mixed_precision` -> the dtype of frozen encoders: float32 for fp16, whose range they overflow."""
TRAINING_TIMESTEPS = 1000
"""How many timesteps training draws from, in every family (`num_train_timesteps` of diffusers' schedulers)."""
MAX_SAMPLING_STEPS = 10_000
"""Maximum number of sampling steps: samplers use tens, and their training timesteps are a thousand."""
SWAP_BUFFERS = 2
"""Swapped blocks, or parts of them, that are on the device at a time: one that computes, and the next one."""

Checkpointing = Literal["full", "nested", "keep_attention", "keep_every_2", "keep_every_3", "keep_every_4"]
"""Kinds of gradient checkpointing of the denoiser's blocks."""


@dataclass(frozen=True)
class Recomputation:
    """What the backward pass computes again of the denoiser's blocks.

    Attributes:
        parts: the parts of a block with layers of their own, such as attention and feed-forward, are computed a third
            time: of a block that is recomputed only their inputs are kept, and then one part's activations at a time.
        keeps_attention: the output of attention, with the float32 number for each query that its backward pass needs,
            is kept instead.
        keeps_every: every how manyth block is not recomputed, in the order of the forward pass; None: all are.
    """

    parts: bool = False
    keeps_attention: bool = False
    keeps_every: int | None = None

    @property
    def keeps_more(self) -> bool:
        """Whether more is kept from the forward pass than the inputs of blocks."""
        return self.keeps_attention or self.keeps_every is not None


RECOMPUTATIONS: Mapping[Checkpointing, Recomputation] = {
    "full": Recomputation(),
    "nested": Recomputation(parts=True),
    "keep_attention": Recomputation(keeps_attention=True),
    "keep_every_2": Recomputation(keeps_every=2),
    "keep_every_3": Recomputation(keeps_every=3),
    "keep_every_4": Recomputation(keeps_every=4),
}
"""What each kind of gradient checkpointing computes again."""
MOST_COMPILATIONS = 256
"""How often blocks may be compiled in a run. Source: `accumulated_recompile_limit` of torch/_dynamo/config.py."""
