"""The four dialects in which LoRA files name their tensors, in one table.

The module name inside a dialect is the family's business (`families/*/names.py`); here is what stands around it.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Literal

from diffsynth_core.errors import DiffSynthError, shorten
from diffsynth_core.state_dicts.key_maps import SAME_NAMES, KeyMap

ALPHA = ".alpha"
"""How the key of an alpha ends, in all dialects; one that is there is read in each."""
AlphaKeys = Literal["never", "kept", "always"]
"""Whether a dialect is written with alphas: not, where one is stored, or for each LoRA, since its readers expect it."""


@dataclass(frozen=True)
class Dialect:
    """How one program names LoRA tensors: `prefix + module + down`, dots of the module kept or made underscores."""

    prefixes: tuple[str, ...]
    """The first is written; all are read. `{component}` stands for the name of the component."""
    down: str
    up: str
    alpha: AlphaKeys = "never"
    underscored: bool = False
    also: tuple[str, ...] = ()
    """Endings of down and up that are read too."""


DIALECTS: Mapping[str, Dialect] = {
    "diffsynth": Dialect(
        ("", "pipe.{component}."),
        ".lora_A.default.weight",
        ".lora_B.default.weight",
        also=(".lora_A.weight", ".lora_B.weight"),
    ),
    "diffusers": Dialect(("transformer.", ""), ".lora_A.weight", ".lora_B.weight"),
    "comfyui": Dialect(
        ("diffusion_model.",),
        ".lora_A.weight",
        ".lora_B.weight",
        alpha="kept",
        also=(".lora_down.weight", ".lora_up.weight"),
    ),
    "kohya": Dialect(("lora_unet_",), ".lora_down.weight", ".lora_up.weight", alpha="always", underscored=True),
}


@dataclass(frozen=True)
class LoraNaming:
    """How LoRA files call the modules of one component.

    `dialects`: for dialects that name modules otherwise: documented names -> those there, which may be of several
    modules; None: the dialect has no names for this component.
    `fused`: for dialects of whose modules one may be several documented ones: names there -> documented names.
    `modules`: documented names of all modules that can carry a LoRA, with `{}` for numbers.
    """

    component: str = "dit"
    dialects: Mapping[str, KeyMap | None] = field(default_factory=dict)
    fused: Mapping[str, KeyMap] = field(default_factory=dict)
    modules: tuple[str, ...] = ()

    def known(self, dialect_name: str) -> bool:
        """Whether a dialect has names for the modules of this component."""
        return self.dialects.get(dialect_name, SAME_NAMES) is not None

    def written(self, dialect_name: str) -> bool:
        """Whether the LoRA of each documented module has names of its own in a dialect."""
        return self.known(dialect_name) and dialect_name not in self.fused

    def names(self, dialect_name: str) -> KeyMap:
        """Documented names -> those of a dialect, of modules that are not fused there.

        Raises:
            KeyError: when the dialect has none.
        """
        found = self.dialects.get(dialect_name, SAME_NAMES)
        if found is None:
            raise KeyError(dialect_name)
        return found

    def texts(self, module: str, dialect_name: str) -> tuple[str, ...]:
        """A module, by its documented name, as a dialect writes it: in one name, or in those of its parts."""
        if dialect_name in self.fused:
            whole = self.fused[dialect_name].theirs(module)
            parts: tuple[str, ...] = () if whole is None else (whole,)
        else:
            parts = self.names(dialect_name).ours(module) or ()
        return tuple(spell(part, dialect_name) for part in parts)

    def modules_met(self, keys: Iterable[str]) -> list[str]:
        """Documented names of all modules that can carry a LoRA, with the numbers that stand in `keys`."""
        numbers = sorted({number for key in keys for number in _NUMBER.findall(key)}, key=int)
        return [
            pattern.format(*chosen)
            for pattern in self.modules
            for chosen in product(numbers, repeat=pattern.count("{}"))
        ]


_NUMBER = re.compile(r"\d+")


def spell(module: str, dialect_name: str) -> str:
    """A module's name in a dialect as its keys have it."""
    return module.replace(".", "_") if DIALECTS[dialect_name].underscored else module


DIT = LoraNaming()


OTHER_ADAPTERS = {
    "lokr_.*": "LoKr",
    "hada_.*": "LoHa",
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "lora_mid": "LoRA with a core tensor (Tucker decomposition)",
    "oft_.*": "OFT",
    "diff_b": "LoRA with changes of biases",
    "diff": "LoRA with changes of whole weights",
}
"""What a part of a key is in files of other adapters -> their name."""
PEFT_PREFIX = "base_model.model."
"""How keys begin in files that peft itself writes, whose alphas stand in another file, `adapter_config.json`."""


