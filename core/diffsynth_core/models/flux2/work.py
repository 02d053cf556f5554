"""Work of a forward pass of FLUX.2. No torch."""

from diffsynth_core.models.flux2.captions import MAX_TOKENS
from diffsynth_core.models.forward_work import (
    IMAGE,
    JOINT,
    SAMPLE,
    TEXT,
    Attention,
    ForwardWork,
    Tokens,
    joint_tokens,
)
from diffsynth_core.models.size_facts import StepSizes
from diffsynth_core.models.spec import Variant


def tokens(variant: Variant, sizes: StepSizes) -> Tokens:
    """Return the tokens of one sample: all texts are as long."""
    return joint_tokens(variant, sizes, MAX_TOKENS)


WORK = ForwardWork(
    tokens,
    {
        "time_guidance_embed.*": SAMPLE,
        "*_modulation*": SAMPLE,
        "norm_out.*": SAMPLE,
        "single_transformer_blocks.*": JOINT,
        "context_embedder": TEXT,
        "*.ff_context.*": TEXT,
        "*.attn.add_*": TEXT,
        "*.attn.to_add_out": TEXT,
        "*": IMAGE,
    },
    (Attention("transformer_blocks.*.attn.to_q", JOINT, JOINT), Attention("single_*.attn.to_out", JOINT, JOINT)),
)
"""Of the transformer."""
