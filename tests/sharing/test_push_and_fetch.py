"""A store onto the Hub and back, by the client's own requests, against a stand-in on loopback."""

from __future__ import annotations

from pathlib import Path

import pytest
from hub_server import USER, File, Repository

from kdcache.errors import StoreError
from kdcache.sharing import HubAddress, hub_address, opened, push_store
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


@pytest.mark.parametrize("commits", [1, 2])
def test_an_interrupted_push_goes_on_and_is_no_store_before(hub, made, tmp_path, commits) -> None:
    """The card comes first and the seal last."""
    source, address = open_cache(made / "store.zarr"), hub_address(PLACE)
    hub.most_commits = commits
    with pytest.raises(StoreError, match="500, out of order"):
        push_store(source, address, licence="mit")
    assert "README.md" in hub.files(NAME)
    assert ("zarr.json" in hub.files(NAME)) == (commits == 2)
    assert "complete.json" not in hub.files(NAME)
    with pytest.raises(StoreError, match=r"has no complete\.json"):
        pull(PLACE, tmp_path / "early.zarr")
    hub.most_commits = None
    pushed = push_store(source, address, licence="mit")
    assert (pushed.files - pushed.sent > 5) == (commits == 2)
    before, after = (hub.repositories[NAME].commits[place][1] for place in (-2, -1))
    assert after.keys() - before.keys() == {"complete.json"}


def test_what_did_not_arrive_is_noticed_after_a_push(hub, made, monkeypatch) -> None:
    """As when another client removes a file meanwhile."""
    add = Repository.add
    monkeypatch.setattr(
        Repository,
        "add",
        lambda own, files: add(own, {key: file for key, file in files.items() if key != "ledger/00000000.json"}),
    )
    with pytest.raises(
        StoreError, match=r"Cannot find ledger/00000000\.json in hf://datasets/me/targets after the push"
    ):
        push_store(open_cache(made / "store.zarr"), hub_address(PLACE), licence="mit")


def test_a_card_that_was_edited_stays(hub, made) -> None:
    source, address = open_cache(made / "store.zarr"), hub_address(PLACE)
    push_store(source, address, licence="mit")
    hub.repositories[NAME].add({"README.md": File(b"# Ours\n", None)})
    push_store(source, address, licence="cc-by-4.0")
    assert hub.files(NAME)["README.md"] == b"# Ours\n"


def test_an_error_of_the_block_is_not_the_hub_s(hub, made) -> None:
    push_store(open_cache(made / "store.zarr"), hub_address(PLACE), licence="mit")
    with pytest.raises(ValueError, match="mine"), opened(PLACE):
        raise ValueError("mine")


@pytest.mark.parametrize("text", ["store.zarr", "s3://bucket/store", "data/hf:/x", Path("a")])
def test_places_that_are_not_on_the_hub(text) -> None:
    assert hub_address(text) is None


def test_addresses() -> None:
    assert hub_address("hf://datasets/me/a.b-c_d/") == HubAddress("me/a.b-c_d")
    assert str(hub_address("hf://datasets/me/x@refs/pr/1")) == "hf://datasets/me/x@refs/pr/1"
