"""What an encoding depends on, and the name of its cache entry, for training and for generating. No torch."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from diffsynth_core.data.cache import EncodingCache, encoding_key
from diffsynth_core.data.media import MediaCrop
from diffsynth_core.data.samples import Sample
from diffsynth_core.hub.file_cache import FileCache
from diffsynth_core.hub.identity import IDENTITIES, HashCache
from diffsynth_core.models.spec import EncoderFacts, FamilyFacts
from diffsynth_core.planning.model.model_plan import ModelPlan
from diffsynth_core.progress import Reporter

ENTRIES = "encodings.jsonl"
"""File in the cache folder with the results of verifying encodings."""


@dataclass(frozen=True)
class ConditioningFrames:
    """A clip of which only some frames are given, as files; the others are 0, gray.

    Attributes:
        shape: (frames, height, width).
        given: (frame, its image), in order.
    """

    shape: tuple[int, int, int]
    given: tuple[tuple[int, MediaCrop], ...]

    @property
    def first_frame(self) -> "ConditioningFrames":
        """Its first frame only."""
        _, height, width = self.shape
        return ConditioningFrames((1, height, width), tuple(one for one in self.given if one[0] == 0))


ColumnInput = str | float | MediaCrop | ConditioningFrames | tuple[MediaCrop, ...]
"""What an encoder reads of a column: the caption or another value, the target, or the files of a condition."""


def hash_cache(cache: Path) -> HashCache:
    """Return the cache of file hashes, in the cache folder."""
    return HashCache(cache / IDENTITIES)


def entry_memory(cache: Path) -> FileCache:
    """Return the cache of verified encodings, in the cache folder."""
    return FileCache(cache / ENTRIES)


def encoding_cache(cache: Path, facts: FamilyFacts, encoder: EncoderFacts, memory: FileCache) -> EncodingCache:
    """Return the entries of an encoder in the cache folder."""
    return EncodingCache(cache / "encodings" / facts.name / encoder.name, memory=memory)


def component_paths(model: ModelPlan, component: str) -> dict[str, Path]:
    """Return all files that a component's output depends on: weights, configuration, tokenizer, a merged LoRA."""
    files = model.components[component]
    paths = [*files.paths, *([files.config_path] if files.config_path else [])]
    for parameter, tokenizer in model.facts.tokenizers.items():
        if tokenizer.component == component and parameter in model.tokenizers:
            folder = model.tokenizers[parameter]
            paths += [folder / name for name in tokenizer.files if (folder / name).is_file()]
    fused = model.fused_lora
    merged = {"preset_lora_path": fused.file.path} if fused and fused.component == component else {}
    return {f"{path.parent.name}/{path.name}": path for path in paths} | merged


def identify(
    model: ModelPlan, components: Iterable[str], memory: HashCache, reporter: Reporter
) -> dict[str, dict[str, str]]:
    """Return sha256 by component and file."""
    found = {name: component_paths(model, name) for name in components}
    memory.read_all((path for files in found.values() for path in files.values()), reporter, "Hashing model files")
    return {name: {label: memory.sha256(path) for label, path in files.items()} for name, files in found.items()}


@dataclass(frozen=True)
class EncoderInputs:
    """What the encoders may read: target, conditions by name, and values that are conditions by column."""

    target: MediaCrop | ConditioningFrames
    conditions: Mapping[str, tuple[MediaCrop, ...]]
    values: Mapping[str, float | str]

    def of(self, encoder: EncoderFacts, text_column: str, caption: str) -> dict[str, ColumnInput]:
        """Return what an encoder reads with a caption, by column."""
        read: dict[str, ColumnInput] = {}
        for column in encoder.columns:
            if column == text_column:
                read[column] = caption
            elif column in self.values:
                read[column] = self.values[column]
            elif column in self.conditions:
                read[column] = self.conditions[column]
            else:
                read[column] = self.target.first_frame if encoder.first_frame_only else self.target
        return read


def inputs_of(facts: FamilyFacts, encoder: EncoderFacts, sample: Sample, caption: str) -> dict[str, ColumnInput]:
    """Return what an encoder reads of a sample with one of its captions, by column."""
    return EncoderInputs(sample.target, sample.conditions, sample.values).of(encoder, facts.text_column, caption)


def entry_key(
    model: ModelPlan,
    mixed_precision: str,
    encoder: EncoderFacts,
    identity: Mapping[str, str],
    inputs: Mapping[str, ColumnInput],
    memory: HashCache,
) -> str:
    """Return the cache entry of an encoding.

    It depends on the content of its inputs: captions as text, media as the hash of their bytes and the crop.

    Args:
        identity: sha256 of the files of the encoder's component.
        memory: has the hashes of all media.
    """
    return encoding_key(
        encoder=encoder.name,
        version=encoder.version,
        files=sorted(identity.values()),
        precision=_precision(model, mixed_precision, encoder.component),
        inputs={
            "extra_inputs": encoder.inputs,
            **{column: _content(value, memory) for column, value in inputs.items()},
        },
    )


def _precision(model: ModelPlan, mixed_precision: str, component: str) -> str:
    """Return an encoder's compute dtype, and how its weights are rounded, if they are."""
    if not model.stored.get(component):
        return mixed_precision
    return f"{mixed_precision}, {model.components[component].storage} weights"


def _content(value: ColumnInput, memory: HashCache) -> object:
    if isinstance(value, MediaCrop):
        return [memory.sha256(value.path), *value.transform]
    if isinstance(value, tuple):
        return [_content(crop, memory) for crop in value]
    if isinstance(value, ConditioningFrames):
        return {"shape": value.shape, "given": [[frame, _content(crop, memory)] for frame, crop in value.given]}
    return value
