"""The interface of a hub: list the files of a repository, and read the bytes of one from an offset.

The SDKs could download files themselves. They are used only for file lists, addresses, credentials and open streams:
`huggingface_hub` (2.4) discards the received bytes of a file when it is stopped and compares no hash; `modelscope_hub`
(0.5) draws its own progress bars, reports progress to no one else, and gives up on a file after an hour. `fetching`
does the rest, once for both.
"""

import hashlib
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from diffsynth_core.errors import DiffSynthError, FaultsFound, Problem
from diffsynth_core.hub.model_folder import model_folder

if TYPE_CHECKING:
    from hashlib import _Hash

SOURCE_VARIABLE = "DIFFSYNTH_DOWNLOAD_SOURCE"
"""Environment variable that selects a hub."""
SKIP_VARIABLE = "DIFFSYNTH_SKIP_DOWNLOAD"
"""Environment variable that disables downloads."""
HUBS = {
    "modelscope": ("diffsynth_core.hub.modelscope", "ModelScope"),
    "huggingface": ("diffsynth_core.hub.huggingface", "HuggingFace"),
}
"""Name of a hub -> module and class; the first is the default."""
UNSET = ("", "0", "false", "no", "off")
"""Values of a boolean environment variable that mean false."""


@dataclass(frozen=True)
class Repository:
    """A model or dataset on a hub; `name` is `owner/name`."""

    kind: Literal["model", "dataset"]
    name: str

    @property
    def owner(self) -> str:
        """The user or organization that it belongs to."""
        return self.name.partition("/")[0]

    def folder(self, base: Path) -> Path:
        """Return the local folder of the repository: that of the model, usually below `base`; `base` for a dataset."""
        return model_folder(self.name, base) if self.kind == "model" else base


