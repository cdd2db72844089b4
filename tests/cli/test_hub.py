"""`kdcache copy` onto the Hub and back, and what it refuses, against a stand-in on loopback."""

from __future__ import annotations

import hashlib
import shutil
import sys

import pytest
from hub_server import READ, USER

NAME = f"{USER}/targets"
PLACE = f"hf://datasets/{NAME}"
pytestmark = pytest.mark.filterwarnings("ignore:Use .content=:DeprecationWarning")


@pytest.fixture
def pushed(hub, made, cli):
    """The store of `made`, without its pixels, on the stand-in."""
    ended = cli("copy", made / "store.zarr", PLACE, "--license", "cc-by-4.0")
    assert ended.code == 0, ended.err
    return hub


def test_there_and_back(hub, made, cli, tree, tmp_path) -> None:
    assert cli("copy", made / "store.zarr", tmp_path / "near.zarr", "--pixels", "source").code == 0
    there = cli("copy", made / "store.zarr", PLACE, "--license", "cc-by-4.0", "--private")
    assert there.code == 0, there.err
    assert "pixels source" in there.out
    assert hub.repositories[NAME].private
    assert not any(path.startswith(("pixels/", "labels/")) for path in hub.files(NAME))
    back = cli("copy", PLACE, tmp_path / "back.zarr")
    assert back.code == 0, back.err
    assert tree(tmp_path / "back.zarr") == tree(tmp_path / "near.zarr")
    seal = there.out.split("seal ")[1].split()[0]
    assert "as published" in cli("verify", tmp_path / "back.zarr", "--seal", seal).out
    train = f"train-student --cache {tmp_path}/back.zarr --data {made}/data --model kdcache:tiny --iterations 2"
    assert cli(*train.split(), "--batch-size", 2, "--out", tmp_path / "run").code == 0


def test_there_and_back_by_xet(hub, made, cli, tree, monkeypatch, tmp_path) -> None:
    """As `test_there_and_back`, by the client's own transfer; its storage is hf_xet's, in a folder."""
    hf_xet = pytest.importorskip("hf_xet")
    store = tmp_path / "near.zarr"
    assert cli("copy", made / "store.zarr", store, "--pixels", "source").code == 0
    files = [path for path in sorted(store.rglob("*")) if path.is_file()]
    for path, found in zip(files, hf_xet.hash_files([str(path) for path in files]), strict=True):
        hub.xet_hashes[hashlib.sha256(path.read_bytes()).hexdigest()] = found.hash
    hub.xet_storage = tmp_path / "xet"
    hub.xet_storage.mkdir()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    for words in ((store, PLACE, "--license", "mit"), (PLACE, tmp_path / "back.zarr")):
        ended = cli("copy", *words)
        assert ended.code == 0, ended.err
    assert tree(tmp_path / "back.zarr") == tree(store)
    asked = {path.split("/")[-2] for _, path in hub.requests if "-token/" in path}
    assert asked == {"xet-write-token", "xet-read-token"}
    assert not any(path.startswith("/large/") or "/lfs/" in path for _, path in hub.requests)


def test_again_sends_nothing(pushed, made, cli) -> None:
    commits = len(pushed.repositories[NAME].commits)
    pushed.sent.clear()
    ended = cli("copy", made / "store.zarr", PLACE, "--license", "mit")
    assert ended.code == 0, ended.err
    assert "44 files (44 from before), pixels source" in ended.out
    assert pushed.sent == []
    assert len(pushed.repositories[NAME].commits) == commits


def test_part_of_a_store_and_another_codec(hub, made, cli, tmp_path) -> None:
    words = ["--license", "mit", "--pixels", "stored", "--samples", 2, "--codec", "none"]
    assert cli("copy", made / "store.zarr", PLACE, *words).code == 0
    back = cli("copy", PLACE, tmp_path / "back.zarr", "--codec", "default")
    assert "2 records" in back.out, back.err


