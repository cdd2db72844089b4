"""Does a kill -9 ever harm? Kill builds and trainings at random moments, and compare the bytes at the end.

What is killed is a process that runs the command line; it is forked from this one, which has everything imported, so
that its life is the build and not the imports. A build is one to three processes, numbered or sharing as they come;
some or all of them are killed, and another number of them goes on. The moments are spread over the whole life of a
build: before its first shard, in any shard, between the last shard and the seal, and after.

After every kill the store is opened: it must be refused as incomplete, or be the uninterrupted build's record for
record. At the end it must be that build's file for file (the time stamp apart), no finished shard written twice.

    python benchmarks/crash.py --kills 50
    python benchmarks/crash.py --kills 20 --engine ray [--bucket]    # actors, nodes, drivers: crash_ray.py

Exits with 1 if anything differs. A failure is repeated, as far as chance allows, with the seed that is printed.
"""

import argparse
import hashlib
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

# A fork keeps one thread only. Libraries read this when they are imported.
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np

from common import header, write
from crash_ray import RayBuilds, moto_bucket, two_nodes
from doomed import DifferenceError, Doom, Process, Tally, import_everything
from kdcache.errors import IncompleteError, KDCacheError, StoreError
from kdcache.store import Cache, open_cache, read_manifest

WEIGHTS = ("last.safetensors", "best.safetensors")


class Builds:
    """Kills builds of one cache after another."""

    def __init__(self, work: Path, words: Sequence[object], rng: random.Random) -> None:
        self.work, self.words, self.rng = work, words, rng
        self.log = work / "build.log"
        self.clean = work / "clean.zarr"
        began = time.monotonic()
        self._start([], self.clean).finish()
        self.seconds = time.monotonic() - began
        cache = open_cache(self.clean)
        self.shards = cache.manifest.shards
        self.rows = all_rows(cache)
        self.ids = cache.ids
        self.manifest = unstamped(cache)
        # A second build starts up and finds nothing to do.
        began = time.monotonic()
        self._start([], self.clean).finish()
        self.start_s = time.monotonic() - began
        print(f"uninterrupted build: {self.shards} shards, {self.seconds:.2f} s, start-up {self.start_s:.2f} s")

    def _start(self, more: Sequence[object], store: Path) -> Process:
        return Process.start(["build-teacher-cache", *self.words, "--out", store, *more], self.log)

    def kill(self, most: int, tally: Tally) -> None:
        """Kill one build again and again, until it finishes or was killed `most` times.

        Then let it finish, and compare its cache.
        """
        store = self.work / f"store-{tally.finished}.zarr"
        finished: dict[str, tuple[int, int]] = {}
        state = "absent"
        while True:
            done = written(store)
            processes, how = self._start_some(store)
            if len(tally.kills) < most and (state != "complete" or self.rng.random() < 0.5):
                each_s = max(self.seconds - self.start_s, 0.01) / self.shards
                doom = Doom.draw(self.rng, done, self.shards, each_s, self.start_s)
                doom.wait(lambda: written(store), processes)
                victims = self.rng.sample(processes, self.rng.choice([len(processes), len(processes), 1]))
                killed = [process.kill() for process in victims]
                if any(killed):
                    state = self.state_of(store)
                    tally.killed(processes=how, victims=len(victims), shards=written(store), state=state)
            for process in processes:
                if process.wait() not in (0, -signal.SIGKILL):
                    raise DifferenceError(f"{how}: exit code {process.code}: {process.log_end()}")
            state = self.state_of(store)
            now = ledger_files(store)
            redone = [name for name, identity in finished.items() if now.get(name) != identity]
            if redone:
                raise DifferenceError(f"{store.name}: finished shards were written again: {redone}")
            finished = now
            if state == "complete" and all(process.code == 0 for process in processes):
                break
        self.compare(store)
        tally.finished += 1

    def _start_some(self, store: Path) -> tuple[list[Process], str]:
        count = self.rng.choice([1, 1, 2, 3])
        numbered = count > 1 and self.rng.random() < 0.5
        more = [["--worker", f"{index}/{count}"] if numbered else [] for index in range(count)]
        return [self._start(words, store) for words in more], f"{count}{' numbered' if numbered else ''}"

    def state_of(self, store: Path) -> str:
        """Return the state that a cache reports.

        Raises: DifferenceError if it opens and holds something else than the uninterrupted build.
        """
        try:
            cache = open_cache(store)
            cache.check_files()
        except IncompleteError:
            return "incomplete"
        except StoreError as error:
            if store.exists():
                raise DifferenceError(f"{store.name}: half built, refused as something else: {error}") from error
            return "absent"
        if cache.ids != self.ids or unstamped(cache) != self.manifest:
            raise DifferenceError(f"{store.name}: other ids or another manifest")
        rows = all_rows(cache)
        wrong = [path for path in self.rows if not np.array_equal(rows[path], self.rows[path])]
        if wrong:
            raise DifferenceError(f"{store.name} served wrong records of {wrong}")
        return "complete"

    def compare(self, store: Path) -> None:
        """Compare a cache file by file with the uninterrupted build. No other file may be next to it."""
        differing = differences(self.clean, store)
        left = [path.name for path in self.work.glob(f".{store.name}*")]
        if differing or left:
            raise DifferenceError(f"{store.name} differs in {differing}; left beside it: {left}")