@dataclass(frozen=True)
class Checksum:
    """The checksum of a file according to a hub.

    Attributes:
        kind: `sha256` of the bytes, or `git`: the blob id, sha1 of a header with the size followed by the bytes.
    """

    kind: Literal["sha256", "git"]
    hexdigest: str

    def start(self, size: int) -> "_Hash":
        """Return a hash object for the bytes of a file of `size` bytes."""
        if self.kind == "sha256":
            return hashlib.sha256()
        return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository: its path there, its size in bytes, and its checksum if known."""

    path: str
    size: int
    checksum: Checksum | None

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ValueError(f"a size of {self.size} bytes")


class TransientHubError(Exception):
    """A transfer failed in a way that a retry may fix; the message is the reason."""


class HubAccessError(DiffSynthError):
    """A hub does not have what is requested, or denies this user access to it."""


class Hub(Protocol):
    """A hub. Methods raise `HubAccessError`, which is final, or `TransientHubError`."""

    title: str
    """Name for messages."""
    login: str
    """The command that stores a token."""
    another: str
    """How to use another hub instead, for hints."""

    def page(self, repository: Repository) -> str:
        """Return the URL of the web page of a repository."""

    def files(self, repository: Repository) -> list[RemoteFile]:
        """Return all files of a repository."""

    def read(
        self, repository: Repository, file: RemoteFile, start: int
    ) -> AbstractContextManager[tuple[int, Iterator[bytes]]]:
        """Open the bytes of a file from `start`, or from 0 if the hub does not support ranges.

        Yields the offset of the first byte, and an iterator of chunks.
        """

    def check_account(self, repository: Repository) -> None:
        """Check that there is a token, and as far as the hub says, that it may write to repositories of this owner."""

    def create(self, repository: Repository, private: bool) -> None:
        """Create a model repository unless it exists; one that exists and is public is refused if `private`."""

    def commit(self, repository: Repository, files: Mapping[str, Path | bytes], message: str) -> None:
        """Add files to a model repository in one commit: path there -> the file or its content."""

    def upload_command(self, repository: Repository, path: Path) -> str:
        """Return the command of the SDK that uploads a file."""


def download_source(given: str | None) -> str:
    """Return the name of the hub to use: the given one, `$DIFFSYNTH_DOWNLOAD_SOURCE`, or ModelScope.

    Raises:
        DiffSynthError: if there is no hub of that name.
    """
    source = (given or os.environ.get(SOURCE_VARIABLE) or next(iter(HUBS))).lower()
    if source not in HUBS:
        where = "`source`" if given else f"`{SOURCE_VARIABLE}`"
        wrong = Problem(
            f"{where} is `{source}`, which is not a known hub", f"use one of {', '.join(HUBS)}", wrong_use=True
        )
        raise FaultsFound([wrong])
    return source


def open_hub(given: str | None) -> Hub:
    """Return the hub to use, chosen as by `download_source`; imports its SDK but opens no connection.

    Hints suggest the other hub in the same way in which this one was chosen: with a flag or the environment variable.
    """
    source = download_source(given)
    module, name = HUBS[source]
    other = next(known for known in HUBS if known != source)
    way = f"--source {other}" if given else f"{SOURCE_VARIABLE}={other}"
    hub: Hub = getattr(import_module(module), name)(f"use another hub with `{way}`")
    return hub


def downloads_disabled() -> bool:
    """Return whether `$DIFFSYNTH_SKIP_DOWNLOAD` forbids access to hubs."""
    return os.environ.get(SKIP_VARIABLE, "").strip().lower() not in UNSET


def not_found(hub: Hub, repository: Repository, path: str | None = None) -> HubAccessError:
    """Return the error for a repository that is missing or hidden from this user, or for a missing file in it."""
    if path:
        what = f"{hub.title} has no file `{path}` in `{repository.name}`"
    else:
        what = f"{hub.title} has no {repository.kind} `{repository.name}` that you have access to"
    private = "" if path else f" log in with `{hub.login}` if it is private,"
    return HubAccessError(what, f"check {hub.page(repository)},{private} or {hub.another}")


def access_denied(hub: Hub, repository: Repository) -> HubAccessError:
    """Return the error for a repository that this user may not read."""
    return HubAccessError(
        f"{hub.title} denied access to `{repository.name}`: its license is not accepted, or it is private",
        f"accept the license at {hub.page(repository)}, and log in with `{hub.login}`",
    )


def no_token(hub: Hub) -> HubAccessError:
    """Return the error for a user who is not logged in, or whose token is not valid."""
    return HubAccessError(
        f"{hub.title} has no valid token of yours, which an upload needs", f"log in with `{hub.login}`"
    )


def write_denied(hub: Hub, repository: Repository, reason: str = "") -> HubAccessError:
    """Return the error for a repository that this user may not create or write to."""
    what = f"{hub.title} does not let you write to `{repository.name}`{reason}"
    return HubAccessError(what, f"check the owner, or log in with a token that may write: `{hub.login}`")


def is_public(hub: Hub, repository: Repository) -> HubAccessError:
    """Return the error for a repository that everybody can read."""
    what = f"`{repository.name}` on {hub.title} is public"
    return HubAccessError(what, "pass `--hub_public` to upload to it all the same, or choose another repository")


@contextmanager
def parsing_response() -> Iterator[None]:
    """Convert errors of parsing a response into `TransientHubError`: the SDKs trust its structure.

    A proxy or a login page may answer instead of the hub.
    """
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise TransientHubError("unexpected response") from error


def silence(sdk: str, unless: str) -> None:
    """Keep the log messages of an SDK (each page of a list, each retry) off stderr: diffsynth reports their
    consequences.

    Args:
        unless: environment variable with which a user requests the log of the SDK.
    """
    if unless not in os.environ:
        logging.getLogger(sdk).setLevel(logging.CRITICAL)


def status_error(status: int) -> TransientHubError:
    """Return the transient error for an HTTP status."""
    return TransientHubError(f"the hub responded with status {status}")
