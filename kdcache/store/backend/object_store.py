"""A store in an object store (S3, Google Cloud, Azure), through obstore: the extra `remote`.

Objects appear whole or not at all, and stay; there are no locks, so workers must be numbered (see writer.py). Reads
fetch whole files into a bounded folder of copies (mirror.py): a shard costs one request, not two per record.
Credentials, region and endpoint come from the environment alone (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, GOOGLE_..., ...).

obstore itself tries again after 5xx answers and lost connections, and goes on where a body broke off; a body that is
not what the ledger says is fetched again here.
"""

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import urlsplit

from kdcache.errors import StoreError
from kdcache.store.backend.base import MAX_JSON_BYTES, MAX_SEALED_BYTES, Place, Release
from kdcache.store.backend.mirror import Mirror

try:
    import obstore
    from obstore import exceptions
    from obstore.store import from_url
except ImportError as error:
    raise StoreError(
        "stores in object stores need obstore",
        received=f"it cannot be imported ({error})",
        remedy="in a clone of kdcache: pip install '.[remote]'",
    ) from error

T = TypeVar("T")
SCHEMES = ("s3", "gs", "az")
ATTEMPTS = 5
"""At a whole body. Each is several of obstore's own, which see to what a connection does."""
PAUSE_SECONDS = 0.4  # after the first attempt; doubled after each
BACKOFF: Any = {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=10), "base": 2}
RETRIES: Any = {"max_retries": 8, "retry_timeout": timedelta(seconds=120), "backoff": BACKOFF}
CLIENT: Any = {"connect_timeout": "10s", "read_timeout": "60s", "timeout": "1h"}
_FEW = 4  # files that are requested one by one; more are listed with the whole store
_CHUNK_BYTES = 2**23
_NO_BUCKET = re.compile("NoSuchBucket|ContainerNotFound|bucket does not exist")
_MACHINE_ROLE = re.compile(r"169\.254\.\d+\.\d+|metadata\.google\.internal|/latest/api/token")
_users = set[int]()  # processes that have a client, this one or those that it was forked from


