"""Work of a forward pass of Wan. No torch."""

from diffsynth_core.models.forward_work import (
    IMAGE,
    SHOWN,
    TEXT,
    Attention,
    ForwardWork,
    Tokens,
    count_image_tokens,
)
from diffsynth_core.models.size_facts import StepSizes
from diffsynth_core.models.spec import Variant
from diffsynth_core.models.wan.captions import MAX_TOKENS
from diffsynth_core.models.wan.sizes import EMBEDDER

INPUT = "input"
"""Kind of tokens: those of the clip before the first block, where processes do not divide them yet."""
TIME = "time"
"""Kind of tokens: timesteps, one per sample, or one per token where some latents stay clean."""


def tokens(variant: Variant, sizes: StepSizes) -> Tokens:
    """Return the tokens of one sample; frames that are shown are channels of the clip's tokens."""
    image = count_image_tokens(sizes.images[0], variant.target)
    shown = sum(encoder.states.count for encoder in variant.encoders if encoder.states)
    time = image if variant.num_conditioning_frames else 1
    return {INPUT: image, IMAGE: image, TEXT: MAX_TOKENS, SHOWN: shown, TIME: time}


WORK = ForwardWork(
    tokens,
    {
        "patch_embedding": INPUT,
        f"{EMBEDDER}.time_*": TIME,
        f"{EMBEDDER}.text_embedder.*": TEXT,
        f"{EMBEDDER}.image_embedder.*": SHOWN,
        "*.attn2.add_*": SHOWN,
        "*.attn2.to_[kv]": TEXT,
        "*": IMAGE,
    },
    (
        Attention("*.attn1.to_q", IMAGE, IMAGE),
        Attention("*.attn2.to_q", IMAGE, TEXT),
        Attention("*.attn2.add_k_proj", IMAGE, SHOWN),
    ),
    divided=(IMAGE, TIME),
)
"""Of the transformer."""
