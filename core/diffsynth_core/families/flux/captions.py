"""How CLIP and T5 read the captions of FLUX.1, as diffusers' `FluxPipeline` gives them to them. No torch."""

from diffsynth_core.families.interface import CaptionFacts

CLIP_TOKENS = 77
T5_TOKENS = 512
"""Text tokens that the encoders read, always as many: shorter captions are padded, and the padding is not masked."""
CLIP_WIDTH = 768
"""Values in the one state of CLIP that is kept, of the whole caption."""

TEXT = CaptionFacts("tokenizer_2_path", T5_TOKENS, width=4096, padded=True)
"""By T5, which reads what CLIP has no room for."""
