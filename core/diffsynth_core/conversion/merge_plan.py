"""Plan of merging LoRAs into a base, from headers alone. No torch."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from diffsynth_core.config.choices import WeightDtype
from diffsynth_core.conversion.bases import Base
from diffsynth_core.conversion.lora_inputs import WeightedLora, match_lora
from diffsynth_core.conversion.provenance import merge_entry, with_entry
from diffsynth_core.errors import DiffSynthError, Problem, list_names, raise_if_any
from diffsynth_core.files import stem_of_shard
from diffsynth_core.progress import pluralize
from diffsynth_core.weights.base_files import QUANT_METADATA, is_float8_marker
from diffsynth_core.weights.dtypes import FLOATING_POINT, SAFETENSORS_NAMES
from diffsynth_core.weights.headers import TensorHeader
from diffsynth_core.weights.weight_sets import ENDING
from diffsynth_core.weights.weight_writer import (
    Output,
    OutputFile,
    OutputTensor,
    OutputText,
    Pieces,
    aligned,
    make_index,
    plan_shards,
)
from diffsynth_core.weights.weighted_files import WeightedFile

FORMATS = {name: SAFETENSORS_NAMES[name] for name in get_args(WeightDtype)}
"""Value of `--dtype` -> safetensors dtype."""
MERGED_IN_PLACE = frozenset(FORMATS.values())
"""Dtypes that a merged weight may keep."""


@dataclass(frozen=True)
class MergePlan:
    """A base, the LoRAs that fit it, and the output.

    Attributes:
        dtype: safetensors dtype of all floating-point tensors; None: each as in the base.
        changed: keys in the base's files of the weights that the LoRAs change.
    """

    base: Base
    loras: tuple[WeightedLora, ...]
    changed: frozenset[str]
    output: Path
    dtype: str | None = None
    max_shard_bytes: int | None = None

    @property
    def inputs(self) -> tuple[Path, ...]:
        """All files that are read."""
        return (*self.base.weights.inputs, *(one.lora.path for one in self.loras))

    @property
    def hashed(self) -> tuple[Path, ...]:
        """The files whose hashes the output records."""
        return tuple(dict.fromkeys((*self.base.weights.files, *(one.lora.path for one in self.loras))))

    def format_of(self, name: str) -> str:
        """Return the dtype in which a tensor is written."""
        stored = self.base.weights.tensors[name].dtype
        return self.dtype if self.dtype and stored in FLOATING_POINT else stored

    @property
    def left_out(self) -> frozenset[str]:
        """Keys of scales and markers of 8-bit floats, if nothing is written as such."""
        if self.dtype is None:
            return frozenset()
        scales = {scale.name for scale in self.base.scales.values()}
        return frozenset(scales | {name for name in self.base.weights.tensors if is_float8_marker(name)})

    def entry(self, hashes: Mapping[Path, str]) -> dict[str, Any]:
        """Return the merge's entry in the metadata of the output."""
        loras = [(one.lora.path, one.weight) for one in self.loras]
        return merge_entry(self.base.weights.files, loras, hashes)


def plan_merge(
    base: Base,
    given: Sequence[WeightedFile],
    output: Path,
    dtype: WeightDtype | None = None,
    max_shard_bytes: int | None = None,
    allow_unmatched: bool = False,
) -> MergePlan:
    """Plan a merge; `dtype` is a key of `FORMATS`.

    Raises:
        FaultsFound: LoRAs that do not fit the base, and weights of the base that cannot be merged into.
        DiffSynthError: if the output has an unsupported suffix.
    """
    loras: list[WeightedLora] = []
    problems: list[Problem] = []
    for one in given:
        try:
            loras.append(match_lora(one, base, allow_unmatched))
        except DiffSynthError as error:
            problems += error.problems
    changed = frozenset(name for one in loras for tensor in one.lora.weights for name in base.names_of(tensor))
    written = FORMATS[dtype] if dtype else None
    problems += _format_problems({name: base.weights.tensors[name] for name in sorted(changed)}, written)
    problems += _output_problems(base, output, max_shard_bytes)
    raise_if_any(problems)
    return MergePlan(base, tuple(loras), changed, output, written, max_shard_bytes)


