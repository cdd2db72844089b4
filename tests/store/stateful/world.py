"""A data set, seven caches that are built from it and from each other, and everything that can happen to them.

Each cache has a model: the versions of the data that it may hold, and whether it is known to be whole. What a cache
does is compared with its model at every step, and a difference is a Violation. One cache lies in an object store, and
one is copied back from there. While requests fail (weather.py) errors are allowed, but no wrong record, and no word
against an object that is what was written.
"""

from __future__ import annotations

import datetime
import errno
import hashlib
import json
import os
import re
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import torch
from s3 import BUCKET, ObjectStore
from stateful.reference import (
    CLASSES,
    FEWEST,
    FIRST,
    LEVELS,
    MODULUS,
    SAMPLES,
    SIZE,
    STRIDE,
    WEIGHTS,
    Version,
    Versions,
    ids_of,
    image_of,
    is_row,
    label_of,
    png,
)
from stateful.weather import Weather, bad_weather, calm

import kdcache.teacher.build.manifest as build_manifest
from kdcache.data import Changes, Split, open_split
from kdcache.errors import CorruptError, KDCacheError
from kdcache.store import Cache, CopyChanges, copy_store, data_changes, open_cache, verify_files
from kdcache.store.backend import object_store
from kdcache.teacher import BuildOptions, Teacher, build_cache, load_teacher, options_of
from kdcache.training import TrainConfig, make_config, train

OPTIONS = BuildOptions(
    size=SIZE, view_scale=(1.0, 1.0), shard_records=2, batch_size=2, render_threads=1, fidelity=False, views=1
)
STAMPED = ("zarr.json", "manifest.json", "complete.json")
"""Files that say when a cache was begun, so that two equal caches differ in them."""
WRITES = ("replace", "rename", "unlink", "mkdir", "fsync")
MOST_REMEDIES = 8
_CHILD_S = 120


class Violation(AssertionError):  # noqa: N818
    """A cache did what its model does not allow."""


