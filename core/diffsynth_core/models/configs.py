"""Reading the config.json of a component, and refusing numbers that no model has before anything is built. No torch.

Numbers of a config drive loops (`num_layers` modules are built) and allocations (tables of positions are computed even
where weights are not), so a damaged or forged one would take minutes and gigabytes before the comparison with the
tensors could refuse it.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffsynth_core.errors import DiffSynthError, truncate
from diffsynth_core.json_files import read_json
from diffsynth_core.models.spec import Shapes

FETCH = "download the file again"
MAX_CONFIG_BYTES = 4 * 2**20
"""Largest config.json that is read: 4 MiB; published ones have a few kB, with names of labels some 100 kB."""
LEAST_LIMIT_OF_LAYERS = 128
"""Layers, and entries of a list, that a config may ask for however few tensors its files have."""
LARGEST_SIDE = 2**20
"""Of every other integer: channels, heads, lengths of tables. The widest published layers have 30 thousand."""
LARGEST_VOCABULARY = 2**24
"""Of vocabularies, token ids and positions: published ones go up to ten million."""
_LAYERS = re.compile(r"layers|depth|blocks")
_VOCABULARY = re.compile(r"vocab|token|position")
_FREE = re.compile(r"theta$|^_")
"""Bases of rotary frequencies go to 10^9 and size nothing; what begins with an underscore is not read."""


def read_config(path: Path, shapes: Shapes) -> dict[str, Any]:
    """The settings in a component's config.json.

    Args:
        shapes: of the tensors in the component's files: no model has more layers than tensors.

    Raises:
        DiffSynthError: when the file cannot be read, or holds a number that no model has.
    """
    config: dict[str, Any] = read_json(path, dict[str, Any], FETCH, MAX_CONFIG_BYTES)
    layers = max(len(shapes), LEAST_LIMIT_OF_LAYERS)
    for place, name, value in _numbers(config):
        limit = _limit(name, layers)
        if limit is not None and abs(value) > limit:
            what = f"`{path}`: `{place}` is {truncate(str(value), 20)}, expected at most {limit}"
            raise DiffSynthError(what, "put the config.json of these files next to them")
    return config


def _limit(name: str, layers: int) -> int | None:
    """Largest sound value of a setting; None where any is."""
    if _FREE.search(name):
        return None
    if _LAYERS.search(name):
        return layers
    return LARGEST_VOCABULARY if _VOCABULARY.search(name) else LARGEST_SIDE


def _numbers(value: Any, place: str = "", name: str = "") -> Iterator[tuple[str, str, int]]:
    """(key path, name of the setting, number) of every integer in a config, and of the length of every list."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _numbers(inner, f"{place}.{key}" if place else key, key)
    elif isinstance(value, list):
        yield f"length of {place}", "layers", len(value)
        for number, inner in enumerate(value):
            yield from _numbers(inner, f"{place}[{number}]", name)
    elif type(value) is int:
        yield place, name, value
