"""A flag per sample as text: what was written is read, and nothing else is."""

from __future__ import annotations

import base64
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcache.errors import CorruptError
from kdcache.store.format.flags import pack_flags, unpack_flags


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_flags_go_through_text(flags: list[bool]) -> None:
    assert unpack_flags(pack_flags(np.array(flags)), len(flags), "here").tolist() == flags


def test_the_first_sample_is_the_lowest_bit() -> None:
    flags = np.zeros(10, np.bool_)
    flags[[0, 9]] = True
    assert zlib.decompress(base64.b64decode(pack_flags(flags))) == bytes([1, 2])


def test_equal_flags_take_no_room() -> None:
    assert len(pack_flags(np.ones(1_000_000, np.bool_))) < 300


@pytest.mark.parametrize(
    "text",
    [
        pack_flags(np.ones(17, np.bool_)),
        pack_flags(np.ones(8, np.bool_)),
        pack_flags(np.ones(100_000_000, np.bool_)),  # inflates to 12.5 MB
        pack_flags(np.ones(16, np.bool_))[:-4],
        base64.b64encode(b"no zlib").decode(),
        "abc",
    ],
    ids=["more", "fewer", "a bomb", "cut short", "not compressed", "no Base64"],
)
def test_a_text_of_something_else_is_refused(text: str) -> None:
    with pytest.raises(CorruptError, match="which samples had labels") as caught:
        unpack_flags(text, 16, "s.zarr")
    assert "s.zarr" in caught.value.problem
