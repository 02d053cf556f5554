"""From the two documented model parameters to files on disk.

`model_paths` contains paths; `model_id_with_origin_paths` contains `model_id:glob` below the model base path, or local
paths. Nothing is downloaded here: missing files are returned as problems, and the caller calls again after a download.
"""

import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from diffsynth_core.errors import Problem, list_names
from diffsynth_core.files import GGUF_SUFFIX, PICKLED_SUFFIXES, SAFETENSORS_SUFFIXES, missing_shards, stem_of_shard
from diffsynth_core.hub.model_folder import model_folder
from diffsynth_core.progress import pluralize

PIPELINE_INDEX = "model_index.json"
"""File in the folder of a diffusers pipeline, whose components are its subfolders."""
PICKLED_PREFIX = "pytorch_"
"""Prefix of pickled files: `pytorch_model.bin` contains the same weights as `model.safetensors`."""


@dataclass(frozen=True)
class MissingFiles(Problem):
    """Files of a repository are not on disk.

    Attributes:
        entry: the entry that names them.
        command: the command that downloads them, possibly with others.
    """

    entry: str = ""
    command: str = ""


def missing_in_one(problems: Sequence[Problem]) -> list[Problem]:
    """Return the problems with all `MissingFiles` merged into one, at the position of the first."""
    missing = [problem for problem in problems if isinstance(problem, MissingFiles)]
    if len(missing) < 2:
        return list(problems)
    entries = list(dict.fromkeys(problem.entry for problem in missing))
    of_recipe = next((problem.command for problem in missing if problem.entry not in problem.command), None)
    command = of_recipe or f"diffsynth download {shlex.join(entries)}"
    merged = MissingFiles(
        f"{len(entries)} model files are missing: {list_names(entries)}",
        f"download them with `{command}`, set DIFFSYNTH_MODEL_BASE_PATH to where they are, or rehearse with `--rehearse`",
        command=command,
    )
    first = problems.index(missing[0])
    others = [problem for problem in problems[first:] if not isinstance(problem, MissingFiles)]
    return [*problems[:first], merged, *others]


@dataclass(frozen=True)
class FileSet:
    """The files of one model.

    Attributes:
        origin: what the user wrote for them.
        entries: what other parameters may call them: the entry, or any element of a list of shards.
        mirror: the entry that is read instead, if any.
    """

    origin: str
    paths: tuple[Path, ...]
    entries: tuple[str, ...] = ()
    mirror: str | None = None
    home: Path | None = None
    """The folder of the repository that the user named, if a mirror is read instead."""

    @property
    def source(self) -> str:
        """Where the files come from, in words."""
        return f"{self.origin}, read from its mirror {self.mirror}" if self.mirror else self.origin


def download_command(entry: str) -> str:
    """Return the command that downloads the files of an entry."""
    return f"diffsynth download {shlex.quote(entry)}"


def locate(
    path_groups: Sequence[Sequence[str]],
    entries: Sequence[str],
    base: Path,
    mirrors: Mapping[str, str] | None = None,
    command_for: Callable[[str], str] = download_command,
) -> tuple[list[FileSet], list[Problem]]:
    """Return the file sets of `model_paths` and `model_id_with_origin_paths`, and the problems of missing files.

    Args:
        mirrors: file name -> entry with the same weights, which is read if only the mirror is on disk.
        command_for: entry -> the command that downloads its files, for hints.
    """
    file_sets: list[FileSet] = []
    problems: list[Problem] = []
    for group in path_groups:
        missing = [item for item in group if not expand_local(item)]
        problems += map(_missing_path, missing)
        file_sets += [] if missing else _local_sets(group)
    for entry in entries:
        parts = split_entry(entry)  # None for a local path, which has no mirror
        mirror = (mirrors or {}).get(parts[1].rpartition("/")[2]) if parts else None
        paths = tuple(expand_entry(entry, base))
        copied = tuple(expand_entry(mirror, base)) if mirror and not paths else ()
        if paths and (parts is None or expand_local(entry)):
            file_sets += _local_sets((entry,))
        elif paths or copied:
            home = (model_folder(parts[0], base) / parts[1]).parent if parts and copied else None
            file_sets.append(FileSet(entry, paths or copied, (entry,), mirror if copied else None, home))
        else:
            problems.append(_nothing_matches(entry, mirror, base, command_for))
    file_sets = _with_joined_shards(file_sets)
    faults = {file_set.origin: _shard_problems(file_set, command_for) for file_set in file_sets}
    problems += [problem for found in faults.values() for problem in found]
    return [file_set for file_set in file_sets if not faults[file_set.origin]], problems


