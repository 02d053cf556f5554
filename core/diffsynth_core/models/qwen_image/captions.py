"""How Qwen2.5-VL reads the captions of Qwen-Image, as diffusers' pipelines give them to it. No torch."""

from dataclasses import replace

from diffsynth_core.models.size_facts import CaptionFacts

PROMPT_TEMPLATE = (
    "<|im_start|>system\n"
    "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the "
    "objects and background:<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
DROPPED_TOKENS = 34
"""Tokens of the system message, whose states the model never sees."""
MAX_TOKENS = 1024
"""Text tokens kept behind the dropped ones."""

EDIT_TEMPLATE = (
    "<|im_start|>system\n"
    "Describe the key features of the input image (color, shape, size, texture, objects, background), then explain how "
    "the user's text instruction should alter or modify the image. Generate a new image that meets the user's "
    "requirements while maintaining consistency with the original input where appropriate.<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
DROPPED_EDIT_TOKENS = 64
MAX_EDIT_TOKENS = 3072
"""Tokens of a caption and its images behind the dropped ones. The pipelines cut nothing off; but the transformer has
4096 positions, of which text begins at a 32nd of the longest side of an image in pixels."""
WIDTH = 3584
"""Values in a state of Qwen2.5-VL 7B."""

IMAGE_SIDE = 28
"""Pixels of a token of an image that Qwen2.5-VL sees: patches of 14, joined two by two."""
IMAGE_TOKENS = 4
"""The fewest of an image, the `min_pixels` (56 x 56) of its processor."""
IMAGE = "<|vision_start|>{image}<|vision_end|>"

TEXT = CaptionFacts(
    "tokenizer_path", MAX_TOKENS, WIDTH, ("txt_in.weight", 1), PROMPT_TEMPLATE, DROPPED_TOKENS, around=5
)
EDIT_TEXT = replace(
    TEXT,
    most=MAX_EDIT_TOKENS,
    template=EDIT_TEMPLATE,
    dropped=DROPPED_EDIT_TOKENS,
    announced=IMAGE,
    image_side=IMAGE_SIDE,
    image_tokens=IMAGE_TOKENS,
)
EDIT_PLUS_TEXT = replace(EDIT_TEXT, announced=f"Picture {{number}}: {IMAGE}")
"""Of the models after the first, to which images are numbered."""
