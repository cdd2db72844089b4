"""Kills in builds on a Ray cluster: of actors, of nodes, of the driver; on a disk or in a bucket.

The cluster is a head without room and two nodes of a core each, all of this machine. What is killed is drawn anew
every time: an actor, a node with all that runs on it (another is added), or the driver, whose command is then
repeated. Nobody does anything else. At the end the store must be one process's.
"""

import contextlib
import os
import random
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from doomed import DifferenceError, Process, Tally
from kdcache.store import Cache, inspect_store, open_cache, store_exists

KINDS = ("actor", "node", "driver")


class Driver(Process):
    """A command line in a process that shares nothing with this one, which may have threads."""

    @classmethod
    def start(cls, words: Sequence[object], log: Path) -> "Driver":
        """Start the command line in a new process, not a fork. Its output goes to `log`."""
        command = [sys.executable, "-m", "kdcache_cli", *map(str, words)]
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        actions = [(os.POSIX_SPAWN_OPEN, 1, str(log), flags, 0o644), (os.POSIX_SPAWN_DUP2, 1, 2)]
        return cls(os.posix_spawn(sys.executable, command, dict(os.environ), file_actions=actions), log)


class RayBuilds:
    """Kills builds of one cache after another on a Ray cluster.

    Args:
        work: the folder of caches and the log.
        words: the command line of a build.
        clean: the cache that one process built.
        rows: its records, by path.
        rng: draws the moments of the kills.
        bucket: the address of a bucket for the caches, or None for `work`.
    """

    def __init__(
        self,
        work: Path,
        words: Sequence[object],
        clean: Cache,
        rows: dict[str, Any],
        rng: random.Random,
        bucket: str | None,
    ) -> None:
        self.log, self.words, self.rng = work / "ray.log", words, rng
        self.clean, self.rows, self.work, self.bucket = clean, rows, work, bucket
        self.shards = clean.manifest.shards

    def kill(self, most: int, tally: Tally, cluster: Any) -> None:
        """Kill one build again and again, until it finishes or was killed `most` times. Then compare it."""
        name = f"ray-{tally.finished}.zarr"
        store = f"{self.bucket}/{name}" if self.bucket else str(self.work / name)
        while True:
            more = ["--engine", "ray", "--actors", 2, "--address", cluster.address]
            driver = Driver.start(["build-teacher-cache", *self.words, "--out", store, *more], self.log)
            killed = False
            while len(tally.kills) < most and not killed:
                done = written(store)
                until = self.rng.randint(done, min(done + self.shards // 3, self.shards))
                while written(store) < until and not driver.ended():
                    time.sleep(0.01)
                time.sleep(self.rng.uniform(0, 0.2))
                if driver.ended() or done == self.shards:  # once at most after the last shard
                    break
                kind = self.rng.choice(KINDS)
                if self._kill(kind, driver, cluster):
                    tally.killed(kind=kind, shards=written(store), of=self.shards)
                    killed = kind == "driver"
            code = driver.wait()
            if code == 0:
                break
            if not killed:
                raise DifferenceError(f"{name}: the driver ended with {code}: {driver.log_end()}")
        self.compare(store)
        tally.finished += 1

    def _kill(self, kind: str, driver: Driver, cluster: Any) -> bool:
        """Return whether there was one to kill."""
        if kind == "driver":
            return driver.kill()
        if kind == "actor":
            running = actors()
            if not running:
                return False
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.rng.choice(running), signal.SIGKILL)
            return True
        cluster.remove_node(
            self.rng.choice([node for node in cluster.list_all_nodes() if node != cluster.head_node]), False
        )
        cluster.add_node(num_cpus=1)
        return True

    def compare(self, store: str) -> None:
        """Compare a cache with one that a single process built. Raises: DifferenceError for another record."""
        cache = open_cache(store)
        cache.check_files()
        created = {"created"}
        if cache.ids != self.clean.ids or cache.manifest.model_dump(exclude=created) != self.clean.manifest.model_dump(
            exclude=created
        ):
            raise DifferenceError(f"{store}: other ids or another manifest")
        assert cache.ledger is not None
        assert self.clean.ledger is not None
        for shard in range(self.shards):
            if cache.ledger.record(shard) != self.clean.ledger.record(shard):  # size and SHA-256 of every array file
                raise DifferenceError(f"{store}: shard {shard} has other files")
        rows = [cache.read(record, list(cache.specs)) for record in range(len(cache))]
        wrong = [
            path for path in self.rows if not np.array_equal(np.stack([row[path] for row in rows]), self.rows[path])
        ]
        if wrong:
            raise DifferenceError(f"{store} served wrong records of {wrong}")


@contextlib.contextmanager
def two_nodes() -> Iterator[Any]:
    """Run a Ray cluster in a with block: a head node without workers, and two nodes with one core each."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        yield cluster
    finally:
        cluster.shutdown()


@contextlib.contextmanager
def moto_bucket() -> Iterator[str]:
    """Run moto's S3 server on this machine in a with block, set its credentials, and yield the address of a bucket."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "kdcache",
        "AWS_SECRET_ACCESS_KEY": "kdcache",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ALLOW_HTTP": "true",
    }
    try:
        boto3.client("s3").create_bucket(Bucket="kdcache")
        yield "s3://kdcache"
    finally:
        server.stop()


def written(store: str) -> int:
    """Return the number of shards in a store's ledger."""
    if "://" not in store:
        return len(list(Path(store).glob("ledger/*.json")))
    return inspect_store(store).shards_written if store_exists(store) else 0


def actors() -> list[int]:
    """Return the process ids of the Ray actors that run teachers, found by the title that Ray gives them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if path.read_bytes().startswith(b"ray::ShardTeacher"):
                found.append(int(path.parent.name))
    return found
