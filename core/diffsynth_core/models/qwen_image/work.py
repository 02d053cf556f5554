"""Work of a forward pass of Qwen-Image. No torch."""

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
    """Return the tokens of one sample: texts are as long as the longest."""
    return joint_tokens(variant, sizes, sizes.text_tokens)


WORK = ForwardWork(
    tokens,
    {
        "time_text_embed.*": SAMPLE,
        "*_mod.1": SAMPLE,
        "norm_out.*": SAMPLE,
        "txt_in": TEXT,
        "*.txt_mlp.*": TEXT,
        "*.attn.add_*": TEXT,
        "*.attn.to_add_out": TEXT,
        "*": IMAGE,
    },
    (Attention("*.attn.to_q", JOINT, JOINT),),
)
"""Of the transformer and of ControlNets."""
