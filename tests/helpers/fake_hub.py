"""A small Hugging Face hub on loopback that records every request.

Start at `FakeHub`. A `Repository` has files and simulated failures; that of a dataset is called `datasets/OWNER/NAME`.
"""

import contextlib
import hashlib
import json
import re
import threading
from base64 import b64decode
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

LFS = (".safetensors", ".bin", ".pth", ".parquet")  # stored as large files, whose ETag is their SHA-256

# failure: status, X-Error-Code, X-Error-Message
REFUSALS: dict[str, tuple[int, str, str]] = {
    "absent": (401, "RepoNotFound", "Invalid username or password."),
    "gated": (403, "GatedRepo", "Access is restricted"),
    "bad token": (401, "", "Invalid credentials in Authorization header"),
    "forbidden": (403, "", "The token has no such scope"),
    "busy": (429, "", ""),
    "broken": (503, "", ""),
}


@dataclass
class Repository:
    """Files by commit, commits by branch, and simulated failures."""

    commits: dict[str, Mapping[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)  # wrong sizes in the listing
    listing: str = ""  # a key of REFUSALS; "silent" hangs up, "garbage" is no JSON
    download: str = ""  # a key of REFUSALS, for the files
    cut: dict[str, int] = field(default_factory=dict)  # bytes of a file after which the connection breaks
    private: bool = False

    def commit(self, files: Mapping[str, bytes], branch: str = "main") -> str:
        """Return the SHA of a new commit at the head of `branch`."""
        sha = hashlib.sha1(f"{branch} {len(self.commits)} {sorted(files)}".encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha


class Request(NamedTuple):
    method: str
    repository: str
    file: str  # "" is the listing
    token: str


class FakeHub:
    """Repositories by name, served at `url`."""

    def __init__(self, url: str):
        self.url = url
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.objects: dict[str, bytes] = {}  # large files by SHA-256
        self.uploads = 0  # of large files
        self.stall = ""  # "put" or "commit": this request of an upload sets `stalled` and gets no answer until `go_on`
        self.stalled, self.go_on = threading.Event(), threading.Event()

    def stalls(self, step: str) -> bool:
        """Wait if uploads stall at this step."""
        if step != self.stall:
            return False
        self.stalled.set()
        return self.go_on.wait(30)

    def add(self, name: str, files: Mapping[str, bytes], **failure: Any) -> Repository:
        """Return a new repository with one commit."""
        repository = self.repositories[name] = Repository(**failure)
        repository.commit(files)
        return repository

    def fetched(self, name: str) -> list[str]:
        """Return the downloaded files of a repository, in order."""
        return [r.file for r in self.requests if r.repository == name and r.method == "GET" and r.file]

    def listed(self, name: str) -> int:
        """Return how often a repository was listed."""
        return sum(r.repository == name and not r.file for r in self.requests)


@contextlib.contextmanager
def serve() -> Iterator[FakeHub]:
    """Serve a hub on a free port."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads, server.block_on_close = True, False
    hub = FakeHub(f"http://127.0.0.1:{server.server_address[1]}")
    server.hub = hub  # pyright: ignore[reportAttributeAccessIssue]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=10)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 10

    _API = re.compile(r"/api/(?:models/)?((?:datasets/)?[^/]+/[^/]+)(?:/revision/([^/]+))?")
    _FILE = re.compile(r"/((?:datasets/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)")

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if match := self._API.fullmatch(path):
            self._list(match[1], unquote(match[2] or "main"))
        elif match := self._FILE.fullmatch(path):
            self._send(match[1], unquote(match[2]), unquote(match[3]))
        else:
            self._answer(404)

    do_HEAD = do_GET  # noqa: N815

    # Uploads, which need a token: a repository or branch is created, each file is uploaded by its SHA-256 or is part of
    # the commit.
    _CREATE = "/api/repos/create"
    _CARD = "/api/validate-yaml"
    _UPLOAD = re.compile(r"/api/models/([^/]+/[^/]+)/(branch|preupload|commit)/([^/]+)")
    _BATCH = re.compile(r"/([^/]+/[^/]+?)(?:\.git)?/info/lfs/objects/batch")

    def do_POST(self) -> None:
        hub: FakeHub = self.server.hub  # pyright: ignore[reportAttributeAccessIssue]
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path)
        lines = [json.loads(line) for line in body.splitlines() if line]
        if path == self._CARD:
            refused = re.search(r'^license: "no such.*"$', lines[0]["content"], re.MULTILINE)
            errors = [{"message": '"license" must be one of [apache-2.0, mit]'}] if refused else []
            return self._json({"errors": errors, "warnings": []}, status=400 if refused else 200)
        if not self.headers.get("Authorization"):
            return self._send_error("absent")
        if path == self._CREATE:
            name = "/".join(filter(None, (lines[0].get("organization"), lines[0]["name"])))
            found, created = hub.repositories.get(name), {"url": f"{hub.url}/{name}", "id": name}
            if found is None:
                hub.add(name, {}).private = lines[0].get("private") is True or lines[0].get("visibility") == "private"
                return self._json(created)
            return self._send_error(found.listing) if found.listing else self._json(created, status=409)
        if match := self._BATCH.fullmatch(path):
            return self._json({"transfer": "basic", "objects": [self._lfs(hub, one) for one in lines[0]["objects"]]})
        match = self._UPLOAD.fullmatch(path)
        repository = hub.repositories.get(match[1]) if match else None
        if match is None or repository is None:
            return self._send_error("absent")
        if repository.listing:
            return self._send_error(repository.listing)
        if match[2] == "branch":
            repository.branches.setdefault(match[3], repository.branches["main"])
            self._json({})
        elif match[2] == "preupload":
            self._json({"files": [self._mode(file["path"]) for file in lines[0]["files"]]})
        elif not hub.stalls("commit"):
            files = dict(repository.commits[repository.branches[match[3]]])
            for line in lines[1:]:
                value = line["value"]
                if line["key"] == "deletedFile":
                    del files[value["path"]]
                    continue
                files[value["path"]] = (
                    b64decode(value["content"]) if line["key"] == "file" else hub.objects[value["oid"]]
                )
            sha = repository.commit(files, match[3])
            self._json({"commitOid": sha, "commitUrl": f"{hub.url}/{match[1]}/commit/{sha}"})

    def do_PUT(self) -> None:
        hub: FakeHub = self.server.hub  # pyright: ignore[reportAttributeAccessIssue]
        data = self.rfile.read(int(self.headers["Content-Length"]))
        hub.uploads += 1
        if hub.stalls("put"):
            return
        hub.objects[hashlib.sha256(data).hexdigest()] = data
        self._answer(200)

    def _lfs(self, hub: "FakeHub", entry: dict[str, Any]) -> dict[str, Any]:
        actions = {"upload": {"href": f"{hub.url}/lfs/{entry['oid']}"}}
        return {**entry, **({} if entry["oid"] in hub.objects else {"actions": actions})}

    def _mode(self, path: str) -> dict[str, Any]:
        return {"path": path, "uploadMode": "lfs" if path.endswith(LFS) else "regular", "shouldIgnore": False}

    def _json(self, fields: dict[str, Any], status: int = 200) -> None:
        self._answer(status, {"Content-Type": "application/json"}, json.dumps(fields).encode())

    def log_message(self, *_: Any) -> None:
        """Log nothing."""

    def _find(self, name: str, revision: str, file: str) -> tuple[Repository, str] | None:
        """Return repository and commit, or None after an error response."""
        hub: FakeHub = self.server.hub  # pyright: ignore[reportAttributeAccessIssue]
        hub.requests.append(Request(self.command, name, file, self.headers.get("Authorization", "")))
        repository = hub.repositories.get(name, Repository(listing="absent", download="absent"))
        if failure := repository.download if file else repository.listing:
            return self._send_error(failure)
        sha = repository.branches.get(revision, revision)
        if sha not in repository.commits:
            return self._answer(404, {"X-Error-Code": "RevisionNotFound"})
        return repository, sha

    def _send_error(self, failure: str) -> None:
        if failure == "silent":
            self.close_connection = True
        elif failure == "garbage":
            self._answer(200, {}, b"<html>Log in to the hotel's network</html>")
        else:
            status, code, message = REFUSALS[failure]
            self._answer(
                status, {"X-Error-Code": code, "X-Error-Message": message.replace("\n", " ")}, message.encode()
            )

    def _list(self, name: str, revision: str) -> None:
        if found := self._find(name, revision, ""):
            repository, sha = found
            siblings = []
            for file, data in repository.commits[sha].items():
                size = repository.sizes.get(file, len(data))
                lfs = {"size": size, "sha256": _etag(file, data), "pointerSize": 134} if file.endswith(LFS) else None
                blob = {"blobId": _etag("", data)} | ({"lfs": lfs} if lfs else {})
                siblings.append({"rfilename": file, "size": size, **blob})
            fields = {"id": name, "sha": sha, "private": repository.private, "siblings": siblings}
            self._answer(200, {}, json.dumps(fields).encode())

    def _send(self, name: str, revision: str, file: str) -> None:
        if not (found := self._find(name, revision, file)):
            return
        repository, sha = found
        if file not in repository.commits[sha]:
            return self._answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
        data = repository.commits[sha][file]
        headers = {"X-Repo-Commit": sha, "ETag": f'"{_etag(file, data)}"', "Accept-Ranges": "bytes"}
        start = int(m[1]) if (m := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))) else 0
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if self.command == "HEAD" or file not in repository.cut:
            self._answer(206 if start else 200, headers, data[start:])
        elif until := repository.cut[file]:
            repository.cut[file] = 0
            self._answer(200, headers, data, until=until)
        else:
            self._send_error("broken")

    def _answer(
        self, status: int, headers: Mapping[str, str] | None = None, body: bytes = b"", *, until: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            with contextlib.suppress(ConnectionError):  # of an interrupted client
                self.wfile.write(body[:until])
        self.close_connection |= until is not None


def _etag(file: str, data: bytes) -> str:
    if file.endswith(LFS):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
