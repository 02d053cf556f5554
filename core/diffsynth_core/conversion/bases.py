"""Base weights that a LoRA is merged into or checked against: their family and component. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from diffsynth_core.errors import DiffSynthError, list_names
from diffsynth_core.files import stem_of_shard
from diffsynth_core.hub.model_files import expand_entry, locate_folder
from diffsynth_core.models.bases import shapes_in
from diffsynth_core.models.recognition import recognize_component
from diffsynth_core.models.registry import FAMILIES
from diffsynth_core.models.spec import ComponentFacts, FamilyFacts, Layout, modules_with_weights
from diffsynth_core.weights.base_files import Scale, find_weights, parts_of
from diffsynth_core.weights.weight_sets import INDEX_ENDING, WeightSet, open_weights


@dataclass(frozen=True)
class Base:
    """A component's weights.

    Attributes:
        shapes: weight shapes of the modules that can have a LoRA, by public name.
        prefix: prefix of the component's keys in the files; keys without it belong to others.
        tensor_shapes: shapes of all its tensors, by public name.
        scales: scales of weights in the files, by key.
    """

    weights: WeightSet
    facts: FamilyFacts
    component: ComponentFacts
    layout: Layout
    shapes: Mapping[str, tuple[int, ...]]
    prefix: str = ""
    tensor_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    scales: Mapping[str, Scale] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """Name for messages."""
        return f"the {self.facts.title} {self.component.title}"

    def names_of(self, tensor: str) -> frozenset[str]:
        """Return the keys in the files that contain a public tensor."""
        own = self.layout.public_keys.to_targets(tensor) or ()
        return frozenset(self.prefix + name for part in own if (name := self.layout.names.to_source(part)) is not None)


def open_base(text: str, models: Path, option: str = "--base") -> Base:
    """Open the component that `text` names: a file, a folder, an index, or `model_id:glob` below the folder `models`.

    Args:
        option: the option that `text` is the value of, for messages.

    Raises:
        DiffSynthError: see `open_weights` and `find_weights`; also if nothing is found, or not a known component.
    """
    weights = open_weights(_paths(text, models, option))
    found = find_weights(weights.origin, weights.tensors)
    known = [(part, recognized) for part in parts_of(found) if (recognized := recognize_component(part.tensors))]
    if not known:
        raise _unknown(weights)
    denoisers = [(part, of) for part, of in known if of[1].name == of[0].denoiser]
    part, (facts, component, layout) = (denoisers or known)[0]
    public_shapes = layout.public_shapes(shapes_in(part, layout))
    shapes = {name: public_shapes[f"{name}.weight"] for name in modules_with_weights(public_shapes)}
    return Base(weights, facts, component, layout, shapes, part.prefix, public_shapes, found.scales)


def _paths(text: str, models: Path, option: str) -> list[Path]:
    """Return the files that `text` names; shards found by a glob are read through their index, if there is one."""
    if Path(text).exists():
        return [Path(text)]
    folder = locate_folder(text, models)
    if folder:
        return [folder]
    paths = expand_entry(text, models)
    if not paths:
        below = f", and is not in `{models}` either" if ":" in text else ""
        raise DiffSynthError(f"`{option}` `{text}` does not exist{below}", "correct the path, or use `model_id:file`")
    stems = {path.with_name(stem_of_shard(path.name) or "") for path in paths if stem_of_shard(path.name)}
    if len(stems) == 1:
        (stem,) = stems
        index = stem.with_name(stem.name + INDEX_ENDING)
        if index.is_file():
            return [index]
    return paths


def _unknown(weights: WeightSet) -> DiffSynthError:
    names = list(weights.tensors)
    if any(name.startswith("pipe.") for name in names):
        return DiffSynthError(
            f"`{weights.origin}` is a checkpoint whose keys have component prefixes: {list_names(names, 3)}",
            "split it with `diffsynth split-ckpt`, and pass one of its parts",
        )
    known = ", ".join(facts.title for facts in FAMILIES.values())
    return DiffSynthError(
        f"`{weights.origin}` matches no component of {known}; its tensors are {list_names(names, 3)}",
        "pass the weights of one component",
    )
