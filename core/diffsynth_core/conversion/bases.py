"""The weights that something is merged into or checked against: which component of which family they are. No torch."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from diffsynth_core.errors import DiffSynthError, shorten
from diffsynth_core.families.interface import ComponentFacts, FamilyFacts, Layout, modules_with_weights
from diffsynth_core.families.table import FAMILIES, recognise
from diffsynth_core.files import stem_of_shard
from diffsynth_core.sources.model_files import expand_entry, locate_folder
from diffsynth_core.state_dicts.headers import shapes_of
from diffsynth_core.state_dicts.weight_sets import INDEX_ENDING, WeightSet, open_weights

QUANTISED = (
    *("absmax", "quant_map", "SCB", "weight_format", "qweight", "qzeros", "wscales", "_weight_qdata"),
    *("nested_absmax", "nested_quant_map", "bitsandbytes__nf4", "bitsandbytes__fp4"),
)
"""Last parts of the names of tensors that stand beside weights in fewer bits: bitsandbytes, GPTQ, AWQ, SVDQuant."""
SCALES = ("scale_weight", "weight_scale", "weight_scale_2", "scale_input", "input_scale", "scaled_fp8", "comfy_quant")
"""Last parts of the names of tensors that stand beside 8-bit floats, which mean nothing without them."""
PREFIXES = ("", "model.diffusion_model.", "diffusion_model.")
"""How the names of a transformer begin in files: in those that ComfyUI writes, other components may stand beside it."""


@dataclass(frozen=True)
class Base:
    """A component's weights. `shapes`: weight shapes of the modules that can carry a LoRA, by documented name.
    `prefix`: what all its names in the files begin with; what has other beginnings is not of this component.
    `tensor_shapes`: shapes of all its tensors, by documented name."""

    weights: WeightSet
    facts: FamilyFacts
    component: ComponentFacts
    layout: Layout
    shapes: Mapping[str, tuple[int, ...]]
    prefix: str = ""
    tensor_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """What messages call it."""
        return f"the {self.component.title} of {self.facts.title}"

    def names_of(self, tensor: str) -> frozenset[str]:
        """Names in the files of what holds a documented tensor."""
        own = self.layout.documented.ours(tensor) or ()
        return frozenset(self.prefix + name for part in own if (name := self.layout.names.theirs(part)) is not None)


def open_base(text: str, models: Path, option: str = "--base") -> Base:
    """The component that `text` names: a file, a folder, an index, or `model_id:glob` below the folder `models`.

    Args:
        option: where the user wrote it, for messages.

    Raises:
        DiffSynthError: as `open_weights`, when nothing is there, the weights are in fewer bits than can be computed
            with, or they are of no component that is known.
    """
    weights = open_weights(_paths(text, models, option))
    _refuse_what_has_scales(weights)
    for prefix in PREFIXES:
        own = {name.removeprefix(prefix): tensor for name, tensor in weights.tensors.items() if name.startswith(prefix)}
        found = recognise_component(own)
        if found:
            facts, component, layout = found
            documented = layout.documented_shapes(layout.module_shapes(shapes_of(own)))
            shapes = {name: documented[f"{name}.weight"] for name in modules_with_weights(documented)}
            return Base(weights, facts, component, layout, shapes, prefix, documented)
    raise _unknown(weights)


def recognise_component(names: Collection[str]) -> tuple[FamilyFacts, ComponentFacts, Layout] | None:
    """The family, component and layout of these tensor names; a diffusion transformer before all others."""
    found = [(facts, *known) for facts in FAMILIES.values() if (known := recognise(names, facts))]
    denoisers = [item for item in found if item[1].name == item[0].denoiser]
    return next(iter(denoisers or found), None)


def _paths(text: str, models: Path, option: str) -> list[Path]:
    """What `text` names; the shards that a glob finds are read through the index beside them, if there is one."""
    if Path(text).exists():
        return [Path(text)]
    folder = locate_folder(text, models)
    if folder:
        return [folder]
    paths = expand_entry(text, models)
    if not paths:
        below = f", nor below `{models}`" if ":" in text else ""
        raise DiffSynthError(f"`{option}` `{text}` is not there{below}", "correct the path, or write `model_id:file`")
    stems = {path.with_name(stem_of_shard(path.name) or "") for path in paths if stem_of_shard(path.name)}
    if len(stems) == 1:
        (stem,) = stems
        index = stem.with_name(stem.name + INDEX_ENDING)
        if index.is_file():
            return [index]
    return paths


def _refuse_what_has_scales(weights: WeightSet) -> None:
    """Refuse weights that are not what they say without other tensors."""
    for kind, endings in (("quantised weights", QUANTISED), ("8-bit floats with scales", SCALES)):
        found = [name for name in weights.tensors if name.rpartition(".")[2] in endings]
        if found:
            raise DiffSynthError(
                f"`{weights.origin}` holds {kind} ({shorten(found, 1)}): what is merged would have to be quantised "
                f"anew, which only the program that made them can do",
                "name the original weights, and quantise what comes out",
            )


def _unknown(weights: WeightSet) -> DiffSynthError:
    names = list(weights.tensors)
    if any(name.startswith("pipe.") for name in names):
        return DiffSynthError(
            f"`{weights.origin}` is a checkpoint of several components, or one with their prefix: {shorten(names, 3)}",
            "take it apart with `diffsynth split-ckpt`, and name one of its parts",
        )
    known = ", ".join(facts.title for facts in FAMILIES.values())
    return DiffSynthError(
        f"`{weights.origin}` is no component of {known}, by its tensors {shorten(names, 3)}", "name the weights of one"
    )
