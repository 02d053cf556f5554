"""Shapes of the tensors of published components, recorded from their modules in `hub_shapes.json`. No torch to read it.

Plans without model files need them before a library is loaded: what kind of model a transformer is, and which of its
modules can carry a LoRA. `python -m diffsynth_core.models.hub_shapes` records them again; a test does so as well.
"""

import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from importlib.resources import files
from typing import Any

from diffsynth_core.models.size_facts import HubModelSize
from diffsynth_core.models.spec import FamilyFacts, Shapes

FILE = "hub_shapes.json"
Record = dict[str, Any]
"""Name of a tensor -> its shape; name of a list of blocks that are all alike -> (how many, the tensors of one)."""


def hub_shapes(family: FamilyFacts, known: HubModelSize) -> Shapes:
    """Shapes of a published component by the names of our module; empty where its configuration is not known."""
    return dict(_expand(_recorded().get(_name(family, known), {})))


def record() -> str:
    """The text of the file, from modules that are built without memory."""
    from accelerate import init_empty_weights

    from diffsynth_core.models.loading import tie
    from diffsynth_core.models.registry import FAMILIES, load_family

    lines = []
    for family in FAMILIES.values():
        for known in family.published:
            if known.config is None:
                continue
            with init_empty_weights(include_buffers=False):
                module = load_family(family.name).build(known.component, known.config)
            tie(module)
            shapes = {name: list(parameter.shape) for name, parameter in module.named_parameters()}
            lines.append(f"{json.dumps(_name(family, known))}: {json.dumps(_compress(shapes))}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


@lru_cache(maxsize=1)
def _recorded() -> Mapping[str, Record]:
    recorded: Mapping[str, Record] = json.loads((files("diffsynth_core.models") / FILE).read_text(encoding="utf-8"))
    return recorded


def _name(family: FamilyFacts, known: HubModelSize) -> str:
    return f"{family.name} {known.component} {known.files}"


def _compress(shapes: Mapping[str, Any]) -> Record:
    """Shapes with the blocks of each outermost list written once, where they are alike."""
    lists: dict[str, dict[int, Record]] = {}
    for name, shape in shapes.items():
        blocks, index, rest = _split(name)
        if rest:
            lists.setdefault(blocks, {}).setdefault(int(index), {})[rest] = shape
    alike = {blocks: found for blocks, found in lists.items() if all(one == found[0] for one in found.values())}
    others = {name: shape for name, shape in shapes.items() if _split(name)[0] not in alike or not _split(name)[2]}
    return others | {blocks: [len(found), found[0]] for blocks, found in alike.items()}


def _expand(record: Record) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name, value in record.items():
        if len(value) == 2 and isinstance(value[1], dict):
            count, block = value
            yield from (
                (f"{name}.{index}.{rest}", tuple(shape)) for index in range(count) for rest, shape in block.items()
            )
        else:
            yield name, tuple(value)


def _split(name: str) -> tuple[str, str, str]:
    """The first list of blocks that a tensor stands in, its block, and its name there; blank where in none."""
    parts = name.split(".")
    place = next((place for place, part in enumerate(parts) if part.isdecimal()), len(parts))
    return ".".join(parts[:place]), "".join(parts[place : place + 1]), ".".join(parts[place + 1 :])


if __name__ == "__main__":
    from pathlib import Path

    Path(__file__).with_name(FILE).write_text(record(), encoding="utf-8")