def refuse_other_adapters(path: object, keys: Iterable[str]) -> None:
    """Raises: DiffSynthError: when keys are those of another kind of adapter, whose halves mean something else, or of a
    LoRA whose alphas are not in its file."""
    present = list(keys)
    for pattern, title in OTHER_ADAPTERS.items():
        found = sorted(key for key in present if any(re.fullmatch(pattern, part) for part in key.split(".")))
        if found:
            raise DiffSynthError(
                f"`{path}`: it is a {title}, told by {shorten(found)}; only a LoRA is read here",
                "make a LoRA of it with the program that it comes from",
            )
    unscaled = sorted(key for key in present if key.startswith(PEFT_PREFIX))
    if unscaled:
        raise DiffSynthError(
            f"`{path}`: its keys begin with `{PEFT_PREFIX}`, as peft writes them, whose alphas are not in the file but "
            f"in the `adapter_config.json` beside it: {shorten(unscaled)}",
            "write it with the `save_lora_weights` of the diffusers pipeline",
        )


LORA_ENDINGS = tuple(
    dict.fromkeys(
        ending for dialect in DIALECTS.values() for ending in (dialect.down, dialect.up, *dialect.also, ALPHA)
    )
)
"""How the keys of LoRA files end, in any dialect."""


def is_lora_key(key: str) -> bool:
    """Whether a key ends as those of LoRA files do, in any dialect."""
    return key.endswith(LORA_ENDINGS)


def module_of_lora_key(key: str) -> str:
    """A key of a LoRA file without its ending."""
    return next((key.removesuffix(ending) for ending in LORA_ENDINGS if key.endswith(ending)), key)


@dataclass(frozen=True)
class LoraKeys:
    """Where a file keeps the halves of one LoRA; a missing half is None.

    `fused`: what the dialect calls a module that is the one the LoRA is of, and others, together; blank: there is none.
    """

    down: str | None = None
    up: str | None = None
    alpha: str | None = None
    fused: str = ""


def stem_keys(module: str, dialect_name: str) -> LoraKeys:
    """The keys that a dialect has for the LoRA of a module, given by its name there; that of an alpha even where it is
    not always written."""
    dialect = DIALECTS[dialect_name]
    stem = dialect.prefixes[0] + spell(module, dialect_name)
    return LoraKeys(stem + dialect.down, stem + dialect.up, None if dialect.alpha == "never" else stem + ALPHA)


def lora_keys(module: str, dialect_name: str, naming: LoraNaming = DIT) -> tuple[LoraKeys, ...]:
    """The keys under which a dialect writes the LoRA of `module` (its documented name), for each of its parts there.

    `alpha` is given where the dialect's readers expect one; the others take alpha = rank where none is stored.
    """
    found = tuple(stem_keys(part, dialect_name) for part in naming.names(dialect_name).ours(module) or ())
    return found if DIALECTS[dialect_name].alpha == "always" else tuple(replace(keys, alpha=None) for keys in found)


def find_lora_keys(
    keys: Iterable[str], modules: Iterable[str], naming: LoraNaming = DIT
) -> tuple[str, dict[str, tuple[LoraKeys, ...]], list[str]]:
    """Which dialect a LoRA file speaks, its keys by module of the base, and the keys that fit no module.

    The dialect that explains most keys is taken; `modules` are the documented names of the base's own modules. Of each
    module found there are the keys of all parts that the dialect has of it, or of the one module there that it is part
    of.
    """
    present = list(keys)
    best: tuple[str, dict[str, tuple[LoraKeys, ...]], list[str]] = ("diffsynth", {}, present)
    names = list(modules)
    for name in filter(naming.known, DIALECTS):
        found, unmatched = match_lora_keys(present, names, name, naming)
        if len(unmatched) < len(best[2]):
            best = (name, found, unmatched)
    return best


def match_lora_keys(
    keys: Iterable[str], modules: Iterable[str], dialect_name: str, naming: LoraNaming = DIT
) -> tuple[dict[str, tuple[LoraKeys, ...]], list[str]]:
    """As `find_lora_keys`, for a file that is known to speak a dialect."""
    texts = {module: naming.texts(module, dialect_name) for module in modules}
    places: dict[str, list[tuple[str, str]]] = {}
    for module, parts in texts.items():
        for part in parts:
            for prefix in DIALECTS[dialect_name].prefixes:
                places.setdefault(prefix.format(component=naming.component) + part, []).append((module, part))
    endings = _endings(dialect_name)
    found: dict[tuple[str, str], dict[str, str]] = {}
    unmatched = []
    for key in keys:
        ending = next((text for text in endings if key.endswith(text)), None)
        named = places.get(key.removesuffix(ending), []) if ending else []
        if ending and named and endings[ending] not in found.get(named[0], {}):
            for place in named:
                found.setdefault(place, {})[endings[ending]] = key
        else:
            unmatched.append(key)
    fused = naming.fused.get(dialect_name)
    return {
        module: tuple(
            LoraKeys(**found.get((module, part), {}), fused=(fused.theirs(module) or "") if fused else "")
            for part in parts
        )
        for module, parts in texts.items()
        if any((module, part) in found for part in parts)
    }, unmatched


def _endings(dialect_name: str) -> dict[str, str]:
    """Endings of keys that are read in a dialect -> what they are of a LoRA."""
    dialect = DIALECTS[dialect_name]
    endings = {dialect.down: "down", dialect.up: "up", ALPHA: "alpha"}
    return endings | (dict(zip(dialect.also, ("down", "up"), strict=True)) if dialect.also else {})
