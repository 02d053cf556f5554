"""Plan of a download: the files, their sizes, what is already on disk, and the disk space for the rest."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal
from unicodedata import category

from diffsynth_core.errors import DiffSynthError, Problem, list_names, raise_if_any
from diffsynth_core.files import free_bytes
from diffsynth_core.hub.client import Hub, HubAccessError, RemoteFile, Repository, TransientHubError
from diffsynth_core.hub.file_requests import FileRequest, RepoFiles, paths_below
from diffsynth_core.hub.identity import HashCache
from diffsynth_core.progress import format_bytes

LOCK = ".download.lock"
"""Name of the lock file of the process that downloads into a base folder."""
PART_NAME = re.compile(r"\.(?P<name>.+)\.[0-9a-f]+\.part")
"""Name of the file that holds the bytes of `name` until it is complete."""
State = Literal["here", "unchecked", "incomplete", "damaged", "missing"]
"""What is on disk of a file; see `ListedFile`."""


@dataclass(frozen=True)
class ListedFile:
    """A file to download, its local path, and the number of its bytes on disk.

    States: `here`: complete. `unchecked`: on disk, but the hub offers nothing to compare it with. `incomplete`: can be
    resumed. `damaged`: longer than on the hub, with another hash, or a link to an incomplete file; none of it is used.
    `missing`.
    """

    repository: Repository
    file: RemoteFile
    target: Path
    state: State
    bytes_here: int

    @property
    def missing_bytes(self) -> int:
        """Bytes left to download."""
        return self.file.size - self.bytes_here

    @property
    def part(self) -> Path:
        """Path of the partial file, which matches `PART_NAME`.

        It contains the checksum, so that a partial file of an older version on the hub is not resumed.
        """
        tag = self.file.checksum.hexdigest[:12] if self.file.checksum else self.file.size
        return self.target.with_name(f".{self.target.name}.{tag}.part")


@dataclass(frozen=True)
class DownloadPlan:
    """All files of a download below `base`.

    Attributes:
        hub: title of the hub.
        free_bytes: free bytes of the disk.
        refusals: why the hub provides no file list for the files in state `unchecked`.
    """

    hub: str
    base: Path
    files: tuple[ListedFile, ...]
    free_bytes: int
    refusals: tuple[str, ...] = ()

    @property
    def to_fetch(self) -> tuple[ListedFile, ...]:
        """Files to download or to resume."""
        return tuple(listed for listed in self.files if listed.state not in ("here", "unchecked"))

    @property
    def missing_bytes(self) -> int:
        """Bytes left to download, of all files."""
        return sum(listed.missing_bytes for listed in self.to_fetch)

    def check_disk(self) -> None:
        """Check that the missing bytes fit on the disk.

        Raises:
            DiffSynthError: if they do not.
        """
        if self.missing_bytes > self.free_bytes:
            raise DiffSynthError(
                f"not enough disk space: {format_bytes(self.missing_bytes)} to download, {format_bytes(self.free_bytes)} free at "
                f"`{self.base}`",
                "free some space, or choose a folder on another disk",
            )


def plan_download(requests: Iterable[FileRequest], hub: Hub, base: Path, identities: HashCache) -> DownloadPlan:
    """Get the file lists from the hub and compare them with the disk: sizes, and hashes as far as they are cached.

    Raises:
        FaultsFound: everything that the hub lacks or denies.
        DiffSynthError: if the hub cannot be reached.
    """
    lists = _FileLists(hub)
    files: dict[Path, ListedFile] = {}
    problems: list[Problem] = []
    refusals: list[str] = []
    for item in requests:
        try:
            found = _find(item, lists, base)
        except HubAccessError as error:
            problems += [] if item.optional else error.problems
            continue
        if found.refusal and not item.optional:
            refusals.append(found.refusal)
        for file in found.files:
            target = found.repository.folder(base) / file.path
            if problem := _name_problem(found.repository, file) or _blocked(target, base):
                problems.append(problem)
            elif found.refusal:
                files[target] = ListedFile(found.repository, file, target, "unchecked", file.size)
            else:
                files[target] = _listed(found.repository, file, target, identities)
    raise_if_any(problems)
    ordered = sorted(files.values(), key=lambda listed: (listed.repository.name, listed.file.path))
    return DownloadPlan(hub.title, base, tuple(ordered), free_bytes(base), tuple(dict.fromkeys(refusals)))


def compared(plan: DownloadPlan, identities: HashCache) -> DownloadPlan:
    """Return the plan, compared again with hashes that have become known since."""
    files = (
        listed if listed.state == "unchecked" else _listed(listed.repository, listed.file, listed.target, identities)
        for listed in plan.files
    )
    return replace(plan, files=tuple(files))


class _FileLists:
    """File lists of repositories, each requested once."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self._known: dict[Repository, list[RemoteFile] | HubAccessError] = {}

    def files(self, repository: Repository) -> list[RemoteFile]:
        if repository not in self._known:
            try:
                self._known[repository] = self.hub.files(repository)
            except HubAccessError as error:
                self._known[repository] = error
            except TransientHubError as error:
                raise DiffSynthError(
                    f"cannot get the file list of `{repository.name}` from {self.hub.title}: {error}",
                    f"check the connection to {self.hub.page(repository)}, or {self.hub.another}",
                ) from error
        known = self._known[repository]
        if isinstance(known, HubAccessError):
            raise known
        return known


