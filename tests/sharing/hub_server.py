"""The Hub on loopback: as much of its HTTP protocol as huggingface_hub speaks to push and pull a data set.

Repositories are made, files classed (`preupload`), large ones sent by the LFS protocol, all of them committed; trees
are listed in pages, files resolved, the large ones by a redirect, in part where that is asked for. Of Xet there are the
answers that name its storage, which is then the one in a folder that hf_xet itself has for tests: no server of it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import yaml
from huggingface_hub import constants

WRITE, READ = "hf_may_write", "hf_may_read"
USER = "me"
LICENCES = ("mit", "apache-2.0", "cc-by-4.0", "other")
PAGE = 7  # entries of a tree in one answer, so that a small store has several


class File(NamedTuple):
    """A file of a commit; `sha256` of one that is kept by the LFS protocol, `xet` of one whose content Xet holds."""

    content: bytes
    sha256: str | None
    xet: str = ""
    xet_size: int = 0

    @property
    def size(self) -> int:
        return self.xet_size if self.xet else len(self.content)

    @property
    def oid(self) -> str:
        pointer = b"" if self.sha256 is None else f"oid sha256:{self.sha256} size {self.size}".encode()
        content = self.content if self.sha256 is None else pointer
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repository:
    """Commits, oldest first: each has a name and all its files."""

    private: bool = False
    commits: list[tuple[str, dict[str, File]]] = field(default_factory=list)

    def add(self, files: dict[str, File]) -> str:
        everything = {**(self.commits[-1][1] if self.commits else {}), **files}
        name = hashlib.sha1(repr((len(self.commits), sorted(everything))).encode()).hexdigest()
        self.commits.append((name, everything))
        return name

    def at(self, revision: str) -> tuple[str, dict[str, File]] | None:
        if revision == "main":
            return self.commits[-1]
        return next((commit for commit in self.commits if commit[0] == revision), None)


class Hub:
    """The server, what it has, what it was asked, and what shall go wrong.

    Attributes:
        objects: what was sent by the LFS protocol, by SHA-256, committed or not.
        requests: (method, path) of everything that was asked.
        sent, served: SHA-256 of every large object that arrived, and of every one that was asked for.
        hold_after: after so many objects sent or served, `held` is set, and the next are not answered: their client
            waits, or is killed.
        most_commits: after so many, the next is refused.
        xet_storage: where a Xet client keeps contents. xet_hashes: SHA-256 of what it sends, to Xet's own digest.
    """

    def __init__(self) -> None:
        self.endpoint = ""
        self.release = threading.Event()
        self.reset()

    def reset(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.sent: list[str] = []
        self.served: list[str] = []
        self.hold_after: int | None = None
        self.most_commits: int | None = None
        self.xet_storage: Path | None = None
        self.xet_hashes: dict[str, str] = {}
        self.status: int | None = None  # what every request is answered
        self.held = threading.Event()
        self.release.set()
        self.release = threading.Event()
        self.lock = threading.Lock()

    def environment(self, home: Path) -> dict[str, str]:
        """What names this server to a process of its own, with a token that may write."""
        own = {"HF_ENDPOINT": self.endpoint, "HF_TOKEN": WRITE, "HF_HOME": str(home / "hf"), "HF_HUB_DISABLE_XET": "1"}
        return {**own, "KDCACHE_CACHE_DIR": str(home / "copies")}

    def enter(self, patch: pytest.MonkeyPatch, home: Path) -> None:
        """Let the environment name this server, and the client, which has read it before."""
        for name, value in self.environment(home).items():
            patch.setenv(name, value)
        patch.setattr(constants, "ENDPOINT", self.endpoint)
        patch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", self.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "HF_TOKEN_PATH", str(home / "no token"))

    def lose(self, process: subprocess.Popen[str]) -> None:
        """Kill a process that sends or fetches as soon as `hold_after` objects are through; then answer again."""
        while not self.held.wait(0.1):
            assert process.poll() is None, process.communicate()
        process.kill()
        process.communicate()
        self.hold_after = None
        self.held.clear()
        self.release.set()
        self.release = threading.Event()

    def files(self, repository: str) -> dict[str, bytes]:
        """The files of the newest commit."""
        return {path: file.content for path, file in self.repositories[repository].commits[-1][1].items()}

    def make(self, repository: str, files: dict[str, bytes], *, private: bool = False) -> Repository:
        """A repository as the Hub makes it, with files of its owner."""
        made = self.repositories[repository] = Repository(private)
        made.add({".gitattributes": File(b"*.bin filter=lfs\n", None)})
        if files:
            made.add({path: File(content, None) for path, content in files.items()})
        return made

    @contextmanager
    def serving(self) -> Iterator[None]:
        """The server answers while the block runs."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        self.endpoint = f"http://127.0.0.1:{server.server_port}"
        try:
            yield
        finally:
            self.release.set()
            server.shutdown()
            server.server_close()


