"""Tiny tokenizers in their published layouts: byte-level BPE of Qwen models, unigrams of T5 and UMT5."""

import json
import string
from collections.abc import Mapping, Sequence
from pathlib import Path

from diffsynth_core.models.tiny import write_json

UNIGRAM_SPECIAL_TOKENS = ("<pad>", "</s>", "<unk>")
"""Tokens 0, 1 and 2, as in the vocabularies of T5 and UMT5."""


def tiny_vocabulary(words: Sequence[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return a byte-level vocabulary, and merges that turn each of `words` into one token."""
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


def write_pairs(folder: Path, vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> None:
    """Write vocab.json and merges.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text(
        "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in merges), encoding="utf-8"
    )


def write_tokenizer(folder: Path, words: Sequence[str], special_tokens: Sequence[str]) -> None:
    """Write a tokenizer in the published layout: vocab.json, merges.txt and configuration.

    The special tokens are numbered after the vocabulary.
    """
    vocabulary, merges = tiny_vocabulary(words)
    write_pairs(folder, vocabulary, merges)
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


def unigram_vocabulary(byte_fallback: bool) -> list[tuple[str, float]]:
    """Return (token, log-probability): special tokens, optional bytes, ASCII characters, pairs of letters."""
    pairs = [first + second for first in "▁" + string.ascii_lowercase for second in string.ascii_lowercase]
    characters = ["▁", *(character for character in string.printable if not character.isspace())]
    return [
        *((token, 0.0) for token in UNIGRAM_SPECIAL_TOKENS),
        *((f"<0x{number:02X}>", -12.0) for number in range(256) if byte_fallback),
        *((token, -6.0) for token in characters),
        *((token, -8.0) for token in pairs),
    ]


def write_unigram_tokenizer(folder: Path, byte_fallback: bool) -> None:
    """Write a tokenizer that ends each text with `</s>`.

    Args:
        byte_fallback: turn unknown characters into bytes, as UMT5 does, instead of `<unk>`, as T5 does.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors
    from tokenizers.models import Unigram

    folder.mkdir(parents=True, exist_ok=True)
    pad, end, unknown = UNIGRAM_SPECIAL_TOKENS
    vocabulary = unigram_vocabulary(byte_fallback)
    tokenizer = Tokenizer(
        Unigram(vocabulary, unk_id=UNIGRAM_SPECIAL_TOKENS.index(unknown), byte_fallback=byte_fallback)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", pair=f"$A {end} $B {end}", special_tokens=[(end, UNIGRAM_SPECIAL_TOKENS.index(end))]
    )
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in UNIGRAM_SPECIAL_TOKENS]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"eos_token": end, "pad_token": pad, "unk_token": unknown}
    write_json(folder / "special_tokens_map.json", special)
    config = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "model_max_length": 1000000000000000019884624838656}
    write_json(folder / "tokenizer_config.json", {**special, **config})
