"""How many tokens captions have, by their tokenizer where it is on disk. No torch, no transformers."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffsynth_core.json_files import MAX_TOKENIZER_BYTES, read_json
from diffsynth_core.models.size_facts import CaptionFacts

CHARACTERS_PER_TOKEN = 4
"""Of plain English, as a rule of thumb; characters outside ASCII count as a token each."""
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Where Qwen2's tokenizer cuts a text before it looks for pairs. Source: `Qwen2Tokenizer` of transformers."""


@dataclass(frozen=True)
class CaptionRule:
    """How a text encoder reads captions, and the folder of its tokenizer; None where that is not on disk."""

    facts: CaptionFacts
    tokenizer: Path | None = None


def count_tokens(captions: Sequence[str], rule: CaptionRule) -> tuple[list[int], bool]:
    """Tokens of each caption, were nothing cut off, and whether they are counted; else they are estimated."""
    cleaned = [rule.facts.clean(_whole_characters(caption)) for caption in captions]
    tokenizer = _load(rule.tokenizer) if rule.tokenizer else None
    if tokenizer is None:
        return [rule.facts.around + estimate_tokens(caption) for caption in cleaned], False
    texts = [rule.facts.template.format(caption) for caption in cleaned]
    return [len(encoded.ids) - rule.facts.dropped for encoded in tokenizer.encode_batch(texts)], True


def _whole_characters(caption: str) -> str:
    """A caption without halves of characters, which tokenizers do not take."""
    return caption if caption.isascii() else caption.encode("utf-8", "replace").decode("utf-8")


def estimate_tokens(caption: str) -> int:
    """About how many tokens a caption has, without a tokenizer."""
    plain = sum(character.isascii() for character in caption)
    return -(-plain // CHARACTERS_PER_TOKEN) + len(caption) - plain


def may_be_longer(caption: str, facts: CaptionFacts) -> bool:
    """Whether a caption can have more tokens than are read: no token is shorter than a byte."""
    room = facts.most + facts.dropped - len(facts.template)
    return len(caption) > room if caption.isascii() else len(caption.encode("utf-8", "surrogatepass")) > room


def _load(folder: Path) -> Any:
    """The tokenizer in a folder; None where its files cannot be read."""
    load = next((load for name, load in LOADERS.items() if (folder / name).is_file()), None)
    if load is None:
        return None
    try:
        tokenizer = load(folder)
        _settle(tokenizer, folder)
    except Exception:  # the library raises nothing narrower, and its files may hold anything
        return None
    return tokenizer


def _whole(folder: Path) -> Any:
    """The tokenizer in `tokenizer.json`; of T5's kind without bytes for unknown characters, as transformers has it."""
    from tokenizers import Tokenizer

    content = read_json(folder / "tokenizer.json", dict[str, Any], "", MAX_TOKENIZER_BYTES)
    if content["model"]["type"] == "Unigram":
        content["model"]["byte_fallback"] = False
    return Tokenizer.from_str(json.dumps(content))


def _settle(tokenizer: Any, folder: Path) -> None:
    """Have captions read to their end, and special tokens whole, as transformers has them."""
    from tokenizers import AddedToken

    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in _special_tokens(folder)])


def _special_tokens(folder: Path) -> list[str]:
    """The special tokens that the files beside a tokenizer name."""
    settings, added = (_read_object(folder / name) for name in ("tokenizer_config.json", "added_tokens.json"))
    listed = [*settings.get("added_tokens_decoder", {}).values(), *settings.get("additional_special_tokens", ())]
    listed += [settings[name] for name in ("bos_token", "eos_token", "pad_token", "unk_token") if settings.get(name)]
    names = [token["content"] if isinstance(token, dict) else token for token in listed]
    return list(dict.fromkeys([*sorted(added, key=added.__getitem__), *names]))


def _read_object(path: Path) -> dict[str, Any]:
    """An object of JSON; empty where there is none."""
    return read_json(path, dict[str, Any], "", MAX_TOKENIZER_BYTES) if path.exists() else {}


def _byte_pairs(folder: Path) -> Any:
    """Qwen2's tokenizer from `vocab.json` and `merges.txt`."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    tokenizer = Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    tokenizer.normalizer = normalizers.NFC()
    cut = pre_tokenizers.Split(Regex(QWEN_WORDS), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return tokenizer


LOADERS: Mapping[str, Callable[[Path], Any]] = {"tokenizer.json": _whole, "vocab.json": _byte_pairs}
"""The file that a folder has -> what makes its tokenizer; the first that is there counts."""
