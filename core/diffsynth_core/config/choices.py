"""Names that several options and the code behind them share."""

from typing import Literal

LoraFormat = Literal["diffsynth", "diffusers", "comfyui", "kohya"]
"""Key formats of LoRA files, by the program that defines them."""
LayoutName = Literal["documented", "diffusers", "original"]
"""Key names of full weights: those of DiffSynth-Studio's modules, of diffusers' and transformers' modules, or of the
files that the makers of a model publish."""
WeightDtype = Literal["float32", "bfloat16", "float16"]
"""Dtypes that weights are written in."""
