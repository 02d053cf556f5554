"""Documented defaults for generating with Wan. No torch.

Source: the configurations of the repositories Wan-Video/Wan2.1 and Wan-Video/Wan2.2 (`wan/configs`, `generate.py`).
"""

# ruff: noqa: RUF001 - full-width punctuation of the published negative prompt

from dataclasses import replace

from diffsynth_core.models.spec import SamplingFacts

NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，"
    "多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，"
    "背景人很多，倒着走"
)
"""`sample_neg_prompt` of the configurations."""

T2V = SamplingFacts(
    steps=50,
    cfg_scale=5.0,
    height=480,
    width=832,
    num_frames=81,
    fps=16,
    negative_prompt=NEGATIVE_PROMPT,
    shift=3.0,
)
"""Wan 2.1; shift: that for 480P in the documentation of diffusers."""
T2V_2_2 = replace(
    T2V, steps=40, cfg_scale=4.0, second_cfg_scale=3.0, height=720, width=1280, shift=12.0, boundary=0.875
)
I2V_480P = replace(T2V, steps=40)
I2V_720P = replace(T2V, steps=40, height=720, width=1280, shift=5.0)
FLF2V = replace(T2V, height=720, width=1280, shift=16.0)
I2V_2_2 = replace(T2V, steps=40, cfg_scale=3.5, second_cfg_scale=3.5, shift=5.0, boundary=0.9)
TI2V = replace(T2V, height=704, width=1280, num_frames=121, fps=24, shift=5.0)


def text_to_video(origin: str) -> SamplingFacts:
    """Return the defaults of a text-to-video model: those of Wan 2.1 and 2.2 differ by the names of their files."""
    return T2V_2_2 if "A14B" in origin or "_noise_" in origin else T2V


def image_to_video(origin: str, image_encoder: bool, two_images: bool) -> SamplingFacts:
    """Return the defaults of an image-to-video model: only Wan 2.1 has an image encoder."""
    if not image_encoder:
        return I2V_2_2
    if two_images:
        return FLF2V
    return I2V_720P if "720P" in origin else I2V_480P
