"""What a family declares without torch: components, file layouts, variants, encoders, names."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

from diffsynth_core.config.choices import LayoutName, LoraFormat
from diffsynth_core.data.conditions import Condition, TargetSpec, ValueCondition
from diffsynth_core.models.forward_work import ForwardWork
from diffsynth_core.models.size_facts import CaptionFacts, EmbeddingSpec, HubModelSize, LatentFacts
from diffsynth_core.weights.key_maps import SAME_NAMES, KeyMap
from diffsynth_core.weights.lora_formats import LoraNaming

Shapes = Mapping[str, tuple[int, ...]]
"""Tensor name -> shape."""


def nothing_unused(names: frozenset[str]) -> frozenset[str]:
    """For components all of whose modules are in use."""
    return frozenset()


def is_below(name: str, modules: Collection[str]) -> bool:
    """Return whether a module or tensor is one of `modules`, or inside one of them."""
    parts = name.split(".")
    return any(".".join(parts[:depth]) in modules for depth in range(1, len(parts) + 1))


@dataclass(frozen=True)
class Layout:
    """A file layout of a component.

    Attributes:
        signature: tensor names that exist in all files of this layout, and not in other components.
        names: keys in the file -> module keys.
        public_keys: keys that users type and LoRA files contain, those of DiffSynth-Studio -> module keys.
        saved_keys: keys in full checkpoints -> module keys; None: the public ones.
        borrowed: another family publishes its files with these keys too, and takes precedence if neither is specified.
    """

    signature: frozenset[str]
    names: KeyMap = SAME_NAMES
    public_keys: KeyMap = SAME_NAMES
    saved_keys: KeyMap | None = None
    borrowed: bool = False

    @property
    def checkpoint_keys(self) -> KeyMap:
        """Keys in full checkpoints -> module keys."""
        return self.public_keys if self.saved_keys is None else self.saved_keys

    def module_shapes(self, shapes: Shapes) -> dict[str, tuple[int, ...]]:
        """Convert shapes from keys in the files to module keys, omitting tensors that the module lacks."""
        ours: dict[str, tuple[int, ...]] = {}
        for name, shape in shapes.items():
            ours |= self.names.split_shape(name, shape)
        return ours

    def public_shapes(self, shapes: Shapes) -> dict[str, tuple[int, ...]]:
        """Convert shapes from module keys to public keys, omitting tensors without one."""
        return {name: self.public_keys.fuse_shape(name, shapes) for name in self.public_keys.to_sources(shapes)}

    def below(self, modules: Collection[str], names: Collection[str]) -> frozenset[str]:
        """Return those of the module keys `names` that are, or are inside, one of `modules` (public names)."""
        known = [name for name in self.public_keys.to_sources(names) if is_below(name, modules)] if modules else ()
        return frozenset(own for name in known for own in self.public_keys.to_targets(name) or ())

    def checkpoint_shapes(self, shapes: Shapes) -> dict[str, tuple[int, ...]]:
        """Convert shapes from module keys to keys in full checkpoints."""
        return {name: self.checkpoint_keys.fuse_shape(name, shapes) for name in self.checkpoint_keys.to_sources(shapes)}


@dataclass(frozen=True)
class ComponentFacts:
    """One network of a family.

    Attributes:
        file_patterns: patterns (fnmatch) of its file names in recipes and repositories; patterns of repository and
            file name (`model_id:file`) take precedence over those of file names only.
        config_classes: patterns (fnmatch) of the class in a config.json of this component and of no other of the
            family.
        lora_targets: documented default of `lora_target_modules`; empty if there is none.
        modules: public names of all modules that can have a LoRA, with `{}` for numbers; empty if LoRAs can only be
            read together with the base.
        lora_key_maps: LoRA format with other module names -> map from public names to names there, possibly of parts
            of a module; None: the format has no names for this component.
        lora_fused: LoRA format whose modules may fuse several public ones -> map from names there to public names.
        sides: rows and columns of the weights of some of `modules`, in a common unit, which distinguish families with
            the same module names.
        blocks: list of repeated blocks (module key) -> constructor option with its length, in the order of the forward
            pass.
        max_blocks: prefix of a block's public name -> largest number of blocks in published models.
        fp32_modules: parts of the keys of weights that stay float32 whatever the dtype of the others, if frozen.
        unread_formats: LoRA formats whose names for `modules` no other program reads.
        published: for the `original` layout, if its keys are not the documented ones: map to module keys; None: there
            is none.
        untrainable: module keys -> those of modules or tensors without influence on the loss.
        settings: constructor option that the parameter of the same name overrides -> extra inputs that it requires.
        parts: documented component names of what is a part of this component here -> name of the part.
        inputs: extra inputs without which its files have no effect; empty: they always have one.
        comfyui: for the `comfyui` layout, if its keys are not the original ones: map to module keys; None: ComfyUI
            does not read this component, or its names are not known.
        folder: its folder in a repository of diffusers, if it has another name there.
        work: of its forward pass in a training step; None: not declared.
        heads: function from its files and shapes to its attention heads, where processes can divide the tokens of a
            sample among them (`context_parallel`); None: they cannot.
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
    blocks: Mapping[str, str] = field(default_factory=dict)
    max_blocks: Mapping[str, int] = field(default_factory=dict)
    fp32_modules: frozenset[str] = frozenset()
    unread_formats: tuple[LoraFormat, ...] = ()
    published: Mapping[str, KeyMap | None] = field(default_factory=dict)
    unused_params: Callable[[frozenset[str]], frozenset[str]] = nothing_unused
    settings: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    parts: Mapping[str, str] = field(default_factory=dict)
    inputs: tuple[str, ...] = ()
    comfyui: KeyMap | Literal["original"] | None = None
    folder: str = ""
    work: ForwardWork | None = None
    heads: "Callable[[ComponentFiles, Shapes], int] | None" = None

    def names_in(self, layout_name: LayoutName, layout: Layout) -> KeyMap | None:
        """Return the map from keys in files of a layout to module keys; None if there is none."""
        if layout_name == "diffusers":
            return SAME_NAMES
        if layout_name == "comfyui":
            return self.names_in("original", layout) if self.comfyui == "original" else self.comfyui
        return (
            layout.public_keys if layout_name == "documented" else self.published.get(layout_name, layout.public_keys)
        )

    def stays_float32(self, name: str) -> bool:
        """Return whether a weight, by module key, is loaded in float32 whatever the dtype of the model."""
        return not self.fp32_modules.isdisjoint(name.split("."))

    @property
    def lora_naming(self) -> LoraNaming:
        """Names of its modules in LoRA files."""
        return LoraNaming(self.name, self.lora_key_maps, self.lora_fused, self.modules)


