"""The keys of LoRA files, matched to modules: any known prefix, any known ending, any vocabulary of the component.

Modules may be spelled with dots or underscores. No torch.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from diffsynth_core.config.choices import LoraFormat
from diffsynth_core.errors import DiffSynthError, list_names
from diffsynth_core.weights.lora_formats import (
    DIFFERENCES,
    DIT,
    ENDINGS,
    LORA_FORMATS,
    PREFIXES,
    LoraKeys,
    LoraNaming,
    Role,
    Vocabulary,
    underscored,
)

OTHER_ADAPTERS = {
    r"lokr_.*": "LoKr",
    r"hada_.*": "LoHa",
    r"dora_scale|lora_magnitude_vector": "DoRA",
    r"lora_mid": "LoRA with a core tensor (Tucker decomposition)",
    r"oft_.*": "OFT",
    r"boft_.*": "BOFT",
    r"ia3_.*|on_input": "IA3",
    r"vera_lambda_.*": "VeRA",
    r"glora_.*|[ab][12]": "GLoRA",
    r"bias_diff|bitfit.*": "BitFit",
    r"w_norm|b_norm": "LyCORIS norm",
    r"set_weight|reshape_weight": "ComfyUI weight replacement",
    r"lora_embedding_[AB]": "embedding LoRA",
    r"lora_bias|lora_[AB]_bias": "LoRA with biases",
}
"""A part of the keys of other adapters -> their name."""
_OTHER_ENDINGS = {r".*\.lora_(B|up)(\.default)?\.bias": "LoRA with biases"}
_OTHER = [(re.compile(rf"(.*\.)?({part})(\..*)?"), title) for part, title in OTHER_ADAPTERS.items()] + [
    (re.compile(ending), title) for ending, title in _OTHER_ENDINGS.items()
]


def refuse_other_adapters(path: object, keys: Iterable[str]) -> None:
    """Check that no key belongs to another kind of adapter, whose tensors mean something else.

    Raises:
        DiffSynthError: naming the adapter.
    """
    present = list(keys)
    for pattern, title in _OTHER:
        found = sorted(key for key in present if not is_lora_key(key) and pattern.fullmatch(key))
        if found:
            raise DiffSynthError(
                f"`{path}`: {title} adapters are not supported yet: {list_names(found)}",
                "extract a plain LoRA with the program that wrote it",
            )


def is_lora_key(key: str) -> bool:
    """Whether a key has an ending of a LoRA."""
    return key.endswith(tuple(ENDINGS))


def is_difference_key(key: str) -> bool:
    """Whether a key has an ending of a full difference."""
    return key.endswith(tuple(DIFFERENCES))


def split_lora_key(key: str) -> tuple[str, Role] | None:
    """A key of a LoRA without its ending, and its role."""
    ending = max((text for text in ENDINGS if key.endswith(text)), key=len, default=None)
    return (key.removesuffix(ending), ENDINGS[ending]) if ending else None


def module_of_lora_key(key: str) -> str:
    """A key of a LoRA file without its ending."""
    found = split_lora_key(key)
    return found[0] if found else key


class _Slot(NamedTuple):
    """What a key stores: the role in the LoRA of a module, or in a tensor, by its name in a vocabulary."""

    name: str
    role: Role


@dataclass(frozen=True)
class LoraMatch:
    """The keys of a file, matched to modules by their names in one vocabulary.

    `loras`: module -> its keys. `differences`: tensor -> its key.
    `prefixes`: those of the keys. `unmatched`: keys without a module. `repeated`: those of them whose role another key
    of the file has already.
    """

    vocabulary: Vocabulary
    loras: Mapping[str, LoraKeys] = field(default_factory=dict)
    differences: Mapping[str, str] = field(default_factory=dict)
    prefixes: frozenset[str] = frozenset()
    unmatched: tuple[str, ...] = ()
    repeated: tuple[str, ...] = ()

    def lora_format(self, naming: LoraNaming) -> LoraFormat | None:
        """The format whose prefix, names and endings the file has; None: a combination that no format has."""
        return next((name for name in LORA_FORMATS if self._has_format(name, naming)), None)

    def _has_format(self, lora_format: LoraFormat, naming: LoraNaming) -> bool:
        written = LORA_FORMATS[lora_format]
        if not naming.known(lora_format) or lora_format not in self.vocabulary.title.split("/"):
            return False
        own = {prefix.format(component=naming.component) for prefix in written.prefixes}
        endings = (written.A, ".lora_down.weight") if written.alpha == "kept" else (written.A,)
        return self.prefixes <= own and all(keys.A.endswith(endings) for keys in self.loras.values() if keys.A)


def match_lora_keys(
    keys: Iterable[str],
    modules: Collection[str] | None,
    naming: LoraNaming = DIT,
    tensors: Collection[str] = (),
) -> LoraMatch:
    """Match the keys of a LoRA file to modules, in the vocabulary that explains most of them.

    Args:
        modules: public names of the existing modules, against which underscores in keys are resolved; None if they are
            not known: a module is then whatever precedes the ending, prefix included.
        tensors: public names of the existing tensors, to which a file may store full differences.
    """
    present = list(keys)
    vocabularies = naming.vocabularies if modules is not None else (Vocabulary(""),)
    found = [match_in_vocabulary(present, modules, vocabulary, naming, tensors) for vocabulary in vocabularies]
    return min(found, key=lambda match: len(match.unmatched))


def match_in_vocabulary(
    keys: Iterable[str],
    modules: Collection[str] | None,
    vocabulary: Vocabulary,
    naming: LoraNaming = DIT,
    tensors: Collection[str] = (),
) -> LoraMatch:
    """As `match_lora_keys`, in one vocabulary."""
    names = None if modules is None else _spellings(part for module in modules for part in vocabulary.parts(module))
    changed = _tensor_spellings(part for tensor in tensors for part in vocabulary.parts(tensor))
    prefixes = sorted((text.format(component=naming.component) for text in PREFIXES), key=len, reverse=True)
    taken: dict[_Slot, str] = {}
    met, unmatched, repeated = set(), [], []
    for key in keys:
        found = _find_slot(key, prefixes, names, changed)
        if found is None or found[0] in taken:
            unmatched.append(key)
            repeated += [key] if found else []
        else:
            taken[found[0]] = key
            met.add(found[1])
    loras: dict[str, dict[str, str]] = {}
    differences = {}
    for (name, role), key in taken.items():
        if role in ("A", "B", "alpha"):
            loras.setdefault(name, {})[role] = key
        else:
            differences[name] = key
    pairs = {name: LoraKeys(**roles) for name, roles in loras.items()}
    return LoraMatch(vocabulary, pairs, differences, frozenset(met), tuple(unmatched), tuple(repeated))


def _find_slot(
    key: str, prefixes: Iterable[str], names: Mapping[str, str] | None, changed: Mapping[tuple[str, Role], str]
) -> tuple[_Slot, str] | None:
    """What a key stores, and its prefix; None if it matches nothing."""
    pair = split_lora_key(key)
    if names is None:
        return (_Slot(*pair), "") if pair else None
    difference = next((text for text in DIFFERENCES if key.endswith(text)), None)
    if not pair and not difference:
        return None
    stem, role = pair or (key.removesuffix(difference or ""), DIFFERENCES[difference or ""][0])
    for prefix in prefixes:
        if stem.startswith(prefix):
            rest = stem.removeprefix(prefix)
            name = names.get(rest) if pair else changed.get((rest, role))
            if name is not None:
                return _Slot(name, role), prefix
    return None


def _spellings(names: Iterable[str]) -> dict[str, str]:
    """Names as keys may spell them, dotted or with underscores -> names; a spelling of two names is left out."""
    found: dict[str, str] = {}
    ambiguous = set()
    for name in names:
        for text in {name, underscored(name)}:
            if found.setdefault(text, name) != name:
                ambiguous.add(text)
    return {text: name for text, name in found.items() if text not in ambiguous or text == name}


def _tensor_spellings(tensors: Iterable[str]) -> dict[tuple[str, Role], str]:
    """(spelling of the tensor's module, role of its difference) -> tensor."""
    leaves = {leaf: role for role, own in DIFFERENCES.values() for leaf in own}
    found: dict[str, list[str]] = {}
    for tensor in tensors:
        found.setdefault(tensor.rpartition(".")[2], []).append(tensor)
    return {
        (text, leaves[leaf]): f"{stem}.{leaf}" if stem else leaf
        for leaf, own in found.items()
        if leaf in leaves
        for text, stem in _spellings(tensor.removesuffix(leaf).removesuffix(".") for tensor in own).items()
    }