class Trainings:
    """Kills trainings of a student on a store."""

    def __init__(self, work: Path, words: Sequence[object], iterations: int, rng: random.Random) -> None:
        self.work, self.rng, self.iterations = work, rng, iterations
        self.words = ["train-student", *words, "--iterations", iterations, "--log-every", 1]
        self.log = work / "training.log"
        began = time.monotonic()
        self._start(work / "clean-run").finish()
        self.seconds = time.monotonic() - began
        print(f"uninterrupted training: {iterations} iterations, {self.seconds:.2f} s")

    def _start(self, run: Path) -> Process:
        resume = ["--resume"] if run.exists() else []
        return Process.start([*self.words, *resume, "--out", run, "--workers", self.rng.choice([0, 2])], self.log)

    def kill(self, most: int, tally: Tally) -> None:
        """Kill one run again and again, until it finishes or was killed `most` times.

        Then let it finish, and compare its weights.
        """
        run = self.work / f"run-{tally.finished}"
        while True:
            process = self._start(run)
            if len(tally.kills) < most:
                done = steps_of(run)
                doom = Doom.draw(self.rng, done, self.iterations, 2 * self.seconds / self.iterations, self.seconds / 2)
                doom.wait(lambda: steps_of(run), [process])
                if process.kill():
                    tally.killed(iteration=steps_of(run), checkpoint=(run / "checkpoint.pt").exists())
                    continue
            process.finish()
            break
        clean = self.work / "clean-run"
        differing = [name for name in WEIGHTS if (run / name).read_bytes() != (clean / name).read_bytes()]
        if differing:
            raise DifferenceError(f"{run.name}: {differing} differ")
        tally.finished += 1


def kill_on_ray(builds: Builds, kills: int, tally: Tally, *, in_bucket: bool) -> None:
    """Kill builds on a Ray cluster of two nodes. `builds` has made the same cache without interruption."""
    with moto_bucket() if in_bucket else nullcontext() as bucket, two_nodes() as cluster:
        doomed = RayBuilds(builds.work, builds.words, open_cache(builds.clean), builds.rows, builds.rng, bucket)
        while len(tally.kills) < kills:
            doomed.kill(kills, tally, cluster)


def written(store: Path) -> int:
    """Return the number of records in a store's ledger, one for each finished shard."""
    return len(ledger_files(store))


def ledger_files(store: Path) -> dict[str, tuple[int, int]]:
    """Return (inode, modification time in ns) of each ledger file by its name. They change if a shard is rewritten."""
    identities = {}
    for path in store.glob("ledger/*.json"):
        status = path.stat()
        identities[path.name] = (status.st_ino, status.st_mtime_ns)
    return identities


def steps_of(run: Path) -> int:
    """Return the number of training steps that a run has logged."""
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b'"kind": "train"') if path.is_file() else 0


def all_rows(cache: Cache) -> dict[str, Any]:
    """Return every array of a cache as one NumPy array over its records, by the array's path."""
    records = [cache.read(record, list(cache.specs)) for record in range(len(cache))]
    return {path: np.stack([rows[path] for rows in records]) for path in cache.specs}


