"""The four dialects in which LoRA files name their tensors, in one table.

The module name inside a dialect is the family's business (`families/*/names.py`); here is what stands around it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from diffsynth_core.errors import DiffSynthError, shorten
from diffsynth_core.progress import count_of
from diffsynth_core.state_dicts.key_maps import SAME_NAMES, KeyMap


@dataclass(frozen=True)
class Dialect:
    """How one program names LoRA tensors: `prefix + module + down`, dots of the module kept or made underscores."""

    prefixes: tuple[str, ...]
    """The first is written; all are read. `{component}` stands for the name of the component."""
    down: str
    up: str
    alpha: str | None = None
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
        alpha=".alpha",
        also=(".lora_down.weight", ".lora_up.weight"),
    ),
    "kohya": Dialect(("lora_unet_",), ".lora_down.weight", ".lora_up.weight", alpha=".alpha", underscored=True),
}


@dataclass(frozen=True)
class LoraNaming:
    """How LoRA files call the modules of one component.

    `dialects`: for dialects that name modules otherwise: documented names -> those there, which may be of several
    modules; None: the dialect has no names for this component.
    """

    component: str = "dit"
    dialects: Mapping[str, KeyMap | None] = field(default_factory=dict)

    def known(self, dialect_name: str) -> bool:
        """Whether a dialect has names for the modules of this component."""
        return self.dialects.get(dialect_name, SAME_NAMES) is not None

    def names(self, dialect_name: str) -> KeyMap:
        """Documented names -> those of a dialect.

        Raises:
            KeyError: when the dialect has none.
        """
        found = self.dialects.get(dialect_name, SAME_NAMES)
        if found is None:
            raise KeyError(dialect_name)
        return found

    def texts(self, module: str, dialect_name: str) -> tuple[str, ...]:
        """A module, by its documented name, as a dialect writes it: in one name, or in those of its parts."""
        parts = self.names(dialect_name).ours(module) or ()
        return tuple(part.replace(".", "_") for part in parts) if DIALECTS[dialect_name].underscored else parts


DIT = LoraNaming()


OTHER_ADAPTERS: Mapping[str, tuple[str, ...]] = {
    "LoKr": (".lokr_",),
    "LoHa": (".hada_",),
    "DoRA": (".dora_scale", ".lora_magnitude_vector"),
    "LoCon with a core tensor": (".lora_mid.",),
    "OFT": (".oft_",),
    "a LoRA with changed biases": (".lora_B.bias", ".lora_B.default.bias", ".lora_up.bias", ".diff_b"),
    "a LoRA with full differences": (".diff",),
}
"""Adapters that are more than W + (alpha / rank) B A, by what their keys contain; the first that fits names a key."""


def refuse_other_adapters(origin: object, keys: Iterable[str]) -> None:
    """Refuse adapters whose change of weights is not that of a plain LoRA.

    Raises:
        DiffSynthError: when `keys`, those of the file `origin`, are of such an adapter.
    """
    present = list(keys)
    for title, marks in OTHER_ADAPTERS.items():
        found = sorted(key for key in present if any(mark in key for mark in marks))
        if found:
            raise DiffSynthError(
                f"`{origin}` is no plain LoRA but {title}, which is not supported: {count_of(len(found), 'key')} such "
                f"as {shorten(found)}",
                "name a plain LoRA, or have the program that made it merge it into the base",
            )


LORA_ENDINGS = tuple(
    dict.fromkeys(
        ending
        for dialect in DIALECTS.values()
        for ending in (dialect.down, dialect.up, *dialect.also, *([dialect.alpha] if dialect.alpha else []))
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
    """Where a file keeps the halves of one LoRA; a missing half is None."""

    down: str | None = None
    up: str | None = None
    alpha: str | None = None


def lora_keys(module: str, dialect_name: str, naming: LoraNaming = DIT) -> tuple[LoraKeys, ...]:
    """The keys under which a dialect writes the LoRA of `module` (its documented name), for each of its parts there.

    `alpha` is given for kohya only: its readers expect one, the others take alpha = rank where none is stored.
    """
    dialect = DIALECTS[dialect_name]
    alpha = dialect.alpha if dialect.underscored else None
    stems = [dialect.prefixes[0] + text for text in naming.texts(module, dialect_name)]
    return tuple(LoraKeys(stem + dialect.down, stem + dialect.up, stem + alpha if alpha else None) for stem in stems)


def find_lora_keys(
    keys: Iterable[str], modules: Iterable[str], naming: LoraNaming = DIT
) -> tuple[str, dict[str, tuple[LoraKeys, ...]], list[str]]:
    """Which dialect a LoRA file speaks, its keys by module of the base, and the keys that fit no module.

    The dialect that explains most keys is taken; `modules` are the documented names of the base's own modules. Of each
    module found there are the keys of all parts that the dialect has of it.
    """
    present = list(keys)
    best: tuple[str, dict[str, tuple[LoraKeys, ...]], list[str]] = ("diffsynth", {}, present)
    names = list(modules)
    for name in filter(naming.known, DIALECTS):
        found, unmatched = _match(present, names, name, naming)
        if len(unmatched) < len(best[2]):
            best = (name, found, unmatched)
    return best


def _match(
    keys: list[str], modules: list[str], dialect_name: str, naming: LoraNaming
) -> tuple[dict[str, tuple[LoraKeys, ...]], list[str]]:
    dialect = DIALECTS[dialect_name]
    prefixes = [prefix.format(component=naming.component) for prefix in dialect.prefixes]
    texts = {module: naming.texts(module, dialect_name) for module in modules}
    by_stem = {prefix + text: (module, text) for module in modules for text in texts[module] for prefix in prefixes}
    endings = {dialect.down: "down", dialect.up: "up"}
    if dialect.also:
        endings |= dict(zip(dialect.also, ("down", "up"), strict=True))
    if dialect.alpha:
        endings[dialect.alpha] = "alpha"
    found: dict[str, dict[str, dict[str, str]]] = {}
    unmatched = []
    for key in keys:
        ending = next((text for text in endings if key.endswith(text)), None)
        place = by_stem.get(key.removesuffix(ending)) if ending else None
        if ending and place and endings[ending] not in found.get(place[0], {}).get(place[1], {}):
            found.setdefault(place[0], {}).setdefault(place[1], {})[endings[ending]] = key
        else:
            unmatched.append(key)
    return {
        module: tuple(LoraKeys(**halves.get(text, {})) for text in texts[module]) for module, halves in found.items()
    }, unmatched
