"""A Hugging Face Hub on the loopback, in memory and of the standard library: what the tests push to and load from.

It answers what `huggingface_hub` asks about repositories of models and data sets over plain HTTP: creating them,
commits on branches, tags, large files through Git LFS with their checksums verified, and downloads by revision. A
commit is applied whole or not at all. Transfers can be made to break half-way.

`python tests/loopback_hub.py` serves a Hub until it is interrupted and prints the environment for its clients.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

USER = "qst"
TOKEN = "hf_loopback"
DATASETS = "datasets/"
LARGE = (".arrow", ".bin", ".gguf", ".model", ".msgpack", ".npz", ".onnx", ".parquet", ".pt", ".pth", ".safetensors")


@dataclass(frozen=True)
class Blob:
    """The content of a file."""

    content: bytes
    large: bool

    @property
    def oid(self) -> str:
        """What the Hub calls it: the SHA-256 of a large file, the Git object id of any other."""
        if self.large:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass(frozen=True)
class Commit:
    """The files of a repository after a change."""

    title: str
    parent: str | None
    files: dict[str, Blob]

    @property
    def oid(self) -> str:
        """Hash of the content and of the whole history."""
        content = [self.title, self.parent, sorted((path, blob.oid) for path, blob in self.files.items())]
        return hashlib.sha1(json.dumps(content).encode()).hexdigest()


@dataclass
class Repo:
    """Commits, and the branches and tags that name some of them."""

    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def add(self, branch: str, commit: Commit) -> Commit:
        """Make `commit` the head of `branch`."""
        self.commits[commit.oid] = commit
        self.branches[branch] = commit.oid
        return commit

    def at(self, revision: str) -> Commit:
        """The commit that a branch, a tag or its own name points to."""
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        if oid not in self.commits:
            raise Refusal(404, f"no revision {revision}", "RevisionNotFound")
        return self.commits[oid]


class Answer(NamedTuple):
    """An HTTP response."""

    status: int
    body: bytes
    headers: dict[str, str]


class Refusal(Exception):
    """An error of the client, under the code by which the real client tells them apart."""

    def __init__(self, status: int, message: str, code: str = "", **headers: str) -> None:
        super().__init__(message)
        told = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {}) | headers
        self.answer = Answer(status, json.dumps({"error": message}).encode(), told)


def _json(content: object, status: int = 200) -> Answer:
    return Answer(status, json.dumps(content).encode(), {"Content-Type": "application/json"})


class LoopbackHub:
    """A Hub that lives as long as its `with` block. Its parts, such as `repos`, may be looked into at any time."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.large_files: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.breaks: dict[str, tuple[int, threading.Event]] = {}
        self.lock = threading.Lock()

    def __enter__(self) -> LoopbackHub:
        self._home = tempfile.TemporaryDirectory(prefix="loopback-hub-")
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, self))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._home.cleanup()

    @property
    def url(self) -> str:
        """Where the Hub is."""
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def environment(self) -> dict[str, str]:
        """Variables under which a process takes this Hub for the only one."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": TOKEN,
            "HF_HOME": self._home.name,
            "HF_HUB_OFFLINE": "0",
            # With Xet, large files would bypass HTTP for a protocol of its own.
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "no_proxy": "127.0.0.1",
        }

    @contextmanager
    def breaking(self, transfer: str, after: int) -> Iterator[threading.Event]:
        """Hang up on every transfer of more than `after` bytes; the event is set when it has happened.

        `transfer` is `"store"` (a large file on its way up), `"commit"` or `"download"`.
        """
        happened = threading.Event()
        self.breaks[transfer] = (after, happened)
        try:
            yield happened
        finally:
            del self.breaks[transfer]

    def repo(self, name: str) -> Repo:
        """An existing repository."""
        if name not in self.repos:
            raise Refusal(404, f"no repository {name}", "RepoNotFound")
        return self.repos[name]

    def whoami(self) -> Answer:
        return _json({"name": USER, "type": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def validate_yaml(self, body: bytes) -> Answer:
        return _json({"errors": [], "warnings": []})

    def create(self, body: bytes) -> Answer:
        asked = json.loads(body)
        if (kind := asked.get("type", "model")) not in ("model", "dataset"):
            raise Refusal(400, "only repositories of models and data sets are served")
        name = f"{DATASETS if kind == 'dataset' else ''}{asked.get('organization') or USER}/{asked['name']}"
        told = {"url": f"{self.url}/{name}", "name": name}
        if name in self.repos:
            return _json(told, 409)
        self.repos[name] = Repo()
        self.repos[name].add("main", Commit("initial commit", None, {}))
        return _json(told)

    def branch(self, body: bytes, repo: str, name: str) -> Answer:
        found = self.repo(repo)
        if name in found.branches:
            raise Refusal(409, f"branch {name} exists")
        found.branches[name] = found.at(json.loads(body).get("startingPoint", "main")).oid
        return _json({})

    def tag(self, body: bytes, repo: str, revision: str) -> Answer:
        found, name = self.repo(repo), json.loads(body)["tag"]
        if name in found.tags:
            raise Refusal(409, f"tag {name} exists")
        found.tags[name] = found.at(revision).oid
        return _json({})

    def info(self, repo: str, revision: str = "main") -> Answer:
        commit = self.repo(repo).at(revision)
        siblings, name = [{"rfilename": path} for path in commit.files], repo.removeprefix(DATASETS)
        return _json({"id": name, "sha": commit.oid, "private": False, "tags": [], "siblings": siblings})

    def tree(self, repo: str, revision: str, folder: str = "") -> Answer:
        files = self.repo(repo).at(revision).files
        listed = [_entry(path, blob) for path, blob in files.items() if path.startswith(f"{folder}/" if folder else "")]
        if folder and not listed:
            raise Refusal(404, f"no folder {folder}", "EntryNotFound")
        return _json(listed)

    def preupload(self, body: bytes, repo: str, revision: str) -> Answer:
        files = self.repo(repo).at(revision).files
        modes = []
        for path in (item["path"] for item in json.loads(body)["files"]):
            mode = "lfs" if path.endswith(LARGE) else "regular"
            oid = files[path].oid if path in files else None
            modes.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return _json({"files": modes})

    def batch(self, body: bytes, repo: str) -> Answer:
        self.repo(repo)
        objects = [{"oid": item["oid"], "size": item["size"]} for item in json.loads(body)["objects"]]
        for item in objects:
            if item["oid"] not in self.large_files:
                item["actions"] = {"upload": {"href": f"{self.url}/lfs/{item['oid']}/{item['size']}"}}
            elif item["size"] != len(self.large_files[item["oid"]]):
                item["error"] = {"code": 422, "message": "stored with another size"}
        return _json({"transfer": "basic", "objects": objects})

    def store(self, body: bytes, oid: str, size: str) -> Answer:
        if hashlib.sha256(body).hexdigest() != oid or len(body) != int(size):
            raise Refusal(400, "the content is not what its checksum and size say")
        self.large_files[oid] = body
        return _json({})

    def commit(self, body: bytes, repo: str, revision: str) -> Answer:
        found = self.repo(repo)
        if revision not in found.branches:
            raise Refusal(404, f"no branch {revision}", "RevisionNotFound")
        head = found.at(revision)
        files, title = dict(head.files), ""
        for operation in map(json.loads, body.splitlines()):
            key, value = operation["key"], operation["value"]
            if key == "header":
                title = value["summary"]
                if value.get("parentCommit", head.oid) != head.oid:
                    raise Refusal(412, "the branch has moved on")
            elif key == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), large=False)
            elif key == "lfsFile":
                content = self.large_files.get(value["oid"])
                if content is None or value.get("size", len(content)) != len(content):
                    raise Refusal(400, f"{value['path']} was not uploaded")
                files[value["path"]] = Blob(content, large=True)
            elif key == "deletedFile":
                files.pop(value["path"], None)
            elif key == "deletedFolder":
                folder = value["path"].rstrip("/") + "/"
                files = {path: blob for path, blob in files.items() if not path.startswith(folder)}
            else:
                raise Refusal(400, f"unknown operation {key}")
        made = found.add(revision, Commit(title, head.oid, files))
        return _json({"commitOid": made.oid, "commitUrl": f"{self.url}/{repo}/commit/{made.oid}"})

    def download(self, repo: str, revision: str, path: str) -> Answer:
        commit = self.repo(repo).at(revision)
        # The client remembers under this name that a file does not exist.
        headers = {"X-Repo-Commit": commit.oid}
        if path not in commit.files:
            raise Refusal(404, f"no file {path}", "EntryNotFound", **headers)
        blob = commit.files[path]
        headers["ETag"] = f'"{blob.oid}"'
        if blob.large:
            headers |= {"X-Linked-ETag": f'"{blob.oid}"', "X-Linked-Size": str(len(blob.content))}
        return Answer(200, blob.content, headers)


def _entry(path: str, blob: Blob) -> dict[str, Any]:
    size = len(blob.content)
    lfs = {"lfs": {"oid": blob.oid, "size": size, "pointerSize": 130}} if blob.large else {}
    return {"type": "file", "path": path, "oid": blob.oid, "size": size} | lfs


_REPO = rf"(?P<repo>(?:{DATASETS})?[^/]+/[^/]+)"
_API = rf"/api/(?:models/)?{_REPO}"
_ROUTES: list[tuple[str, str, Callable[..., Answer]]] = [
    ("GET", r"/api/whoami-v2", LoopbackHub.whoami),
    ("POST", r"/api/validate-yaml", LoopbackHub.validate_yaml),
    ("POST", r"/api/repos/create", LoopbackHub.create),
    ("POST", _API + r"/branch/(?P<name>[^/]+)", LoopbackHub.branch),
    ("POST", _API + r"/tag/(?P<revision>[^/]+)", LoopbackHub.tag),
    ("GET", _API, LoopbackHub.info),
    ("GET", _API + r"/revision/(?P<revision>[^/]+)", LoopbackHub.info),
    ("GET", _API + r"/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?", LoopbackHub.tree),
    ("POST", _API + r"/preupload/(?P<revision>[^/]+)", LoopbackHub.preupload),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", LoopbackHub.batch),
    ("PUT", r"/lfs/(?P<oid>\w+)/(?P<size>\d+)", LoopbackHub.store),
    ("POST", _API + r"/commit/(?P<revision>[^/]+)", LoopbackHub.commit),
    ("GET", rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", LoopbackHub.download),
]


class _Handler(BaseHTTPRequestHandler):
    """Between the socket and the Hub's methods."""

    protocol_version = "HTTP/1.1"
    # Headers and body go out in two writes, which would otherwise wait 40 ms for each other.
    disable_nagle_algorithm = True

    def __init__(self, hub: LoopbackHub, *arguments: Any) -> None:
        self.hub = hub
        super().__init__(*arguments)

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        method = "GET" if self.command == "HEAD" else self.command
        self.hub.requests.append((self.command, path))
        function, parts = _route(method, path)
        body = self._transfer(function.__name__, int(self.headers.get("Content-Length", 0)), self.rfile.read)
        try:
            # A large file goes where a link of its own points, which is all the permission it needs.
            if method == "POST" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                raise Refusal(401, "Invalid credentials in Authorization header")
            with self.hub.lock:
                answer = function(self.hub, **({} if method == "GET" else {"body": body}), **parts)
        except Refusal as refusal:
            answer = refusal.answer
        self.send_response(answer.status)
        for name, value in (answer.headers | {"Content-Length": str(len(answer.body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self._transfer(function.__name__, len(answer.body), lambda size: self.wfile.write(answer.body[:size]))

    do_HEAD = do_POST = do_PUT = do_GET

    def _transfer(self, name: str, size: int, move: Callable[[int], Any]) -> Any:
        after, happened = self.hub.breaks.get(name, (size, None))
        moved = move(min(size, after))
        if happened is not None and size > after:
            happened.set()
            raise ConnectionAbortedError
        return moved

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except ConnectionError:
            # Broken on purpose, or the client was killed.
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def _route(method: str, path: str) -> tuple[Callable[..., Answer], dict[str, str]]:
    for verb, pattern, function in _ROUTES:
        if verb == method and (match := re.fullmatch(pattern, path)):
            return function, {name: unquote(part) for name, part in match.groupdict().items() if part is not None}
    return _unknown, {}


def _unknown(hub: LoopbackHub, **_: object) -> Answer:
    raise Refusal(404, "not served here")


def main() -> None:
    """Serve until interrupted."""
    with LoopbackHub() as hub, suppress(KeyboardInterrupt):
        print("\n".join(f"export {name}={value}" for name, value in hub.environment.items()), flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
