"""What a family states about itself without torch: components, files, encoders, factors, names."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

Shapes = Mapping[str, tuple[int, ...]]
"""Tensor names of weight files and their shapes."""


def nothing_untrainable(names: frozenset[str]) -> frozenset[str]:
    """For components all of whose modules count."""
    return frozenset()


def is_below(name: str, modules: Collection[str]) -> bool:
    """Whether a module or tensor is one of `modules` or stands below one of them."""
    parts = name.split(".")
    return any(".".join(parts[:depth]) in modules for depth in range(1, len(parts) + 1))


@dataclass(frozen=True)
class ComponentFacts:
    """One network of a family.

    `signatures`: the component is recognised by its tensor names; all names of one signature must be there.
    `places`: patterns (fnmatch) of the file names that recipes and repositories use for it.
    `lora_targets`: the documented default of `lora_target_modules`, empty when there is none.
    `module_key`: tensor name in a file -> tensor name in our module, which is the documented name.
    `untrainable`: module or tensor names of the component -> names of modules in which, or below which, nothing ever
    influences what is trained for.
    """

    name: str
    title: str
    signatures: tuple[frozenset[str], ...]
    places: tuple[str, ...]
    lora_targets: tuple[str, ...] = ()
    module_key: Callable[[str], str] = str
    untrainable: Callable[[frozenset[str]], frozenset[str]] = nothing_untrainable


@dataclass(frozen=True)
class EncoderFacts:
    """One step from a sample to what the model takes: which component makes it from which columns.

    `version` goes up when the encoding of the same inputs changes, so that older cache entries are not taken for it.
    """

    name: str
    component: str
    columns: tuple[str, ...]
    version: int = 1


@dataclass(frozen=True)
class FamilyFacts:
    """What is known of a family before any weight or library is loaded.

    `model_ids`: patterns (fnmatch) of the hub repositories of its models.
    `text_column` and `media_columns`: metadata columns every sample needs.
    `size_factor`: sides of pictures are multiples of it, in pixels.
    `tokenizers`: parameter that names a tokenizer -> the component whose files it lies beside and its default place.
    """

    name: str
    title: str
    model_ids: tuple[str, ...]
    components: tuple[ComponentFacts, ...]
    denoiser: str
    encoders: tuple[EncoderFacts, ...]
    text_column: str
    media_columns: tuple[str, ...]
    size_factor: int
    tokenizers: Mapping[str, "TokenizerFacts"]

    def component(self, name: str) -> ComponentFacts:
        return next(component for component in self.components if component.name == name)

    @property
    def component_names(self) -> tuple[str, ...]:
        return tuple(component.name for component in self.components)


@dataclass(frozen=True)
class TokenizerFacts:
    """Where a tokenizer is looked for: `folder` beside the component's own folder, else `default` below the models.

    `layouts`: sets of files of which one must be whole in the folder. `files`: all that its output depends on.
    """

    component: str
    folder: str
    default: str
    layouts: tuple[tuple[str, ...], ...] = (("tokenizer.json",), ("vocab.json", "merges.txt"))
    files: tuple[str, ...] = (
        *("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json"),
        *("special_tokens_map.json", "added_tokens.json"),
    )


@dataclass(frozen=True)
class ComponentFiles:
    """The files a component is read from; `config_path` is the config.json beside them, when there is one."""

    component: str
    origin: str
    paths: tuple[Path, ...]
    config_path: Path | None


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
