"""How UMT5 reads the captions of Wan, as in diffusers' `WanPipeline`. No torch."""

import html
import re

from diffsynth_core.models.size_facts import CaptionFacts

MAX_TOKENS = 512
"""Number of text states of the transformer; those after the caption are zero."""


def clean_caption(caption: str) -> str:
    """Return the caption with mojibake fixed, HTML entities unescaped and white space collapsed."""
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
"""Captions of Wan."""
