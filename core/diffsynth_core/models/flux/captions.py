"""How CLIP and T5 read the captions of FLUX.1, as diffusers' `FluxPipeline` gives them to them. No torch."""

from diffsynth_core.models.size_facts import CaptionFacts, EmbeddingSpec

CLIP_TOKENS = 77
T5_TOKENS = 512
"""Text tokens that the encoders read, always as many: shorter captions are padded, and the padding is not masked."""
POOLED = EmbeddingSpec(count=1, width=768, side=("time_text_embed.text_embedder.linear_1.weight", 1))
"""The one state of CLIP that is kept, of the whole caption."""

TEXT = CaptionFacts("tokenizer_2_path", T5_TOKENS, 4096, ("context_embedder.weight", 1), around=1, padded=True)
"""By T5, which reads what CLIP has no room for."""