class Bucket(Place):
    """A store below an address such as s3://bucket/prefix.

    Args:
        mirror: where copies for reading are kept.
        version: what distinguishes the content from that of another store that was there before; see `at`.
    Raises: StoreError for an address that is not understood.
    """

    remote = True

    def __init__(self, address: str, mirror: Mirror, version: str = "") -> None:
        parts = urlsplit(address)
        if parts.scheme not in SCHEMES or not parts.netloc or "@" in parts.netloc or parts.query or parts.fragment:
            raise StoreError(
                "the address of a store is s3://BUCKET/PREFIX, gs:// and az:// likewise; credentials are no part of it",
                received=f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}",
                remedy="put credentials, region and endpoint into the environment, as for the provider's own tools",
            )
        self._address = address.rstrip("/")
        self._mirror = mirror
        self._version = version
        identity = hashlib.sha256(f"{self._address}\n{version}".encode()).hexdigest()[:16]
        self.folder = mirror.folder / f"{Path(parts.path).name or parts.netloc}-{identity}"

    def __str__(self) -> str:
        return self._address

    def __reduce__(self) -> tuple[object, ...]:
        return Bucket, (self._address, self._mirror, self._version)

    def at(self, version: str) -> "Bucket":
        return Bucket(self._address, self._mirror, version)

    @property
    def room(self) -> int:
        return self._mirror.most()

    @property
    def _client(self) -> Any:
        """obstore's client. Its threads survive no fork: without them a request would wait for ever."""
        if _users and os.getpid() not in _users:
            raise StoreError(
                "a process that reads a remote store is started, not forked",
                received=f"{self} in a process that was forked from one that has read from an object store",
                remedy="use threads, or worker processes by forkserver or spawn (multiprocessing_context=...)",
            )
        _users.add(os.getpid())
        return self._connected

    @cached_property
    def _connected(self) -> Any:
        endpoints = (os.environ.get(name, "") for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT"))
        plain = any(endpoint.startswith("http://") for endpoint in endpoints)  # what the user's own environment says
        options: Any = {**CLIENT, "allow_http": True} if plain else CLIENT
        with self._answers():
            return from_url(self._address, client_options=options, retry_config=RETRIES)

    @contextmanager
    def _answers(self, key: str = "") -> Iterator[None]:
        """Turn what the object store refuses into an error with a remedy.

        The original is not kept as its cause: an answer may repeat the request, credentials too.
        """
        try:
            yield
        except (exceptions.BaseError, FileNotFoundError) as error:
            text = str(error)
            if isinstance(error, FileNotFoundError) and not _NO_BUCKET.search(text):
                raise FileNotFoundError(f"{self.describe(key)} does not exist") from None
            raise StoreError(
                "an object store must answer", received=f"{self}: {_summary(text)}", remedy=_remedy(text)
            ) from None

    def _get(self, key: str, take: Callable[[Any], T]) -> T:
        """The result of `take` for an object; fetched again when its body breaks off, or `take` raises ValueError."""
        for attempt in range(1, ATTEMPTS + 1):
            with self._answers(key):
                result = obstore.get(self._client, key)
                try:
                    return take(result)
                except (exceptions.BaseError, ValueError):
                    if attempt == ATTEMPTS:
                        raise
            time.sleep(PAUSE_SECONDS * 2 ** (attempt - 1))
        raise AssertionError

    def read(self, key: str, most: int = MAX_JSON_BYTES) -> bytes:
        result = self._get(key, lambda result: _read(result, most))
        if isinstance(result, int):
            raise ValueError(f"{result} bytes are more than the {most} that it may have")
        return result

    def read_verified(self, key: str, sha256: str) -> bytes:
        for _ in range(2):  # a copy that was damaged here is fetched again, and then checked on its way
            with os.fdopen(self.open(key, None, sha256), "rb") as file:
                content = file.read(MAX_SEALED_BYTES)
            if hashlib.sha256(content).hexdigest() == sha256:
                return content
            self.forget(key)
        raise ValueError("its copy on this machine is not what was fetched")

    def sizes(self, keys: Iterable[str]) -> Iterator[int | None]:
        wanted = list(keys)
        if len(wanted) <= _FEW:
            yield from map(self._size, wanted)
            return
        listed = dict(self._listed())
        yield from map(listed.get, wanted)

    def _size(self, key: str) -> int | None:
        try:
            with self._answers(key):
                return int(obstore.head(self._client, key)["size"])
        except FileNotFoundError:
            return None

    def _listed(self) -> Iterator[tuple[str, int]]:
        """Key and bytes of every object of the store."""
        with self._answers():
            for page in obstore.list(self._client, chunk_size=1000):
                yield from ((meta["path"], meta["size"]) for meta in page)

    def digest(self, key: str) -> str | None:
        def digest(result: Any) -> str:
            sink = hashlib.sha256()
            for part in result.stream(min_chunk_size=_CHUNK_BYTES):
                sink.update(part)
            return sink.hexdigest()

        try:
            return self._get(key, digest)
        except FileNotFoundError:
            return None

    def open(self, key: str, size: int | None = None, sha256: str | None = None) -> int:
        return self._mirror.open(self.folder, key, size, lambda file: self._download(key, size, sha256, file))

    def forget(self, key: str) -> bool:
        return self._mirror.forget(self.folder, key)

    def _download(self, key: str, size: int | None, sha256: str | None, file: BinaryIO) -> int:
        """Fetch an object into a file. Returns its bytes. Raises ValueError when it is not what the ledger says."""

        def take(result: Any) -> int:
            file.seek(0)
            sink, count = hashlib.sha256(), 0
            for part in result.stream(min_chunk_size=_CHUNK_BYTES):
                sink.update(part)
                count += file.write(part)
            if size not in (None, count):
                raise ValueError(f"{count} bytes arrive, the ledger says {size}")
            if sha256 not in (None, sink.hexdigest()):
                raise ValueError("its bytes are not those that were written")
            file.truncate()
            return count

        return self._get(key, take)

    def begin(self, files: Mapping[str, bytes]) -> None:
        """Write the metadata, zarr.json last, unless it is there. Raises StoreError for an object of something else."""
        if self._size("zarr.json") is not None:
            return
        present = set[str]()
        for key, _ in self._listed():
            if key == "zarr.json":  # just now
                return
            if key not in files or self.read(key) != files[key]:
                raise StoreError(
                    "--out is a place without anything else, or a store to continue",
                    received=f"{self.describe(key)} is no part of this store",
                    remedy="give another --out, or empty it yourself if nothing in it is needed",
                )
            present.add(key)
        for key, content in files.items():  # zarr.json, which makes it a store, is the last
            if key not in present:
                self.publish_exclusive(key, content)

    def publish(self, key: str, content: bytes) -> None:
        with self._answers(key):
            obstore.put(self._client, key, content)

    def publish_exclusive(self, key: str, content: bytes) -> bool:
        with self._answers(key):
            try:
                obstore.put(self._client, key, content, mode="create", use_multipart=False)
            except exceptions.AlreadyExistsError:
                return False
        return True

    def remove(self, key: str) -> None:
        try:
            with self._answers(key):
                obstore.delete(self._client, key)
        except FileNotFoundError:
            return

    def claim(self, shard: int, keys: Iterable[str]) -> Release | None:
        return lambda: None

    def tidy(self) -> None:
        return


def _read(result: Any, most: int) -> bytes | int:
    """The body, or its length when that is more than `most`."""
    size = int(result.meta["size"])
    return bytes(result.bytes()) if size <= most else size


def _summary(text: str) -> str:
    """The first line of an answer, without its body and what follows a `?`: they may repeat credentials."""
    first = re.sub(r"\?\S*", "", text.partition("\n")[0].partition("<")[0]).strip(" :")
    code = re.search(r"<Code>(\w{1,60})</Code>", text)
    return f"{first[:300]} ({code[1]})" if code else first[:300]


def _remedy(text: str) -> str:
    if _NO_BUCKET.search(text):
        return "check the name of the bucket, or make it: kdcache makes none"
    if _MACHINE_ROLE.search(text):
        return (
            "put credentials into the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, GOOGLE_..., AZURE_...):"
            " there are none, and this machine has no role of its own"
        )
    return "check address, network and the credentials in the environment; the same command goes on"