def _local_sets(group: Sequence[str]) -> list[FileSet]:
    """Return the models of a group of local paths; a folder may contain several."""
    if len(group) == 1 and _path(group[0]).is_dir():
        models = _models_in(_path(group[0]))
        folder = group[0].rstrip("/") or group[0]
        if len(models) == 1 and all(path.parent == _path(folder) for paths in models.values() for path in paths):
            return [FileSet(group[0], tuple(paths), tuple(group)) for paths in models.values()]
        return [FileSet(f"{folder}/{name}", tuple(paths), tuple(group)) for name, paths in models.items()]
    return [FileSet(", ".join(group), tuple(path for item in group for path in expand_local(item)), tuple(group))]


def _models_in(folder: Path) -> dict[str, list[Path]]:
    """Return the weight files in a folder by model: those of one component, of several in one folder, or of the
    subfolders of a pipeline.
    """
    models_here = {} if (folder / PIPELINE_INDEX).is_file() else _models_directly_in(folder)
    if models_here:
        return models_here
    below = {sub.name: _models_directly_in(sub) for sub in sorted(folder.iterdir()) if sub.is_dir() and _is_seen(sub)}
    return {
        name if len(models) == 1 else f"{name}/{model}": paths
        for name, models in below.items()
        for model, paths in models.items()
    }


def _models_directly_in(folder: Path) -> dict[str, list[Path]]:
    """Return the weight files in a folder itself by model, shards together.

    A pickled file is skipped if the same model exists as safetensors, and a GGUF file if there is any other.
    """
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and _is_seen(path)]
    models: dict[str, list[Path]] = {}
    for endings in (SAFETENSORS_SUFFIXES, PICKLED_SUFFIXES, (GGUF_SUFFIX,)):
        known = {_stem(models[name][0]) for name in models}
        for path in files:
            if path.suffix not in endings or _stem(path) in known or (endings == (GGUF_SUFFIX,) and known):
                continue
            shard = stem_of_shard(path.name)
            models.setdefault(f"{shard}*{path.suffix}" if shard else path.name, []).append(path)
    return models


def _is_seen(path: Path) -> bool:
    """Return whether a file or folder is visible: macOS stores metadata of `x` in `._x`."""
    return not path.name.startswith(".")


def _stem(path: Path) -> str:
    return (stem_of_shard(path.name) or path.stem).removeprefix(PICKLED_PREFIX)


def _with_joined_shards(file_sets: Sequence[FileSet]) -> list[FileSet]:
    """Return the file sets, with shards of one model that were given one by one joined."""
    joined: dict[object, FileSet] = {}
    for position, file_set in enumerate(file_sets):
        models = {(path.parent, stem_of_shard(path.name)) for path in file_set.paths}
        one = next(iter(models)) if len(models) == 1 else (None, None)
        key: object = one if one[1] else position
        before = joined.get(key)
        if before is None or set(before.paths) & set(file_set.paths):
            joined[key if before is None else position] = file_set
            continue
        joined[key] = FileSet(
            f"{before.origin}, {file_set.origin}",
            (*before.paths, *file_set.paths),
            (*before.entries, *file_set.entries),
            before.mirror,
            before.home,
        )
    return list(joined.values())


