"""How Qwen2.5-VL reads the captions of Qwen-Image, as in diffusers' pipelines. No torch."""

from dataclasses import replace

from diffsynth_core.models.size_facts import CaptionFacts

PROMPT_TEMPLATE = (
    "<|im_start|>system\n"
    "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the "
    "objects and background:<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
"""Template of text-to-image captions."""
DROPPED_TOKENS = 34
"""Tokens of the system message, whose states are dropped."""
MAX_TOKENS = 1024
"""Maximum number of text tokens after the dropped ones."""

EDIT_TEMPLATE = (
    "<|im_start|>system\n"
    "Describe the key features of the input image (color, shape, size, texture, objects, background), then explain how "
    "the user's text instruction should alter or modify the image. Generate a new image that meets the user's "
    "requirements while maintaining consistency with the original input where appropriate.<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
"""Template of editing captions."""
DROPPED_EDIT_TOKENS = 64
"""Tokens of the system message for editing."""
MAX_EDIT_TOKENS = 3072
"""Maximum number of tokens of a caption and its images after the dropped ones.

The pipelines do not truncate, but the transformer has 4096 positions, and text starts at position
(longest side of an image in pixels) / 32.
"""
WIDTH = 3584
"""Width of Qwen2.5-VL 7B."""

IMAGE_SIDE = 28
"""Pixels per side of an image token: patches of 14 pixels, merged 2 x 2."""
IMAGE_TOKENS = 4
"""Minimum number of tokens of an image: `min_pixels` (56 x 56) of the processor."""
IMAGE = "<|vision_start|>{image}<|vision_end|>"
"""Text of an image in the prompt."""

TEXT = CaptionFacts(
    "tokenizer_path", MAX_TOKENS, WIDTH, ("txt_in.weight", 1), PROMPT_TEMPLATE, DROPPED_TOKENS, around=5
)
"""Captions of text-to-image models."""
EDIT_TEXT = replace(
    TEXT,
    most=MAX_EDIT_TOKENS,
    template=EDIT_TEMPLATE,
    dropped=DROPPED_EDIT_TOKENS,
    announced=IMAGE,
    image_side=IMAGE_SIDE,
    image_tokens=IMAGE_TOKENS,
)
"""Captions of the first editing model."""
EDIT_PLUS_TEXT = replace(EDIT_TEXT, announced=f"Picture {{number}}: {IMAGE}")
"""Captions of the later editing models, in which images are numbered."""
