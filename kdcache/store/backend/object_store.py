"""A cache in an object store (S3, Google Cloud, Azure), through obstore: the extra `remote`.

Objects appear completely or not at all. There are no locks, so workers must be numbered (see writer.py). Reads fetch
whole files into a bounded folder of copies (mirror.py): a shard costs one request instead of two per record.
Credentials, region and endpoint come from the environment only (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, GOOGLE_..., ...).

obstore repeats a request after a 5xx answer or a lost connection, and continues an interrupted body. This module also
retries a busy server until `retry_timeout` is over, and never trusts or rejects a body at first sight. A body counts
if it has the ledger's digest, or the MD5 that the server gives as its ETag, or if it arrives twice.
"""

import hashlib
import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import IO, Any, TypeVar
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
        f"Cannot import obstore, which caches in object stores need ({error})",
        fix="Install it in a clone of kdcache: pip install '.[remote]'",
    ) from error

T = TypeVar("T")
SCHEMES = ("s3", "gs", "az")
ATTEMPTS = 5
"""Downloads of an object before its bytes count as wrong. Each may be several requests of obstore."""
PAUSE_SECONDS = 0.4  # after the first fetch; doubled after each
BACKOFF: Any = {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=10), "base": 2}
RETRIES: Any = {"max_retries": 8, "retry_timeout": timedelta(seconds=120), "backoff": BACKOFF}
CLIENT: Any = {"connect_timeout": "10s", "read_timeout": "60s", "timeout": "1h"}
_FEW = 4  # files that are requested one by one; more are listed with the whole store
CHUNK_BYTES = 2**23
_BUSY = re.compile(r"\b(429|5\d\d) [A-Z]|status code: (429|5\d\d)|SlowDown|InternalError")
_MD5 = re.compile('"?([0-9a-f]{32})"?')
"""An ETag that is the MD5 of its object, unless the server encrypts with keys of its own (SSE-KMS)."""
_NO_BUCKET = re.compile("NoSuchBucket|ContainerNotFound|bucket does not exist")
_MACHINE_ROLE = re.compile(r"169\.254\.\d+\.\d+|metadata\.google\.internal|/latest/api/token")
_users = set[int]()  # processes that have a client, this one or those that it was forked from


