"""Documented defaults for generating with Qwen-Image, and its published scheduler. No torch."""

# ruff: noqa: RUF001 - full-width punctuation of a published prompt

import re
from collections.abc import Mapping
from typing import Any

from diffsynth_core.models.spec import SamplingFacts

SCHEDULER: Mapping[str, Any] = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 8192,
    "max_shift": 0.9,
    "num_train_timesteps": 1000,
    "shift_terminal": 0.02,
    "time_shift_type": "exponential",
    "use_dynamic_shifting": True,
}
"""The published scheduler_config.json, as far as it differs from the defaults of diffusers."""

TEXT_TO_IMAGE = SamplingFacts(steps=50, cfg_scale=4.0, height=1328, width=1328, negative_prompt=" ")
"""Source: the model card of Qwen/Qwen-Image."""
TEXT_TO_IMAGE_2512 = SamplingFacts(
    steps=50,
    cfg_scale=4.0,
    height=1328,
    width=1328,
    negative_prompt=(
        "低分辨率，低画质，肢体畸形，手指畸形，画面过饱和，蜡像感，人脸无细节，过度光滑，画面具有AI感。"
        "构图混乱。文字模糊，扭曲。"
    ),
)
"""Source: the model card of Qwen/Qwen-Image-2512."""
EDIT = SamplingFacts(steps=50, cfg_scale=4.0, height=1024, width=1024, negative_prompt=" ")
"""Source: the model card of Qwen/Qwen-Image-Edit; size: that of its pipeline for square images."""
EDIT_PLUS = SamplingFacts(steps=40, cfg_scale=4.0, height=1024, width=1024, negative_prompt=" ")
"""Source: the model cards of Qwen/Qwen-Image-Edit-2509 and -2511."""


SHAPES = SamplingFacts(steps=12, cfg_scale=2.5, height=64, width=64, negative_prompt="")
"""Source: the card of diffsynth/shapes, which is shipped with the recipes."""


def text_to_image(origin: str) -> SamplingFacts:
    """Return the defaults of a text-to-image model by the name of the denoiser's files: all have the same modules."""
    if "diffsynth/shapes" in origin:
        return SHAPES
    return TEXT_TO_IMAGE_2512 if re.search(r"-2512(?!\d)", origin) else TEXT_TO_IMAGE