@dataclass(frozen=True)
class EncoderFacts:
    """A frozen encoder: its component, the metadata columns that it reads, and its output.

    Attributes:
        columns: the caption, the target, and conditions by their names.
        inputs: requested extra inputs that change its output.
        first_frame_only: reads only the first frame of a video.
        version: incremented when the encoding of the same inputs changes, so that older cache entries are not reused.
        caption, latents, states: size of its output, if it reads a caption, produces latents of all columns, or a
            fixed number of states.
        reads_values: reads values of images, so that its memory cannot be measured without them.
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
    reads_values: bool = False


@dataclass(frozen=True, kw_only=True)
class SamplingFacts:
    """Documented defaults for generating with a model, and what its sampler depends on.

    Attributes:
        cfg_scale: scale of classifier-free guidance; 1: none.
        height, width: in pixels.
        fps: frames per second of a clip; 0 for images.
        guidance: input of the guidance embedder of a guidance-distilled model; None: it has none.
        shift: shift of the sampler's sigmas; None: by the number of tokens.
        boundary: sigma below which the second denoiser takes over, for models with two; None: they have one.
        second_cfg_scale: scale of classifier-free guidance of the second denoiser; None: that of the first.
    """

    steps: int
    cfg_scale: float
    height: int
    width: int
    num_frames: int = 1
    fps: int = 0
    negative_prompt: str = ""
    guidance: float | None = None
    shift: float | None = None
    boundary: float | None = None
    second_cfg_scale: float | None = None


@dataclass(frozen=True)
class Variant:
    """What one kind of model of a family requires.

    Attributes:
        model_id: a published model of this variant.
        components: required components.
        sampling: documented defaults for generating.
        conditions: inputs with files besides caption and target; each of their columns is a requested extra input.
        values: inputs that are numbers or texts, likewise.
        step_components: components besides the denoiser that run in every training step, whether they train or not.
        extra_trainable: component -> modules that are unused in other variants but trainable in this one.
        extra_unused: component -> function from module keys to those without a gradient in this variant only.
        accepted_inputs: extra inputs (`extra_inputs`) that it accepts.
        required_inputs: those of them that it requires.
        num_conditioning_frames: latent frames at the start of a clip that stay clean: not noised, not in the loss.
    """

    title: str
    model_id: str
    components: tuple[str, ...]
    encoders: tuple[EncoderFacts, ...]
    target: TargetSpec
    sampling: SamplingFacts
    conditions: tuple[Condition, ...] = ()
    values: tuple[ValueCondition, ...] = ()
    step_components: tuple[str, ...] = ()
    extra_trainable: Mapping[str, frozenset[str]] = field(default_factory=dict)
    extra_unused: Mapping[str, Callable[[frozenset[str]], frozenset[str]]] = field(default_factory=dict)
    accepted_inputs: tuple[str, ...] = ()
    required_inputs: tuple[str, ...] = ()
    num_conditioning_frames: int = 0

    @property
    def decoder(self) -> str:
        """The component that decodes latents: it is the one that encodes the target."""
        return next(encoder.component for encoder in self.encoders if self.target.column in encoder.columns)

    def unused_params(self, component: ComponentFacts, names: frozenset[str]) -> frozenset[str]:
        """Return the modules of a component that receive no gradient, given the keys of its modules or tensors."""
        extra_unused = self.extra_unused.get(component.name, nothing_unused)(names)
        return (component.unused_params(names) | extra_unused) - self.extra_trainable.get(component.name, frozenset())


@dataclass(frozen=True)
class ShapeConstraint:
    """A dimension of a component that must match one of the denoiser.

    Attributes:
        source: (tensor, axis) of the component, by module key.
        target: (tensor, axis) of the denoiser, which must be `parts` times the source.
        verb: what the component does with `what`, for the message.
        way_out: hint; None: to use the component of the same model.
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
    """Unsupported files that resemble `component`, recognized by the tensor names in `signature`; `title` is what
    they are.
    """

    title: str
    component: str
    signature: frozenset[str]