class _RefusedError(Exception):
    """An answer that is an error: a status, the Hub's code for it, and words."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        return

    def _answer(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        path = unquote(urlsplit(self.path).path)
        with self.hub.lock:
            self.hub.requests.append((self.command, path))
        try:
            if self.hub.status is not None:
                raise _RefusedError(self.hub.status, "", "out of order")
            for method, pattern, name in _ROUTES:
                match = re.fullmatch(pattern, path)
                if match and self.command in method.split():
                    getattr(self, name)(*match.groups(), body=body)
                    return
            raise _RefusedError(404, "", f"no such route: {self.command} {path}")
        except _RefusedError as refused:
            status, code, words = refused.args
            self._send(
                status, json.dumps({"error": words}).encode(), **{"X-Error-Code": code, "X-Error-Message": words}
            )

    do_GET = do_HEAD = do_POST = do_PUT = _answer  # noqa: N815

    def _send(self, status: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(content)), **headers}.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, value: Any, status: int = 200, **headers: str) -> None:
        self._send(status, json.dumps(value).encode(), **headers)

    @property
    def _token(self) -> str:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def _repository(self, name: str, *, write: bool = False) -> Repository:
        """The repository, as far as the token allows it."""
        if self._token not in ("", WRITE, READ):
            raise _RefusedError(401, "", "Invalid credentials in Authorization header")
        found = self.hub.repositories.get(name)
        if found is None or (found.private and not self._token):
            raise _RefusedError(404 if self._token else 401, "RepoNotFound", "Repository not found")
        if write and self._token != WRITE:
            raise _RefusedError(403, "", "You need a token with write rights")
        return found

    def _commit(self, name: str, revision: str) -> tuple[str, dict[str, File]]:
        commit = self._repository(name).at(revision)
        if commit is None:
            raise _RefusedError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def create(self, *, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        if self._token not in (WRITE, READ):
            raise _RefusedError(401, "", "Invalid username or password.")
        if self._token != WRITE or asked["organization"] != USER:
            raise _RefusedError(403, "", f"You don't have the rights to create a dataset under {asked['organization']}")
        assert asked["type"] == "dataset"
        url = {"url": f"{self.hub.endpoint}/datasets/{name}", "id": name}
        if name in self.hub.repositories:
            self._json({**url, "error": "You already created this dataset repo"}, 409)
            return
        self.hub.make(name, {}, private=asked.get("visibility") == "private")
        self._json(url)

    def info(self, name: str, revision: str | None, *, body: bytes) -> None:
        sha, files = self._commit(name, revision or "main")
        siblings = [{"rfilename": path} for path in files]
        private = self._repository(name).private
        self._json({"id": name, "sha": sha, "private": private, "siblings": siblings, "tags": []})

    def tree(self, name: str, revision: str, *, body: bytes) -> None:
        _, files = self._commit(name, revision)
        folders = {"/".join(path.split("/")[:depth]) for path in files for depth in range(1, path.count("/") + 1)}
        entries = [{"type": "directory", "oid": "0" * 40, "size": 0, "path": folder} for folder in folders]
        for path, file in files.items():
            large = {"lfs": {"oid": file.sha256, "size": file.size, "pointerSize": 130}} if file.sha256 else {}
            large |= {"xetHash": file.xet} if file.xet else {}
            entries.append({"type": "file", "oid": file.oid, "size": file.size, "path": path, **large})
        entries.sort(key=lambda entry: str(entry["path"]))
        first = int(parse_qs(urlsplit(self.path).query).get("cursor", ["0"])[0])
        link = f"{self.hub.endpoint}{urlsplit(self.path).path}?recursive=true&cursor={first + PAGE}"
        more = first + PAGE < len(entries)
        self._json(entries[first : first + PAGE], **({"Link": f'<{link}>; rel="next"'} if more else {}))

    def check_card(self, *, body: bytes) -> None:
        content = json.loads(body)["content"]
        front = yaml.safe_load(content.split("---\n")[1]) if content.startswith("---\n") else {}
        if front.get("license") not in LICENCES:
            words = f'"license" must be one of [{", ".join(LICENCES)}]'
            self._json({"errors": [{"message": words}], "warnings": []}, 400)
            return
        self._json({"errors": [], "warnings": []})

    def preupload(self, name: str, revision: str, *, body: bytes) -> None:
        self._repository(name, write=True)
        _, files = self._commit(name, revision)
        asked, answers = json.loads(body)["files"], []
        assert len(asked) <= 256
        for one in asked:
            sample = base64.b64decode(one["sample"])
            large = one["size"] > 10 * 2**20 or b"\0" in sample or not _is_text(sample)
            there = files.get(one["path"])
            oid = None if there is None else there.sha256 or there.oid
            mode = "lfs" if large else "regular"
            answers.append({"path": one["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._json({"files": answers})

    def lfs_batch(self, name: str, *, body: bytes) -> None:
        self._repository(name, write=True)
        objects = []
        for one in json.loads(body)["objects"]:
            if one["oid"] not in self.hub.objects:
                href = f"{self.hub.endpoint}/lfs/{one['oid']}"
                verify = {"href": f"{self.hub.endpoint}/lfs/verify/{one['oid']}"}
                one["actions"] = {"upload": {"href": href, "header": {}}, "verify": verify}
            objects.append(one)
        self._json({"transfer": "basic", "objects": objects}, **{"Content-Type": "application/vnd.git-lfs+json"})

    def lfs_put(self, oid: str, *, body: bytes) -> None:
        hub = self.hub
        if self._held(hub.sent):
            return
        if hashlib.sha256(body).hexdigest() != oid:
            raise _RefusedError(400, "", "the bytes are not those of the digest")
        with hub.lock:
            hub.objects[oid] = body
            hub.sent.append(oid)
        self._send(200, ETag=f'"{oid[:32]}"')

    def _held(self, before: list[str]) -> bool:
        """Whether a request was left without an answer, as of a server that is lost."""
        hub = self.hub
        with hub.lock:
            late, release = hub.hold_after is not None and len(before) >= hub.hold_after, hub.release
        if late:
            hub.held.set()
            release.wait(60)
            self.close_connection = True
        return late

    def lfs_verify(self, oid: str, *, body: bytes) -> None:
        size = json.loads(body)["size"]
        if len(self.hub.objects.get(oid, b"")) != size:
            raise _RefusedError(404, "", "no such object")
        self._json({})

    def commit(self, name: str, revision: str, *, body: bytes) -> None:
        repository = self._repository(name, write=True)
        assert revision == "main"
        files = {}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), None)
            elif value.get("oid") in self.hub.xet_hashes:
                xet = self.hub.xet_hashes[value["oid"]]
                files[value["path"]] = File(b"", value["oid"], xet, value["size"])
            elif line["key"] == "lfsFile":
                content = self.hub.objects.get(value["oid"])
                if content is None or len(content) != value["size"]:
                    raise _RefusedError(400, "", f"LFS object {value['oid']} of {value['path']} was not uploaded")
                files[value["path"]] = File(content, value["oid"])
        with self.hub.lock:
            if self.hub.most_commits is not None and len(repository.commits) > self.hub.most_commits:
                raise _RefusedError(500, "", "out of order")
            sha = repository.add(files)
        self._json({"commitUrl": f"{self.hub.endpoint}/datasets/{name}/commit/{sha}", "commitOid": sha})

    def resolve(self, name: str, revision: str, path: str, *, body: bytes) -> None:
        sha, files = self._commit(name, revision)
        if path not in files:
            raise _RefusedError(404, "EntryNotFound", "Entry not found")
        file = files[path]
        headers = {"X-Repo-Commit": sha, "ETag": f'"{file.oid}"'}
        if file.sha256 is None:
            self._content(file.content, headers)
            return
        headers |= {"X-Linked-Size": str(file.size), "X-Linked-Etag": f'"{file.sha256}"'}
        if file.xet:
            route = f"{self.hub.endpoint}/api/datasets/{name}/xet-read-token/{sha}"
            headers |= {"X-Xet-Hash": file.xet, "X-Xet-Refresh-Route": route}
        elsewhere = self.hub.endpoint.replace("127.0.0.1", "localhost")  # a host of its own, as the Hub has for them
        self._send(302, b"", **headers, Location=f"{elsewhere}/large/{file.sha256}")

    def xet_token(self, name: str, kind: str, _revision: str, *, body: bytes) -> None:
        self._repository(name, write=kind == "write")
        info = {"casUrl": f"local://{self.hub.xet_storage}", "exp": int(time.time()) + 3600, "accessToken": "token"}
        names = {"Cas-Url": "casUrl", "Token-Expiration": "exp", "Access-Token": "accessToken"}
        self._json(info, **{f"X-Xet-{header}": str(info[field]) for header, field in names.items()})

    def large(self, oid: str, *, body: bytes) -> None:
        if self.command == "GET":
            if self._held(self.hub.served):
                return
            with self.hub.lock:
                self.hub.served.append(oid)
        self._content(self.hub.objects[oid], {"ETag": f'"{oid}"'})

    def _content(self, content: bytes, headers: dict[str, str]) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        headers["Content-Type"] = "application/octet-stream"
        if asked is None:
            self._send(200, content, **headers)
            return
        first = int(asked[1])
        self._send(
            206, content[first:], **headers, **{"Content-Range": f"bytes {first}-{len(content) - 1}/{len(content)}"}
        )


def _is_text(sample: bytes) -> bool:
    try:
        sample.decode()
    except UnicodeDecodeError as error:
        return error.start > len(sample) - 4  # a character that the sample cuts
    return True


_NAME = r"([\w.-]+/[\w.-]+)"
_ROUTES = [
    ("POST", "/api/repos/create", "create"),
    ("POST", "/api/validate-yaml", "check_card"),
    ("GET", rf"/api/datasets/{_NAME}(?:/revision/([^/]+))?", "info"),
    ("GET", rf"/api/datasets/{_NAME}/tree/([^/]+)", "tree"),
    ("POST", rf"/api/datasets/{_NAME}/preupload/([^/]+)", "preupload"),
    ("POST", rf"/api/datasets/{_NAME}/commit/([^/]+)", "commit"),
    ("POST", rf"/datasets/{_NAME}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", "/lfs/([0-9a-f]{64})", "lfs_put"),
    ("POST", "/lfs/verify/([0-9a-f]{64})", "lfs_verify"),
    ("GET", rf"/api/datasets/{_NAME}/xet-(read|write)-token/([^/]+)", "xet_token"),
    ("GET HEAD", rf"/datasets/{_NAME}/resolve/([^/]+)/(.+)", "resolve"),
    ("GET HEAD", "/large/([0-9a-f]{64})", "large"),
]
"""Methods, path, and who answers; the first that fits."""
