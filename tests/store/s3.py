"""An object store on loopback: moto's S3 server behind a proxy that counts requests and spoils answers on demand."""

from __future__ import annotations

import http.client
import os
import socket
import struct
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import obstore
import pytest
from obstore.store import from_url

BUCKET = "kdcache-test"
SECRET = "a-very-secret-key"
TOKEN = "a-very-secret-token"
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "AWS_SESSION_TOKEN": TOKEN,
    "AWS_REGION": "us-east-1",
}
_DROPPED = {"connection", "transfer-encoding", "content-length", "keep-alive", "date", "server"}


class Request(NamedTuple):
    method: str
    key: str  # below the bucket; empty for a listing


@dataclass
class Fault:
    """What happens to the next `times` requests of `method` whose key ends with `key`.

    `kind`: a status such as "503"; "slow" (to answer), "drip" (a slow body), "cut" (the body ends half-way), "short"
    and "long" (a Content-Length that is too small or too large), "stump" (too small by another number each time),
    "flip" (a wrong byte), "noise" (`wrong` other wrong bytes each time), "reset" (the connection, before the server is
    asked), "lost" (the same after it has answered), "kms" (an ETag that is no MD5), "echo" (403 that repeats the
    headers).
    """

    kind: str
    key: str = ""
    times: int = 1
    method: str = "GET"
    seconds: float = 0.3
    wrong: int = 1

    def spoil(self, content: bytes) -> bytes:
        """Return other bytes for every number of `times`."""
        spoilt = bytearray(content)
        for number in range(self.wrong):
            spoilt[(self.times + 97 * number) % len(content)] ^= 1 + self.times % 255
        return bytes(spoilt)


class ObjectStore:
    """The server, its proxy, what was asked of it and what shall go wrong.

    Attributes:
        draw: what befalls a request, for faults that are not listed beforehand.
    """

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.draw: Callable[[Request], Fault | None] | None = None
        self._contents: dict[str | None, bytes] = {}
        self._changes = 0
        self._lock = threading.Lock()
        self._port = 0
        self.endpoint = ""

    def fail(self, kind: str, key: str = "", times: int = 1, **others: Any) -> Fault:
        fault = Fault(kind, key, times, **others)
        self.faults.append(fault)
        return fault

    def reset(self) -> None:
        with self._lock:
            self.requests.clear()
            self.faults.clear()
            self.draw = None
            self._contents.clear()

    def counted(self, method: str = "", key: str = "") -> int:
        """Requests of a method whose key contains `key`."""
        return sum(method in ("", request.method) and key in request.key for request in list(self.requests))

    def enter(self, patch: pytest.MonkeyPatch, copies: Path) -> None:
        """Let the environment name this server, and a folder for copies."""
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": self.endpoint}.items():
            patch.setenv(name, value)
        patch.setenv("KDCACHE_CACHE_DIR", str(copies))

    def address(self, name: str = "") -> str:
        """Of a place; without a name of one where nothing is yet."""
        return f"s3://{BUCKET}/{name or uuid.uuid4().hex}/store.zarr"

    def objects(self, address: str) -> dict[str, bytes]:
        """What lies below an address, asked past the proxy. Content of an MD5 (ETag) that was seen is not asked for."""
        store = self._past(address)
        tags = {found["path"]: found["e_tag"] for page in obstore.list(store) for found in page}
        self._contents |= {
            tag: bytes(obstore.get(store, key).bytes()) for key, tag in tags.items() if tag not in self._contents
        }
        return {key: self._contents[tags[key]] for key in sorted(tags)}

    def clear(self, address: str) -> None:
        """Remove all that lies below an address."""
        store = self._past(address)
        if keys := [found["path"] for page in obstore.list(store) for found in page]:
            obstore.delete(store, keys)

    def put(self, address: str, key: str, content: bytes | None) -> None:
        """Write an object past the proxy, or remove it."""
        if content is None:
            obstore.delete(self._past(address), key)
        else:
            obstore.put(self._past(address), key, content)

    def make_bucket(self, name: str) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        connection.request("PUT", f"/{name}")
        assert connection.getresponse().status == 200
        connection.close()

    @contextmanager
    def changing(self, method: str) -> Iterator[None]:
        """While a request is with the server that may change an object. Its client may have given up already."""
        changes = method not in ("GET", "HEAD")
        with self._lock:
            self._changes += changes
        try:
            yield
        finally:
            with self._lock:
                self._changes -= changes

    def _past(self, address: str) -> Any:
        """Return a client of the server itself, once no request changes anything any more."""
        while self._changes:
            time.sleep(0.001)
        return from_url(
            address,
            endpoint=f"http://127.0.0.1:{self._port}",
            access_key_id="testing",
            secret_access_key=SECRET,
            client_options={"allow_http": True},
        )

    def seen(self, method: str, path: str) -> Fault | None:
        """Note a request; the fault that is due, if any."""
        key = unquote(urlsplit(path).path).removeprefix(f"/{BUCKET}").lstrip("/")
        with self._lock:
            self.requests.append(request := Request(method, key))
            if self.draw is not None:
                return self.draw(request)
            for fault in self.faults:
                if fault.times and fault.method == method and key.endswith(fault.key):
                    fault.times -= 1
                    return fault
        return None

    @contextmanager
    def serving(self) -> Iterator[None]:
        """While both run."""
        self._port = port = _free_port()
        command = [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
            try:
                _wait_for(port)
                self.make_bucket(BUCKET)
                proxy = _proxy(self, port)
                threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
                self.endpoint = f"http://127.0.0.1:{proxy.server_port}"
                yield
                proxy.shutdown()
                proxy.server_close()
            finally:
                server.kill()


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _wait_for(port: int) -> None:
    for _ in range(600):
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=10):
            return
        time.sleep(0.1)
    raise TimeoutError("moto does not answer")


