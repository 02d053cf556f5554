"""The four dialects in which LoRA files name their tensors, in one table.

The module name inside a dialect is the family's business (`families/*/names.py`); here is what stands around it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


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

    def module_text(self, module: str) -> str:
        return module.replace(".", "_") if self.underscored else module


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
class LoraKeys:
    """Where a file keeps the halves of one module's LoRA; a missing half is None."""

    down: str | None = None
    up: str | None = None
    alpha: str | None = None


def lora_keys(module: str, dialect_name: str) -> LoraKeys:
    """The keys under which a dialect writes the LoRA of `module`.

    `alpha` is given for kohya only: its readers expect one, the others take alpha = rank where none is stored.
    """
    dialect = DIALECTS[dialect_name]
    stem = dialect.prefixes[0] + dialect.module_text(module)
    return LoraKeys(
        stem + dialect.down, stem + dialect.up, stem + dialect.alpha if dialect.alpha and dialect.underscored else None
    )


def find_lora_keys(
    keys: Iterable[str], modules: Iterable[str], component: str = "dit"
) -> tuple[str, dict[str, LoraKeys], list[str]]:
    """Which dialect a LoRA file speaks, its keys by module of the base, and the keys that fit no module.

    The dialect that explains most keys is taken; `modules` are the names of the base's own modules.
    """
    present = list(keys)
    best: tuple[str, dict[str, LoraKeys], list[str]] = ("diffsynth", {}, present)
    names = list(modules)
    for name, dialect in DIALECTS.items():
        found, unmatched = _match(present, names, dialect, component)
        if len(unmatched) < len(best[2]):
            best = (name, found, unmatched)
    return best


def _match(
    keys: list[str], modules: list[str], dialect: Dialect, component: str
) -> tuple[dict[str, LoraKeys], list[str]]:
    prefixes = [prefix.format(component=component) for prefix in dialect.prefixes]
    by_stem = {prefix + dialect.module_text(module): module for module in modules for prefix in prefixes}
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
