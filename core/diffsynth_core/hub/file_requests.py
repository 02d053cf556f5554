"""Files that a run or command requires from hubs, and whether they are on disk. Opens no connection."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from diffsynth_core.files import missing_shards
from diffsynth_core.hub.client import Repository


@dataclass(frozen=True)
class RepoFiles:
    """Files of one repository that match one of `patterns`, with `*` not matching `/`, as in `Path.glob`.

    Attributes:
        layouts: alternative sets of paths, one of which must be complete; if empty, every pattern must match.
        anywhere: let `*` match `/` too, as in the hubs' own command-line tools.
    """

    repository: Repository
    patterns: tuple[str, ...]
    layouts: tuple[tuple[str, ...], ...] = ()
    anywhere: bool = False

    def choose(self, paths: Iterable[str]) -> list[str]:
        """Return the paths that match."""
        return [path for path in paths if any(self._matches(path, pattern) for pattern in self.patterns)]

    def is_complete(self, paths: Collection[str]) -> bool:
        """Return whether `paths` in the repository include everything required, judged by their names."""
        if self.layouts:
            return any(set(layout) <= set(paths) for layout in self.layouts)
        found = [self._matches_of(pattern, paths) for pattern in self.patterns]
        return all(found) and not any(missing_shards(chosen) for chosen in found)

    def unmatched(self, paths: Collection[str]) -> list[str]:
        """Return the patterns that match none of the paths."""
        return [pattern for pattern in self.patterns if not self._matches_of(pattern, paths)]

    def _matches_of(self, pattern: str, paths: Iterable[str]) -> list[str]:
        return [path for path in paths if self._matches(path, pattern)]

    def _matches(self, path: str, pattern: str) -> bool:
        return fnmatchcase(path, pattern) if self.anywhere else _matches(path.split("/"), pattern.split("/"))

    def __str__(self) -> str:
        return f"{self.repository.name}:{self.patterns[0]}"


@dataclass(frozen=True)
class FileRequest:
    """Required files, from the first of `sources` that has them.

    Attributes:
        optional: download the files if the hub has them, without requiring them.
    """

    sources: tuple[RepoFiles, ...]
    optional: bool = False

    def __str__(self) -> str:
        return str(self.sources[0])

    def is_on_disk(self, base: Path) -> bool:
        """Return whether the files are on disk below `base`, judged by their names."""
        return self.source_on_disk(base) is not None

    def source_on_disk(self, base: Path) -> RepoFiles | None:
        """Return the first source whose files are on disk."""
        return next(
            (source for source in self.sources if source.is_complete(paths_below(source.repository.folder(base)))), None
        )


def absent(requests: Iterable[FileRequest], base: Path) -> list[FileRequest]:
    """Return the required files that are not on disk below `base`, judged by their names."""
    return [item for item in requests if not item.optional and not item.is_on_disk(base)]


def paths_below(folder: Path) -> list[str]:
    """Return the relative paths of the files below a folder, without hidden ones; empty if there is no folder."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(path.as_posix() for path in found if not any(part.startswith(".") for part in path.parts))


def _matches(parts: list[str], pattern: list[str]) -> bool:
    """Return whether a path matches a glob, part by part; `**` matches any number of folders."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_matches(parts[depth:], pattern[1:] or ["*"]) for depth in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])