@dataclass(frozen=True)
class FamilyFacts:
    """What is known about a family before weights or libraries are loaded.

    Attributes:
        implementation: `module:class` of its `Family`, which imports torch.
        model_ids: patterns (fnmatch) of the hub repositories of its models.
        variant: function from shapes by component (module keys), requested extra inputs, and what the user wrote for
            the denoiser's files (or for all files, without a denoiser) to the variant; raises DiffSynthError for
            unsupported ones. Without the denoiser, the other components determine as much as possible.
        lookalikes: unsupported checkpoints that resemble a component.
        not_trained: pattern (fnmatch) of entries `model_id:file` of related, unsupported models -> what they are.
        published: sizes of published components; the first match counts.
        shape_constraints: dimensions that must match the denoiser.
        mirrors: file name in recipes -> `model_id:file` of a mirror, which is read if only that is on disk.
        second_denoiser: name of the second of two transformers in keys of files; it has the denoiser's modules.
        tokenizers: tokenizer parameter -> its component and default location.
        conditions: extra inputs that are metadata columns, of all its variants.
        frame_inputs: extra inputs that are frames of the target clip, not columns -> which one, negative from its end.
        later_inputs: extra inputs of DiffSynth-Studio for this family that are not supported yet.
        masks_captions: whether a batch of captions of different lengths is padded, and attention masks the padding.
        architectures: pattern (fnmatch) of a variant's `model_id` -> its name in `modelspec.architecture`, as
            kohya-ss/sd-scripts and musubi-tuner write it (`sai_model_spec.py`); the first match counts.
        repository: of the code of its makers, which `modelspec.implementation` states.
    """

    name: str
    implementation: str
    title: str
    model_ids: tuple[str, ...]
    components: tuple[ComponentFacts, ...]
    denoiser: str
    variant: Callable[[Mapping[str, Shapes], tuple[str, ...], str], Variant]
    text_column: str
    tokenizers: Mapping[str, "TokenizerFacts"]
    published: tuple[HubModelSize, ...]
    shape_constraints: tuple[ShapeConstraint, ...] = ()
    mirrors: Mapping[str, str] = field(default_factory=dict)
    second_denoiser: str = ""
    lookalikes: tuple["UnsupportedCheckpoint", ...] = ()
    not_trained: Mapping[str, str] = field(default_factory=dict)
    conditions: tuple[Condition, ...] = ()
    frame_inputs: Mapping[str, int] = field(default_factory=dict)
    later_inputs: tuple[str, ...] = ()
    masks_captions: bool = False
    architectures: Mapping[str, str] = field(default_factory=dict)
    repository: str = ""

    def component(self, name: str) -> ComponentFacts:
        """Return the component of a name; the second of two denoisers is like the first."""
        known = self.denoiser if name and name == self.second_denoiser else name
        return next(component for component in self.components if component.name == known)

    def architecture(self, model_id: str) -> str | None:
        """Return the name of the variant of a `model_id` in `modelspec.architecture`, if it has one."""
        return next((name for pattern, name in self.architectures.items() if fnmatch(model_id, pattern)), None)

    def published_sizes(self, component: str, model_id: str, place: str) -> HubModelSize | None:
        """Return the published component of an entry `model_id:place`, if its size is known."""
        named = f"{model_id}:{place}"
        return next(
            (known for known in self.published if known.component == component and fnmatch(named, known.files)), None
        )

    @property
    def component_names(self) -> tuple[str, ...]:
        """Names of all components."""
        return tuple(component.name for component in self.components)