def unstamped(cache: Cache) -> dict[str, Any]:
    """Return the manifest of a cache without its date, to compare builds."""
    return cache.manifest.model_dump(exclude={"created"})


def differences(store: Path, other: Path) -> list[str]:
    """Return files that only one of two stores has, or whose bytes differ, apart from time stamps."""
    files, other_files = files_of(store), files_of(other)
    return sorted(name for name in {*files, *other_files} if files.get(name) != other_files.get(name))


def files_of(store: Path) -> dict[str, bytes]:
    """Return the bytes of every file of a cache by its path.

    Time stamps and digests of the manifest and its copy are replaced by constants.
    """
    files = {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*") if path.is_file()}
    stamp = read_manifest(store).created
    stamped = [name for name in ("zarr.json", "manifest.json") if name in files]
    digests = [hashlib.sha256(files[name]).hexdigest().encode() for name in stamped]
    for name in (*stamped, "complete.json"):
        files[name] = files[name].replace(stamp.encode(), b"TIME")
        for digest in digests:
            files[name] = files[name].replace(digest, b"DIGEST")
    return files


def main() -> None:
    """Kill builds and trainings at random moments, compare what they end with, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="of builds")
    parser.add_argument("--training-kills", type=int, default=6)
    parser.add_argument("--data", default="scenes:48x64,train=40,val=4")
    parser.add_argument("--teacher", help="a run of train-teacher; default a few iterations of kdcache:tiny")
    parser.add_argument("--size", default="48x64", help="of the teacher that is made here")
    parser.add_argument("--shard-records", type=int, default=4)
    parser.add_argument("--iterations", type=int, default=40, help="of a training")
    parser.add_argument("--seed", type=int, default=None, help="of the moments; default another each time")
    parser.add_argument("--engine", choices=("local", "ray"), default="local")
    parser.add_argument("--bucket", action="store_true", help="with ray: stores in an S3 server on loopback")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    seed = random.randrange(10**6) if arguments.seed is None else arguments.seed
    print(f"seed {seed}", flush=True)
    rng = random.Random(seed)
    import_everything()
    common = ["--device", "cpu", "--threads", 1]
    with tempfile.TemporaryDirectory(prefix="kdcache-crash-") as scratch:
        work = Path(scratch)
        teacher = arguments.teacher
        if teacher is None:
            teacher = work / "teacher"
            words = ["train-teacher", "--data", arguments.data, "--model", "kdcache:tiny", "--size", arguments.size]
            words += ["--iterations", 4, "--batch-size", 4, "--out", teacher, *common]
            Process.start(words, work / "teacher.log").finish()
        words = ["--data", arguments.data, "--teacher", teacher, "--shard-records", arguments.shard_records, *common]
        builds, trainings, failure = Tally(), Tally(), None
        try:
            doomed = Builds(work, words, rng)
            if arguments.engine == "ray":
                kill_on_ray(doomed, arguments.kills, builds, in_bucket=arguments.bucket)
            while len(builds.kills) < arguments.kills:
                doomed.kill(arguments.kills, builds)
            words = ["--cache", doomed.clean, "--model", "kdcache:tiny", "--val", arguments.data, "--batch-size", 4]
            words += ["--val-every", max(1, arguments.iterations // 8), *common]
            if arguments.training_kills and arguments.engine == "local":
                runs = Trainings(work, words, arguments.iterations, rng)
                while len(trainings.kills) < arguments.training_kills:
                    runs.kill(arguments.training_kills, trainings)
        except (DifferenceError, KDCacheError) as error:
            failure = str(error)
            print(f"FAILED with --seed {seed}: {failure}")
    if failure is None:
        print(
            f"{len(builds.kills)} kills of builds: {builds.finished} stores, all identical; "
            f"{len(trainings.kills)} kills of trainings: {trainings.finished} runs, weights identical"
        )
    if arguments.json:
        result = {"seed": seed, "failure": failure, "builds": vars(builds), "trainings": vars(trainings)}
        write(arguments.json, {**header("crash" if arguments.engine == "local" else "crash-ray"), **result})
    sys.exit(failure is not None)


if __name__ == "__main__":
    main()
