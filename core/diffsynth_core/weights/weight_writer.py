"""Writing weight files derived from others: a plan from headers first, bytes later. No torch.

A tensor of an output is either a span of an input, copied by the system without passing through this process's memory,
or computed piece by piece when it is written. All files are written under temporary names, synced, reopened and
verified against the plan; only then are they renamed, one right after the other, an index last.
"""

import errno
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from glob import escape
from itertools import groupby
from pathlib import Path
from typing import BinaryIO

from diffsynth_core.errors import DiffSynthError, Problem, list_names, raise_if_any
from diffsynth_core.files import (
    created_folder,
    ignore_signals,
    remove_stale_files,
    stem_of_shard,
    sync_file,
    sync_folder,
    temporary_sibling,
)
from diffsynth_core.progress import BYTES, Reporter, Task, format_bytes
from diffsynth_core.weights.dtypes import BITS_PER_ELEMENT
from diffsynth_core.weights.headers import TensorHeader, make_header, read_header
from diffsynth_core.weights.weight_sets import ENDING, INDEX_ENDING, Span

COPIED_AT_ONCE = 64 * 1024**2
"""Bytes between two progress updates, and between two requests to the system to start writing."""
NOT_COPIED_BY_THE_SYSTEM = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)
"""Errors of `copy_file_range` after which bytes are copied through memory."""

Pieces = Callable[[], Iterable[bytes | bytearray | memoryview]]
"""Computes the bytes of a tensor, in order, in pieces that need not fit in memory together."""


@dataclass(frozen=True)
class OutputTensor:
    """One tensor of an output; `dtype` is a safetensors name, `source` its spans, or a function that computes it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: Span | tuple[Span, ...] | Pieces

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return TensorHeader(self.dtype, self.shape, Path()).nbytes


@dataclass(frozen=True)
class OutputFile:
    """A safetensors file to write.

    Attributes:
        metadata: texts for its header.
        late: called when the tensors of all files are written, for metadata known only then; `metadata` has
            placeholders of the same length.
    """

    path: Path
    tensors: tuple[OutputTensor, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)
    late: Callable[[], Mapping[str, str]] | None = None

    @property
    def kind(self) -> str:
        """What it is, in a word."""
        return "weights"

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors, without the header."""
        return sum(tensor.nbytes for tensor in self.tensors)


@dataclass(frozen=True)
class OutputText:
    """A text file beside weights: the index of shards, as diffusers and transformers read it, or a config.json."""

    path: Path
    text: str

    @property
    def kind(self) -> str:
        """What it is, in a word."""
        return "index" if self.path.name.endswith(INDEX_ENDING) else "config"


def aligned(tensors: Iterable[OutputTensor]) -> tuple[OutputTensor, ...]:
    """Sort tensors such that each starts at a multiple of its element size: wide elements first, otherwise stable."""
    return tuple(sorted(tensors, key=lambda tensor: -BITS_PER_ELEMENT[tensor.dtype]))


