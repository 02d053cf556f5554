"""How Qwen3 reads the captions of FLUX.2 klein, as diffusers' `Flux2KleinPipeline` gives them to it. No torch."""

from diffsynth_core.models.flux2.keys import TEXT_LAYERS
from diffsynth_core.models.size_facts import CaptionFacts

MAX_TOKENS = 512
"""Text tokens that the transformer sees, always as many: it attends to the padding too."""
TEMPLATE = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
"""What Qwen3's chat template makes of a message without thinking; for counting, encoding asks the tokenizer itself."""
WIDTHS = {"4B": 2560, "9B": 4096}
"""Values in a state of the text encoder, by the size of the model it belongs to (Qwen3 4B and 8B)."""

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
