"""The text form of `quant_options`: `entry:method` or `entry:method/module,module`, several with `;` between them."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from diffsynth_core.json_files import InvalidJson, parse_json


@dataclass(frozen=True)
class QuantOption:
    """How the frozen weights of a model are quantized.

    Attributes:
        entries: what names the model: its entry of the model parameters, or a list of shards as in `model_paths`.
        method: name of the method, which may not exist.
        left_out: modules whose weights are not quantized, by name or the end of it.
    """

    entries: tuple[str, ...]
    method: str
    left_out: tuple[str, ...] = ()

    def __str__(self) -> str:
        entry = self.entries[0] if len(self.entries) == 1 else json.dumps(list(self.entries))
        return f"{entry}:{self.method}" + (f"/{','.join(self.left_out)}" if self.left_out else "")


def read_quant_options(value: object) -> str:
    """Return the options in their one form.

    Args:
        value: a string in that form, or a mapping of entries to methods, as a YAML file may have it.

    Raises:
        ValueError: if it is neither.
    """
    if isinstance(value, dict):
        value = ";".join(f"{entry}:{method}" for entry, method in value.items())
    if not isinstance(value, str):
        raise ValueError("is no list of quantized models")
    return join_quant_options(split_quant_options(value))


def split_quant_options(text: str) -> tuple[QuantOption, ...]:
    """Return the options in a text.

    An entry contains `:` and `/` itself: the method follows the last `:`.

    Raises:
        ValueError: if one has no entry or no method.
    """
    return tuple(_read_option(part.strip()) for part in text.split(";") if part.strip())


def join_quant_options(options: Iterable[QuantOption]) -> str:
    """Return the text of options."""
    return ";".join(map(str, options))


def rename_entries(text: str, names: Callable[[str], Iterable[str]]) -> str:
    """Return options whose models have other names: those of each entry; without those of whom none is left."""
    renamed = (
        replace(option, entries=tuple(dict.fromkeys(name for entry in option.entries for name in names(entry))))
        for option in split_quant_options(text)
    )
    return join_quant_options(option for option in renamed if option.entries)


def _read_option(text: str) -> QuantOption:
    entry, _, choice = text.rpartition(":")
    method, _, left_out = choice.partition("/")
    entry, method = entry.strip(), method.strip()
    if not entry or not method:
        raise ValueError("is no list of quantized models")
    modules = tuple(name.strip() for name in left_out.split(",") if name.strip())
    return QuantOption(_read_entries(entry), method, modules)


def _read_entries(entry: str) -> tuple[str, ...]:
    """Return an entry, or the paths of a JSON list."""
    if not entry.startswith("["):
        return (entry,)
    try:
        paths = parse_json(entry)
    except InvalidJson as error:
        raise ValueError("is no list of quantized models") from error
    if not isinstance(paths, list) or not paths or not all(isinstance(path, str) and path for path in paths):
        raise ValueError("is no list of quantized models")
    return tuple(paths)