def plan_shards(
    folder: Path,
    stem: str,
    tensors: Sequence[OutputTensor],
    metadata: Mapping[str, str],
    max_shard_bytes: int | None,
) -> tuple[list[OutputFile], list[OutputText]]:
    """Plan `<stem>.safetensors` or, if its tensors exceed `max_shard_bytes`, shards with an index.

    Tensors keep their order; one that is larger than `max_shard_bytes` gets a shard of its own.
    """
    parts: list[list[OutputTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if max_shard_bytes is not None and filled and filled + tensor.nbytes > max_shard_bytes:
            parts.append([])
            filled = 0
        parts[-1].append(tensor)
        filled += tensor.nbytes
    if len(parts) == 1:
        return [OutputFile(folder / f"{stem}.safetensors", aligned(tensors), metadata)], []
    files = [
        OutputFile(folder / f"{stem}-{number:05d}-of-{len(parts):05d}.safetensors", aligned(part), metadata)
        for number, part in enumerate(parts, start=1)
    ]
    return files, [make_index(folder / f"{stem}.safetensors.index.json", files)]


def make_index(path: Path, files: Iterable[OutputFile], metadata: Mapping[str, object] | None = None) -> OutputText:
    """Return the index of shards: `weight_map`, and `metadata` with the bytes of all tensors as `total_size`."""
    shards = list(files)
    content = {
        "metadata": {**(metadata or {}), "total_size": sum(shard.nbytes for shard in shards)},
        "weight_map": dict(sorted((tensor.name, shard.path.name) for shard in shards for tensor in shard.tensors)),
    }
    return OutputText(path, json.dumps(content, indent=2) + "\n")


Output = OutputFile | OutputText
"""A file to write."""


def output_problems(outputs: Sequence[Output], inputs: Collection[Path], overwrite: bool = False) -> list[Problem]:
    """Return what prevents writing the outputs: their paths, and the disk space. Writes nothing."""
    problems = []
    for output in outputs:
        twin = _same_file(output.path, inputs)
        if twin:
            problems.append(
                Problem(f"`{output.path}` would overwrite the input `{twin}`", "choose another `--output_path`")
            )
        elif output.path.is_dir():
            problems.append(Problem(f"`{output.path}` is a folder", "choose another `--output_path`"))
        elif os.path.lexists(output.path) and not overwrite:
            problems.append(
                Problem(f"`{output.path}` already exists", "choose another `--output_path`, or pass `--overwrite`")
            )
    problems += _mixed_formats(outputs, inputs)
    return problems or _space_problems(outputs)


def _same_file(path: Path, inputs: Collection[Path]) -> Path | None:
    """Return the input that a path refers to, by its own name or through links."""
    for known in inputs:
        if path.absolute() == known.absolute() or (path.exists() and known.exists() and path.samefile(known)):
            return known
    return None


def _mixed_formats(outputs: Sequence[Output], inputs: Collection[Path]) -> list[Problem]:
    """Return files that look like parts of the output but are not, such as shards of another count.

    A reader of the folder would use them. Inputs are allowed: they contain the same model.
    """
    problems = []
    written = [output.path for output in outputs]
    places = dict.fromkeys((path.parent, stem) for path in written if (stem := _stem(path)) is not None)
    for folder, stem in places:
        similar = sorted(path for path in folder.glob(f"{escape(stem)}*") if _stem(path) == stem)
        others = [path.name for path in similar if path not in written and not _same_file(path, inputs)]
        if others:
            problems.append(
                Problem(
                    f"`{folder}` contains other files of a model `{stem}`, which would be read as parts of this one: "
                    f"{list_names(others)}",
                    "delete them, or choose another `--output_path`",
                )
            )
    return problems


def _stem(path: Path) -> str | None:
    """Return the common stem of a model's files, shards and index; None for other files."""
    ending = next((ending for ending in (INDEX_ENDING, ENDING) if path.name.endswith(ending)), None)
    return None if ending is None else stem_of_shard(path.name) or path.name.removesuffix(ending)


def _space_problems(outputs: Sequence[Output]) -> list[Problem]:
    """Return the problem of a folder that is not writable, or of a disk without enough space."""
    folder = outputs[0].path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        return [Problem(f"`{folder}` is a file, not a folder", "choose another `--output_path`")]
    if not os.access(folder, os.W_OK | os.X_OK):
        return [Problem(f"`{folder}` is not writable", "choose another `--output_path`")]
    needed = sum(output_bytes(output) for output in outputs)
    free = shutil.disk_usage(folder).free
    if needed <= free:
        return []
    message = f"`{outputs[0].path.parent}` has {format_bytes(free)} free, but {format_bytes(needed)} are needed"
    return [Problem(message, "free some space, or choose another `--output_path`")]


def output_bytes(output: Output) -> int:
    """Return the final size of a file."""
    if isinstance(output, OutputText):
        return len(output.text.encode())
    return len(_header(output)) + output.nbytes


def write_outputs(
    outputs: Sequence[Output], inputs: Collection[Path], reporter: Reporter, overwrite: bool = False
) -> None:
    """Write all files, or none of them; an index is renamed after its shards.

    A signal that stops the program (as an exception, `diffsynth_cli/stopping.py`) leaves no file; during the final
    renames signals are ignored, so that all files get their names.

    Raises:
        FaultsFound: see `output_problems`, before anything is written.
        DiffSynthError: if a disk refuses, an input changes meanwhile, or verification fails; no file is left then.
    """
    raise_if_any(output_problems(outputs, inputs, overwrite))
    stamps = {path: _stamp(path) for path in inputs}
    ordered = sorted(outputs, key=lambda output: isinstance(output, OutputText))
    with ExitStack() as cleaning:
        for folder in dict.fromkeys(output.path.parent for output in ordered):
            cleaning.enter_context(created_folder(folder))
        places = {}
        with reporter.task("Writing", sum(output_bytes(output) for output in ordered), BYTES) as task:
            for output in ordered:
                remove_stale_files(output.path)
                places[output.path] = cleaning.enter_context(temporary_sibling(output.path))
                _put(output, places[output.path], task)
        for output in ordered:
            if isinstance(output, OutputFile) and output.late:
                _complete(output, output.late(), places[output.path])
        changed = [path for path in inputs if _stamp(path) != stamps[path]]
        if changed:
            raise DiffSynthError(
                f"{list_names([str(path) for path in changed])} changed while it was read",
                "wait until nothing writes to it, then rerun the command",
            )
        with ignore_signals():
            _give_names(ordered, places)


def _stamp(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except FileNotFoundError:
        return 0, 0
    return status.st_size, status.st_mtime_ns


def _put(output: Output, place: Path, task: Task) -> None:
    """Write one file under its temporary name, sync it, and verify it."""
    if isinstance(output, OutputText):
        place.write_text(output.text, encoding="utf-8")
        task.advance(output_bytes(output))
    else:
        _write(output, place, task)
    sync_file(place)
    if isinstance(output, OutputFile):
        _verify(output, place)


def _complete(file: OutputFile, late: Mapping[str, str], place: Path) -> None:
    """Write late metadata into the header of a file, and verify it again."""
    final = replace(file, metadata={**file.metadata, **late})
    header = _header(final)
    assert len(header) == len(_header(file)), "late metadata must be as long as its placeholder"
    with place.open("r+b", buffering=0) as stream:
        _write_whole(stream, header)
    sync_file(place)
    _verify(final, place)


def _give_names(outputs: Sequence[Output], places: Mapping[Path, Path]) -> None:
    """Rename files to their final names. An older index is removed first: it would refer to old and new shards."""
    for output in outputs:
        if isinstance(output, OutputText):
            output.path.unlink(missing_ok=True)
    for output in outputs:
        places[output.path].replace(output.path)
    for folder in dict.fromkeys(output.path.parent for output in outputs):
        sync_folder(folder)


def _header(file: OutputFile) -> bytes:
    return make_header(((tensor.name, tensor.dtype, tensor.shape) for tensor in file.tensors), file.metadata)


def _write(file: OutputFile, place: Path, task: Task) -> None:
    """Write the bytes of one file."""
    with place.open("wb", buffering=0) as stream, ExitStack() as opened:
        header = _header(file)
        _write_whole(stream, header)
        task.advance(len(header))
        sources: dict[Path, BinaryIO] = {}
        for made, tensors in groupby(file.tensors, key=lambda tensor: callable(tensor.source)):
            if made:
                for tensor in tensors:
                    _make(tensor, stream, task)
                continue
            for span in _joined(span for tensor in tensors for span in _spans(tensor)):
                if span.path not in sources:
                    sources[span.path] = opened.enter_context(span.path.open("rb", buffering=0))
                _copy(sources[span.path], stream, span, task)


def _make(tensor: OutputTensor, stream: BinaryIO, task: Task) -> None:
    """Compute and write a tensor piece by piece."""
    assert callable(tensor.source)
    for piece in tensor.source():
        _write_whole(stream, piece)
        task.advance(len(memoryview(piece).cast("B")))
    _begin_writeback(stream)


def _spans(tensor: OutputTensor) -> tuple[Span, ...]:
    """Return the spans of a copied tensor."""
    assert not callable(tensor.source)
    return (tensor.source,) if isinstance(tensor.source, Span) else tensor.source


def _joined(spans: Iterable[Span]) -> Iterator[Span]:
    """Merge adjacent spans."""
    last: Span | None = None
    for span in spans:
        if last and last.path == span.path and last.end == span.begin:
            last = Span(last.path, last.begin, span.end)
        else:
            if last:
                yield last
            last = span
    if last:
        yield last


def _copy(source: BinaryIO, target: BinaryIO, span: Span, task: Task) -> None:
    """Append a span of a file to another, within the system if possible."""
    by_system = hasattr(os, "copy_file_range")
    place = span.begin
    while place < span.end:
        wanted = min(COPIED_AT_ONCE, span.end - place)
        done = 0
        if by_system:
            try:
                done = os.copy_file_range(source.fileno(), target.fileno(), wanted, offset_src=place)
            except OSError as error:
                if error.errno not in NOT_COPIED_BY_THE_SYSTEM:
                    raise
                by_system = False
        if not done:
            source.seek(place)
            piece = source.read(min(wanted, 1024**2))
            if not piece:
                raise DiffSynthError(f"`{span.path}` was truncated while it was read", "download the file again")
            _write_whole(target, piece)
            done = len(piece)
        place += done
        task.advance(done)
        if done == wanted:
            _begin_writeback(target)


def _begin_writeback(stream: BinaryIO) -> None:
    """Start writing the cached pages of a file, so that the final sync has less to wait for.

    On Linux this advice starts the writeback of dirty pages (mm/fadvise.c).
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _write_whole(target: BinaryIO, piece: bytes | bytearray | memoryview) -> None:
    """All bytes of a piece: an unbuffered stream may take fewer."""
    rest = memoryview(piece).cast("B")
    while rest:
        rest = rest[target.write(rest) :]


def _verify(file: OutputFile, place: Path) -> None:
    """Open what was written and account for every tensor."""
    written = read_header(place)
    planned = {tensor.name: (tensor.dtype, tensor.shape) for tensor in file.tensors}
    found = {name: (tensor.dtype, tensor.shape) for name, tensor in written.tensors.items()}
    if found != planned or dict(written.metadata) != dict(file.metadata):
        wrong = sorted(name for name in planned.keys() | found.keys() if planned.get(name) != found.get(name))
        raise DiffSynthError(
            f"verification of `{file.path}` failed after writing: {list_names(wrong)}", "check the disk"
        )
