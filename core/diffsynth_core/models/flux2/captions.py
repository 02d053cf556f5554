"""How Qwen3 reads the captions of FLUX.2 klein, as in diffusers' `Flux2KleinPipeline`. No torch."""

from diffsynth_core.models.flux2.keys import TEXT_LAYERS
from diffsynth_core.models.size_facts import CaptionFacts

MAX_TOKENS = 512
"""Length of the text encoder's input. The transformer attends to the padding too."""
TEMPLATE = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
"""Output of Qwen3's chat template for a message, without thinking.

Used to count tokens without transformers; encoding applies the tokenizer's own template.
"""
WIDTHS = {"4B": 2560, "9B": 4096}
"""Size of the FLUX.2 model -> width of its text encoder (Qwen3 4B and 8B)."""

TEXT = {
    size: CaptionFacts(
        "tokenizer_path",
        MAX_TOKENS,
        width * len(TEXT_LAYERS),
        ("context_embedder.weight", 1),
        TEMPLATE,
        around=12,
        padded=True,
    )
    for size, width in WIDTHS.items()
}
"""Size of the FLUX.2 model -> captions as read by its text encoder."""
