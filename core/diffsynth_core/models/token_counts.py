"""Token counts of captions, exact if the tokenizer is on disk. No torch, no transformers."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffsynth_core.json_files import MAX_TOKENIZER_BYTES, read_json
from diffsynth_core.models.size_facts import CaptionFacts

CHARACTERS_PER_TOKEN = 4
"""Estimate for English text; a character outside ASCII counts as one token."""
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Pattern by which Qwen2's tokenizer splits a text before merging. Source: `Qwen2Tokenizer` of transformers."""


@dataclass(frozen=True)
class CaptionRule:
    """How a text encoder reads captions, and the folder of its tokenizer; None if that is not on disk."""

    facts: CaptionFacts
    tokenizer: Path | None = None


def count_tokens(captions: Sequence[str], rule: CaptionRule) -> tuple[list[int], bool]:
    """Return the number of tokens of each caption without truncation, and whether it is exact or an estimate."""
    cleaned = [rule.facts.clean(_replace_surrogates(caption)) for caption in captions]
    tokenizer = _load(rule.tokenizer) if rule.tokenizer else None
    if tokenizer is None:
        return [rule.facts.around + estimate_tokens(caption) for caption in cleaned], False
    texts = [rule.facts.template.format(caption) for caption in cleaned]
    return [len(encoded.ids) - rule.facts.dropped for encoded in tokenizer.encode_batch(texts)], True


def _replace_surrogates(caption: str) -> str:
    """Replace unpaired surrogates, which tokenizers reject."""
    return caption if caption.isascii() else caption.encode("utf-8", "replace").decode("utf-8")


def estimate_tokens(caption: str) -> int:
    """Estimate the number of tokens of a caption without a tokenizer."""
    plain = sum(character.isascii() for character in caption)
    return -(-plain // CHARACTERS_PER_TOKEN) + len(caption) - plain


def may_be_longer(caption: str, facts: CaptionFacts) -> bool:
    """Return whether a caption can exceed the limit: every token has at least one byte."""
    limit = facts.most + facts.dropped - len(facts.template)
    return len(caption) > limit if caption.isascii() else len(caption.encode("utf-8", "surrogatepass")) > limit


def _load(folder: Path) -> Any:
    """Load the tokenizer in a folder; None if its files cannot be read."""
    load = next((load for name, load in LOADERS.items() if (folder / name).is_file()), None)
    if load is None:
        return None
    try:
        tokenizer = load(folder)
        _configure(tokenizer, folder)
    except Exception:  # the library raises nothing narrower, and its files may hold anything
        return None
    return tokenizer


def _from_tokenizer_json(folder: Path) -> Any:
    """Load `tokenizer.json`; unigram tokenizers without byte fallback, as transformers does."""
    from tokenizers import Tokenizer

    content = read_json(folder / "tokenizer.json", dict[str, Any], "", MAX_TOKENIZER_BYTES)
    if content["model"]["type"] == "Unigram":
        content["model"]["byte_fallback"] = False
    return Tokenizer.from_str(json.dumps(content))


def _configure(tokenizer: Any, folder: Path) -> None:
    """Disable truncation and padding, and add special tokens, as transformers does."""
    from tokenizers import AddedToken

    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in _special_tokens(folder)])


def _special_tokens(folder: Path) -> list[str]:
    """Return the special tokens in the files of a tokenizer."""
    config, added = (_read_object(folder / name) for name in ("tokenizer_config.json", "added_tokens.json"))
    listed = [*config.get("added_tokens_decoder", {}).values(), *config.get("additional_special_tokens", ())]
    listed += [config[name] for name in ("bos_token", "eos_token", "pad_token", "unk_token") if config.get(name)]
    names = [token["content"] if isinstance(token, dict) else token for token in listed]
    return list(dict.fromkeys([*sorted(added, key=added.__getitem__), *names]))


def _read_object(path: Path) -> dict[str, Any]:
    """Return a JSON object; empty if the file does not exist."""
    return read_json(path, dict[str, Any], "", MAX_TOKENIZER_BYTES) if path.exists() else {}


def _byte_pairs(folder: Path) -> Any:
    """Build Qwen2's tokenizer from `vocab.json` and `merges.txt`."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    tokenizer = Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    tokenizer.normalizer = normalizers.NFC()
    cut = pre_tokenizers.Split(Regex(QWEN_WORDS), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return tokenizer


LOADERS: Mapping[str, Callable[[Path], Any]] = {"tokenizer.json": _from_tokenizer_json, "vocab.json": _byte_pairs}
"""File in a folder -> loader of its tokenizer; the first existing file counts."""