class Network(torch.nn.Module):
    """The teacher of the reference: whole numbers, so that no batch and no library rounds them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.from_numpy(WEIGHTS).float())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pixels = (x[:, :, ::STRIDE, ::STRIDE] * 255).round()
        return torch.einsum("kc,bchw->bkhw", self.weight, pixels).remainder(MODULUS)


@dataclass(frozen=True)
class Recipe:
    """How a cache is made.

    Attributes:
        source: the cache that it is extended from or copied from.
        changes: of a copy.
        views, stored: of the cache; whether it keeps pixels and labels.
        far: whether it lies in the object store.
    """

    source: str = ""
    changes: CopyChanges | None = None
    views: int = 1
    stored: bool = True
    far: bool = False


RECIPES = {
    "plain": Recipe(),
    "extended": Recipe(source="plain", views=2),
    "copied": Recipe(source="plain", changes=CopyChanges()),
    "lean": Recipe(stored=False),
    "small": Recipe(source="extended", changes=CopyChanges(codec="small", shard_records=3), views=2),
    "far": Recipe(source="plain", changes=CopyChanges(), far=True),
    "back": Recipe(source="far", changes=CopyChanges()),
}
NEAR = tuple(name for name in RECIPES if name not in ("far", "back"))
"""Caches whose commands ask the object store nothing. The others run in no forked process."""


@dataclass
class Model:
    """What a cache may be.

    Attributes:
        whole: it was complete at last, and nothing has happened to it since.
        may_hold: the versions that a command has begun to write into it, the last one last.
        files: of the last time that it was whole, unless a command ran since.
        strays: files of other caches that were copied into it, in places that mean nothing there.
        hurt: it was damaged since it was whole or not there.
    """

    whole: bool = False
    may_hold: list[Versions] = field(default_factory=list)
    files: dict[str, bytes] | None = None
    strays: set[str] = field(default_factory=set)
    hurt: bool = False


class World:
    """Everything below one folder. Its methods do one thing each, and raise Violation."""

    clean: ClassVar[dict[str, dict[str, bytes]]] = {}
    """Files of each cache that was built without any disturbance from the first versions."""

    def __init__(self, top: Path, server: ObjectStore) -> None:
        self.top = top
        self.server = server
        self.weather: Weather | None = None
        self._bucket = server.address()
        self.tally: Counter[str] = Counter()
        self.models = {name: Model() for name in RECIPES}
        self.versions: dict[str, Version] = dict(FIRST)
        self.rewritten = False  # some file of the data set was: the same content has other digests
        self.held: list[tuple[Cache, str, Versions]] = []
        self.trained: dict[object, str] = {}
        self.clock = 0
        (top / "data").mkdir(parents=True)
        (top / "data" / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES))
        for sample in SAMPLES:
            self._write(sample)

    def path(self, name: str) -> Path:
        """Return the folder of a cache that is no far one."""
        assert not RECIPES[name].far
        return self.top / f"{name}.zarr"

    def place(self, name: str) -> Path | str:
        """Return the folder or the address of a cache."""
        return self._bucket if RECIPES[name].far else self.path(name)

    def files(self, name: str) -> dict[str, bytes]:
        """Return every file below a cache's folder or address; empty without one."""
        if RECIPES[name].far:
            return self.server.objects(self._bucket)
        top = self.path(name)
        return {p.relative_to(top).as_posix(): p.read_bytes() for p in sorted(top.rglob("*")) if p.is_file()}

    # The data set

    def set_version(self, sample: str, **parts: int) -> None:
        """Relabel a sample, or replace its image. One that is not there is added."""
        self.versions[sample] = self.versions.get(sample, Version())._replace(**parts)
        self._write(sample)

    def remove_sample(self, sample: str) -> None:
        """Remove a sample from the data set, unless it has few."""
        if sample in self.versions and len(self.versions) > FEWEST:
            self._remove(sample)

    def rewrite(self, sample: str) -> None:
        """Write the same image and label into other files."""
        if sample in self.versions:
            self.rewritten = True
            self._write(sample, LEVELS[1])

    def restore(self, versions: Versions) -> None:
        for sample in self.versions.keys() - versions.keys():
            self._remove(sample)
        for sample, version in versions.items():
            if self.versions.get(sample) != version:
                self.versions[sample] = version
                self._write(sample)

    def _remove(self, sample: str) -> None:
        del self.versions[sample]
        for path in self._sample_files(sample):
            path.unlink()

    def _write(self, sample: str, level: int = LEVELS[0]) -> None:
        version = self.versions[sample]
        contents = image_of(sample, version.image), label_of(sample, version.label)
        for path, content in zip(self._sample_files(sample), contents, strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(content, level))

    def _sample_files(self, sample: str) -> list[Path]:
        """Return the image and the label of a sample."""
        return [self.top / "data" / folder / "train" / f"{sample}.png" for folder in ("images", "labels")]

    def changes_since(self, versions: Versions) -> Changes:
        """Return what has changed in the data set since some versions of it."""
        shared = [sample for sample in ids_of(versions) if sample in self.versions]
        return Changes(
            added=tuple(sample for sample in ids_of(self.versions) if sample not in versions),
            removed=tuple(sample for sample in ids_of(versions) if sample not in self.versions),
            images=tuple(s for s in shared if versions[s].image != self.versions[s].image),
            labels=tuple(s for s in shared if versions[s].label != self.versions[s].label),
        )

    def split(self) -> Split:
        return open_split(str(self.top / "data"), "train")

    # Commands

    def command(self, name: str, out: Path | None = None, *, renew: bool = False) -> None:
        """Run the command that makes a cache.

        Args:
            out: another place for it.
            renew: whether to extend the cache itself, as after a change of its data.
        """
        recipe = RECIPES[name]
        self.clock += 1
        source = name if renew else recipe.source
        earlier = open_cache(self.place(source)) if source else None
        if recipe.changes is not None:
            assert earlier is not None
            copy_store(earlier, out or self.place(name), recipe.changes)
            return
        out = out or self.path(name)
        split = self.split()
        options = replace(OPTIONS, pixels="stored" if recipe.stored else "source")
        if earlier is not None:
            options = options_of(earlier.manifest, views=recipe.views, view_scale=(1.0, 1.0), render_threads=1)
        with self._clock():
            build_cache(split, teacher_of(split), out, options, reuse=earlier)

    def run(self, name: str) -> KDCacheError | None:
        """Run a cache's command. It must leave the cache whole, or say why not."""
        model = self.models[name]
        candidates = self._candidates(name)
        if not candidates:
            return None
        before = self.files(name)
        try:
            self.command(name)
        except KDCacheError as error:
            self.tally["refused"] += 1
            self._check_refusal(name, error, candidates)
            if self.weather is not None or RECIPES[name].changes is not None:  # it may have copied a part
                self._begin(name)
                self._ended(name, before)
            return error
        with self._calm():
            if model.whole and model.may_hold[0] not in candidates:
                raise Violation(f"{name} was built from other data, and its command does not notice it")
            if model.whole and self.weather is not None and self.files(name) != before:
                raise Violation(f"{name} was whole, and a command whose requests failed has changed it")
            if model.hurt and RECIPES[name].far and (error := self._far_damage(name)) is not None:
                return error
            self._became_whole(name, candidates)
        return None

    def _check_refusal(self, name: str, error: KDCacheError, candidates: list[Versions]) -> None:
        """Check that a command's error has a reason, and names exactly the samples that have changed."""
        model = self.models[name]
        if name not in NEAR and self.weather is not None:
            self._check_answer(error)
        if self._source_whole(name) and not self._another_source(name, error):
            if model.whole and model.may_hold == candidates:
                self._allowed(name, error, f"{name} is whole, its data are the same, and its command fails")
            elif not model.may_hold and not self.files(name) and self.weather is None:
                raise Violation(f"{name} is not there, and its command fails: {error}") from error
        if model.whole and "The data set has changed since" in error.problem:
            said = self.changes_since(model.may_hold[-1]).describe()
            named = error.problem.partition(" was made: ")[2]
            if said not in (named, named.rpartition(" (")[0]):  # the data set and its split come last
                raise Violation(f"{name}: {said} in its data, and its command says: {error}") from error
            self.tally["changes named"] += 1

    def _far_damage(self, name: str) -> KDCacheError | None:
        """Return what `verify` says of a far cache whose command has ended: that looks at sizes alone."""
        try:
            report = verify_files(self.place(name))
        except KDCacheError as error:
            return error
        if not report.damaged:
            return None
        files = " ".join(f"{self.place(name)}/{key}" for key in report.damaged)
        return CorruptError(f"verify finds damage: {files}", fix=report.fix)

    def _candidates(self, name: str) -> list[Versions]:
        """Return what a cache's command may write now: the data, or what its source may hold; without a source []."""
        source = RECIPES[name].source
        if source and not self.models[source].may_hold:
            return []
        return [dict(self.versions)] if RECIPES[name].changes is None else self.models[source].may_hold

    def _source_whole(self, name: str) -> bool:
        source = RECIPES[name].source
        return not source or self.models[source].whole

    def _another_source(self, name: str, error: KDCacheError) -> bool:
        """Return True if a copy fails because its source was built anew since, with the same content or others."""
        anew = "Copy into a new or empty place" in error.fix or self._of_other_samples(name, error)
        return RECIPES[name].changes is not None and anew

    def _of_other_samples(self, name: str, error: KDCacheError) -> bool:
        """Return True if a command says that a cache was begun with others than today's samples, and it may be so."""
        now = {tuple(ids_of(versions)) for versions in self._candidates(name)}
        begun = {tuple(ids_of(versions)) for versions in self.models[name].may_hold}
        return "differs in dataset." in error.problem and "give another --out" in error.fix and now != begun

    def _became_whole(self, name: str, candidates: list[Versions]) -> None:
        model = self.models[name]
        versions = self.check(name, candidates)
        self._compare_files(name, versions)
        model.whole, model.may_hold, model.hurt = True, [versions], False
        model.files = {key: content for key, content in self.files(name).items() if key not in model.strays}
        self.tally["whole"] += 1

    def check(self, name: str, candidates: list[Versions]) -> Versions:
        """Check that a cache opens, is verified, and holds every record of one of some versions. Return these."""
        try:
            cache = open_cache(self.place(name))
            cache.check_files()
            rows, report = read_rows(cache), verify_files(self.place(name))
        except KDCacheError as error:
            raise Violation(f"{name} is not whole after its command: {error}") from error
        versions = next((versions for versions in candidates if rows_are(rows, name, versions)), None)
        if versions is None or list(cache.ids) != ids_of(versions):
            raise Violation(f"{name} holds WRONG records after its command")
        if report.damaged:
            raise Violation(f"{name} has damaged files after its command: {report.damaged}")
        return versions

    def _compare_files(self, name: str, versions: Versions) -> None:
        """Compare a whole cache with the undisturbed one: its bytes, or after a change of the data its names."""
        if not self.clean:
            return
        clean, found = self.clean[name], self.files(name)
        missing = clean.keys() - found.keys()
        more = found.keys() - clean.keys() - self.models[name].strays
        other = {key for key in clean.keys() & found.keys() if key not in STAMPED and clean[key] != found[key]}
        if versions != FIRST or self.rewritten:
            other = set()
        if versions.keys() != FIRST.keys():
            missing, more = set(), set()
        beside = [path.name for path in self.top.glob(f".{name}*")]
        if missing or more or other or beside:
            raise Violation(
                f"{name} is not the undisturbed cache: {sorted(missing)} are missing, {sorted(more)} are too many, "
                f"{sorted(other)} have other bytes, {beside} is left beside it"
            )

    def kill(self, name: str, at: int, half: bool) -> None:
        """Run a cache's command in a process that dies at its `at`-th write, before it or (`half`) after it."""
        if not self._candidates(name):
            return
        before = self._begin(name)
        if name in NEAR:
            killed = killed_child(lambda: self.command(name), f"the command of {name}", at, half)
            self.clock += 1
        else:
            killed = interrupted(lambda: self.command(name), at, half)
        self._ended(name, before)
        self.tally["killed" if killed else "not killed in time"] += 1

    def fault(self, name: str, at: int, number: int) -> None:
        """Run a cache's command on a disk whose `at`-th write fails. It may fail, and it loses nothing."""
        if not self._candidates(name):
            return
        before = self._begin(name)
        try:
            with failing_writes(at, number):
                self.command(name)
        except (KDCacheError, OSError):
            self.tally[f"disk {errno.errorcode[number]}"] += 1
        self._ended(name, before)

    def _begin(self, name: str) -> dict[str, bytes]:
        """Note what a command that may not end may write."""
        model = self.models[name]
        model.may_hold = [*model.may_hold, *(v for v in self._candidates(name) if v not in model.may_hold)]
        return self.files(name)

    def _ended(self, name: str, before: dict[str, bytes]) -> None:
        """A command ended at any point. A whole cache is not written by its command, so it must be as it was."""
        model = self.models[name]
        if not model.whole:
            model.files = None
            return
        model.may_hold = model.may_hold[:1]
        if self.files(name) != before:
            raise Violation(f"{name} was whole, and a command that did not end has changed it")

    # Damage

    def damage(self, name: str, nth: int, change: Callable[[bytes], bytes | None], part: str = "") -> None:
        """Change the nth file of a cache (of those that mean something); None deletes it.

        Args:
            part: of the file's name.
        """
        files = [key for key in self.files(name) if part in key and not key.endswith((".partial", ".lock", ".owner"))]
        if not files:
            return
        key = files[nth % len(files)]
        self.put(name, key, change(self.files(name)[key]))

    def put(self, name: str, key: str, content: bytes | None) -> None:
        """Have a cache's file hold this; None deletes it."""
        before = self.files(name).get(key)
        self._write_file(name, key, content)
        strays = self.models[name].strays
        if key in strays or (before is None and self.clean and key not in self.clean[name]):
            strays.add(key)
        elif content != before:
            self.models[name].whole, self.models[name].hurt = False, True
            self.tally["damaged"] += 1

    def _write_file(self, name: str, key: str, content: bytes | None) -> None:
        if RECIPES[name].far:
            self.server.put(self._bucket, key, content)
            return
        path = self.path(name) / key
        if content is None:
            path.unlink(missing_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

    def remove(self, name: str) -> None:
        """Delete all of a cache."""
        if RECIPES[name].far:
            self.server.clear(self._bucket)
        else:
            shutil.rmtree(self.path(name), ignore_errors=True)
        self.models[name] = Model()

    def damage_copy(self, nth: int, bit: int) -> None:
        """Flip a bit in the nth copy on this machine of a file of the far cache."""
        files = sorted(p for p in (self.mirrors).rglob("*") if p.is_file() and ".locks" not in p.parts)
        if files:
            path = files[nth % len(files)]
            path.write_bytes(flipped(path.read_bytes(), bit))

    @property
    def mirrors(self) -> Path:
        """The folder of the copies on this machine of files of the far cache."""
        return self.top.parent / "index" / "mirrors"

    # An object store whose requests fail

    @contextmanager
    def storm(self, seed: int, *, fresh: bool) -> Iterator[None]:
        """Let the requests of one command fail.

        Args:
            fresh: whether to fetch every file again, and not to read what was copied before.
        """
        if fresh:
            shutil.rmtree(self.mirrors, ignore_errors=True)
        below = self._bucket.removeprefix(f"s3://{BUCKET}/")
        self.weather = Weather(seed, below, self.tally)
        try:
            with bad_weather(self.server, self.weather):
                yield
        finally:
            self.weather = None
        self.tally["storms"] += 1

    def _calm(self) -> AbstractContextManager[None]:
        """Hold the faults of an object store."""
        return nullcontext() if self.weather is None else calm(self.server)

    # Looking

    def look(self, name: str) -> None:
        """Look at a cache in every way that changes nothing."""
        self.verify(name)
        self.read(name)
        self.read_held()

    def hold(self, name: str) -> None:
        """Open a cache and keep it open, whatever happens to it."""
        model = self.models[name]
        try:
            cache = open_cache(self.place(name))
            rows = read_rows(cache)
        except KDCacheError as error:
            self._allowed(name, error)
            return
        versions = next((v for v in model.may_hold if rows_are(rows, name, v)), None)
        if versions is None:
            raise Violation(f"{name} opened with WRONG records")
        self.held = [*self.held[-3:], (cache, name, versions)]

    def read_held(self) -> None:
        """Read the caches that are held open: right records or errors, even if the files are others now."""
        for cache, name, versions in self.held:
            self._check_rows(cache, name, [versions], "held open")

    def read(self, name: str) -> None:
        """Open a cache and read it."""
        try:
            cache = open_cache(self.place(name))
        except KDCacheError as error:
            self._allowed(name, error)
            return
        for error in self._check_rows(cache, name, self.models[name].may_hold, "opened"):
            self._allowed(name, error)

    def _check_rows(self, cache: Cache, name: str, allowed: list[Versions], how: str) -> list[KDCacheError]:
        """Check every record of an open cache that can be read. Returns the errors of the others."""
        rows, errors = dict[int, Any](), []
        for record in range(len(cache)):
            try:
                rows[record] = cache.read(record, list(cache.specs))
            except KDCacheError as error:
                errors.append(error)
        allowed = [versions for versions in allowed if rows_are(rows, name, versions)]
        if not allowed and rows:
            raise Violation(f"{name}, {how}, serves WRONG records: {sorted(rows)} were read")
        try:
            ids = list(cache.ids)
        except KDCacheError as error:
            return [*errors, error]
        if rows and ids not in map(ids_of, allowed):
            raise Violation(f"{name}, {how}, has WRONG ids")
        return errors

    def _allowed(self, name: str, error: KDCacheError, what: str = "") -> None:
        """Check that a cache may be refused. Of a whole one only answers may be, and it is not to be deleted."""
        if not self.models[name].whole:
            return
        if self.weather is None or name in NEAR:
            raise Violation(f"{what or f'{name} is whole and is not read'}: {error}") from error
        self._check_answer(error)

    def _check_answer(self, error: KDCacheError) -> None:
        """Check that an error while requests fail calls no whole cache damaged."""
        accused = self._bucket in str(error) and (isinstance(error, CorruptError) or "elete" in error.fix)
        if accused and self.models["far"].whole:
            raise Violation(f"the far cache is whole, answers fail, and it is accused: {error}") from error
        self.tally["answers failed"] += 1

    def verify(self, name: str) -> None:
        """Verify a cache: it sees every damage, and none of a whole cache."""
        model = self.models[name]
        try:
            report = verify_files(self.place(name))
        except KDCacheError as error:
            self._allowed(name, error)
            return
        if report.damaged:
            if model.whole:
                raise Violation(f"{name} is whole and verify finds {report.damaged}")
            return
        found = self.files(name)
        if model.files is not None:
            missed = [key for key, content in model.files.items() if not _means_same(key, found.get(key), content)]
            if missed:
                raise Violation(f"{name} is verified although {missed} are not what they were")
        self.read(name)

    def compare(self, name: str) -> None:
        """Compare a whole cache with the data set: it names exactly the samples that have changed."""
        model = self.models[name]
        if not model.whole:
            return
        expected = self.changes_since(model.may_hold[-1])
        changes = data_changes(open_cache(self.place(name)), self.split())
        if replace(changes, same=()) != expected:
            raise Violation(f"{name}: {expected} since it was built, and it says {changes}")

    def train(self, name: str) -> None:
        """Train two steps. From the same records come the same weights."""
        model, out = self.models[name], self.top / "run"
        fresh = self._is_fresh(name)
        shutil.rmtree(out, ignore_errors=True)
        try:
            train(self._training(name), out)
        except KDCacheError as error:
            if fresh and self.weather is None:
                raise Violation(f"{name} is whole and a training fails: {error}") from error
            if fresh:
                self._resume_in_calm(name, out, error)
            return
        if model.whole and not fresh:
            raise Violation(f"{name} was built from other data, and a training does not notice it")
        if model.whole:
            self._check_weights(name, out, "a training")
        self.tally["trained"] += 1

    def _resume_in_calm(self, name: str, out: Path, error: KDCacheError) -> None:
        """Go on with a training that a fault of the object store has ended."""
        self._allowed("far", error, "a training fails")
        with self._calm():
            self._resume(name, out)

    def kill_training(self, name: str, at: int, half: bool) -> None:
        """Train two steps in a process that dies at its `at`-th write, and go on: the weights are the same."""
        out = self.top / "run"
        if not self._is_fresh(name):
            return
        shutil.rmtree(out, ignore_errors=True)
        config = self._training(name)
        if killed_child(lambda: train(config, out), f"a training from {name}", at, half):
            self.tally["trainings killed"] += 1
            self._resume(name, out)
        else:
            self._check_weights(name, out, "a training")

    def _resume(self, name: str, out: Path) -> None:
        try:
            train(self._training(name), out, resume=out.is_dir())
        except KDCacheError as error:
            raise Violation(f"a training from {name} was ended and does not go on: {error}") from error
        self._check_weights(name, out, "a training that was ended and resumed")
        self.tally["trainings resumed"] += 1

    def _check_weights(self, name: str, out: Path, what: str) -> None:
        """Check that the weights are those of every training from the same records."""
        versions = tuple(sorted(self.models[name].may_hold[-1].items()))
        digest = hashlib.sha256((out / "last.safetensors").read_bytes()).hexdigest()
        while RECIPES[name].changes == CopyChanges():
            name = RECIPES[name].source
        if self.trained.setdefault((name, versions), digest) != digest:
            raise Violation(f"{what} from {name} ends with other weights")

    def _is_fresh(self, name: str) -> bool:
        """Return True if a training must succeed: the cache is whole, and its data are what they were."""
        model = self.models[name]
        return model.whole and (RECIPES[name].stored or model.may_hold[-1] == self.versions)

    def _training(self, name: str) -> TrainConfig:
        settings: dict[str, Any] = {} if RECIPES[name].stored else {"data": str(self.top / "data")}
        return make_config(
            **{"verb": "train-student", "cache": str(self.place(name)), "model": "kdcache:tiny", "method": "kl"},
            **{"iterations": 2, "batch_size": 4, "device": "cpu", "lr": 1e-3, "seed": 3, "shuffle": "window"},
            **settings,
        )

    # Repair

    def repair(self, name: str, renew: bool) -> None:
        """Do what the errors of a cache's command say, until the cache is whole.

        Args:
            renew: which of two fixes to take after a change of the data: renew the cache, or restore the data.
        """
        if RECIPES[name].source and not self.models[RECIPES[name].source].whole:
            self.repair(RECIPES[name].source, renew)
            if self.weather is not None and not self.models[RECIPES[name].source].whole:
                return
        said: list[str] = []
        while (error := self.run(name)) is not None:
            said.append(str(error))
            if len(said) > MOST_REMEDIES:
                if self.weather is not None:
                    return
                raise Violation(f"{name}: the remedies do not end: {said[-2:]}")
            self._follow(name, error, renew, again=len(said) > 1 and said[-1] == said[-2])
        if not self.models[name].whole:
            raise Violation(f"{name} is not whole after its remedies")
        self.tally["repaired"] += 1
        self.tally["remedies"] += len(said)

    def _follow(self, name: str, error: KDCacheError, renew: bool, *, again: bool) -> None:
        fix, place = error.fix, str(self.place(name))
        if self.weather is not None and (again or "same command" in fix or "epeat the command" in fix):
            return  # the next one may be answered
        if "has changed since" in error.problem or "do not render as they did" in error.problem:
            self._follow_change(name, error, renew)
        elif (found := re.search(r"delete all of (\S+)", fix)) is not None:
            self.remove(self._named(found.group(1), error))
        elif any(words in fix for words in ("empty it yourself", "Copy into a new or empty place")):
            self.remove(name)
        elif self._of_other_samples(name, error):
            self.remove(name)  # as good as another --out
        elif "elete " in fix and (files := self._far_files(error.problem)):
            for key in files:
                self.put("far", key, None)
        elif "Run the command that" in fix and not again:
            named = [other for other in RECIPES if f"{self.place(other)}" in error.problem]
            if named and place not in error.problem:
                self.repair(named[0], renew)
        else:
            raise Violation(f"{name}: DEAD END: {error}")

    def _far_files(self, problem: str) -> list[str]:
        """Return the files of the far cache that an error names."""
        return [word.rstrip(":,;") for word in re.findall(rf"{re.escape(self._bucket)}/(\S+)", problem)]

    def _named(self, place: str, error: KDCacheError) -> str:
        name = next((name for name in RECIPES if str(self.place(name)) == place.rstrip(":,;")), None)
        if name is None:
            raise Violation(f"the remedy names {place}, which is no cache: {error}")
        return name

    def _follow_change(self, name: str, error: KDCacheError, renew: bool) -> None:
        """Renew a cache, or restore its data, as the error says."""
        may_hold = self.models[name].may_hold
        if not renew and len(may_hold) == 1:
            self.restore(may_hold[0])
        elif renew and "renew the cache: " in error.fix:
            self.renew(name)
        elif "new --out" in error.fix or "a new folder" in error.fix or "--out NEW" in error.fix:
            self.remove(name)  # as good as another folder
        else:
            raise Violation(f"{name}: no way on: {error}")

    def renew(self, name: str) -> None:
        """Extend a cache into a new one from the data as they are now, which takes its place."""
        new = self.top / "new.zarr"
        shutil.rmtree(new, ignore_errors=True)
        try:
            self.command(name, new, renew=True)
        except KDCacheError as error:
            raise Violation(f"{name} is told to be renewed and cannot be: {error}") from error
        self.remove(name)
        new.rename(self.path(name))
        self.models[name].may_hold = [dict(self.versions)]
        self.tally["renewed"] += 1
        self._became_whole(name, [dict(self.versions)])

    @contextmanager
    def _clock(self) -> Iterator[None]:
        """Give every command another second, so that caches of two commands never have one stamp."""
        stamp = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC) + datetime.timedelta(seconds=self.clock)
        before = build_manifest.datetime
        frozen = SimpleNamespace(datetime=SimpleNamespace(now=lambda zone: stamp), UTC=datetime.UTC)
        build_manifest.datetime = frozen  # type: ignore[assignment]
        try:
            yield
        finally:
            build_manifest.datetime = before


