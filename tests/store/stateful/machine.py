"""The life of a cache as a state machine of Hypothesis: every rule is something that happens to one of seven caches."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from s3 import ObjectStore
from stateful.reference import LATER, SAMPLES
from stateful.weather import patient
from stateful.world import DISK_ERRORS, NEAR, RECIPES, World, build_clean, flipped

CACHES = st.sampled_from(list(RECIPES))
NUMBERS = st.integers(0, 2**16)
VERSIONS = st.integers(0, 2)
WRITES = st.integers(1, 60) | st.integers(1, 650)  # a whole build has 360 to 630, a repair few
META = ("zarr.json", "manifest.json", "complete.json", "ledger.jsonl")

DATA = ("values/c/", "image/c/", "segmentation/c/")


class CacheLife(RuleBasedStateMachine):
    """Builds, kills, damages, repairs and reads; World compares each with the plain model.

    Attributes:
        server: the object store of the far cache. It is set before the first life.
    """

    memory: ClassVar[Path] = Path("/dev/shm")
    total: ClassVar[Counter[str]] = Counter()
    server: ClassVar[ObjectStore]

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="kdcache-life-", dir=self.memory if self.memory.is_dir() else None))
        self.ending = ExitStack()
        self.ending.callback(shutil.rmtree, self.folder, ignore_errors=True)
        self.server.enter(self.ending.enter_context(pytest.MonkeyPatch.context()), self.folder / "index")
        self.ending.enter_context(patient())
        self.server.reset()
        build_clean(self.folder / "clean", self.server)
        self.world = World(self.folder / "world", self.server)
        self.ending.callback(self.world.remove, "far")

    def teardown(self) -> None:
        self.total.update(self.world.tally)
        self.ending.close()

    @invariant()
    def count(self) -> None:
        self.world.tally["steps"] += 1

    @initialize(name=CACHES)
    def begin(self, name: str) -> None:
        self.world.repair(name, renew=True)

    @rule(name=CACHES)
    def build(self, name: str) -> None:
        self.world.run(name)

    @rule(name=CACHES)
    def build_anew(self, name: str) -> None:
        """Delete a cache, and make it again from sources as they are."""
        self.world.remove(name)
        self.world.run(name)

    @rule(name=CACHES, at=WRITES, half=st.booleans())
    def kill(self, name: str, at: int, half: bool) -> None:
        self.world.kill(name, at, half)

    @rule(name=CACHES, at=WRITES, half=st.booleans())
    def begin_anew(self, name: str, at: int, half: bool) -> None:
        """Delete a cache, and kill the command that makes it once more."""
        self.world.remove(name)
        self.world.kill(name, at, half)

    @rule(sample=st.sampled_from(SAMPLES), version=VERSIONS)
    def relabel(self, sample: str, version: int) -> None:
        self.world.set_version(sample, label=version)

    @rule(sample=st.sampled_from(SAMPLES), version=VERSIONS)
    def replace_image(self, sample: str, version: int) -> None:
        self.world.set_version(sample, image=version)

    @rule(sample=st.sampled_from(LATER))
    def add_sample(self, sample: str) -> None:
        self.world.set_version(sample)

    @rule(sample=st.sampled_from(SAMPLES + LATER))
    def remove_sample(self, sample: str) -> None:
        self.world.remove_sample(sample)

    @rule(sample=st.sampled_from(SAMPLES))
    def rewrite(self, sample: str) -> None:
        self.world.rewrite(sample)

    @rule(name=CACHES, nth=NUMBERS, bit=st.integers(0, 2**24))
    def flip(self, name: str, nth: int, bit: int) -> None:
        self.world.damage(name, nth, lambda content: flipped(content, bit))
        self.world.look(name)

    @rule(name=CACHES, key=st.sampled_from(META), bit=st.integers(0, 2**24))
    def flip_metadata(self, name: str, key: str, bit: int) -> None:
        content = self.world.files(name).get(key)
        if content is not None:
            self.world.put(name, key, flipped(content, bit))
            self.world.look(name)

    @rule(name=CACHES, part=st.sampled_from(DATA), nth=NUMBERS, bit=st.integers(0, 2**24))
    def flip_records(self, name: str, part: str, nth: int, bit: int) -> None:
        """Flip a bit in the large arrays, whose files are few, and copy from it."""
        self.world.damage(name, nth, lambda content: flipped(content, bit), part)
        self.world.look(name)
        for copy, recipe in RECIPES.items():
            if recipe.source == name and recipe.changes is not None:
                self.build_anew(copy)

    @rule(name=CACHES, nth=NUMBERS)
    def delete(self, name: str, nth: int) -> None:
        self.world.damage(name, nth, lambda content: None)
        self.world.look(name)

    @rule(name=CACHES, nth=NUMBERS, length=NUMBERS)
    def truncate(self, name: str, nth: int, length: int) -> None:
        self.world.damage(name, nth, lambda content: content[: length % (len(content) + 1)])
        self.world.look(name)

    @rule(name=CACHES, keys=st.sets(st.sampled_from(META), min_size=1))
    def lose(self, name: str, keys: set[str]) -> None:
        for key in sorted(keys & set(self.world.files(name))):
            self.world.put(name, key, None)
        self.world.look(name)

    @rule(name=CACHES, other=CACHES, nth=NUMBERS)
    def mix_up(self, name: str, other: str, nth: int) -> None:
        """Copy a file of one cache into another."""
        files = self.world.files(other)
        if files and self.world.files(name):
            key = sorted(files)[nth % len(files)]
            self.world.put(name, key, files[key])
            self.world.look(name)

    @rule(name=CACHES, renew=st.booleans())
    def repair(self, name: str, renew: bool) -> None:
        self.world.repair(name, renew)

    @rule(name=CACHES)
    def verify(self, name: str) -> None:
        self.world.verify(name)

    @rule(name=CACHES)
    def read(self, name: str) -> None:
        self.world.read(name)

    @rule(name=CACHES)
    def hold(self, name: str) -> None:
        self.world.hold(name)

    @rule()
    @precondition(lambda self: self.world.held)
    def read_held(self) -> None:
        self.world.read_held()

    @rule(name=CACHES)
    def compare(self, name: str) -> None:
        self.world.compare(name)

    @rule(name=CACHES)
    def train(self, name: str) -> None:
        self.world.train(name)

    @rule(name=st.sampled_from(NEAR), at=st.integers(1, 60), half=st.booleans())
    def kill_training(self, name: str, at: int, half: bool) -> None:
        self.world.kill_training(name, at, half)

    @rule(nth=NUMBERS, bit=st.integers(0, 2**24))
    def flip_copy(self, nth: int, bit: int) -> None:
        """Flip a bit in a copy on this machine of an object: it is fetched again."""
        self.world.damage_copy(nth, bit)
        self.world.look("far")


class CacheLifeWithFaults(CacheLife):
    """The same, on a disk whose writes fail at times, and with an object store whose requests do."""

    @rule(name=CACHES, at=WRITES, number=st.sampled_from(DISK_ERRORS))
    def fault(self, name: str, at: int, number: Any) -> None:
        self.world.fault(name, at, number)

    @rule(act=st.sampled_from(["run", "read", "verify", "train", "repair"]), seed=NUMBERS, fresh=st.booleans())
    def storm(self, act: str, seed: int, fresh: bool) -> None:
        """Use the far cache while requests fail, and look at it when they do not."""
        with self.world.storm(seed, fresh=fresh):
            getattr(self.world, act)("far", *([True] if act == "repair" else []))
        self.world.look("far")

    @rule(act=st.sampled_from(["run", "repair"]), seed=NUMBERS)
    def storm_on_the_way_back(self, act: str, seed: int) -> None:
        """Copy the far cache back while requests fail."""
        with self.world.storm(seed, fresh=True):
            getattr(self.world, act)("back", *([True] if act == "repair" else []))
        self.world.look("back")
