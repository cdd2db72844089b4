"""Files that appear whole or not at all, and a full disk by whatever name its error has."""

from __future__ import annotations

import errno
import os

import pytest

from kdcache.errors import StoreError
from kdcache.store.durable import disk_space_errors, file_digest, write_durably


def test_a_file_is_whole_or_not_there(tmp_path) -> None:
    path = tmp_path / "a.json"
    write_durably(path, b"first")
    digest = file_digest(path)
    with pytest.raises(TypeError):
        write_durably(path, "no bytes")
    assert (path.read_bytes(), file_digest(path)) == (b"first", digest)
    write_durably(path, b"second")
    assert path.read_bytes() == b"second"
    assert os.listdir(tmp_path) == ["a.json"]


def test_other_errors_pass(tmp_path) -> None:
    for error in (OSError(errno.EACCES, "no"), RuntimeError("inline_container"), KeyError("x")):
        with pytest.raises(type(error)) as caught, disk_space_errors(tmp_path / "x"):
            raise error
        assert caught.value is error


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_every_way_to_be_full(tmp_path, number) -> None:
    with pytest.raises(StoreError, match="no space left"), disk_space_errors(tmp_path):
        raise OSError(number, "full")


@pytest.mark.parametrize("how", ["torch", "safetensors"])
def test_writers_that_lose_the_error_number(small_disk, how) -> None:
    import torch
    from safetensors.torch import save_file

    disk = small_disk(100)
    state = {"a": torch.zeros(100_000)}
    write = torch.save if how == "torch" else save_file
    with pytest.raises(StoreError, match="no space left"), disk_space_errors(disk.path / "run"):
        write(state, disk.path / "x")
