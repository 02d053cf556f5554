"""How UMT5 reads the captions of Wan, as diffusers' `WanPipeline` gives them to it. No torch."""

import html
import re

from diffsynth_core.models.size_facts import CaptionFacts

MAX_TOKENS = 512
"""Text tokens that the transformer sees, always as many; behind the caption they are zero."""


def clean_caption(caption: str) -> str:
    """The caption with broken encodings fixed, HTML entities unescaped and runs of white space collapsed."""
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(caption)))
    return re.sub(r"\s+", " ", text).strip()


TEXT = CaptionFacts(
    "tokenizer_path",
    MAX_TOKENS,
    4096,
    ("condition_embedder.text_embedder.linear_1.weight", 1),
    around=1,
    clean=clean_caption,
)