def teacher_of(split: Split) -> Teacher:
    return load_teacher(Network(), split.classes, mean=(0, 0, 0), std=(1, 1, 1))


def read_rows(cache: Cache) -> dict[int, dict[str, Any]]:
    """Return every array of every record. Raises: KDCacheError."""
    return {record: cache.read(record, list(cache.specs)) for record in range(len(cache))}


def rows_are(rows: Mapping[int, Mapping[str, Any]], name: str, versions: Versions) -> bool:
    """Return True if these records of a cache are the ones of some versions of the data."""
    views, stored = RECIPES[name].views, RECIPES[name].stored
    return all(is_row(row, record, versions, views=views, stored=stored) for record, row in rows.items())


def flipped(content: bytes, bit: int) -> bytes:
    """Return a file with one bit of it flipped; an empty one as it is."""
    if not content:
        return content
    at = bit % (8 * len(content))
    changed = np.frombuffer(content, np.uint8).copy()
    changed[at // 8] ^= np.uint8(1 << at % 8)
    return changed.tobytes()


def _means_same(key: str, found: bytes | None, content: bytes) -> bool:
    """Return True if a file is what it was; a seal, which no digest covers, in other words too."""
    if found == content:
        return True
    try:
        return key == "complete.json" and bool(json.loads(found or b"") == json.loads(content))
    except ValueError:
        return False


@contextmanager
def _counted_writes(
    event: Callable[[int], None], after: Callable[[int], None], *, requests: bool = False
) -> Iterator[None]:
    """Call `event` with its number before each write of this process, and `after` behind it.

    Args:
        requests: whether what is sent to an object store is a write too.
    """
    functions: list[tuple[Any, str]] = [(os, name) for name in WRITES]
    functions += [(object_store.obstore, name) for name in ("put", "delete")] if requests else []
    real = [getattr(module, name) for module, name in functions]
    count = 0

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            number = count
            event(number)
            result = function(*args, **options)
            after(number)
            return result

        return call

    for (module, name), function in zip(functions, real, strict=True):
        setattr(module, name, wrap(function))
    try:
        yield
    finally:
        for (module, name), function in zip(functions, real, strict=True):
            setattr(module, name, function)


def _nothing(_: int) -> None:
    return


class Stop(BaseException):
    """What ends a command as Ctrl-C does."""


def interrupted(command: Callable[[], None], at: int, half: bool) -> bool:
    """Run a command that is stopped at its `at`-th write, before it or (`half`) after it. Return whether it was."""

    def stop(number: int) -> None:
        if number == at:
            raise Stop

    try:
        with _counted_writes(*((_nothing, stop) if half else (stop, _nothing)), requests=True):
            command()
    except Stop:
        return True
    except KDCacheError:
        pass
    return False


def killed_child(command: Callable[[], object], what: str, at: int, half: bool) -> bool:
    """Run a command in a process that dies at its `at`-th write, as `interrupted`. Return whether it died.

    Raises: Violation for a crash, and for no end.
    """
    child = os.fork()
    if child == 0:
        _end_of_child(command, at, half)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 4:
        raise Violation(f"{what} crashed in a child; its traceback is in stderr")
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM:
        raise Violation(f"{what} did not end in {_CHILD_S} s")
    return os.WIFSIGNALED(status)


def _end_of_child(command: Callable[[], object], at: int, half: bool) -> None:
    """Run a command in a forked process and end it: killed at a write, or with an exit code."""

    def die(number: int) -> None:
        if number == at:
            os.kill(os.getpid(), signal.SIGKILL)

    code = 4
    try:
        signal.alarm(_CHILD_S)
        with _counted_writes(*((_nothing, die) if half else (die, _nothing))):
            command()
        code = 0
    except KDCacheError:
        code = 3
    except BaseException as error:
        import traceback

        os.write(2, "".join(traceback.format_exception(error)).encode())
    finally:
        os._exit(code)


@contextmanager
def failing_writes(at: int, number: int) -> Iterator[None]:
    """Have the at-th write of this process fail with an error of the operating system, and no other."""

    def fail(count: int) -> None:
        if count == at:
            raise OSError(number, os.strerror(number))

    with _counted_writes(fail, _nothing):
        yield


DISK_ERRORS = (errno.EIO, errno.ENOSPC)


def build_clean(top: Path, server: ObjectStore) -> None:
    """Build each cache once without any disturbance, for comparison."""
    if World.clean:
        return
    world = World(top, server)
    for name in RECIPES:
        error = world.run(name)
        assert error is None, error
    World.clean = {name: world.files(name) for name in RECIPES}
    world.remove("far")
