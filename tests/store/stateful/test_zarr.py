"""Zarr's own state machine of a store, on the places where kdcache keeps its files.

kdcache has no class of zarr-python's Store: readers go to the shards themselves, and the writer encodes in memory. An
adapter says what a place does in words of that class.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import pytest
from hypothesis.stateful import run_state_machine_as_test
from stateful.test_life import SETTINGS
from stateful.weather import patient
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.testing.stateful import ZarrStoreStateMachine

from kdcache.store.backend.base import Place
from kdcache.store.backend.object_store import Bucket
from kdcache.store.backend.open import open_place


class PlaceStore(Store):
    """A place as a store of Zarr. A place lists nothing: a folder is walked, and a bucket is asked as `sizes` asks."""

    supports_writes = supports_deletes = supports_listing = True

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.place = place

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PlaceStore) and str(self.place) == str(other.place)

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        try:
            content = self.place.read(key)
        except FileNotFoundError:
            return None
        match byte_range:
            case RangeByteRequest(start, end):
                content = content[start:end]
            case OffsetByteRequest(offset):
                content = content[offset:]
            case SuffixByteRequest(suffix):
                content = content[-suffix:]
        return prototype.buffer.from_bytes(content)

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        return [await self.get(key, prototype, byte_range) for key, byte_range in key_ranges]

    async def exists(self, key: str) -> bool:
        return self.place.exists(key)

    async def set(self, key: str, value: Buffer) -> None:
        self.place.publish(key, value.to_bytes())

    async def delete(self, key: str) -> None:
        self.place.remove(key)

    async def list(self) -> AsyncIterator[str]:
        async for key in self.list_prefix(""):
            yield key

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        place = self.place
        found = dict(place.listing()) if isinstance(place, Bucket) else _files(place.folder)
        for key in found:
            if key.startswith(prefix):
                yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        below = f"{prefix.rstrip('/')}/".lstrip("/")
        for name in dict.fromkeys([key.removeprefix(below).split("/")[0] async for key in self.list_prefix(below)]):
            yield name


def _files(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize("where", ["folder", "bucket"])
def test_zarr_finds_no_fault_in_a_place(where, s3, tmp_path) -> None:
    place = open_place(tmp_path / "store" if where == "folder" else s3.address())
    with patient():
        run_state_machine_as_test(lambda: ZarrStoreStateMachine(PlaceStore(place)), settings=SETTINGS)
