"""A hub on the loopback interface with the APIs that the SDKs of ModelScope and Hugging Face use to download and to
upload; it can fail on demand.
"""

import base64
import hashlib
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import parse_qs, unquote, urlsplit

ERRORS = {401: "RepoNotFound", 403: "GatedRepo", 404: "RepoNotFound"}
"""HTTP status -> error code of Hugging Face."""
SLICE = 16 * 1024
LFS_BYTES = 1024
"""Minimum size of files in Git LFS on Hugging Face, for which it provides the sha256."""


@dataclass
class Trouble:
    """How the transfer of a file fails: `times` transfers send the first `after` bytes, then end.

    Attributes:
        stall: seconds of silence before that end.
        pause: seconds of silence between chunks.
    """

    after: int = 1 << 60
    times: int = 0
    stall: float = 0
    pause: float = 0


@dataclass
class LoopbackHub:
    """Repositories as `models/owner/name` or `datasets/owner/name` -> path -> bytes, and their faults.

    Attributes:
        sent: path -> bytes that are sent instead of those in the file lists.
        refusals: repository -> HTTP status.
        lists: response to every request for a list.
        transfers: path and first byte of every requested transfer.
        tokens: received credentials.
        requests: number of requests by route.
        accounts: token -> the owners that it may write for; its user first.
        role: what the tokens may do according to Hugging Face.
        public: repositories that everybody can read.
        commits: repository and message of every commit.
    """

    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    troubles: dict[str, Trouble] = field(default_factory=dict)
    sent: dict[str, bytes] = field(default_factory=dict)
    refusals: dict[str, int] = field(default_factory=dict)
    transfers: list[tuple[str, int]] = field(default_factory=list)
    lists: bytes | None = None
    tokens: set[str] = field(default_factory=set)
    requests: Counter[str] = field(default_factory=Counter)
    url: str = ""
    accounts: dict[str, list[str]] = field(default_factory=dict)
    role: str = "write"
    public: set[str] = field(default_factory=set)
    commits: list[tuple[str, str]] = field(default_factory=list)
    blobs: dict[str, bytes] = field(default_factory=dict)

    @contextmanager
    def serving(self) -> Iterator["LoopbackHub"]:
        handler = type("Handler", (_Handler,), {"hub": self})
        with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            self.url = f"http://127.0.0.1:{server.server_address[1]}"
            server.daemon_threads = True
            Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
            yield self
            server.shutdown()

    def starts(self, path: str) -> list[int]:
        """Return the offsets at which transfers of a file started."""
        return [start for asked, start in self.transfers if asked == path]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # a body after its headers would wait 40 ms for their receipt
    hub: LoopbackHub

    def do_GET(self) -> None:
        self._route(_ROUTES)

    def do_POST(self) -> None:
        self._route(_CHANGES)

    def do_PUT(self) -> None:
        self._route(_CHANGES)

    def _route(self, routes: "Routes") -> None:
        address = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(address.query).items()}
        path = unquote(address.path)
        self.hub.tokens |= {value for name in ("Authorization", "Cookie") if (value := self.headers.get(name))}
        for pattern, answer in routes.items():
            match = re.fullmatch(pattern, path)
            if match:
                self.hub.requests[pattern] += 1
                answer(self, *match.groups(), query)
                return
        self._answer(404, {"Message": "no such route"})

    def _modelscope_list(self, kind: str, name: str, query: dict[str, str]) -> None:
        entries = [
            {
                "Path": path,
                "Name": path.rpartition("/")[2],
                "Size": len(content),
                "Type": "blob",
                "Sha256": sha256(content),
            }
            for path, content in self._files(f"{kind}/{name}").items()
        ]
        entries += [{"Path": folder, "Size": 0, "Type": "tree"} for folder in folders(self._files(f"{kind}/{name}"))]
        if kind == "datasets":
            size, page = int(query["PageSize"]), int(query["PageNumber"])
            entries = entries[size * (page - 1) : size * page]
        if not self._refuse(f"{kind}/{name}"):
            self._answer(200, self.hub.lists or {"Code": 200, "Success": True, "Data": {"Files": entries}})

    def _modelscope_file(self, kind: str, name: str, query: dict[str, str]) -> None:
        self._transfer(f"{kind}/{name}", query["FilePath"])

    def _acceleration(self, query: dict[str, str]) -> None:
        self._answer(200, {"Data": {"InternalRegionQueryAddress": ""}})

    def _huggingface_list(self, kind: str, name: str, query: dict[str, str]) -> None:
        if self._refuse(f"{kind}/{name}", listed=True):
            return
        entries: list[dict[str, object]] = []
        for path, content in self._files(f"{kind}/{name}").items():
            entry: dict[str, object] = {"type": "file", "path": path, "size": len(content), "oid": git_id(content)}
            if len(content) >= LFS_BYTES:
                entry["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 134}
            entries.append(entry)
        entries += [
            {"type": "directory", "path": folder, "oid": "0" * 40} for folder in folders(self._files(f"{kind}/{name}"))
        ]
        self._answer(200, self.hub.lists or entries)

    def _huggingface_file(self, kind: str | None, name: str, path: str, query: dict[str, str]) -> None:
        self._transfer(f"{'datasets' if kind else 'models'}/{name}", path)

    def _account(self) -> list[str] | None:
        """Return the owners that the token of a request may write for; None without a valid one."""
        sent = f"{self.headers.get('Authorization')} {self.headers.get('Cookie')}"
        return next((owners for token, owners in self.hub.accounts.items() if token in sent), None)

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _may_write(self, name: str) -> bool:
        """Respond to a request of somebody who may not write to a repository."""
        owners, status = self._account(), self.hub.refusals.get(f"models/{name}", 200)
        if owners is None:
            status = 401
        elif name.partition("/")[0] not in owners:
            status = 403
        if status != 200:
            self._answer(status, {"Code": status, "Message": "refused", "Success": False, "error": "refused"})
        return status == 200

    def _create(self, name: str, public: bool, made: object) -> None:
        if self._may_write(name):
            if f"models/{name}" in self.hub.repositories:
                self._answer(409, {"error": "exists", "url": f"{self.hub.url}/{name}"})
                return
            self.hub.repositories[f"models/{name}"] = {}
            self.hub.public |= {f"models/{name}"} if public else set()
            self._answer(200, made)

    def _objects(self, name: str, body: dict[str, list[dict[str, object]]]) -> list[dict[str, object]]:
        """Return where the objects of Git LFS that the hub lacks are to be sent."""
        return [
            {"oid": wanted["oid"], "size": wanted["size"]}
            | ({} if wanted["oid"] in self.hub.blobs else {"actions": {"upload": {"href": self._place(wanted["oid"])}}})
            for wanted in body["objects"]
        ]

    def _place(self, digest: object) -> str:
        return f"{self.hub.url}/blobs/{digest}"

    def _receive(self, digest: str, query: dict[str, str]) -> None:
        content = self._body()
        if sha256(content) == digest:
            self.hub.blobs[digest] = content
        self._answer(200 if digest in self.hub.blobs else 400, {})

    def _huggingface_account(self, query: dict[str, str]) -> None:
        owners = self._account()
        if owners is None:
            self._answer(401, {"error": "Invalid credentials"})
            return
        organizations = [{"name": name, "roleInOrg": "write"} for name in owners[1:]]
        token = {"accessToken": {"role": self.hub.role, "displayName": "of a test"}}
        self._answer(200, {"name": owners[0], "orgs": organizations, "auth": token})

    def _huggingface_create(self, query: dict[str, str]) -> None:
        body = json.loads(self._body())
        name = f"{body['organization']}/{body['name']}"
        self._create(name, body.get("visibility") != "private", {"url": f"{self.hub.url}/{name}"})

    def _huggingface_info(self, name: str, query: dict[str, str]) -> None:
        if not self._refuse(f"models/{name}"):
            private = f"models/{name}" not in self.hub.public
            self._answer(200, {"id": name, "private": private, "sha": "0" * 40, "siblings": [], "tags": []})

    def _huggingface_card(self, query: dict[str, str]) -> None:
        self._body()
        self._answer(200, {"warnings": [], "errors": []})

    def _huggingface_modes(self, name: str, query: dict[str, str]) -> None:
        body = json.loads(self._body())
        if self._may_write(name):
            there = self._files(f"models/{name}")
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".jpg")) else "regular",
                    "shouldIgnore": False,
                    "oid": git_id(there[file["path"]]) if file["path"] in there else None,
                }
                for file in body["files"]
            ]
            self._answer(200, {"files": files})

    def _huggingface_objects(self, name: str, query: dict[str, str]) -> None:
        body = json.loads(self._body())
        if self._may_write(name):
            self._answer(200, {"transfer": "basic", "objects": self._objects(name, body)})

    def _huggingface_commit(self, name: str, query: dict[str, str]) -> None:
        lines = [json.loads(line) for line in self._body().splitlines()]
        if self._may_write(name):
            for line in lines[1:]:
                value = line["value"]
                sent = self.hub.blobs[value["oid"]] if line["key"] == "lfsFile" else base64.b64decode(value["content"])
                self.hub.repositories[f"models/{name}"][value["path"]] = sent
            self.hub.commits.append((name, lines[0]["value"]["summary"]))
            self._answer(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{'0' * 40}", "commitOid": "0" * 40})

    def _modelscope_account(self, query: dict[str, str]) -> None:
        owners = self._account()
        if owners is None:
            self._answer(401, {"success": False, "message": "not logged in"})
        else:
            self._answer(200, {"success": True, "data": {"username": owners[0], "email": ""}})

    def _modelscope_info(self, name: str, query: dict[str, str]) -> None:
        if not self._refuse(f"models/{name}"):
            self._answer(
                200, {"success": True, "data": {"id": name, "private": f"models/{name}" not in self.hub.public}}
            )

    def _modelscope_create(self, query: dict[str, str]) -> None:
        body = json.loads(self._body())
        self._create(f"{body['Path']}/{body['Name']}", body["Visibility"] == 5, {"Code": 200, "Data": {}})

    def _modelscope_objects(self, name: str, query: dict[str, str]) -> None:
        body = json.loads(self._body())
        if self._may_write(name):
            self._answer(200, {"Code": 200, "Data": {"objects": self._objects(name, body)}})

    def _modelscope_commit(self, name: str, query: dict[str, str]) -> None:
        body = json.loads(self._body())
        if self._may_write(name):
            for action in body["actions"]:
                lfs = action["type"] == "lfs"
                sent = self.hub.blobs[action["sha256"]] if lfs else base64.b64decode(action["content"])
                self.hub.repositories[f"models/{name}"][action["path"]] = sent
            self.hub.commits.append((name, body["commit_message"]))
            self._answer(200, {"Code": 200, "Success": True, "Data": {}})

    def _files(self, repository: str) -> dict[str, bytes]:
        return self.hub.repositories.get(repository, {})

    def _refuse(self, repository: str, listed: bool = False) -> bool:
        """Respond with a repository's fault; Hugging Face lists the files of gated repositories."""
        status = self.hub.refusals.get(repository) or (200 if repository in self.hub.repositories else 404)
        if status == 200 or (listed and status == 403):
            return False
        self._answer(status, {"Code": status, "Message": "refused", "Success": False}, ERRORS.get(status))
        return True

    def _transfer(self, repository: str, path: str) -> None:
        if self._refuse(repository):
            return
        content = self.hub.sent.get(path, self._files(repository).get(path))
        if content is None:
            self._answer(404, {"Code": 404, "Message": "no file"}, "EntryNotFound")
            return
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        start = int(asked[1]) if asked else 0
        self.hub.transfers.append((path, start))
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self._send(content[start:], self.hub.troubles.get(path, Trouble()))

    def _send(self, content: bytes, trouble: Trouble) -> None:
        fails = trouble.times > 0
        trouble.times -= 1 if fails else 0
        for begin in range(0, min(len(content), trouble.after if fails else len(content)), SLICE):
            self.wfile.write(content[begin : min(begin + SLICE, trouble.after if fails else len(content))])
            self.wfile.flush()
            time.sleep(trouble.pause)
        if fails:
            time.sleep(trouble.stall)
            self.close_connection = True

    def _answer(self, status: int, content: object, error: str | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Log nothing."""

    def handle(self) -> None:
        """Ignore a client that disconnected."""
        try:
            super().handle()
        except ConnectionError:
            self.close_connection = True


_NAME = r"([^/]+/[^/]+)"
Routes = dict[str, Callable[..., None]]
_ROUTES: Routes = {
    r"/api/whoami-v2": _Handler._huggingface_account,
    rf"/api/models/{_NAME}": _Handler._huggingface_info,
    r"/openapi/v1/users/me": _Handler._modelscope_account,
    rf"/openapi/v1/models/{_NAME}": _Handler._modelscope_info,
    rf"/api/v1/models/{_NAME}": _Handler._modelscope_info,
    rf"/api/v1/(models|datasets)/{_NAME}/repo/(?:files|tree)": _Handler._modelscope_list,
    rf"/api/v1/(models|datasets)/{_NAME}/repo": _Handler._modelscope_file,
    r"/api/v1/repos/internalAccelerationInfo": _Handler._acceleration,
    rf"/api/(models|datasets)/{_NAME}/tree/main": _Handler._huggingface_list,
    rf"/(datasets/)?{_NAME}/resolve/main/(.+)": _Handler._huggingface_file,
}


_CHANGES: Routes = {
    r"/blobs/([0-9a-f]{64})": _Handler._receive,
    r"/api/repos/create": _Handler._huggingface_create,
    r"/api/validate-yaml": _Handler._huggingface_card,
    rf"/api/models/{_NAME}/preupload/main": _Handler._huggingface_modes,
    rf"/{_NAME}\.git/info/lfs/objects/batch": _Handler._huggingface_objects,
    rf"/api/models/{_NAME}/commit/main": _Handler._huggingface_commit,
    r"/api/v1/models": _Handler._modelscope_create,
    rf"/api/v1/repos/models/{_NAME}/info/lfs/objects/batch": _Handler._modelscope_objects,
    rf"/api/v1/repos/models/{_NAME}/commit/master": _Handler._modelscope_commit,
}


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_id(content: bytes) -> str:
    """Return the git blob id."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def folders(files: dict[str, bytes]) -> set[str]:
    return {path.rpartition("/")[0] for path in files if "/" in path}
