"""Work of a forward pass of FLUX.1. No torch."""

from diffsynth_core.models.flux.captions import T5_TOKENS
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
    return joint_tokens(variant, sizes, T5_TOKENS)


WORK = ForwardWork(
    tokens,
    {
        "time_text_embed.*": SAMPLE,
        "*norm*.linear": SAMPLE,
        "single_transformer_blocks.*": JOINT,
        "controlnet_single_blocks.*": IMAGE,
        "context_embedder": TEXT,
        "*.ff_context.*": TEXT,
        "*.attn.add_*": TEXT,
        "*.attn.to_add_out": TEXT,
        "*": IMAGE,
    },
    (Attention("*.attn.to_q", JOINT, JOINT),),
)
"""Of the transformer and of ControlNets."""
