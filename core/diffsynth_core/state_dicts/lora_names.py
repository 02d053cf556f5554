"""The four dialects in which LoRA files name their tensors, in one table.

The module name inside a dialect is the family's business (`families/*/names.py`); here is what stands around it.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field


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
    "diffsynth": Dialect(("", "pipe.{component}."), ".lora_A.default.weight", ".lora_B.default.weight"),
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

    `dialects`: dialects with names of their own for modules: documented name -> the name there.
    """

    component: str = "dit"
    dialects: Mapping[str, Callable[[str], str]] = field(default_factory=dict)

    def text(self, module: str, dialect_name: str) -> str:
        """A module, by its documented name, as a dialect writes it."""
        text = self.dialects.get(dialect_name, str)(module)
        return text.replace(".", "_") if DIALECTS[dialect_name].underscored else text


DIT = LoraNaming()


@dataclass(frozen=True)
class LoraKeys:
    """Where a file keeps the halves of one module's LoRA; a missing half is None."""

    down: str | None = None
    up: str | None = None
    alpha: str | None = None


def lora_keys(module: str, dialect_name: str, naming: LoraNaming = DIT) -> LoraKeys:
    """The keys under which a dialect writes the LoRA of `module` (its documented name).

    `alpha` is given for kohya only: its readers expect one, the others take alpha = rank where none is stored.
    """
    dialect = DIALECTS[dialect_name]
    stem = dialect.prefixes[0] + naming.text(module, dialect_name)
    return LoraKeys(
        stem + dialect.down, stem + dialect.up, stem + dialect.alpha if dialect.alpha and dialect.underscored else None
    )


def find_lora_keys(
    keys: Iterable[str], modules: Iterable[str], naming: LoraNaming = DIT
) -> tuple[str, dict[str, LoraKeys], list[str]]:
    """Which dialect a LoRA file speaks, its keys by module of the base, and the keys that fit no module.

    The dialect that explains most keys is taken; `modules` are the documented names of the base's own modules.
    """
    present = list(keys)
    best: tuple[str, dict[str, LoraKeys], list[str]] = ("diffsynth", {}, present)
    names = list(modules)
    for name in DIALECTS:
        found, unmatched = _match(present, names, name, naming)
        if len(unmatched) < len(best[2]):
            best = (name, found, unmatched)
    return best


def _match(
    keys: list[str], modules: list[str], dialect_name: str, naming: LoraNaming
) -> tuple[dict[str, LoraKeys], list[str]]:
    dialect = DIALECTS[dialect_name]
    prefixes = [prefix.format(component=naming.component) for prefix in dialect.prefixes]
    texts = {naming.text(module, dialect_name): module for module in modules}
    by_stem = {prefix + text: module for text, module in texts.items() for prefix in prefixes}
    endings = {dialect.down: "down", dialect.up: "up"}
    if dialect.also:
        endings |= dict(zip(dialect.also, ("down", "up"), strict=True))
    if dialect.alpha:
        endings[dialect.alpha] = "alpha"
    halves: dict[str, dict[str, str]] = {}
    unmatched = []
    for key in keys:
        ending = next((text for text in endings if key.endswith(text)), None)
        module = by_stem.get(key.removesuffix(ending)) if ending else None
        if ending and module and endings[ending] not in halves.get(module, {}):
            halves.setdefault(module, {})[endings[ending]] = key
        else:
            unmatched.append(key)
    return {module: LoraKeys(**keys_of) for module, keys_of in halves.items()}, unmatched
