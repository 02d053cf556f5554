"""The weights that something is merged into or checked against: which component of which family they are. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from diffsynth_core.errors import DiffSynthError, list_names
from diffsynth_core.files import stem_of_shard
from diffsynth_core.hub.model_files import expand_entry, locate_folder
from diffsynth_core.models.bases import recognise_component, shapes_in
from diffsynth_core.models.registry import FAMILIES
from diffsynth_core.models.spec import ComponentFacts, FamilyFacts, Layout, modules_with_weights
from diffsynth_core.weights.base_files import Scale, find_weights, parts_of
from diffsynth_core.weights.weight_sets import INDEX_ENDING, WeightSet, open_weights


@dataclass(frozen=True)
class Base:
    """A component's weights. `shapes`: weight shapes of the modules that can carry a LoRA, by documented name.
    `prefix`: what all its names in the files begin with; what has other beginnings is not of this component.
    `tensor_shapes`: shapes of all its tensors, by documented name.
    `scales`: of all weights in the files that have one, by their names there."""

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
        """What messages call it."""
        return f"the {self.facts.title} {self.component.title}"

    def names_of(self, tensor: str) -> frozenset[str]:
        """Names in the files of what holds a documented tensor."""
        own = self.layout.public_keys.to_targets(tensor) or ()
        return frozenset(self.prefix + name for part in own if (name := self.layout.names.to_source(part)) is not None)


def open_base(text: str, models: Path, option: str = "--base") -> Base:
    """The component that `text` names: a file, a folder, an index, or `model_id:glob` below the folder `models`.

    Args:
        option: where the user wrote it, for messages.

    Raises:
        DiffSynthError: as `open_weights` and `find_weights`, when nothing is there, or it is no known component.
    """
    weights = open_weights(_paths(text, models, option))
    found = find_weights(weights.origin, weights.tensors)
    known = [(part, recognised) for part in parts_of(found) if (recognised := recognise_component(part.tensors))]
    if not known:
        raise _unknown(weights)
    denoisers = [(part, of) for part, of in known if of[1].name == of[0].denoiser]
    part, (facts, component, layout) = (denoisers or known)[0]
    public_shapes = layout.public_shapes(shapes_in(part, layout))
    shapes = {name: public_shapes[f"{name}.weight"] for name in modules_with_weights(public_shapes)}
    return Base(weights, facts, component, layout, shapes, part.prefix, public_shapes, found.scales)


def _paths(text: str, models: Path, option: str) -> list[Path]:
    """What `text` names; the shards that a glob finds are read through the index beside them, if there is one."""
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