@dataclass(frozen=True)
class TokenizerFacts:
    """Where a tokenizer is looked up: in `folders` relative to the component's files, otherwise `default` below the
    models.

    Attributes:
        what: name for messages.
        inputs: extra inputs that require it; empty: always required.
        layouts: alternative sets of files, one of which must be complete.
        files: all files that affect its output.
        model: type in tokenizer.json; empty: any.
        embedding: tensor of the component with a row per token, by module key; empty: unknown.
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
    """The files of a component.

    Attributes:
        origin: what the user wrote for them, and the mirror that is read instead, if any.
        folders: where related files are looked up: next to them, and where the user named them.
        config_path: their config.json, if there is one.
        storage: the weight store that keeps its frozen weights (models/weight_store.py).
        prefix: prefix of its keys in the files; keys without it belong to other components.
    """

    component: str
    origin: str
    paths: tuple[Path, ...]
    config_path: Path | None
    layout: Layout = Layout(frozenset())
    folders: tuple[Path, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    storage: str = "plain"
    prefix: str = ""


def modules_with_weights(shapes: Shapes) -> frozenset[str]:
    """Return the modules whose `weight` is a matrix or a convolution: those that can have a LoRA."""
    return frozenset(
        name.removesuffix(".weight")
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) in (2, 4, 5)
    )


def match_targets(modules: frozenset[str], targets: tuple[str, ...]) -> dict[str, list[str]]:
    """Return target -> modules whose dotted name ends with it."""
    return {
        target: sorted(name for name in modules if name == target or name.endswith(f".{target}")) for target in targets
    }