@dataclass(frozen=True)
class _Found:
    """The repository that serves a request, and the files.

    Attributes:
        refusal: why the files are those on disk: the hub provides no list of them.
    """

    repository: Repository
    files: list[RemoteFile]
    refusal: str | None = None


def _find(item: FileRequest, lists: _FileLists, base: Path) -> _Found:
    """Return the source that is on disk, or the first one on the hub.

    A model that is on disk but not on the hub is used as it is; for a dataset only the hub knows the complete list.
    """
    local = item.source_on_disk(base)
    if local and local.repository.kind == "model":
        try:
            return _Found(local.repository, _chosen(local, lists))
        except HubAccessError as error:
            return _Found(local.repository, _on_disk(local, base), error.problems[0].message)
    refusals = []
    for source in item.sources:
        try:
            return _Found(source.repository, _chosen(source, lists))
        except HubAccessError as error:
            refusals.append(error)
    raise refusals[0]


def _chosen(source: RepoFiles, lists: _FileLists) -> list[RemoteFile]:
    """Return the files of a source on the hub.

    Raises:
        HubAccessError: if there are none, or not all.
    """
    files = lists.files(source.repository)
    paths = [file.path for file in files]
    if not source.is_complete(paths):
        raise _nothing_matches(source, paths, lists.hub)
    chosen = set(source.choose(paths))
    return [file for file in files if file.path in chosen]


def _nothing_matches(source: RepoFiles, paths: Sequence[str], hub: Hub) -> HubAccessError:
    folders = sorted({f"{path.split('/')[0]}/" if "/" in path else path for path in paths})
    without = [f"{source.repository.name}:{pattern}" for pattern in source.unmatched(paths)]
    nothing = f"no file that matches {list_names(without)}" if without else f"no complete file that matches `{source}`"
    return HubAccessError(
        f"{hub.title} has {nothing}; it has {list_names(folders) or 'no files'}",
        f"check {hub.page(source.repository)}",
    )


def _on_disk(source: RepoFiles, base: Path) -> list[RemoteFile]:
    folder = source.repository.folder(base)
    return [RemoteFile(path, (folder / path).stat().st_size, None) for path in source.choose(paths_below(folder))]


def _name_problem(repository: Repository, file: RemoteFile) -> Problem | None:
    """Reject a path that leaves the folder of the repository, contains control characters, or is reserved for
    downloads.

    The names come from the hub, and may be hostile to the file system or the terminal.
    """
    parts = file.path.split("/")
    hint = "choose other files, or report it to the owner"
    if ".." in parts or file.path.startswith("/"):
        return Problem(f"`{repository.name}` has a file {file.path!r}, which points outside its folder", hint)
    unfit = not {"", "."}.isdisjoint(parts) or any(category(character) in ("Cc", "Cs") for character in file.path)
    if unfit or parts[-1] == LOCK or PART_NAME.fullmatch(parts[-1]):
        return Problem(f"`{repository.name}` has a file {file.path!r}, which is not an allowed file name", hint)
    return None


def _blocked(target: Path, base: Path) -> Problem | None:
    """Return the problem of a folder at the path of a file, or of a file at the path of one of its folders."""
    if target.is_dir():
        return Problem(
            f"`{target}` is a folder, but a file is to be written there", "move it elsewhere, or choose another folder"
        )
    above = (folder for folder in target.parents if folder.is_relative_to(base))
    if file := next((folder for folder in above if folder.exists() and not folder.is_dir()), None):
        return Problem(
            f"`{file}` is a file, but a folder is to be created there", "move it elsewhere, or choose another folder"
        )
    return None


def _listed(repository: Repository, file: RemoteFile, target: Path, identities: HashCache) -> ListedFile:
    """Return a file with its state on disk."""
    missing = ListedFile(repository, file, target, "missing", 0)
    size = target.stat().st_size if target.is_file() else None
    part = missing.part.stat().st_size if missing.part.is_file() else 0
    if size == file.size and not _has_other_bytes(target, file, identities):
        return ListedFile(repository, file, target, "here", file.size)
    resumable = resumable_bytes(target)
    kept = max(part if part <= file.size else 0, resumable if resumable < file.size else 0)
    state: State = "incomplete" if kept else "missing" if size is None else "damaged"
    return ListedFile(repository, file, target, state, kept)


def resumable_bytes(target: Path) -> int:
    """Return the bytes of an incomplete file under its final name that a download may resume from.

    None of a link, and none of a file with a second hard link: appending would change a file that others read.
    """
    if not target.is_file() or target.is_symlink():
        return 0
    status = target.stat()
    return status.st_size if status.st_nlink == 1 else 0


def _has_other_bytes(target: Path, file: RemoteFile, identities: HashCache) -> bool:
    """Return whether the cached hash of a file differs from the hub's; False if it was never hashed."""
    known = identities.known(target)
    if file.checksum is None or known is None:
        return False
    if file.checksum.kind == "git":  # only small files, outside Git LFS, have this kind
        digest = file.checksum.start(file.size)
        digest.update(target.read_bytes())
        known = digest.hexdigest()
    return known != file.checksum.hexdigest
