"""A cache's life against a plain model. `scripts/soak` runs the same for hours."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from s3 import ObjectStore
from stateful.machine import CacheLife, CacheLifeWithFaults
from stateful.reference import FIRST, SAMPLES
from stateful.world import Violation, World, flipped

from kdcache.errors import KDCacheError

SETTINGS = settings(
    max_examples=8,
    stateful_step_count=30,
    phases=[Phase.generate],  # to shrink a failure takes minutes: its steps are printed as they were
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.parametrize("life", [CacheLife, CacheLifeWithFaults])
def test_no_step_of_any_life_breaks_the_model(life, s3_server, monkeypatch) -> None:
    monkeypatch.setattr(CacheLife, "server", s3_server, raising=False)
    run_state_machine_as_test(life, settings=SETTINGS)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, s3_server: ObjectStore) -> World:
    """A data set with one cache."""
    s3_server.enter(monkeypatch, tmp_path / "index")
    s3_server.reset()
    world = World(tmp_path / "world", s3_server)
    assert world.run("plain") is None
    return world


def test_the_model_sees_a_wrong_record(world) -> None:
    """A model that allows everything would find nothing."""
    world.models["plain"].may_hold = [{**FIRST, SAMPLES[1]: FIRST[SAMPLES[1]]._replace(label=1)}]
    with pytest.raises(Violation, match="WRONG"):
        world.read("plain")


def test_the_model_sees_a_refusal_of_a_whole_cache(world) -> None:
    path = world.path("plain") / "ledger.jsonl"
    path.write_bytes(flipped(path.read_bytes(), 100))
    with pytest.raises(Violation, match="is whole"):
        world.verify("plain")


def test_the_model_sees_a_change_that_a_command_overlooks(world, monkeypatch) -> None:
    world.set_version(SAMPLES[0], label=1)
    monkeypatch.setattr(world, "command", lambda name: None)
    with pytest.raises(Violation, match="does not notice"):
        world.run("plain")


@pytest.mark.parametrize("key", ["complete.json", "ledger.jsonl"])
def test_changed_data_are_named_although_the_ledger_is_damaged(world, key) -> None:
    """The build named itself as the fix, or `extend`, which named the build."""
    world.set_version(SAMPLES[0], label=1)
    world.put("plain", key, b"{")
    with pytest.raises(KDCacheError, match=r"The data set has changed since .* 1 label differs \('a'\)") as caught:
        world.command("plain")
    assert "into a new --out" in caught.value.remedy
    world.repair("plain", renew=True)
    world.verify("plain")


def test_changed_data_are_named_although_the_seal_has_a_wrong_digest(world) -> None:
    """The build named --from, which did not open the cache and named the build."""
    world.set_version(SAMPLES[0], image=1)
    seal = json.loads(world.files("plain")["complete.json"])
    seal["metadata"][next(iter(seal["metadata"]))] = "0" * 64
    world.put("plain", "complete.json", json.dumps(seal).encode())
    with pytest.raises(KDCacheError, match="The data set has changed since") as caught:
        world.command("plain")
    assert "into a new --out" in caught.value.remedy
    world.repair("plain", renew=True)


def test_a_ledger_record_of_another_cache_in_an_unsealed_one(world) -> None:
    """The images were blamed, which are what they were."""
    assert world.run("extended") is None
    key = "ledger/00000000.json"
    record, other = (world.files(name)[key] for name in ("plain", "extended"))
    for lost in ("complete.json", "ledger.jsonl"):
        world.put("plain", lost, None)
    world.put("plain", key, other)
    assert world.run("plain") is None
    assert world.files("plain")[key] == record != other
