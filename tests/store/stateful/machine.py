"""The life of a cache as a state machine of Hypothesis: every rule is something that happens to one of five caches."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from stateful.reference import SAMPLES
from stateful.world import DISK_ERRORS, RECIPES, World, build_clean, flipped

CACHES = st.sampled_from(list(RECIPES))
NUMBERS = st.integers(0, 2**16)
VERSIONS = st.integers(0, 2)
WRITES = st.integers(1, 250)
META = ("zarr.json", "manifest.json", "complete.json", "ledger.jsonl")

DATA = ("values/c/", "image/c/", "segmentation/c/")


class CacheLife(RuleBasedStateMachine):
    """Builds, kills, damages, repairs and reads; World compares each with the plain model."""

    memory: ClassVar[Path] = Path("/dev/shm")
    total: ClassVar[Counter[str]] = Counter()

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="kdcache-life-", dir=self.memory if self.memory.is_dir() else None))
        self.earlier = os.environ.get("KDCACHE_CACHE_DIR")
        os.environ["KDCACHE_CACHE_DIR"] = str(self.folder / "index")
        build_clean(self.folder / "clean")
        self.world = World(self.folder / "world")

    def teardown(self) -> None:
        self.total.update(self.world.tally)
        os.environ.pop("KDCACHE_CACHE_DIR", None)
        if self.earlier is not None:
            os.environ["KDCACHE_CACHE_DIR"] = self.earlier
        shutil.rmtree(self.folder, ignore_errors=True)

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


class CacheLifeOnABadDisk(CacheLife):
    """The same, on a disk whose writes fail at times."""

    @rule(name=CACHES, at=WRITES, number=st.sampled_from(DISK_ERRORS))
    def fault(self, name: str, at: int, number: Any) -> None:
        self.world.fault(name, at, number)
