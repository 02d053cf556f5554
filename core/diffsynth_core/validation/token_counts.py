"""How many tokens captions have, by the tokenizer of a recipe where it is on disk. No torch, no transformers."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from diffsynth_core.config.parameters import Parameters
from diffsynth_core.families.interface import CaptionFacts, FamilyFacts, TokenizerFacts, Variant
from diffsynth_core.families.table import component_at
from diffsynth_core.files import model_base_path
from diffsynth_core.sources.model_files import locate_folder, split_entry
from diffsynth_core.validation.rules import CaptionRule

CHARACTERS_PER_TOKEN = 4
"""Of plain English, as a rule of thumb; characters outside ASCII count as a token each."""
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Where Qwen2's tokenizer cuts a text before it looks for pairs. Source: `Qwen2Tokenizer` of transformers."""


def caption_rule(parameters: Parameters, facts: FamilyFacts, variant: Variant) -> CaptionRule | None:
    """How the text encoder of a run reads captions, and where its tokenizer lies; None when the family does not say."""
    caption = next((encoder.caption for encoder in variant.encoders if encoder.caption), None)
    if caption is None:
        return None
    tokenizer = facts.tokenizers[caption.tokenizer]
    given: str | None = getattr(parameters, caption.tokenizer)
    places = [given] if given else [*_beside(parameters, facts, tokenizer), tokenizer.default]
    base = model_base_path()
    return CaptionRule(caption, next((folder for place in places if (folder := locate_folder(place, base))), None))


def _beside(parameters: Parameters, facts: FamilyFacts, tokenizer: TokenizerFacts) -> list[str]:
    """Where the tokenizer lies beside the files that a recipe names for its text encoder."""
    folders = []
    for entry in parameters.model_id_with_origin_paths:
        model_id, pattern = split_entry(entry) or ("", "")
        component = component_at(pattern, facts, model_id)
        if component and component.name == tokenizer.component:
            here = Path(pattern).parent
            folders += [f"{model_id}:{(here / folder).as_posix()}" for folder in tokenizer.folders]
    return folders


def count_tokens(captions: Sequence[str], rule: CaptionRule) -> tuple[list[int], bool]:
    """Tokens of each caption, were nothing cut off, and whether they are counted; else they are estimated."""
    texts = [rule.facts.template.format(rule.facts.clean(caption)) for caption in captions]
    tokenizer = _load(rule.tokenizer) if rule.tokenizer else None
    if tokenizer is None:
        return [estimate_tokens(rule.facts.clean(caption)) for caption in captions], False
    return [len(encoded.ids) - rule.facts.dropped for encoded in tokenizer.encode_batch(texts)], True


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
    from tokenizers import Tokenizer

    loaders: tuple[tuple[str, Callable[[Path], Any]], ...] = (
        ("tokenizer.json", lambda path: Tokenizer.from_file(str(path))),
        ("vocab.json", lambda path: _byte_pairs(path.parent)),
    )
    for name, load in loaders:
        if (folder / name).is_file():
            try:
                tokenizer = load(folder / name)
            except Exception:  # the library raises nothing narrower
                return None
            tokenizer.no_truncation()
            tokenizer.no_padding()
            return tokenizer
    return None


def _byte_pairs(folder: Path) -> Any:
    """Qwen2's tokenizer from `vocab.json`, `merges.txt` and, where there is one, `added_tokens.json`."""
    import json

    from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

    tokenizer = Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    tokenizer.normalizer = normalizers.NFC()
    cut = pre_tokenizers.Split(Regex(QWEN_WORDS), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    added = folder / "added_tokens.json"
    names = json.loads(added.read_text(encoding="utf-8")) if added.is_file() else {}
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in sorted(names, key=names.__getitem__)])
    return tokenizer
