"""A small Qwen2 tokenizer in the layout without tokenizer.json: vocab.json, merges.txt and configuration."""

import json
from pathlib import Path

from tokenizers.pre_tokenizers import ByteLevel

MERGES = ("t h", "th e", "Ġ the", "Ġ t", "c o", "u n")
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def write_qwen_pairs(folder: Path) -> None:
    """Write it to `folder`."""
    tokens = [*sorted(ByteLevel.alphabet()), *(pair.replace(" ", "") for pair in MERGES)]
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("\n".join(("#version: 0.2", *MERGES)) + "\n")
    added = {token: len(tokens) + number for number, token in enumerate(SPECIAL)}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": SPECIAL[0], "additional_special_tokens": SPECIAL[1:]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
