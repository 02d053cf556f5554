"""What a family states about itself without torch: components, layouts of their files, variants, encoders, names."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

from diffsynth_core.config.choices import LayoutName, LoraFormat
from diffsynth_core.data.conditions import Condition, TargetSpec
from diffsynth_core.models.size_facts import CaptionFacts, EmbeddingSpec, HubModelSize, LatentFacts, MemoryFacts
from diffsynth_core.weights.key_maps import SAME_NAMES, KeyMap
from diffsynth_core.weights.lora_formats import LoraNaming

Shapes = Mapping[str, tuple[int, ...]]
"""Tensor names and shapes."""


def nothing_unused(names: frozenset[str]) -> frozenset[str]:
    """For components all of whose modules count."""
    return frozenset()


def is_below(name: str, modules: Collection[str]) -> bool:
    """Whether a module or tensor is one of `modules` or stands below one of them."""
    parts = name.split(".")
    return any(".".join(parts[:depth]) in modules for depth in range(1, len(parts) + 1))


@dataclass(frozen=True)
class Layout:
    """One way in which files hold a component.

    `signature`: tensor names that are all present in a file of this layout and in no other component's.
    `names`: names in the file -> names in our module.
    `public_keys`: the names that users type and LoRA files contain, those of DiffSynth-Studio -> names in our module.
    `saved_keys`: names in full checkpoints -> names in our module; None: the public ones.
    `borrowed`: another family publishes its files with these names too, and takes precedence if neither is specified.
    """

    signature: frozenset[str]
    names: KeyMap = SAME_NAMES
    public_keys: KeyMap = SAME_NAMES
    saved_keys: KeyMap | None = None
    borrowed: bool = False

    @property
    def checkpoint_keys(self) -> KeyMap:
        """Names in full checkpoints -> names in our module."""
        return self.public_keys if self.saved_keys is None else self.saved_keys

    def module_shapes(self, shapes: Shapes) -> dict[str, tuple[int, ...]]:
        """Shapes by the names of our module, from those in the files; what has no place in it is left out."""
        ours: dict[str, tuple[int, ...]] = {}
        for name, shape in shapes.items():
            ours |= self.names.split_shape(name, shape)
        return ours

    def public_shapes(self, shapes: Shapes) -> dict[str, tuple[int, ...]]:
        """Shapes by documented name, from those of our module; what has no documented name is left out."""
        return {name: self.public_keys.fuse_shape(name, shapes) for name in self.public_keys.to_sources(shapes)}

    def below(self, modules: Collection[str], names: Collection[str]) -> frozenset[str]:
        """Of the `names` of our tensors those that are, or stand below, one of `modules`, by documented name."""
        known = [name for name in self.public_keys.to_sources(names) if is_below(name, modules)]
        return frozenset(own for name in known for own in self.public_keys.to_targets(name) or ())

    def checkpoint_shapes(self, shapes: Shapes) -> dict[str, tuple[int, ...]]:
        """Shapes by the names in full checkpoints, from those of our module."""
        return {name: self.checkpoint_keys.fuse_shape(name, shapes) for name in self.checkpoint_keys.to_sources(shapes)}


@dataclass(frozen=True)
class ComponentFacts:
    """One network of a family.

    `file_patterns`: patterns (fnmatch) of the file names that recipes and repositories use for it; those of repository
    and file name (`model_id:file`) take precedence over those of file names alone.
    `config_classes`: patterns (fnmatch) of what a config.json of this component, and of no other of the family, says of
    its class.
    `lora_targets`: the documented default of `lora_target_modules`, empty when there is none.
    `modules`: public names of all modules that can have a LoRA, with `{}` for numbers; empty if LoRAs are read
    only with the base.
    `lora_key_maps`: for LoRA formats with other module names: public names -> those there, which may be of parts of a
    module; None: the format has no names for this component.
    `lora_fused`: for LoRA formats in which one module may fuse several public ones: names there -> public names.
    `sides`: rows and columns of the weights of some of `modules`, in the same unit; they tell apart families with the
    same module names.
    `blocks`: the prefix of a block's public name -> the largest number of blocks in published models.
    `unread_formats`: LoRA formats whose names for `modules` no other program reads.
    `published`: for the `original` layout, where its names are not the documented ones: names there -> those of our
    module; None: there is no table of them.
    `untrainable`: names of our modules or tensors -> those in which, or below which, nothing ever influences what is
    trained for.
    `settings`: constructor settings that a parameter of the same name switches on or off, whatever config.json says ->
    the extra inputs that it requires.
    `parts`: documented names of what is a component there and one part of this one here -> its name here.
    `inputs`: its files mean nothing without one of these extra inputs; blank: they always mean something.
    """

    name: str
    title: str
    layouts: tuple[Layout, ...]
    file_patterns: tuple[str, ...]
    config_classes: tuple[str, ...] = ()
    lora_targets: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    lora_key_maps: Mapping[LoraFormat, KeyMap | None] = field(default_factory=dict)
    lora_fused: Mapping[LoraFormat, KeyMap] = field(default_factory=dict)
    sides: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    blocks: Mapping[str, int] = field(default_factory=dict)
    unread_formats: tuple[LoraFormat, ...] = ()
    published: Mapping[str, KeyMap | None] = field(default_factory=dict)
    unused_params: Callable[[frozenset[str]], frozenset[str]] = nothing_unused
    settings: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    parts: Mapping[str, str] = field(default_factory=dict)
    inputs: tuple[str, ...] = ()

    def names_in(self, layout_name: LayoutName, layout: Layout) -> KeyMap | None:
        """Names in files of a layout -> names in our module; None: there is no table of them."""
        if layout_name == "diffusers":
            return SAME_NAMES
        return (
            layout.public_keys if layout_name == "documented" else self.published.get(layout_name, layout.public_keys)
        )

    @property
    def lora_naming(self) -> LoraNaming:
        """How LoRA files name its modules."""
        return LoraNaming(self.name, self.lora_key_maps, self.lora_fused, self.modules)


@dataclass(frozen=True)
class EncoderFacts:
    """One step from a sample to what the model takes: which component makes it from which columns.

    `columns`: the caption, what is trained on, and conditions by their names.
    `inputs`: those of the extra inputs asked for (`extra_inputs`) that change what it makes.
    `first_frame_only`: of a video it reads the first frame alone.
    `version` goes up when the encoding of the same inputs changes, so that older cache entries are not taken for it.
    `caption`, `latents`, `states`: what is known of the size of what it makes, where it reads a caption, makes latents
    of all of its columns, or a number of states.
    """

    name: str
    component: str
    columns: tuple[str, ...]
    inputs: tuple[str, ...] = ()
    first_frame_only: bool = False
    version: int = 1
    caption: CaptionFacts | None = None
    latents: LatentFacts | None = None
    states: EmbeddingSpec | None = None


@dataclass(frozen=True)
class Variant:
    """What one kind of a family's models needs.

    `model_id`: the published model that stands for it.
    `components`: all that must be there.
    `conditions`: inputs besides caption and target; each of their columns is one of the extra inputs asked for.
    `step_components`: components besides the denoiser that run in every training step, whether they train or not.
    `extra_trainable`: by component, modules that are `unused_params` of the component but trainable in this variant.
    `extra_unused`: by component, names of our modules or tensors -> those without gradient in this variant only.
    `accepted_inputs`: extra inputs (`extra_inputs`) that it accepts. `required_inputs`: those of them that it requires.
    `num_conditioning_frames`: latent frames at the start of a clip that stay clean: not noised, not in the loss.
    """

    title: str
    model_id: str
    components: tuple[str, ...]
    encoders: tuple[EncoderFacts, ...]
    target: TargetSpec
    conditions: tuple[Condition, ...] = ()
    step_components: tuple[str, ...] = ()
    extra_trainable: Mapping[str, frozenset[str]] = field(default_factory=dict)
    extra_unused: Mapping[str, Callable[[frozenset[str]], frozenset[str]]] = field(default_factory=dict)
    accepted_inputs: tuple[str, ...] = ()
    required_inputs: tuple[str, ...] = ()
    num_conditioning_frames: int = 0

    def unused_params(self, component: ComponentFacts, names: frozenset[str]) -> frozenset[str]:
        """Modules of a component that receive no gradient, given the names of its modules or tensors."""
        extra_unused = self.extra_unused.get(component.name, nothing_unused)(names)
        return (component.unused_params(names) | extra_unused) - self.extra_trainable.get(component.name, frozenset())


@dataclass(frozen=True)
class ShapeConstraint:
    """A dimension of a component that must equal one of the denoiser, which reads the component's output or takes the
    same input.

    `source`, of the component, and `target`, of the denoiser, are (tensor of our module, axis); the target is `parts`
    times the source.
    `verb`: what the component does with `what`. `way_out`: the hint; None: to name the component of the same model.
    """

    component: str
    source: tuple[str, int]
    target: tuple[str, int]
    what: str
    parts: int = 1
    verb: Literal["makes", "takes"] = "makes"
    way_out: str | None = None


@dataclass(frozen=True)
class UnsupportedCheckpoint:
    """Files, told by the tensor names in `signature`, that are taken for `component` by mistake; `title` says what."""

    title: str
    component: str
    signature: frozenset[str]


@dataclass(frozen=True)
class FamilyFacts:
    """What is known of a family before any weight or library is loaded.

    `model_ids`: patterns (fnmatch) of the hub repositories of its models.
    `variant`: shapes by component (our names), the extra inputs asked for, and what the user wrote for the denoiser's
    files, or for all files where the denoiser is not among them -> what that kind of model needs; a kind that is not
    trained raises DiffSynthError. Without the denoiser, the other components tell as much as they can.
    `lookalikes`: files of related models that are easily taken for a component.
    `not_trained`: patterns (fnmatch) of entries `model_id:file` that belong to related models which are not trained
    here -> what they are.
    `published`: sizes of published components; the first that fits counts.
    `shape_constraints`: what of the components must fit the denoiser.
    `mirrors`: a file name as recipes give it -> `model_id:file` of a copy that is read when only the copy is there.
    `second_denoiser`: what keys of files call the second of two transformers, which has the denoiser's names.
    `tokenizers`: parameter that names a tokenizer -> the component whose files it lies beside and its default place.
    `conditions`: extra inputs that are metadata columns, of any kind of its models.
    `frame_inputs`: extra inputs that are frames of the clip that is trained on, and no columns.
    `later_inputs`: extra inputs of the reference trainer for models of this family that are not supported yet.
    """

    name: str
    title: str
    model_ids: tuple[str, ...]
    components: tuple[ComponentFacts, ...]
    denoiser: str
    variant: Callable[[Mapping[str, Shapes], tuple[str, ...], str], Variant]
    text_column: str
    tokenizers: Mapping[str, "TokenizerFacts"]
    memory: MemoryFacts
    published: tuple[HubModelSize, ...]
    shape_constraints: tuple[ShapeConstraint, ...] = ()
    mirrors: Mapping[str, str] = field(default_factory=dict)
    second_denoiser: str = ""
    lookalikes: tuple["UnsupportedCheckpoint", ...] = ()
    not_trained: Mapping[str, str] = field(default_factory=dict)
    conditions: tuple[Condition, ...] = ()
    frame_inputs: tuple[str, ...] = ()
    later_inputs: tuple[str, ...] = ()

    def component(self, name: str) -> ComponentFacts:
        return next(component for component in self.components if component.name == name)

    def published_sizes(self, component: str, model_id: str, place: str) -> HubModelSize | None:
        """The published component that an entry `model_id:place` means, if its size is known."""
        named = f"{model_id}:{place}"
        return next(
            (known for known in self.published if known.component == component and fnmatch(named, known.files)), None
        )

    @property
    def component_names(self) -> tuple[str, ...]:
        return tuple(component.name for component in self.components)


@dataclass(frozen=True)
class TokenizerFacts:
    """Where a tokenizer is looked for: `folders` beside the component's own files, else `default` below the models.

    `folders` are relative to the folder of the component's files.
    `what`: what messages call it.
    `inputs`: it is needed with one of these extra inputs only; blank: always.
    `layouts`: sets of files of which one must be whole in the folder. `files`: all that its output depends on.
    `model`: the kind of model that tokenizer.json says it is; blank: any.
    `embedding`: the tensor of the component, by the name in our module, that has a row for each token; blank: unknown.
    """

    component: str
    folders: tuple[str, ...]
    default: str
    layouts: tuple[tuple[str, ...], ...] = (("tokenizer.json",), ("vocab.json", "merges.txt"))
    files: tuple[str, ...] = (
        *("tokenizer.json", "vocab.json", "merges.txt", "spiece.model", "tokenizer_config.json"),
        *("special_tokens_map.json", "added_tokens.json"),
    )
    what: str = "tokenizer"
    inputs: tuple[str, ...] = ()
    model: str = ""
    embedding: str = ""


@dataclass(frozen=True)
class ComponentFiles:
    """The files a component is read from.

    `origin`: what the user wrote for them, and the copy that is read in their place if so.
    `folders`: where what belongs to them is looked for: beside them, and where the user named them.
    `config_path`: the config.json that belongs to them, when there is one.
    `float8`: the weights are stored in 8-bit floats, as far as they are of a kind that is (adapters/float8.py).
    `prefix`: what the names of its tensors begin with in the files; others are not of this component.
    """

    component: str
    origin: str
    paths: tuple[Path, ...]
    config_path: Path | None
    layout: Layout = Layout(frozenset())
    folders: tuple[Path, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    float8: bool = False
    prefix: str = ""


def modules_with_weights(shapes: Shapes) -> frozenset[str]:
    """Names of the modules whose `weight` is a matrix or a convolution: those that can carry a LoRA."""
    return frozenset(
        name.removesuffix(".weight")
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) in (2, 4, 5)
    )


def match_targets(modules: frozenset[str], targets: tuple[str, ...]) -> dict[str, list[str]]:
    """For each target, the modules it addresses: those whose dotted name ends with it."""
    return {
        target: sorted(name for name in modules if name == target or name.endswith(f".{target}")) for target in targets
    }
