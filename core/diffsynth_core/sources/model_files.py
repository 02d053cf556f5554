"""From the two documented model parameters to files on disk.

`model_paths` names files; `model_id_with_origin_paths` names `model_id:glob` below the model base path, or a local
path. Nothing is fetched here: what is missing is told, and whoever fetches calls this again afterwards.
"""

import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from diffsynth_core.errors import Problem, shorten
from diffsynth_core.files import absent_shards

WEIGHT_ENDINGS = (".safetensors", ".pth")


@dataclass(frozen=True)
class MissingFiles(Problem):
    """The problem that files of a hub's repository are not on disk.

    `entry` is what names them, `command` what downloads them, perhaps with others.
    """

    entry: str = ""
    command: str = ""


def missing_in_one(problems: Sequence[Problem]) -> list[Problem]:
    """The same problems, those of files that are not on disk as one, at the place of the first."""
    missing = [problem for problem in problems if isinstance(problem, MissingFiles)]
    if len(missing) < 2:
        return list(problems)
    entries = list(dict.fromkeys(problem.entry for problem in missing))
    of_recipe = next((problem.command for problem in missing if problem.entry not in problem.command), None)
    command = of_recipe or f"diffsynth download {shlex.join(entries)}"
    merged = MissingFiles(
        f"{len(entries)} model files are missing: {shorten(entries)}",
        f"fetch them with `{command}`, set DIFFSYNTH_MODEL_BASE_PATH to where they are, or rehearse with `--rehearse`",
        command=command,
    )
    first = problems.index(missing[0])
    others = [problem for problem in problems[first:] if not isinstance(problem, MissingFiles)]
    return [*problems[:first], merged, *others]


@dataclass(frozen=True)
class FileSet:
    """The files of one model; `origin` is what the user wrote for them, `copy` the entry read in its place, if any.

    `entries`: what other parameters may call them: the entry, or any element of a list of shards.
    """

    origin: str
    paths: tuple[Path, ...]
    entries: tuple[str, ...] = ()
    copy: str | None = None
    home: Path | None = None
    """The folder of the repository that the user named, where a copy is read in its place."""

    @property
    def source(self) -> str:
        """Where the files come from, in words."""
        return f"{self.origin}, read from its copy {self.copy}" if self.copy else self.origin


def download_command(entry: str) -> str:
    """The command that brings the files of an entry."""
    return f"diffsynth download {shlex.quote(entry)}"


def locate(
    path_groups: Sequence[Sequence[str]],
    entries: Sequence[str],
    base: Path,
    copies: Mapping[str, str] | None = None,
    brings: Callable[[str], str] = download_command,
) -> tuple[list[FileSet], list[Problem]]:
    """File sets of `model_paths` and `model_id_with_origin_paths`, and what of them is not there.

    `copies`: file name -> entry that holds the same weights; read when nothing but the copy is there.
    `brings`: entry -> the command that brings its files, for hints.
    """
    file_sets, problems = [], []
    for group in path_groups:
        origin = group[0] if len(group) == 1 else ", ".join(group)
        found = [path for item in group for path in expand_local(item)]
        missing = [item for item in group if not expand_local(item)]
        problems += [
            Problem(f"`model_paths` names `{item}`, which is not there", "correct the path") for item in missing
        ]
        if not missing:
            file_sets.append(FileSet(origin, tuple(found), tuple(group)))
    for entry in entries:
        parts = split_entry(entry)  # a path of one's own stands for that file and for no other
        copy = (copies or {}).get(parts[1].rpartition("/")[2]) if parts else None
        paths = tuple(expand_entry(entry, base))
        copied = tuple(expand_entry(copy, base)) if copy and not paths else ()
        if paths or copied:
            home = (base / parts[0] / parts[1]).parent if parts and copied else None
            file_sets.append(FileSet(entry, paths or copied, (entry,), copy if copied else None, home))
        else:
            problems.append(_nothing_matches(entry, copy, base, brings))
    faults = {file_set.origin: _shard_problems(file_set, brings) for file_set in file_sets}
    problems += [problem for found in faults.values() for problem in found]
    return [file_set for file_set in file_sets if not faults[file_set.origin]], problems


def split_entry(entry: str) -> tuple[str, str] | None:
    """`"owner/name:glob"` -> `("owner/name", "glob")`; None for a local path."""
    model_id, colon, pattern = entry.partition(":")
    return (model_id.strip(), pattern.strip()) if colon and pattern.strip() else None


def expand_entry(entry: str, base: Path) -> list[Path]:
    """The files that an element of `model_id_with_origin_paths` stands for, sorted by name."""
    parts = split_entry(entry)
    if parts is None or expand_local(entry):
        return expand_local(entry)
    model_id, pattern = parts
    folder = base / model_id
    return _glob(folder, pattern) if folder.is_dir() else []


def expand_local(text: str) -> list[Path]:
    """A file, the weight files of a folder, or the matches of a glob."""
    path = _path(text)
    if path.is_file():
        return [path]
    if path.is_dir():
        return sorted(item for item in path.iterdir() if item.suffix in WEIGHT_ENDINGS)
    if any(character in text for character in "*?["):
        anchor = Path(path.anchor or ".")
        return _glob(anchor, str(path.relative_to(path.anchor)))
    return []


def _glob(folder: Path, pattern: str) -> list[Path]:
    """The files that match; none when the pattern is none (pathlib refuses some)."""
    try:
        return sorted(path for path in folder.glob(pattern) if path.is_file())
    except (ValueError, NotImplementedError):
        return []


def _path(text: str) -> Path:
    with suppress(RuntimeError):  # a home folder that is not there
        return Path(text).expanduser()
    return Path(text)


def locate_folder(text: str, base: Path) -> Path | None:
    """A folder named as a path or as `model_id:folder`; None when it is not there."""
    parts = split_entry(text)
    candidates = [_path(text)] + ([base / parts[0] / parts[1]] if parts else [])
    return next((path for path in candidates if path.is_dir()), None)


def _nothing_matches(entry: str, copy: str | None, base: Path, brings: Callable[[str], str]) -> Problem:
    parts = split_entry(entry)
    if parts is None:
        return Problem(
            f"`model_id_with_origin_paths`: nothing matches `{entry}`", "correct the path, or write `model_id:file`"
        )
    nor = f", nor its copy `{copy}`" if copy else ""
    command = brings(entry)
    return MissingFiles(
        f"`model_id_with_origin_paths`: nothing matches `{entry}`{nor} below `{base}`",
        f"fetch it with `{command}`, set DIFFSYNTH_MODEL_BASE_PATH to where it is, or rehearse with `--rehearse`",
        entry=entry,
        command=command,
    )


def _shard_problems(file_set: FileSet, brings: Callable[[str], str]) -> list[Problem]:
    """Shards that the names of the others promise and that are not among the files."""
    missing = absent_shards(path.name for path in file_set.paths)
    if not missing:
        return []
    what = f"`{file_set.origin}`: {len(missing)} shards are missing, the first is `{missing[0]}`"
    if file_set.copy or file_set.origin not in file_set.entries or split_entry(file_set.origin) is None:
        return [Problem(what, "fetch them, or mend the glob")]
    command = brings(file_set.origin)
    hint = f"fetch them with `{command}`, or mend the glob"
    return [MissingFiles(what, hint, entry=file_set.origin, command=command)]
