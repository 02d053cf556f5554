"""Reading the config.json of a component, with limits on its numbers. No torch.

Numbers in a config control loops (`num_layers` modules are built) and allocations (position tables are computed even
if weights are not), so a damaged or forged config would take minutes and gigabytes before a comparison with the
tensors could reject it.
"""

import re
from collections.abc import Iterator
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from diffsynth_core.errors import DiffSynthError, truncate
from diffsynth_core.json_files import UnreadableFile, read_json
from diffsynth_core.models.spec import ComponentFacts, FamilyFacts, Shapes

FETCH = "download the file again"
"""Hint for an unreadable file."""
MAX_CONFIG_BYTES = 4 * 2**20
"""Maximum size of a config.json: 4 MiB; published ones have a few kB, with label names about 100 kB."""
MIN_LAYER_LIMIT = 128
"""Minimum of the limit for layers and list lengths, however few tensors the files have."""
MAX_SIZE = 2**20
"""Limit of other integers: channels, heads, table lengths. The widest published layers have 30 thousand."""
MAX_VOCABULARY = 2**24
"""Limit of vocabularies, token ids and positions; published ones have up to ten million."""
_LAYERS = re.compile(r"layers|depth|blocks")
_VOCABULARY = re.compile(r"vocab|token|position")
_FREE = re.compile(r"theta$|^_")
"""Options without a limit: rotary bases go up to 10^9 and size nothing; keys with an underscore are not used."""


def read_config(path: Path, shapes: Shapes) -> dict[str, Any]:
    """Return the options in a component's config.json.

    Args:
        shapes: of the tensors in the component's files: no model has more layers than tensors.

    Raises:
        DiffSynthError: if the file cannot be read, or a number exceeds its limit.
    """
    config: dict[str, Any] = read_json(path, dict[str, Any], FETCH, MAX_CONFIG_BYTES)
    layers = max(len(shapes), MIN_LAYER_LIMIT)
    for key_path, name, value in _numbers(config):
        limit = _limit(name, layers)
        if limit is not None and abs(value) > limit:
            what = f"`{path}`: `{key_path}` is {truncate(str(value), 20)}, expected at most {limit}"
            raise DiffSynthError(what, "put the config.json of these files next to them")
    return config


def config_beside(path: Path, component: ComponentFacts, facts: FamilyFacts) -> Path | None:
    """Return the config.json in the folder of the weights, unless it belongs to another component."""
    config = path.parent / "config.json"
    if not config.exists():
        return None
    others = [name for other in facts.components if other is not component for name in other.config_classes]
    with suppress(UnreadableFile):  # its faults are reported when the component is built
        class_name = str(read_json(config, dict[str, Any], "").get("_class_name"))
        if any(fnmatch(class_name, pattern) for pattern in others):
            return None
    return config


def _limit(name: str, layers: int) -> int | None:
    """Return the limit of an option; None if it has none."""
    if _FREE.search(name):
        return None
    if _LAYERS.search(name):
        return layers
    return MAX_VOCABULARY if _VOCABULARY.search(name) else MAX_SIZE


def _numbers(value: Any, key_path: str = "", name: str = "") -> Iterator[tuple[str, str, int]]:
    """Yield (key path, name of the option, value) of every integer in a config, and of the length of every list."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _numbers(inner, f"{key_path}.{key}" if key_path else key, key)
    elif isinstance(value, list):
        yield f"length of {key_path}", "layers", len(value)
        for number, inner in enumerate(value):
            yield from _numbers(inner, f"{key_path}[{number}]", name)
    elif type(value) is int:
        yield key_path, name, value
