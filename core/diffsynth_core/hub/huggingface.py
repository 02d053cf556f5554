"""Hugging Face, through its SDK."""

import shlex
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from http import HTTPStatus
from pathlib import Path

import httpx2
from huggingface_hub import CommitOperationAdd, HfApi, constants, get_session, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers, disable_progress_bars, hf_raise_for_status

from diffsynth_core.hub.client import (
    SKIP_VARIABLE,
    Checksum,
    Hub,
    HubAccessError,
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

NOT_ALLOWED = (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)
"""HTTP statuses that deny access."""


class HuggingFace(Hub):
    """The hub at `$HF_ENDPOINT`, with the token stored by its SDK or set in the environment."""

    title = "Hugging Face"
    login = "hf auth login"

    def __init__(self, another: str) -> None:
        self.another = another
        silence("huggingface_hub", unless="HF_HUB_VERBOSITY")
        self._api = HfApi()

    def page(self, repository: Repository) -> str:
        folder = "datasets/" if repository.kind == "dataset" else ""
        return f"{self._api.endpoint}/{folder}{repository.name}"

    def files(self, repository: Repository) -> list[RemoteFile]:
        with parsing_response(), self._translated(repository):
            entries = self._api.list_repo_tree(repository.name, recursive=True, repo_type=repository.kind)
            return [_remote_file(entry) for entry in entries if isinstance(entry, RepoFile)]

    @contextmanager
    def read(self, repository: Repository, file: RemoteFile, start: int) -> Iterator[tuple[int, Iterator[bytes]]]:
        url = hf_hub_url(repository.name, file.path, repo_type=repository.kind, endpoint=self._api.endpoint)
        headers = {**build_hf_headers(), **range_headers(start)}
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with ExitStack() as stack:
            with self._translated(repository, file.path):
                response = stack.enter_context(get_session().stream("GET", url, headers=headers, timeout=timeout))
                hf_raise_for_status(response)
            yield (
                first_byte(response.status_code, response.headers, file.size),
                chunks_within(self._translated(repository, file.path), response.iter_bytes(CHUNK_BYTES)),
            )

    def check_account(self, repository: Repository) -> None:
        with parsing_response(), self._writing(repository):
            account = self._api.whoami()
            owners = [account["name"], *(organization["name"] for organization in account.get("orgs", ()))]
            role = account.get("auth", {}).get("accessToken", {}).get("role")
        if repository.owner not in owners:
            raise write_denied(self, repository, f": it belongs neither to `{owners[0]}` nor to an organization of it")
        if role == "read":
            raise write_denied(self, repository, ": your token may only read")

    def create(self, repository: Repository, private: bool) -> None:
        with parsing_response(), self._writing(repository):
            self._api.create_repo(repository.name, private=private, exist_ok=True)
            found = self._api.repo_info(repository.name)
        if private and not found.private:
            raise is_public(self, repository)

    def commit(self, repository: Repository, files: Mapping[str, Path | bytes], message: str) -> None:
        disable_progress_bars()  # they would be drawn over those of the run
        with ExitStack() as stack, self._writing(repository):
            # Open, so that they are whole even if the run deletes them meanwhile.
            opened = {
                path: content if isinstance(content, bytes) else stack.enter_context(content.open("rb"))
                for path, content in files.items()
            }
            additions = [CommitOperationAdd(path, content) for path, content in opened.items()]
            self._api.create_commit(repository.name, additions, commit_message=message)

    def upload_command(self, repository: Repository, path: Path) -> str:
        return shlex.join(["hf", "upload", repository.name, str(path), path.name])

    @contextmanager
    def _writing(self, repository: Repository) -> Iterator[None]:
        """Convert errors of the SDK while it writes to ours, without their messages."""
        try:
            yield
        except LocalTokenNotFoundError as error:
            raise no_token(self) from error
        except OfflineModeIsEnabled as error:
            what = "HF_HUB_OFFLINE is set, so nothing can be uploaded to Hugging Face"
            raise HubAccessError(what, "unset it, or remove `--push_to_hub`") from error
        except (RepositoryNotFoundError, HFValidationError) as error:
            raise write_denied(self, repository) from error
        except HfHubHTTPError as error:
            if error.response.status_code == HTTPStatus.UNAUTHORIZED:
                raise no_token(self) from error
            if error.response.status_code == HTTPStatus.FORBIDDEN:
                raise write_denied(self, repository) from error
            raise status_error(error.response.status_code) from error
        except (httpx2.HTTPError, OSError, RuntimeError) as error:
            raise TransientHubError(f"the connection was lost ({type(error.__cause__ or error).__name__})") from error

    @contextmanager
    def _translated(self, repository: Repository, path: str | None = None) -> Iterator[None]:
        """Convert errors of the SDK to ours, without their messages, which can contain signed URLs."""
        try:
            yield
        except GatedRepoError as error:
            raise access_denied(self, repository) from error
        except (RepositoryNotFoundError, HFValidationError) as error:
            raise not_found(self, repository) from error
        except EntryNotFoundError as error:
            raise not_found(self, repository, path) from error
        except OfflineModeIsEnabled as error:
            raise HubAccessError(
                "HF_HUB_OFFLINE is set, so Hugging Face cannot be accessed", f"unset it, or set {SKIP_VARIABLE}=1"
            ) from error
        except UnicodeEncodeError as error:
            raise HubAccessError(
                "the Hugging Face token contains invalid characters", f"set a valid one with `{self.login}`"
            ) from error
        except ImportError as error:  # raised when the HTTP client is created
            raise HubAccessError(
                "a SOCKS proxy is set, but the package that supports it is not installed",
                "install `socksio`, or unset ALL_PROXY, HTTP_PROXY and HTTPS_PROXY",
            ) from error
        except HfHubHTTPError as error:
            status = error.response.status_code
            if status == HTTPStatus.NOT_FOUND:
                raise not_found(self, repository, path) from error
            if status in NOT_ALLOWED:
                raise access_denied(self, repository) from error
            raise status_error(status) from error
        except (httpx2.HTTPError, OSError) as error:
            raise TransientHubError(f"the connection was lost ({type(error).__name__})") from error


def _remote_file(entry: RepoFile) -> RemoteFile:
    checksum = Checksum("sha256", entry.lfs.sha256) if entry.lfs else Checksum("git", entry.blob_id)
    return RemoteFile(entry.path, entry.size, checksum)
