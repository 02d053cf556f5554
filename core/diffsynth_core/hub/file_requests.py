"""What a run or a command wants of the hubs, and whether it is on disk. No connection is opened here."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from diffsynth_core.files import missing_shards
from diffsynth_core.hub.client import Repository


@dataclass(frozen=True)
class RepoFiles:
    """Files of one repository: those that match one of `patterns`, as `Path.glob` has them (`*` stops at `/`).

    `layouts`: sets of paths of which one must be whole; blank: every pattern must match something.
    `anywhere`: a `*` matches `/` too, as it does in the hubs' own commands.
    """

    repository: Repository
    patterns: tuple[str, ...]
    layouts: tuple[tuple[str, ...], ...] = ()
    anywhere: bool = False

    def choose(self, paths: Iterable[str]) -> list[str]:
        """Those of the paths that are meant."""
        return [path for path in paths if any(self._matches(path, pattern) for pattern in self.patterns)]

    def is_complete(self, paths: Collection[str]) -> bool:
        """Whether files with these paths in the repository are all that is wanted, as far as names tell."""
        if self.layouts:
            return any(set(layout) <= set(paths) for layout in self.layouts)
        found = [self._chosen_by(pattern, paths) for pattern in self.patterns]
        return all(found) and not any(missing_shards(chosen) for chosen in found)

    def unmatched(self, paths: Collection[str]) -> list[str]:
        """The patterns that none of the paths match."""
        return [pattern for pattern in self.patterns if not self._chosen_by(pattern, paths)]

    def _chosen_by(self, pattern: str, paths: Iterable[str]) -> list[str]:
        return [path for path in paths if self._matches(path, pattern)]

    def _matches(self, path: str, pattern: str) -> bool:
        return fnmatchcase(path, pattern) if self.anywhere else _matches(path.split("/"), pattern.split("/"))

    def __str__(self) -> str:
        return f"{self.repository.name}:{self.patterns[0]}"


@dataclass(frozen=True)
class FileRequest:
    """Files that something cannot do without, in the first of `sources` that has them.

    `optional`: they come along where the hub has them, and nobody misses them elsewhere.
    """

    sources: tuple[RepoFiles, ...]
    optional: bool = False

    def __str__(self) -> str:
        return str(self.sources[0])

    def is_on_disk(self, base: Path) -> bool:
        """Whether they are on disk, as far as names tell, below `base`."""
        return self.source_on_disk(base) is not None

    def source_on_disk(self, base: Path) -> RepoFiles | None:
        """The first place that is on disk."""
        return next(
            (place for place in self.sources if place.is_complete(paths_below(place.repository.folder(base)))), None
        )


def absent(wanted: Iterable[FileRequest], base: Path) -> list[FileRequest]:
    """What of the wanted files is not on disk, as far as names tell, below the folder of downloaded models."""
    return [item for item in wanted if not item.optional and not item.is_on_disk(base)]


def paths_below(folder: Path) -> list[str]:
    """Paths of the files below a folder, relative to it, hidden ones left out; none where there is no folder."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(path.as_posix() for path in found if not any(part.startswith(".") for part in path.parts))


def _matches(parts: list[str], pattern: list[str]) -> bool:
    """Whether a path matches a glob, part by part; `**` stands for any number of folders."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_matches(parts[depth:], pattern[1:] or ["*"]) for depth in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])