def _proxy(store: ObjectStore, port: int) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True
        timeout = 60

        def do_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            fault = store.seen(self.command, self.path)
            kind = fault.kind if fault else ""
            if kind == "reset":
                self.reset()
            elif fault and kind.isdigit():
                self.answer(int(kind), [], b"<Error><Code>InternalError</Code></Error>")
            elif kind == "echo":
                self.answer(403, [], f"<Error><Code>SignatureDoesNotMatch</Code>{self.headers}</Error>".encode())
            else:
                with store.changing(self.command):
                    status, headers, content = self.ask(body)
                if fault and kind == "slow":
                    time.sleep(fault.seconds)
                if kind == "lost":
                    self.reset()
                else:
                    self.answer(status, headers, content, fault)

        do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = do_any  # noqa: N815

        def reset(self) -> None:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True

        def ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
            while True:
                with suppress(ConnectionError, http.client.HTTPException):  # a busy server drops some
                    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
                    connection.request(self.command, self.path, body, dict(self.headers))
                    response = connection.getresponse()
                    return response.status, response.getheaders(), response.read()

        def answer(
            self, status: int, headers: list[tuple[str, str]], content: bytes, fault: Fault | None = None
        ) -> None:
            length = next((int(value) for name, value in headers if name.lower() == "content-length"), len(content))
            kind = fault.kind if fault else ""
            if fault and kind == "flip" and content:
                content = content[: length // 2] + bytes([content[length // 2] ^ 1]) + content[length // 2 + 1 :]
            if fault and kind == "noise" and content:
                content = fault.spoil(content)
            shown = {"short": length - 5, "long": length + 5}.get(kind, length)
            if fault and kind == "stump" and length:
                shown = length - 1 - fault.times % length
            self.send_response(status)
            for name, value in headers:
                if name.lower() not in _DROPPED:
                    self.send_header(name, f'"{"0" * 32}"' if kind == "kms" and name.lower() == "etag" else value)
            self.send_header("Content-Length", str(shown))
            self.end_headers()
            if self.command == "HEAD":
                return
            if fault and kind == "drip":
                for at in range(0, length, -(-length // 4)):
                    self.wfile.write(content[at : at - (-length // 4)])
                    self.wfile.flush()
                    time.sleep(fault.seconds / 4)
                return
            self.wfile.write(content[: length // 2] if kind == "cut" else content)
            self.close_connection = self.close_connection or kind in ("cut", "short", "long", "stump")

        def log_message(self, *_: object) -> None:
            """Tests print no requests."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            """A client that went away is no news."""

    return Server(("127.0.0.1", 0), Handler)
