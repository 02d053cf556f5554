"""How CLIP and T5 read the captions of FLUX.1, as in diffusers' `FluxPipeline`. No torch."""

from diffsynth_core.models.size_facts import CaptionFacts, EmbeddingSpec

CLIP_TOKENS = 77
"""Length of CLIP's input."""
T5_TOKENS = 512
"""Length of T5's input. Shorter captions are padded, and the padding is not masked."""
POOLED = EmbeddingSpec(count=1, width=768, side=("time_text_embed.text_embedder.linear_1.weight", 1))
"""The pooled embedding of CLIP."""

TEXT = CaptionFacts("tokenizer_2_path", T5_TOKENS, 4096, ("context_embedder.weight", 1), around=1, padded=True)
"""Captions as read by T5, which reads further than CLIP."""
