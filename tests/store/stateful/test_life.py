"""A cache's life against a plain model. `scripts/soak` runs the same for hours."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from s3 import Fault, ObjectStore, Request
from stateful.machine import CacheLife, CacheLifeWithFaults
from stateful.reference import FIRST, LATER, SAMPLES
from stateful.weather import Weather
from stateful.world import Violation, World, flipped

from kdcache.data import Changes
from kdcache.errors import KDCacheError

SETTINGS = settings(
    max_examples=4,
    stateful_step_count=25,
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


def test_the_model_sees_samples_that_are_named_wrongly(world, monkeypatch) -> None:
    """The command names the samples of the data set, and the model those that it is told of."""
    world.set_version(LATER[0])
    world.remove_sample(SAMPLES[1])
    assert "1 sample was added ('aa'), 1 sample was removed ('b')" in world.run("plain").problem
    world.compare("plain")
    monkeypatch.setattr(world, "changes_since", lambda versions: Changes(added=(LATER[0],)))
    with pytest.raises(Violation, match="and its command says"):
        world.run("plain")
    with pytest.raises(Violation, match="and it says"):
        world.compare("plain")


def test_the_model_sees_an_accusation_of_a_whole_cache(world, s3_server) -> None:
    """The same wrong byte in every fetch is what a server has, for all that a reader can know."""
    assert world.run("far") is None
    with world.storm(0, fresh=True):
        s3_server.draw = lambda request: Fault("flip") if "image/c/" in request.key else None
        with pytest.raises(Violation, match="it is accused"):
            world.read("far")
        with pytest.raises(Violation, match="far is whole and verify finds"):
            world.verify("far")


def test_a_storm_ends(world) -> None:
    """Some command fails, none accuses, and afterwards nothing is wrong."""
    assert world.run("far") is None
    for seed, act in enumerate(["run", "read", "verify", "train", "repair"]):
        with world.storm(seed, fresh=True):
            getattr(world, act)("far", *([True] if act == "repair" else []))
    world.look("far")
    assert world.tally["answers failed"] > 0
    assert sum(count for kind, count in world.tally.items() if kind.startswith("s3 ")) > 20


def test_what_befalls_a_request_follows_from_the_seed_alone() -> None:
    """Threads of a training ask in any order."""
    requests = [Request("GET", f"below/{number % 7}") for number in range(60)]
    drawn = []
    for asked in (requests, sorted(requests, key=hash)):
        weather = Weather(3, "below/", Counter())
        drawn.append(Counter((request, repr(weather(request))) for request in asked))
    assert drawn[0] == drawn[1]
    assert len({fault for _, fault in drawn[0]}) > 3


def test_a_damaged_object_is_found_and_mended_alone(world) -> None:
    assert world.run("far") is None
    before = world.files("far")
    key = next(key for key in before if "image/c/" in key)
    world.put("far", key, flipped(before[key], 100))
    said = world.run("far")
    assert key in said.problem
    assert said.fix.startswith("Delete these files")
    world.repair("far", renew=True)
    assert world.files("far") == before


def test_the_model_sees_a_resumed_training_with_other_weights(world) -> None:
    world.kill_training("plain", 30, half=False)
    assert world.tally["trainings resumed"] == 1
    world.trained = dict.fromkeys(world.trained, "other")
    with pytest.raises(Violation, match="resumed from plain ends with other weights"):
        world.kill_training("plain", 10, half=False)


@pytest.mark.parametrize("key", ["complete.json", "ledger.jsonl"])
def test_changed_data_are_named_although_the_ledger_is_damaged(world, key) -> None:
    """The build named itself as the fix, or `extend`, which named the build."""
    world.set_version(SAMPLES[0], label=1)
    world.put("plain", key, b"{")
    with pytest.raises(KDCacheError, match=r"The data set has changed since .* 1 label differs \('a'\)") as caught:
        world.command("plain")
    assert "into a new --out" in caught.value.fix
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
    assert "into a new --out" in caught.value.fix
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
