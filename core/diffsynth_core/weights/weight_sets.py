"""Weights given by a user: one safetensors file, shards with or without an index, or a folder. No torch.

Only headers are read. Incomplete sets are rejected: a missing shard, an index that contradicts its shards, a file with
a wrong header. Pickled files are rejected too: the conversion commands copy byte ranges, which pickled files lack.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffsynth_core.errors import DiffSynthError, list_names
from diffsynth_core.files import PICKLED_SUFFIXES, missing_shards, stem_of_shard
from diffsynth_core.json_files import WrongType, as_type, read_json
from diffsynth_core.progress import pluralize
from diffsynth_core.weights.headers import TensorHeader, read_header

ENDING = ".safetensors"
"""Suffix of the files."""
INDEX_ENDING = ".safetensors.index.json"
"""Suffix of the index of shards."""


@dataclass(frozen=True)
class Span:
    """Bytes of a file from `begin` to `end` (exclusive)."""

    path: Path
    begin: int
    end: int


@dataclass(frozen=True)
class WeightSet:
    """The tensors of one file, or of the shards of one model.

    Attributes:
        origin: what the user wrote.
        files: sorted by name.
        tensors: in the order of files and bytes.
        index: the index file, and its content other than the weight map.
        metadata: text metadata of each file.
    """

    origin: str
    files: tuple[Path, ...]
    tensors: Mapping[str, TensorHeader]
    spans: Mapping[str, Span]
    metadata: Mapping[Path, Mapping[str, str]]
    index: Path | None = None
    index_metadata: Mapping[str, Any] | None = None

    @property
    def inputs(self) -> tuple[Path, ...]:
        """All files that are read, none of which may be overwritten."""
        return (*self.files, *([self.index] if self.index else []))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(span.end - span.begin for span in self.spans.values())

    def metadata_value(self, key: str) -> str | None:
        """Return the value of a metadata key; None if it is missing or differs between files."""
        values = {metadata[key] for metadata in self.metadata.values() if key in metadata}
        return values.pop() if len(values) == 1 else None


def open_weights(paths: Sequence[Path]) -> WeightSet:
    """Open the weight set that `paths` name: a file, all shards, an index, or a folder with one set.

    Raises:
        DiffSynthError: if a file is missing or unreadable, or the set is incomplete.
    """
    origin = ", ".join(str(path) for path in paths)
    if len(paths) == 1:
        path = paths[0]
        if path.is_dir():
            return _open_folder(path)
        if path.name.endswith(".index.json"):
            return _open_index(path)
    for path in paths:
        _check_kind(path)
    unique = list(dict.fromkeys(paths))
    if len(unique) < len(paths):
        raise DiffSynthError(f"`{_first_twice(paths)}` is listed twice", "list each file once")
    _check_shards(unique)
    return _read(origin, unique)


def _first_twice(paths: Sequence[Path]) -> Path:
    return next(path for place, path in enumerate(paths) if path in paths[:place])


def _check_kind(path: Path) -> None:
    """Reject files by name that are not safetensors files."""
    if not path.exists():
        raise DiffSynthError(f"`{path}` does not exist", "correct the path")
    if path.is_dir():
        raise DiffSynthError(f"`{path}` is a folder, listed together with files", "list its files, or only the folder")
    if path.suffix in PICKLED_SUFFIXES:
        raise DiffSynthError(
            f"`{path}` is a pickled file, but only safetensors files are supported here",
            "convert it to safetensors first",
        )


def _open_folder(folder: Path) -> WeightSet:
    """Open the only set of weights in a folder."""
    indexes = sorted(folder.glob(f"*{INDEX_ENDING}"))
    files = sorted(path for path in folder.glob(f"*{ENDING}") if not path.name.startswith("."))
    if len(indexes) == 1:
        return _open_index(indexes[0], str(folder))
    if not files:
        pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLED_SUFFIXES)
        below = sorted({path.parent.name for path in folder.glob(f"*/*{ENDING}")})
        if below:
            raise DiffSynthError(
                f"`{folder}` contains no weights, but its subfolders do: {list_names(below)}", "pass one of them"
            )
        what = f"only pickled files: {list_names(pickled)}" if pickled else "no safetensors files"
        raise DiffSynthError(f"`{folder}` contains {what}", "pass a folder with safetensors files")
    stems = {stem_of_shard(path.name) or path.name for path in files}
    if len(indexes) > 1 or len(stems) > 1:
        names = [path.name for path in (indexes or files)]
        raise DiffSynthError(f"`{folder}` contains several models: {list_names(names)}", "pass the file of one model")
    _check_shards(files)
    return _read(str(folder), files)


def _open_index(path: Path, origin: str | None = None) -> WeightSet:
    """Open the shards of an index file."""
    weight_map, metadata = _read_index(path)
    names = sorted(set(weight_map.values()))
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise DiffSynthError(
            f"`{path}` lists files in other folders: {list_names(outside)}", "download the index again"
        )
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing:
        raise _missing_shards(path.parent, missing)
    for name in names:
        _check_kind(path.parent / name)
    found = _read(origin or str(path), [path.parent / name for name in names])
    contradicted = sorted(
        {
            name
            for name, shard in weight_map.items()
            if name not in found.tensors or found.tensors[name].path.name != shard
        }
        | (found.tensors.keys() - weight_map.keys())
    )
    if contradicted:
        raise DiffSynthError(
            f"`{path}` and its shards disagree on the place of {pluralize(len(contradicted), 'tensor')}: "
            f"{list_names(contradicted)}",
            "download the index and the shards again, or pass the shards themselves",
        )
    return WeightSet(found.origin, found.files, found.tensors, found.spans, found.metadata, path, metadata)


def _read_index(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """Return tensor -> shard, and the rest of the index."""
    if not path.exists():
        raise DiffSynthError(f"`{path}` does not exist", "correct the path")
    content = read_json(path, dict[str, Any], "download it again")
    try:
        weight_map = as_type(content.get("weight_map"), dict[str, str], "weight_map")
        metadata = as_type(content.get("metadata") or {}, dict[str, Any], "metadata")
    except WrongType as error:
        raise DiffSynthError(f"`{path}` is not a shard index: {error}", "download it again") from error
    return weight_map, metadata


def _check_shards(paths: Iterable[Path]) -> None:
    """Check that all shards exist that names such as `…-00001-of-00003` imply."""
    by_folder: dict[Path, list[str]] = {}
    for path in paths:
        by_folder.setdefault(path.parent, []).append(path.name)
    for folder, names in by_folder.items():
        unnamed = missing_shards(names)
        if missing := [name for name in unnamed if not (folder / name).is_file()]:
            raise _missing_shards(folder, missing)
        if unnamed:
            what = (
                f"{pluralize(len(unnamed), 'shard')} of the same model in `{folder}` not listed: {list_names(unnamed)}"
            )
            raise DiffSynthError(what, "list all of them, or pass their index")


def _missing_shards(folder: Path, names: Sequence[str]) -> DiffSynthError:
    return DiffSynthError(
        f"{pluralize(len(names), 'shard')} missing in `{folder}`: {list_names(names)}",
        "download them, or pass all of them",
    )


def _read(origin: str, files: Sequence[Path]) -> WeightSet:
    """Read the headers of files, in byte order."""
    tensors: dict[str, TensorHeader] = {}
    spans: dict[str, Span] = {}
    metadata = {}
    twice: dict[str, tuple[Path, Path]] = {}
    for path in files:
        header = read_header(path)
        metadata[path] = header.metadata
        for name in sorted(header.tensors, key=lambda name: header.spans[name]):
            if name in tensors:
                twice[name] = (tensors[name].path, path)
            tensors[name] = header.tensors[name]
            spans[name] = Span(path, *header.spans[name])
    if twice:
        first, second = next(iter(twice.values()))
        raise DiffSynthError(
            f"{pluralize(len(twice), 'duplicate tensor')} in `{first}` and `{second}`: {list_names(list(twice))}",
            "pass each shard of one model once",
        )
    if not tensors:
        raise DiffSynthError(f"`{origin}` contains no tensors", "pass a file that does")
    return WeightSet(origin, tuple(files), tensors, spans, metadata)
