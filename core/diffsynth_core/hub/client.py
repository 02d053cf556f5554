"""What is asked of a hub, whichever it is: the files of a repository, and the bytes of one from a place on.

Both SDKs could fetch files themselves. They are asked for lists, addresses, credentials and open streams only, because
`huggingface_hub` (2.4) throws away what it has of a file when it is stopped and compares no hash, and `modelscope_hub`
(0.5) draws bars of its own, tells nobody else how far it is, and gives up on a file after an hour. What is done with
the bytes stands in `fetching`, once for both.
"""

import hashlib
import logging
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from diffsynth_core.errors import DiffSynthError, FaultsFound, Problem

if TYPE_CHECKING:
    from hashlib import _Hash

SOURCE_VARIABLE = "DIFFSYNTH_DOWNLOAD_SOURCE"
SKIP_VARIABLE = "DIFFSYNTH_SKIP_DOWNLOAD"
HUBS = {
    "modelscope": ("diffsynth_core.hub.modelscope", "ModelScope"),
    "huggingface": ("diffsynth_core.hub.huggingface", "HuggingFace"),
}
"""Name of a hub -> module and class; the first is asked where none is named."""
UNSET = ("", "0", "false", "no", "off")
"""Values of a switch in the environment that leave it off."""


@dataclass(frozen=True)
class Repository:
    """A model or a dataset on a hub; `name` is `owner/name`."""

    kind: Literal["model", "dataset"]
    name: str

    def folder(self, base: Path) -> Path:
        """Where its files lie: models below the folder of all models, a dataset in the folder named for it."""
        return base / self.name if self.kind == "model" else base


@dataclass(frozen=True)
class Checksum:
    """What a hub says that the bytes of a file sum up to.

    `kind`: `sha256` of the bytes, or `git`: the id of the blob in git, sha1 of a header with the size and the bytes.
    """

    kind: Literal["sha256", "git"]
    hexdigest: str

    def start(self, size: int) -> "_Hash":
        """A hash to put the bytes of a file of `size` bytes into."""
        if self.kind == "sha256":
            return hashlib.sha256()
        return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository: its path there, its size in bytes, and what its bytes sum up to where that is known."""

    path: str
    size: int
    checksum: Checksum | None

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ValueError(f"a size of {self.size} bytes")


class TransientHubError(Exception):
    """A transfer broke in a way that another attempt may fix; the text says how."""


class HubAccessError(DiffSynthError):
    """A hub does not have what is asked for, or does not give it to this user."""


class Hub(Protocol):
    """A hub; all errors are `HubAccessError`, which is final, or `TransientHubError`."""

    title: str
    login: str
    """The command that keeps a token."""
    another: str
    """How a user asks another hub instead, for hints."""

    def page(self, repository: Repository) -> str:
        """The address of a repository for people."""

    def files(self, repository: Repository) -> list[RemoteFile]:
        """All files of a repository."""

    def read(
        self, repository: Repository, file: RemoteFile, start: int
    ) -> AbstractContextManager[tuple[int, Iterator[bytes]]]:
        """The bytes of a file from `start` on, or from the beginning: gives where they begin, and the bytes."""


def download_source(given: str | None) -> str:
    """The hub to ask: the one given, else `$DIFFSYNTH_DOWNLOAD_SOURCE`, else ModelScope.

    Raises:
        DiffSynthError: when there is no hub of that name.
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
    """The hub to ask, as of `download_source`; imports its SDK, and opens no connection.

    Another one is offered in the way in which this one was chosen.
    """
    source = download_source(given)
    module, name = HUBS[source]
    other = next(known for known in HUBS if known != source)
    way = f"--source {other}" if given else f"{SOURCE_VARIABLE}={other}"
    hub: Hub = getattr(import_module(module), name)(f"use another hub with `{way}`")
    return hub


def downloads_disabled() -> bool:
    """Whether `$DIFFSYNTH_SKIP_DOWNLOAD` forbids to ask a hub."""
    return os.environ.get(SKIP_VARIABLE, "").strip().lower() not in UNSET


def not_found(hub: Hub, repository: Repository, path: str | None = None) -> HubAccessError:
    """The error that a hub has no such repository, as far as this user sees, or no such file in it."""
    if path:
        what = f"{hub.title} has no file `{path}` in `{repository.name}`"
    else:
        what = f"{hub.title} has no {repository.kind} `{repository.name}` that you have access to"
    private = "" if path else f" log in with `{hub.login}` if it is private,"
    return HubAccessError(what, f"check {hub.page(repository)},{private} or {hub.another}")


def access_denied(hub: Hub, repository: Repository) -> HubAccessError:
    """The error that a hub does not let this user read a repository."""
    return HubAccessError(
        f"{hub.title} denied access to `{repository.name}`: its licence is not accepted, or it is private",
        f"accept the licence at {hub.page(repository)}, and log in with `{hub.login}`",
    )


@contextmanager
def parsing_response() -> Iterator[None]:
    """Around the reading of a list by an SDK, which trusts its form: an answer that is none becomes an interruption.

    A proxy, or a page to log in at, may answer in the place of the hub.
    """
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise TransientHubError("unexpected response") from error


def silence(sdk: str, unless: str) -> None:
    """Keep the log lines of an SDK (each page of a list, each new try) from stderr: what they lead to is told by us.

    `unless`: the variable in which a user asks the SDK for its log.
    """
    if unless not in os.environ:
        logging.getLogger(sdk).setLevel(logging.CRITICAL)


def status_error(status: int) -> TransientHubError:
    """The interruption that a hub answered with an HTTP status."""
    return TransientHubError(f"the hub responded with status {status}")
