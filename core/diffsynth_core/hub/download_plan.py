"""What a download will do: the files, their sizes, what of them is here, and whether the rest fits on the disk."""

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
"""The file below a base that the process which downloads there holds."""
PART_NAME = re.compile(r"\.(?P<name>.+)\.[0-9a-f]+\.part")
"""What the bytes of a file `name` are kept in until all are here."""
State = Literal["here", "unchecked", "incomplete", "damaged", "missing"]


@dataclass(frozen=True)
class ListedFile:
    """A file to have, where it belongs, and how much of it is here, in bytes.

    `damaged`: a file of that name is here, and it is longer, has other bytes, or is a link to a beginning; nothing of
    it is used.
    `unchecked`: a file is here, and the hub tells nothing to compare it with.
    """

    repository: Repository
    file: RemoteFile
    target: Path
    state: State
    bytes_here: int

    @property
    def missing_bytes(self) -> int:
        return self.file.size - self.bytes_here

    @property
    def part(self) -> Path:
        """Where its bytes are kept until all are here; a file that the hub has changed since has another.

        Its name is one that `PART_NAME` matches.
        """
        tag = self.file.checksum.hexdigest[:12] if self.file.checksum else self.file.size
        return self.target.with_name(f".{self.target.name}.{tag}.part")


@dataclass(frozen=True)
class DownloadPlan:
    """All files of a download below `base`, the hub's title, and the free bytes of the disk.

    `refusals`: why the hub tells nothing of the files that are unchecked.
    """

    hub: str
    base: Path
    files: tuple[ListedFile, ...]
    free_bytes: int
    refusals: tuple[str, ...] = ()

    @property
    def to_fetch(self) -> tuple[ListedFile, ...]:
        return tuple(listed for listed in self.files if listed.state not in ("here", "unchecked"))

    @property
    def missing_bytes(self) -> int:
        return sum(listed.missing_bytes for listed in self.to_fetch)

    def check_disk(self) -> None:
        """Raises: DiffSynthError: when what is missing does not fit on the disk."""
        if self.missing_bytes > self.free_bytes:
            raise DiffSynthError(
                f"not enough disk space: {format_bytes(self.missing_bytes)} to download, {format_bytes(self.free_bytes)} free at "
                f"`{self.base}`",
                "free some space, or choose a folder on another disk",
            )


def plan_download(wanted: Iterable[FileRequest], hub: Hub, base: Path, identities: HashCache) -> DownloadPlan:
    """Ask the hub for the files of what is wanted, and compare sizes with what is here, and hashes as far as known.

    Raises:
        FaultsFound: all that the hub does not have, or does not give.
        DiffSynthError: when the hub cannot be reached.
    """
    lists = _Lists(hub)
    files: dict[Path, ListedFile] = {}
    problems: list[Problem] = []
    refusals: list[str] = []
    for item in wanted:
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
    """A plan again, with hashes that have become known since."""
    files = (
        listed if listed.state == "unchecked" else _listed(listed.repository, listed.file, listed.target, identities)
        for listed in plan.files
    )
    return replace(plan, files=tuple(files))


class _Lists:
    """The files of repositories, each asked for once."""

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
    """The repository that what is wanted comes from, and the files.

    `refusal`: why the files are those on disk: the hub has no list of them.
    """

    repository: Repository
    files: list[RemoteFile]
    refusal: str | None = None


def _find(item: FileRequest, lists: _Lists, base: Path) -> _Found:
    """The place that is on disk, else the first on the hub.

    A model that is on disk and not on the hub is taken as it is; of a dataset the hub alone knows the files.
    """
    here = item.source_on_disk(base)
    if here and here.repository.kind == "model":
        try:
            return _Found(here.repository, _chosen(here, lists))
        except HubAccessError as error:
            return _Found(here.repository, _on_disk(here, base), error.problems[0].message)
    refusals = []
    for place in item.sources:
        try:
            return _Found(place.repository, _chosen(place, lists))
        except HubAccessError as error:
            refusals.append(error)
    raise refusals[0]


def _chosen(place: RepoFiles, lists: _Lists) -> list[RemoteFile]:
    """The files of a place on the hub.

    Raises:
        HubAccessError: when there are none, or not all.
    """
    files = lists.files(place.repository)
    paths = [file.path for file in files]
    if not place.is_complete(paths):
        raise _nothing_matches(place, paths, lists.hub)
    chosen = set(place.choose(paths))
    return [file for file in files if file.path in chosen]


def _nothing_matches(place: RepoFiles, paths: Sequence[str], hub: Hub) -> HubAccessError:
    folders = sorted({f"{path.split('/')[0]}/" if "/" in path else path for path in paths})
    without = [f"{place.repository.name}:{pattern}" for pattern in place.unmatched(paths)]
    nothing = f"no file that matches {list_names(without)}" if without else f"no complete file that matches `{place}`"
    return HubAccessError(
        f"{hub.title} has {nothing}; it has {list_names(folders) or 'no files'}",
        f"check {hub.page(place.repository)}",
    )


def _on_disk(place: RepoFiles, base: Path) -> list[RemoteFile]:
    folder = place.repository.folder(base)
    return [RemoteFile(path, (folder / path).stat().st_size, None) for path in place.choose(paths_below(folder))]


def _name_problem(repository: Repository, file: RemoteFile) -> Problem | None:
    """A hub does not choose a place outside the folder of the repository, nor a name that a terminal obeys or that
    downloads need for themselves."""
    parts = file.path.split("/")
    hint = "choose other files, or report it to the owner"
    if ".." in parts or file.path.startswith("/"):
        return Problem(f"`{repository.name}` has a file {file.path!r}, which points outside its folder", hint)
    unfit = not {"", "."}.isdisjoint(parts) or any(category(character) in ("Cc", "Cs") for character in file.path)
    if unfit or parts[-1] == LOCK or PART_NAME.fullmatch(parts[-1]):
        return Problem(f"`{repository.name}` has a file {file.path!r}, which is not an allowed file name", hint)
    return None


def _blocked(target: Path, base: Path) -> Problem | None:
    """A folder where a file belongs, or a file where one of its folders does."""
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
    """A file with how much of it is here: whole, cut short, in its part, or not at all."""
    missing = ListedFile(repository, file, target, "missing", 0)
    size = target.stat().st_size if target.is_file() else None
    part = missing.part.stat().st_size if missing.part.is_file() else 0
    if size == file.size and not _has_other_bytes(target, file, identities):
        return ListedFile(repository, file, target, "here", file.size)
    begun = resumable_bytes(target)
    kept = max(part if part <= file.size else 0, begun if begun < file.size else 0)
    state: State = "incomplete" if kept else "missing" if size is None else "damaged"
    return ListedFile(repository, file, target, state, kept)


def resumable_bytes(target: Path) -> int:
    """Bytes of a file under its final name that a download may go on from: none of a link, nor of a file with a second
    name, which others read."""
    if not target.is_file() or target.is_symlink():
        return 0
    status = target.stat()
    return status.st_size if status.st_nlink == 1 else 0


def _has_other_bytes(target: Path, file: RemoteFile, identities: HashCache) -> bool:
    """Whether a file that was read once has other bytes than the hub says; of one never read it is not known."""
    known = identities.known(target)
    if file.checksum is None or known is None:
        return False
    if file.checksum.kind == "git":  # of small files only: those outside of Git LFS
        digest = file.checksum.start(file.size)
        digest.update(target.read_bytes())
        known = digest.hexdigest()
    return known != file.checksum.hexdigest
