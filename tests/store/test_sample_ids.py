"""The index of ids, which comes from elsewhere like all of a store."""

from __future__ import annotations

import pickle
import tracemalloc

import google_crc32c
import numpy as np
import pytest
from numcodecs import zstd

from kdcache.store import Manifest
from kdcache.store.backend.local import Folder
from kdcache.store.sample_ids import SampleIds, read_ids

COUNT = 2**18


IDS = {
    "one character": lambda number: "abcdefgh"[number % 8],
    "short and distinct": lambda number: f"{number:x}",
    "an emoji and letters": lambda number: f"\N{LEDGER}{number:x}",
}


@pytest.mark.parametrize("kind", IDS)
def test_reading_takes_at_most_three_times_the_index(kind: str, plan, tmp_path) -> None:
    """Of very many short ids, each of which would be a string of some fifty bytes."""
    manifest: Manifest = plan().manifest
    dataset = manifest.dataset.model_copy(update={"samples": COUNT})
    encoded = [IDS[kind](number).encode() for number in range(COUNT)]
    index = {
        "id_ends": np.cumsum([len(id) for id in encoded], dtype="<i8"),
        "id_bytes": np.frombuffer(b"".join(encoded), np.uint8),
    }
    for name, numbers in index.items():
        frame = bytes(zstd.compress(numbers.tobytes()))
        file = tmp_path / f"samples/{name}/c/0"
        file.parent.mkdir(parents=True)
        file.write_bytes(frame + google_crc32c.value(frame).to_bytes(4, "little"))
    tracemalloc.start()
    try:
        ids = read_ids(Folder(tmp_path), manifest.model_copy(update={"dataset": dataset}))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= 3 * sum(numbers.nbytes for numbers in index.values())
    assert len(ids) == COUNT
    assert [ids[0], ids[1], ids[-1]] == [IDS[kind](number) for number in (0, 1, COUNT - 1)]


def test_ids_are_like_a_tuple() -> None:
    names = ("a", "", "\u00e4\u00f6", "last")
    encoded = [name.encode() for name in names]
    ids = SampleIds(b"".join(encoded), np.cumsum([len(name) for name in encoded]))
    assert ids == names
    assert names == ids
    assert ids != names[:-1]
    assert ids != ("a", "", "\u00e4\u00f6", "Last")
    assert (tuple(ids), ids[-1], ids[1:3], list(reversed(ids))) == (names, "last", names[1:3], list(names[::-1]))
    assert "last" in ids
    assert pickle.loads(pickle.dumps(ids)) == ids  # a split reaches worker processes
    with pytest.raises(IndexError):
        ids[4]


def test_ids_are_utf8_one_by_one() -> None:
    """Bytes that are valid as a whole, and cut within a character."""
    with pytest.raises(UnicodeDecodeError):
        SampleIds("\u00e4".encode(), np.array([1, 2]))
