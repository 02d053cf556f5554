"""ModelScope, through its SDK `modelscope_hub`, which imports no torch, in contrast to `modelscope.hub`."""

from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from json import JSONDecodeError

from modelscope_hub import HubApi
from modelscope_hub.errors import APIError, AuthenticationError, HubError, NotExistError, PermissionDeniedError

from diffsynth_core.hub.client import (
    Checksum,
    Hub,
    RemoteFile,
    Repository,
    TransientHubError,
    access_denied,
    not_found,
    parsing_response,
    silence,
    status_error,
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
        self._api = HubApi().legacy

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