def test_a_push_that_is_killed_goes_on(hub, made, cli, spawn, tree, tmp_path) -> None:
    """No object travels twice, and what comes back is the store."""
    words = ["copy", made / "store.zarr", PLACE, "--license", "mit", "--pixels", "stored"]
    hub.hold_after = 6
    hub.lose(spawn(*words))
    before = len(hub.sent)
    assert before >= 6
    assert set(hub.files(NAME)) == {".gitattributes", "README.md"}
    refused = cli("copy", PLACE, tmp_path / "early.zarr")
    assert refused.code == 2
    assert "has no complete.json" in refused.err
    assert cli(*words).code == 0
    assert hub.sent[before:]
    assert not set(hub.sent[:before]) & set(hub.sent[before:])
    assert cli("copy", PLACE, tmp_path / "back.zarr").code == 0
    assert tree(tmp_path / "back.zarr") == tree(made / "store.zarr")


def test_a_pull_that_is_killed_goes_on(hub, made, cli, spawn, tree, tmp_path) -> None:
    """Files that had arrived are not fetched again; those that were on their way are at most the client's threads."""
    assert cli("copy", made / "store.zarr", PLACE, "--license", "mit", "--pixels", "stored").code == 0
    hub.hold_after = 12
    hub.lose(spawn("copy", PLACE, tmp_path / "back.zarr"))
    ended = cli("copy", PLACE, tmp_path / "back.zarr")
    assert ended.code == 0, ended.err
    assert tree(tmp_path / "back.zarr") == tree(made / "store.zarr")
    assert len(hub.served) - len(set(hub.served)) <= 8


