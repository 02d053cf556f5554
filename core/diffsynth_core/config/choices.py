"""Names that several options and the code behind them share."""

from collections.abc import Mapping
from typing import Literal

LoraFormat = Literal["diffsynth", "diffusers", "comfyui", "kohya"]
"""Key formats of LoRA files, by the program that defines them."""
LayoutName = Literal["documented", "diffusers", "original"]
"""Key names of full weights: those of DiffSynth-Studio's modules, of diffusers' and transformers' modules, or of the
files that the makers of a model publish."""
WeightDtype = Literal["float32", "bfloat16", "float16"]
"""Dtypes of weights and of the computation."""

TrainedDtype = Literal["float32", "bf16"]
"""Dtypes of weights that train in full."""
MixedPrecision = Literal["no", "bf16", "fp16"]
COMPUTE_DTYPES: Mapping[str, WeightDtype] = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""`mixed_precision` -> the dtype of frozen weights and of the computation."""
ENCODER_DTYPES: Mapping[str, WeightDtype] = {**COMPUTE_DTYPES, "fp16": "float32"}
"""`mixed_precision` -> the dtype of frozen encoders: float32 for fp16, whose range they overflow."""
TRAINING_TIMESTEPS = 1000
"""How many timesteps training draws from, in every family (`num_train_timesteps` of diffusers' schedulers)."""
