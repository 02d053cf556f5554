"""ModelScope, through its SDK `modelscope_hub`, which imports no torch, in contrast to `modelscope.hub`."""

import base64
import hashlib
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from json import JSONDecodeError
from pathlib import Path

from modelscope_hub import HubApi
from modelscope_hub.constants import Visibility
from modelscope_hub.errors import (
    APIError,
    AuthenticationError,
    HubError,
    InvalidParameter,
    NotExistError,
    PermissionDeniedError,
)

from diffsynth_core.hub.client import (
    Checksum,
    Hub,
    RemoteFile,
    Repository,
    TransientHubError,
    access_denied,
    is_public,
    no_token,
    not_found,
    parsing_response,
    silence,
    status_error,
    write_denied,
)
from diffsynth_core.hub.ranges import CHUNK_BYTES, chunks_within, first_byte, range_headers

REVISION = "master"
"""Branch that files are downloaded from."""


class ModelScope(Hub):
    """The hub at `$MODELSCOPE_ENDPOINT`, with the token stored by its SDK or set in the environment."""

    title = "ModelScope"
    login = "modelscope login"

    def __init__(self, another: str) -> None:
        self.another = another
        silence("modelscope_hub", unless="MODELSCOPE_LOG_LEVEL")
        self._hub = HubApi()
        self._api = self._hub.legacy

    def page(self, repository: Repository) -> str:
        return f"{self._api.endpoint}/{repository.kind}s/{repository.name}"

    def files(self, repository: Repository) -> list[RemoteFile]:
        with parsing_response(), self._translated(repository):
            entries = self._api.list_repo_files(repository.name, repository.kind, REVISION)
            return [_remote_file(entry) for entry in entries if entry.get("Type") != "tree"]

    @contextmanager
    def read(self, repository: Repository, file: RemoteFile, start: int) -> Iterator[tuple[int, Iterator[bytes]]]:
        with self._translated(repository, file.path):
            response = self._api.download_stream(
                repository.name, repository.kind, file.path, REVISION, headers=range_headers(start)
            )
        with response:
            yield (
                first_byte(response.status_code, response.headers, file.size),
                chunks_within(self._translated(repository, file.path), response.iter_content(CHUNK_BYTES)),
            )

    def check_account(self, repository: Repository) -> None:
        if not self._api.token:
            raise no_token(self)
        with parsing_response(), self._writing(repository):
            self._hub.whoami()

    def create(self, repository: Repository, private: bool) -> None:
        with parsing_response(), self._writing(repository):
            try:
                found = self._hub.get_repo(repository.name, repository.kind)
            except NotExistError:
                visibility = Visibility.PRIVATE if private else Visibility.PUBLIC
                # Without a license, the SDK would state one that nobody has chosen.
                self._hub.create_repo(repository.name, repository.kind, visibility=visibility, license="other")
                return
        if private and found.visibility != Visibility.PRIVATE:
            raise is_public(self, repository)

    def commit(self, repository: Repository, files: Mapping[str, Path | bytes], message: str) -> None:
        # Not by `HubApi.upload_file`, which would create a repository that is missing by now as a public one.
        with parsing_response(), self._writing(repository):
            actions = [
                _action_of_text(path, content)
                if isinstance(content, bytes)
                else self._uploaded(repository, path, content)
                for path, content in files.items()
            ]
            self._api.create_commit(repository.name, repository.kind, actions, message, REVISION)

    def _uploaded(self, repository: Repository, path: str, source: Path) -> dict[str, object]:
        """Upload a file unless the hub has its bytes, and return the action that adds it."""
        with source.open("rb") as stream:  # so that it is whole even if the run deletes it meanwhile
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            size = stream.tell()
            wanted = [{"oid": digest, "size": size}]
            address = self._api.validate_blobs(repository.name, repository.kind, wanted)[digest]
            if address:
                stream.seek(0)
                self._api.upload_blob(address, stream, size)
        return {"action": "create", "path": path, "type": "lfs", "size": size, "sha256": digest,
                "content": "", "encoding": ""}  # fmt: skip

    def upload_command(self, repository: Repository, path: Path) -> str:
        return shlex.join(["modelscope", "upload", repository.name, str(path), path.name])

    @contextmanager
    def _writing(self, repository: Repository) -> Iterator[None]:
        """Convert errors of the SDK while it writes to ours, without their messages."""
        try:
            yield
        except JSONDecodeError:  # left to `parsing_response`
            raise
        except AuthenticationError as error:
            raise no_token(self) from error
        except (PermissionDeniedError, NotExistError, InvalidParameter) as error:
            raise write_denied(self, repository) from error
        except APIError as error:
            raise status_error(error.status_code or HTTPStatus.INTERNAL_SERVER_ERROR) from error
        except (HubError, OSError) as error:
            raise TransientHubError(f"the connection was lost ({type(error).__name__})") from error

    @contextmanager
    def _translated(self, repository: Repository, path: str | None = None) -> Iterator[None]:
        """Convert errors of the SDK to ours, without their messages, which can contain signed URLs."""
        try:
            yield
        except JSONDecodeError:  # that of `requests` is an OSError too; left to `parsing_response`
            raise
        except NotExistError as error:
            raise not_found(self, repository, path) from error
        except (PermissionDeniedError, AuthenticationError) as error:
            raise access_denied(self, repository) from error
        except APIError as error:
            raise status_error(error.status_code or HTTPStatus.INTERNAL_SERVER_ERROR) from error
        except (HubError, OSError) as error:  # errors of `requests` are OSErrors
            raise TransientHubError(f"the connection was lost ({type(error).__name__})") from error


def _remote_file(entry: dict[str, object]) -> RemoteFile:
    sha256 = entry.get("Sha256")
    checksum = Checksum("sha256", str(sha256).lower()) if sha256 else None
    return RemoteFile(str(entry["Path"]), int(str(entry["Size"])), checksum)


def _action_of_text(path: str, content: bytes) -> dict[str, object]:
    """Return the action that adds a file with its content."""
    return {"action": "create", "path": path, "type": "normal", "size": len(content), "sha256": "",
            "content": base64.b64encode(content).decode(), "encoding": "base64"}  # fmt: skip