class Bucket(Place):
    """A cache's location in an object store, such as s3://bucket/prefix. A file's `key` is its path below that address.

    Args:
        address: s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or az://CONTAINER/PREFIX.
        mirror: the folder for local copies of files that are read.
        version: digest of the cache at this address. Copies of an earlier cache with another version are not used.
    Raises: StoreError for an invalid address.
    """

    remote = True

    def __init__(self, address: str, mirror: Mirror, version: str = "") -> None:
        parts = urlsplit(address)
        if parts.scheme not in SCHEMES or not parts.netloc or "@" in parts.netloc or parts.query or parts.fragment:
            raise StoreError(
                f"Invalid cache address: {parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}",
                fix="Use s3://BUCKET/PREFIX, gs:// or az://. Put credentials, region and endpoint into the "
                "environment, as for the provider's own tools.",
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
        """Return this address for reading the cache whose ledger has the digest `version`.

        Local copies of an earlier cache at the same address are then not used.
        """
        return Bucket(self._address, self._mirror, version)

    @property
    def room(self) -> int:
        """The maximum size in bytes of all local copies of remote files."""
        return self._mirror.most()

    @property
    def _client(self) -> Any:
        """The obstore client of this process. Its threads do not survive a fork: a request would then wait for ever."""
        if _users and os.getpid() not in _users:
            raise StoreError(
                f"Cannot read {self} in a process forked from one that has read from an object store",
                fix="Use threads, or start workers with forkserver or spawn (multiprocessing_context=...).",
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
        """Turn an error of the object store into one of kdcache's errors with a fix.

        The original error is not its cause, because it may contain the request with its credentials.
        """
        try:
            yield
        except (exceptions.BaseError, FileNotFoundError) as error:
            text = str(error)
            if isinstance(error, FileNotFoundError) and not _NO_BUCKET.search(text):
                raise FileNotFoundError(f"{self.describe(key)} does not exist") from None
            raise StoreError(f"Cannot reach {self}: {_summary(text)}", fix=_fix(text)) from None

    def _ask(self, key: str, request: Callable[[], T]) -> T:
        """Send a request and return its answer. While the server is busy, repeat the request for up to 2 minutes."""
        until = time.monotonic() + RETRIES["retry_timeout"].total_seconds()
        while True:
            with self._answers(key):
                try:
                    return request()
                except exceptions.BaseError as error:
                    if not _BUSY.search(str(error)) or time.monotonic() > until:
                        raise
            time.sleep(PAUSE_SECONDS)

    def _fetch(self, key: str, file: IO[bytes], sha256: str | None = None, most: int | None = None) -> str:
        """Fetch an object into a file, repeatedly until its bytes are proven. Returns their SHA-256.

        With `sha256` the bytes must have this digest. Without it the server's ETag proves them, or a second equal
        fetch.

        Raises: FileNotFoundError; ValueError for more than `most` bytes in every fetch, and for wrong bytes that arrive
            twice; StoreError for bytes that differ in every fetch.
        """
        arrived, too_large = Counter[str](), Counter[str]()
        for left in reversed(range(ATTEMPTS)):
            digest = None
            with self._answers(key):
                try:
                    digest, tag = self._receive(key, file, most)
                except ValueError as error:
                    too_large[str(error)] += 1
                    if too_large[str(error)] == ATTEMPTS:  # every answer says so
                        raise
                except (exceptions.BaseError, FileNotFoundError) as error:
                    # What the ledger lists is there: one answer does not show that it is not.
                    if (not left and not too_large) or (sha256 is None and isinstance(error, FileNotFoundError)):
                        raise
            if digest is not None:
                arrived[digest] += 1
                tagged = None if digest == sha256 or tag is None else tag[1] == _md5(file)
                if digest == sha256 or (sha256 is None and tagged):
                    return digest
                if arrived[digest] > 1 and (not left or tagged is not False):  # it is what the server has
                    if sha256 is None:
                        return digest
                    raise ValueError("its bytes are not those that were written, in two fetches")
            if left and (digest is None or arrived[digest] == 1):
                time.sleep(PAUSE_SECONDS * 2 ** (ATTEMPTS - 1 - left))
        raise StoreError(
            f"Cannot fetch {self.describe(key)}: {ATTEMPTS} fetches gave different bytes, none with the server's "
            "checksum",
            fix="Check the network and any proxy on the way, then run the same command again. What the server has "
            "need not be damaged.",
        )

    def _receive(self, key: str, file: IO[bytes], most: int | None) -> tuple[str, re.Match[str] | None]:
        """Download an object into a file. Returns its SHA-256, and its ETag if that may be its MD5."""
        result = self._ask(key, lambda: obstore.get(self._client, key))
        size = int(result.meta["size"])
        if most is not None and size > most:
            raise ValueError(f"{size} bytes are more than the {most} that it may have")
        file.seek(0)
        sink = hashlib.sha256()
        for part in result.stream(min_chunk_size=CHUNK_BYTES):
            sink.update(part)
            file.write(part)
        file.truncate()
        return sink.hexdigest(), _MD5.fullmatch(result.meta["e_tag"] or "")

    def read(self, key: str, most: int = MAX_JSON_BYTES, sha256: str | None = None) -> bytes:
        """Download the object `key` and return its content after checking that it arrived unchanged.

        Args:
            key: path of the object below the address.
            most: the maximum size in bytes.
            sha256: the expected digest. None checks the server's MD5, or that two downloads are equal.
        Raises: FileNotFoundError if the object is missing; ValueError if it has more than `most` bytes or another
            digest; StoreError if the store cannot be reached.
        """
        file = BytesIO()
        self._fetch(key, file, sha256, most)
        return file.getvalue()

    def read_verified(self, key: str, sha256: str) -> bytes:
        """Return the content of the object `key` from its local copy, after checking that its SHA-256 is `sha256`.

        The object is downloaded if there is no copy, and once more if the copy is damaged.

        Raises: ValueError if the digest differs; StoreError if the store cannot be reached.
        """
        for _ in range(2):  # a copy that was damaged here is fetched again, and then checked on its way
            with os.fdopen(self.open(key, None, sha256), "rb") as file:
                content = file.read(MAX_SEALED_BYTES)
            if hashlib.sha256(content).hexdigest() == sha256:
                return content
            self.forget(key)
        raise ValueError("its copy on this machine is not what was fetched")

    def sizes(self, keys: Iterable[str]) -> Iterator[int | None]:
        """Yield each object's size in bytes in the order of `keys`, or None for a missing object.

        Up to 4 keys take one request each. More keys take one listing of the whole cache.
        """
        requested = list(keys)
        if len(requested) <= _FEW:
            yield from map(self._size, requested)
            return
        listed = dict(self.listing())
        yield from map(listed.get, requested)

    def _size(self, key: str) -> int | None:
        try:
            return int(self._ask(key, lambda: obstore.head(self._client, key))["size"])
        except FileNotFoundError:
            return None

    def listing(self) -> Iterator[tuple[str, int]]:
        """Yield the key and the size in bytes of every object of the cache."""
        for page in self._ask("", lambda: list(obstore.list(self._client, chunk_size=1000))):
            yield from ((meta["path"], meta["size"]) for meta in page)

    def digest(self, key: str) -> str | None:
        """Download the object `key` and return its SHA-256 as 64 hexadecimal digits.

        Returns None if the object is missing.
        """
        with tempfile.SpooledTemporaryFile(CHUNK_BYTES) as file:
            try:
                return self._fetch(key, file)
            except FileNotFoundError:
                return None

    def open(self, key: str, size: int | None = None, sha256: str | None = None) -> int:
        """Open the local copy of the object `key` and return its file descriptor. Download the object first if needed.

        Args:
            key: path of the object below the address.
            size: the object's size in bytes, or None if unknown. A copy of another size is downloaded again.
            sha256: the digest that a download must have, or None if unknown.
        Raises: FileNotFoundError if the object is missing. ValueError if the downloaded bytes are wrong. StoreError if
            the store cannot be reached or the local disk is full.
        """
        return self._mirror.open(self.folder, key, size, lambda file: self._download(key, sha256, file))

    def forget(self, key: str) -> bool:
        """Delete the local copy of the object `key`. Return False if there is no copy."""
        return self._mirror.forget(self.folder, key)

    def _download(self, key: str, sha256: str | None, file: IO[bytes]) -> int:
        """Fetch an object into a file. Returns its size in bytes. Raises: as `_fetch`."""
        self._fetch(key, file, sha256)
        return file.seek(0, os.SEEK_END)

    def begin(self, files: Mapping[str, bytes]) -> None:
        """Upload a cache's metadata files, zarr.json last. If the address already has a zarr.json, do nothing.

        `files` maps keys to contents, in the order of the upload. Files that are already there with this content are
        kept.

        Raises: StoreError if there is no zarr.json, but another object or a file with other content.
        """
        if self._size("zarr.json") is not None:
            return
        present = set[str]()
        for key, _ in self.listing():
            if key == "zarr.json":  # just now
                return
            if key not in files or self.read(key) != files[key]:
                raise StoreError(
                    f"Cannot write a cache into {self}: {self.describe(key)} is not part of it",
                    fix="Give another --out, or empty it yourself if nothing in it is needed.",
                )
            present.add(key)
        for key, content in files.items():  # zarr.json, which makes it a store, is the last
            if key not in present:
                self.publish_exclusive(key, content)

    def publish(self, key: str, content: bytes) -> None:
        """Upload `content` as the object `key` in one request. It appears completely or not at all."""
        self._ask(key, lambda: obstore.put(self._client, key, content))

    def publish_exclusive(self, key: str, content: bytes) -> bool:
        """Upload `content` as the object `key` only if it does not exist. Return True if this call created it."""

        def create() -> bool:
            try:
                obstore.put(self._client, key, content, mode="create", use_multipart=False)
            except exceptions.AlreadyExistsError:
                return False
            return True

        return self._ask(key, create)

    def remove(self, key: str) -> None:
        """Delete the object `key` if it exists."""
        with suppress(FileNotFoundError):
            self._ask(key, lambda: obstore.delete(self._client, key))

    def claim(self, shard: int, keys: Iterable[str]) -> Release | None:
        """Return a function that does nothing, because object stores have no locks.

        `shard` and `keys` are unused. Workers on an object store must be numbered, so that no two of them write the
        same shard.
        """
        return lambda: None

    def tidy(self) -> None:
        """Do nothing, because interrupted uploads leave no partial objects."""
        return


def _md5(file: IO[bytes]) -> str:
    file.seek(0)
    return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()  # type: ignore[arg-type]


def _summary(text: str) -> str:
    """Return the first line of an answer without its query string, which may contain credentials."""
    first = re.sub(r"\?\S*", "", text.partition("\n")[0].partition("<")[0]).strip(" :")
    code = re.search(r"<Code>(\w{1,60})</Code>", text)
    return f"{first[:300]} ({code[1]})" if code else first[:300]


def _fix(text: str) -> str:
    if _NO_BUCKET.search(text):
        return "Check the name of the bucket, or create it: kdcache creates none."
    if _MACHINE_ROLE.search(text):
        return (
            "Put credentials into the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, GOOGLE_..., "
            "AZURE_...). "
            "There are none, and this machine does not have a role."
        )
    return "Check address, network and the credentials in the environment, then repeat the command: it continues."
