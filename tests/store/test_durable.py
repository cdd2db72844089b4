"""Files that appear whole or not at all, and a full disk by whatever name its error has."""

from __future__ import annotations

import errno
import json
import os

import pytest

from kdcache.errors import StoreError
from kdcache.store.durable import disk_space_errors, file_digest, write_json_durably


def test_json_is_whole_or_not_there(tmp_path) -> None:
    path = tmp_path / "a.json"
    write_json_durably(path, {"b": 1, "a": [1, 2]})
    assert json.loads(path.read_text()) == {"a": [1, 2], "b": 1}
    digest = file_digest(path)
    write_json_durably(path, {"a": [1, 2], "b": 1})
    assert file_digest(path) == digest
    with pytest.raises(TypeError):
        write_json_durably(path, {"a": {1, 2}})  # after "a" was begun
    assert file_digest(path) == digest
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
