"""A store onto the Hub and back, by the client's own requests, against a stand-in on loopback."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hub_server import USER, File

from kdcache.errors import StoreError
from kdcache.sharing import HubAddress, hub_address, opened, push, push_store
from kdcache.store import CopyChanges, copy_store, open_cache, verify_files

# The client sends LFS objects in a way that its own HTTP library calls old.
pytestmark = pytest.mark.filterwarnings("ignore:Use .content=:DeprecationWarning")
NAME = f"{USER}/targets"
PLACE = f"hf://datasets/{NAME}"


def pull(place, destination):
    with opened(place) as cache:
        copy_store(cache, destination)
    return destination


@pytest.mark.parametrize("pixels", ["source", "stored"])
def test_a_store_comes_back_byte_for_byte(hub, made, tree, tmp_path, pixels) -> None:
    source = open_cache(made / "store.zarr")
    same = tmp_path / "same.zarr"
    copy_store(source, same, CopyChanges(pixels=pixels))
    pushed = push_store(source, hub_address(PLACE), CopyChanges(pixels=pixels), licence="cc-by-4.0")
    files = hub.files(NAME)
    assert {key: files[key] for key in tree(same)} == tree(same)
    assert set(files) - set(tree(same)) == {"README.md", ".gitattributes"}
    back = pull(PLACE, tmp_path / "back.zarr")
    assert tree(back) == tree(same)
    assert verify_files(back, seal=pushed.seal).damaged == []
    assert not list((tmp_path / "copies").rglob("*.json"))


def test_a_push_in_several_commits_goes_on_behind_the_last(hub, made, tree, monkeypatch) -> None:
    """The card comes first and the seal last; what was committed is not asked for again."""
    monkeypatch.setattr(push, "FILES_A_COMMIT", 5)
    source, address = open_cache(made / "store.zarr"), hub_address(PLACE)
    hub.most_commits = 4
    with pytest.raises(StoreError, match="500, out of order"):
        push_store(source, address, licence="mit")
    assert set(hub.repositories[NAME].commits[1][1]) >= {"README.md", ".gitattributes"}
    committed = set(hub.files(NAME))
    assert "complete.json" not in committed
    hub.most_commits = None
    seen = []
    pushed = push_store(source, address, licence="mit", progress=lambda *step: seen.append(step))
    assert pushed.files - pushed.sent == len(committed - {"README.md", ".gitattributes"}) > 5
    assert seen[-1] == ("sending", pushed.files, pushed.files)
    before, after = (hub.repositories[NAME].commits[place][1] for place in (-2, -1))
    assert "complete.json" in after.keys() - before.keys()
    assert all(len(one.keys() - other.keys()) <= 5 for (_, other), (_, one) in pairwise(hub.repositories[NAME].commits))


def test_a_card_that_was_edited_stays(hub, made) -> None:
    source, address = open_cache(made / "store.zarr"), hub_address(PLACE)
    push_store(source, address, licence="mit")
    hub.repositories[NAME].add({"README.md": File(b"# Ours\n", None)})
    push_store(source, address, licence="cc-by-4.0")
    assert hub.files(NAME)["README.md"] == b"# Ours\n"


@pytest.mark.parametrize("shard_records", [1, 7, 12])
def test_limits_of_the_hub(made, shard_records) -> None:
    """The remedy names the least shards that fit; one record less is refused again."""
    manifest = open_cache(made / "store.zarr").manifest

    def of(shard_records, records=120_000):
        build = manifest.build.model_copy(update={"shard_records": shard_records})
        return manifest.model_copy(update={"records": records, "build": build})

    with pytest.raises(StoreError, match="fewer than 100,000 files") as refused:
        push.check_counts(of(shard_records))
    least = int(refused.value.remedy.split()[-1])
    push.check_counts(of(least))
    with pytest.raises(StoreError, match="fewer than 100,000 files"):
        push.check_counts(of(least - 1))


def test_a_file_that_is_too_large(hub, made, monkeypatch) -> None:
    monkeypatch.setattr(push, "MOST_FILE_BYTES", 4000)
    with pytest.raises(StoreError, match="has fewer than 4,000 bytes"):
        push_store(open_cache(made / "store.zarr"), hub_address(PLACE), licence="mit")
    assert hub.repositories == {}


@pytest.mark.parametrize("text", ["store.zarr", "s3://bucket/store", "data/hf:/x", Path("a")])
def test_places_that_are_not_on_the_hub(text) -> None:
    assert hub_address(text) is None


def test_addresses() -> None:
    assert hub_address("hf://datasets/me/a.b-c_d/") == HubAddress("me/a.b-c_d")
    assert str(hub_address("hf://datasets/me/x@refs/pr/1")) == "hf://datasets/me/x@refs/pr/1"