WRONG = {
    "no licence": ([], "Missing --license"),
    "a licence that is none": (["--license", "CC BY"], '"license" must be one of'),
    "a licence that the Hub has not": (["--license", "my-own"], '"license" must be one of'),
    "a worker": (["--license", "mit", "--worker", "0/2"], "Leave --worker out"),
    "some of the samples without pixels": (
        ["--license", "mit", "--samples", "2"],
        "Onto the Hub, copy with --pixels stored",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_flags_that_do_not_go_together(hub, made, cli, wrong) -> None:
    words, message = WRONG[wrong]
    ended = cli("copy", made / "store.zarr", PLACE, *words)
    assert ended.code == 2
    assert message in " ".join(ended.err.split())
    assert hub.sent == []
    assert len(hub.repositories.get(NAME, hub.make("x/y", {})).commits) == 1


def test_flags_of_the_hub_elsewhere(made, cli, tmp_path) -> None:
    ended = cli("copy", made / "store.zarr", tmp_path / "copy.zarr", "--license", "mit")
    assert ended.code == 2
    assert "Leave --license out" in ended.err


@pytest.mark.parametrize("place", ["hf://somebody/targets", "hf://datasets/targets", "hf://datasets/a/b/c", "hf://"])
def test_addresses_that_are_none(hub, made, cli, tmp_path, place) -> None:
    for words in ((made / "store.zarr", place, "--license", "mit"), (place, tmp_path / "copy.zarr")):
        ended = cli("copy", *words)
        assert ended.code == 2
        assert "hf://datasets/USER/NAME" in ended.err
    assert hub.requests == []


TOKENS = {
    None: "HF_TOKEN is not set",
    "": "HF_TOKEN is not set",
    READ: "403, You don't have the rights",
    "hf_of_nobody": "401, Invalid",
}


@pytest.mark.parametrize("token", TOKENS, ids=["none", "empty", "of a reader", "invalid"])
def test_tokens_that_may_not_write(hub, made, cli, monkeypatch, token) -> None:
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    ended = cli("copy", made / "store.zarr", PLACE, "--license", "mit")
    assert ended.code == 2
    assert TOKENS[token] in " ".join(ended.err.split())
    assert "hf auth login" in " ".join(ended.err.split())
    assert not token or token not in ended.err
    assert hub.repositories == {}


def test_a_repository_of_somebody_else(hub, made, cli) -> None:
    ended = cli("copy", made / "store.zarr", "hf://datasets/nobody/targets", "--license", "mit")
    assert ended.code == 2
    assert "403, You don't have the rights" in " ".join(ended.err.split())


@pytest.mark.parametrize("held", [{"train.parquet": b"rows"}, {"README.md": b"# Mine\n"}, {"zarr.json": b"{}"}])
def test_a_repository_with_something_else(hub, made, cli, held) -> None:
    """Before the first byte, and what it holds stays."""
    hub.make(NAME, held)
    ended = cli("copy", made / "store.zarr", PLACE, "--license", "mit")
    assert ended.code == 2
    assert f"holds {next(iter(held))}" in " ".join(ended.err.split())
    assert hub.sent == []
    assert len(hub.repositories[NAME].commits) == 2


def test_a_repository_with_another_store(pushed, made, cli, tmp_path) -> None:
    build = f"build-teacher-cache --data {made}/data --teacher {made}/teacher --shard-records 4 --views full"
    assert cli(*build.split(), "--batch-size", 3, "--out", tmp_path / "other.zarr").code == 0
    before = pushed.files(NAME)
    ended = cli("copy", tmp_path / "other.zarr", PLACE, "--license", "mit")
    assert ended.code == 2
    assert "files that are not of this cache" in " ".join(ended.err.replace("│", " ").split())
    assert pushed.files(NAME) == before


def test_a_repository_that_is_made_ready_is_pushed_into(hub, made, cli) -> None:
    hub.make(NAME, {}, private=True)
    assert cli("copy", made / "store.zarr", PLACE, "--license", "mit").code == 0
    assert hub.repositories[NAME].private


def test_a_public_repository_is_not_taken_for_a_private_one(hub, made, cli) -> None:
    hub.make(NAME, {})
    ended = cli("copy", made / "store.zarr", PLACE, "--license", "mit", "--private")
    assert ended.code == 2
    assert f"Cannot push with --private into {PLACE}" in " ".join(ended.err.split())
    assert hub.sent == []


def test_pulling_what_is_no_store(hub, cli, tmp_path) -> None:
    hub.make(NAME, {"train.parquet": b"rows"})
    for place, message in (
        (PLACE, "has no complete.json"),
        (f"{PLACE}-2", "404"),
        (f"{PLACE}@v9", "404, Invalid rev id"),
    ):
        ended = cli("copy", place, tmp_path / "copy.zarr")
        assert ended.code == 2
        assert message in " ".join(ended.err.split())
    assert not (tmp_path / "copy.zarr").exists()


def test_pulling_what_was_damaged(pushed, cli, tree, tmp_path) -> None:
    """The ledger shows it; when the repository is whole again, the same command ends well."""
    _, files = pushed.repositories[NAME].commits[-1]
    path = next(path for path in sorted(files) if path.startswith("targets/") and files[path].sha256)
    good, wrong = files[path], files["records/window/c/0/0"]
    files[path] = wrong
    ended = cli("copy", PLACE, tmp_path / "copy.zarr")
    assert ended.code == 2
    assert "fetches it anew" in " ".join(ended.err.split())
    files[path] = good
    assert cli("copy", PLACE, tmp_path / "copy.zarr").code == 0


def test_a_hub_that_does_not_answer(hub, made, cli, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    ended = cli("copy", made / "store.zarr", PLACE, "--license", "mit")
    assert ended.code == 2
    assert "Run the same command again" in " ".join(ended.err.split())


def test_earlier_states(pushed, made, cli, tmp_path) -> None:
    first = pushed.repositories[NAME].commits[-1][0]
    pushed.repositories[NAME].add({"README.md": pushed.repositories[NAME].commits[-1][1]["zarr.json"]})
    assert cli("copy", f"{PLACE}@{first}", tmp_path / "copy.zarr").code == 0
    ended = cli("copy", made / "store.zarr", f"{PLACE}@{first}", "--license", "mit")
    assert ended.code == 2
    assert f"Leave @{first} out" in " ".join(ended.err.split())


def test_other_verbs_name_the_copy(cli, tmp_path) -> None:
    words = ["train-student", "--cache", PLACE, "--model", "kdcache:tiny", "--out", tmp_path / "run"]
    for command in (words, ["inspect", PLACE], ["verify", PLACE]):
        ended = cli(*command)
        assert ended.code == 2
        assert f"kdcache copy {PLACE}" in " ".join(ended.err.split())


def test_without_the_extra(made, cli, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    ended = cli("copy", made / "store.zarr", PLACE, "--license", "mit")
    assert ended.code == 2
    assert "pip install '.[hub]'" in ended.err


def test_a_store_that_is_damaged_is_not_pushed(hub, made, cli, tmp_path) -> None:
    store = shutil.copytree(made / "store.zarr", tmp_path / "store.zarr")
    file = next(store.glob("targets/*/values/c/1/0/0/0"))
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    ended = cli("copy", store, PLACE, "--license", "mit")
    assert ended.code == 2
    assert str(file.name) in ended.err
    assert hub.sent == []