def split_entry(entry: str) -> tuple[str, str] | None:
    """Split `"owner/name:glob"` into `("owner/name", "glob")`; return None for a local path."""
    model_id, colon, pattern = entry.partition(":")
    return (model_id.strip(), pattern.strip()) if colon and pattern.strip() else None


def expand_entry(entry: str, base: Path) -> list[Path]:
    """Return the files of one element of `model_id_with_origin_paths`, sorted by name."""
    parts = split_entry(entry)
    if parts is None or expand_local(entry):
        return expand_local(entry)
    model_id, pattern = parts
    folder = model_folder(model_id, base)
    return _glob(folder, pattern) if folder.is_dir() else []


def expand_local(text: str) -> list[Path]:
    """Return a file, the weight files of a folder or of a pipeline's subfolders, or the matches of a glob."""
    path = _path(text)
    if path.is_file():
        return [path]
    if path.is_dir():
        return sorted(file for paths in _models_in(path).values() for file in paths)
    if any(character in text for character in "*?["):
        anchor = Path(path.anchor or ".")
        return _glob(anchor, str(path.relative_to(path.anchor)))
    return []


def _glob(folder: Path, pattern: str) -> list[Path]:
    """Return the files that match; none if the pattern is invalid for pathlib."""
    try:
        return sorted(path for path in folder.glob(pattern) if path.is_file())
    except (ValueError, NotImplementedError):
        return []


def _path(text: str) -> Path:
    with suppress(RuntimeError):  # there is no home folder
        return Path(text).expanduser()
    return Path(text)


def locate_folder(text: str, base: Path) -> Path | None:
    """Return a folder given as a path or as `model_id:folder`; None if it does not exist."""
    parts = split_entry(text)
    candidates = [_path(text)] + ([model_folder(parts[0], base) / parts[1]] if parts else [])
    return next((path for path in candidates if path.is_dir()), None)


def _missing_path(item: str) -> Problem:
    """Return the problem of a path in `model_paths` that is neither a weight file nor a folder with weights."""
    if _path(item).is_dir():
        return Problem(
            f"`model_paths` names the folder `{item}`, which contains no weights",
            "pass the folder of a component, or of a whole pipeline",
        )
    return Problem(f"`model_paths` names `{item}`, which does not exist", "correct the path")


def _nothing_matches(entry: str, mirror: str | None, base: Path, command_for: Callable[[str], str]) -> Problem:
    parts = split_entry(entry)
    if parts is None:
        return Problem(
            f"`model_id_with_origin_paths`: nothing matches `{entry}`", "correct the path, or use `model_id:file`"
        )
    nor = f", nor its mirror `{mirror}`" if mirror else ""
    command = command_for(entry)
    return MissingFiles(
        f"`model_id_with_origin_paths`: nothing matches `{entry}`{nor} below `{base}`",
        f"download it with `{command}`, set DIFFSYNTH_MODEL_BASE_PATH to where it is, or rehearse with `--rehearse`",
        entry=entry,
        command=command,
    )


def _shard_problems(file_set: FileSet, command_for: Callable[[str], str]) -> list[Problem]:
    """Return the problem of shards that the names of the others imply but that are missing."""
    missing = missing_shards(path.name for path in file_set.paths)
    if not missing:
        return []
    what = f"`{file_set.origin}` is missing {pluralize(len(missing), 'shard')}, the first is `{missing[0]}`"
    if split_entry(file_set.origin) is None or any(map(expand_local, file_set.entries)):
        return [Problem(what, "pass all shards of the model, or their folder")]
    if file_set.mirror or file_set.origin not in file_set.entries:
        return [Problem(what, "download them, or fix the glob")]
    command = command_for(file_set.origin)
    hint = f"download them with `{command}`, or fix the glob"
    return [MissingFiles(what, hint, entry=file_set.origin, command=command)]
