"""What a run loads: a model's components, from which files. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from diffsynth_core.models.size_facts import HubModelSize
from diffsynth_core.models.spec import ComponentFiles, FamilyFacts, Shapes, Variant
from diffsynth_core.progress import pluralize
from diffsynth_core.weights.lora import Lora


@dataclass(frozen=True)
class FusedLora:
    """A LoRA merged into a component before training; `shapes`: of the component's tensors by public name."""

    component: str
    file: Lora
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def changes(self) -> str:
        """What it changes, in words."""
        modules, tensors = len(self.file.modules), len(self.file.tensors)
        text = pluralize(modules, "module") if modules or not tensors else ""
        whole = f"{pluralize(tensors, 'tensor')} by full-weight differences" if tensors else ""
        return " and ".join(filter(None, (text, whole)))


@dataclass(frozen=True, kw_only=True)
class ModelPlan:
    """The components of a run, and what is known about their files.

    Attributes:
        variant: determined by the denoiser or, if its files are missing, by the other components.
        shapes: of the tensors of each component, by module key; empty for a component of unknown size.
        tokenizers: tokenizer parameter -> folder.
        unused_components: components that the parameters name but the task does not load.
        published: components whose files are missing -> size of the published model, used instead.
        stored: component with a weight store of its own -> fraction of its weights that are in the layers of the store;
            None: unknown without its files.
        fused_lora: LoRA merged into a component before training.
    """

    facts: FamilyFacts
    variant: Variant
    components: Mapping[str, ComponentFiles]
    shapes: Mapping[str, Shapes] = field(default_factory=dict)
    tokenizers: Mapping[str, Path] = field(default_factory=dict)
    unused_components: Mapping[str, ComponentFiles] = field(default_factory=dict)
    published: Mapping[str, HubModelSize] = field(default_factory=dict)
    stored: Mapping[str, float | None] = field(default_factory=dict)
    fused_lora: FusedLora | None = None

    @property
    def float8_components(self) -> list[str]:
        """Components whose weights are stored in 8-bit floats, in alphabetical order."""
        return sorted(name for name, files in self.components.items() if files.storage == "float8")

    @property
    def quantized_components(self) -> dict[str, str]:
        """Components whose weights `quant_options` quantizes -> their storage, in alphabetical order."""
        stored = {name: files.storage for name, files in sorted(self.components.items())}
        return {name: storage for name, storage in stored.items() if storage not in ("plain", "float8")}