def _format_problems(changed: Mapping[str, TensorHeader], dtype: str | None) -> list[Problem]:
    """Return weights that cannot be merged into because of their dtype."""
    problems = []
    integers = [name for name, tensor in changed.items() if tensor.dtype not in FLOATING_POINT]
    if integers:
        problems.append(
            Problem(
                f"cannot merge into {pluralize(len(integers), 'weight')} of dtype {changed[integers[0]].dtype}, "
                f"which is not floating point: {list_names(integers)}",
                "use the original weights",
            )
        )
    narrow = [name for name, tensor in changed.items() if tensor.dtype in FLOATING_POINT - MERGED_IN_PLACE]
    if narrow and dtype is None:
        stored = changed[narrow[0]].dtype
        why = "rounding would lose most of the change" if stored != "F64" else "merging computes in float32"
        problems.append(
            Problem(
                f"cannot merge into {pluralize(len(narrow), 'weight')} of dtype {stored}, as {why}: {list_names(narrow)}",
                "set the dtype to write, such as `--dtype bfloat16`",
            )
        )
    return problems


def _output_problems(base: Base, output: Path, max_shard_bytes: int | None) -> list[Problem]:
    """Return the problem of a file as the output of what may be several files."""
    if output.suffix != ENDING or (len(base.weights.files) == 1 and max_shard_bytes is None):
        return []
    what = "`--max_shard_size` may write several" if max_shard_bytes else f"`{base.weights.origin}` has shards"
    return [Problem(f"`--output_path` `{output}` is one file, but {what}", "pass a folder", wrong_use=True)]


def outputs_of(
    plan: MergePlan,
    pieces: Callable[[str], Pieces],
    late: Callable[[], Mapping[Path, str]] | None = None,
) -> list[Output]:
    """Return the files to write: the shards of the base, or shards of the requested size.

    Args:
        pieces: key in the base's files -> function that computes its bytes, for all that are not copied.
        late: called for the hashes of the inputs when everything else is written.
    """
    weights = plan.base.weights
    kept = [name for name in weights.tensors if name not in plan.left_out]
    tensors = {name: _output_tensor(plan, name, pieces) for name in kept}
    if plan.max_shard_bytes is not None:
        stem = stem_of_shard(weights.files[0].name) or weights.files[0].stem
        metadata = _metadata(plan, weights.files[0])
        common = {key: value for key in metadata if (value := weights.metadata_value(key)) is not None}
        files, indexes = plan_shards(plan.output, stem, list(tensors.values()), common, plan.max_shard_bytes)
        return [*(_with_provenance(plan, file, late) for file in files), *indexes]
    files = []
    for path in weights.files:
        place = plan.output if plan.output.suffix == ENDING else plan.output / path.name
        of_file = tuple(tensor for name, tensor in tensors.items() if weights.tensors[name].path == path)
        ordered = of_file if plan.dtype is None else aligned(of_file)
        files.append(_with_provenance(plan, OutputFile(place, ordered, _metadata(plan, path)), late))
    return [*files, *([_index(plan, files)] if weights.index else [])]


def _metadata(plan: MergePlan, path: Path) -> dict[str, str]:
    """Return the metadata of a file of the base that still applies to the result."""
    metadata = plan.base.weights.metadata[path]
    return {key: value for key, value in metadata.items() if plan.dtype is None or key != QUANT_METADATA}


def _output_tensor(plan: MergePlan, name: str, pieces: Callable[[str], Pieces]) -> OutputTensor:
    tensor, written = plan.base.weights.tensors[name], plan.format_of(name)
    copied = name not in plan.changed and written == tensor.dtype
    return OutputTensor(name, written, tensor.shape, plan.base.weights.spans[name] if copied else pieces(name))


def _with_provenance(plan: MergePlan, file: OutputFile, late: Callable[[], Mapping[Path, str]] | None) -> OutputFile:
    """Return the file with a record of its inputs, completed with their hashes when they are known."""
    metadata = file.metadata
    return replace(
        file,
        metadata=with_entry(metadata, plan.entry({})),
        late=(lambda: with_entry(metadata, plan.entry(late()))) if late else None,
    )


def _index(plan: MergePlan, files: Sequence[OutputFile]) -> OutputText:
    """Return the index of the base, unchanged if dtypes and thus sizes are."""
    weights = plan.base.weights
    assert weights.index
    place = plan.output / weights.index.name
    if plan.dtype is None:
        return OutputText(place, weights.index.read_text(encoding="utf-8"))
    return make_index(place, files, weights.index_metadata)
