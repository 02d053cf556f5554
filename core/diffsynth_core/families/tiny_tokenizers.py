"""Tiny tokenizers of the kind that Qwen models have: byte-level pairs, written in their published layout."""

import json
from collections.abc import Sequence
from pathlib import Path

from diffsynth_core.families.tiny_weights import write_json


def tiny_vocabulary(words: Sequence[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A byte-level vocabulary, and merges by which each of `words` becomes one token."""
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = sorted(ByteLevel.alphabet())
    merges = []
    for word in words:
        letters = word.replace(" ", "Ġ")
        for end in range(1, len(letters)):
            merge = (letters[:end], letters[end])
            if merge not in merges:
                merges.append(merge)
                tokens.append("".join(merge))
    return {token: number for number, token in enumerate(tokens)}, merges


def write_tokenizer(folder: Path, words: Sequence[str], special_tokens: Sequence[str]) -> None:
    """A tokenizer in the published layout: vocab.json, merges.txt and their configuration.

    The special tokens are numbered behind the vocabulary.
    """
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary, merges = tiny_vocabulary(words)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text(
        "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in merges), encoding="utf-8"
    )
    added = {
        str(len(vocabulary) + number): {
            "content": token,
            "special": True,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "single_word": False,
        }
        for number, token in enumerate(special_tokens)
    }
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": added,
        "pad_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
        "unk_token": None,
        "bos_token": None,
        "add_prefix_space": False,
        "model_max_length": 131072,
    }
    write_json(folder / "tokenizer_config.json", config)
