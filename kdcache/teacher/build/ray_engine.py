"""A build on a Ray cluster: actors compute whole shards and write their files, and this process distributes them.

An actor loads the teacher once and gets shard numbers. It writes their array files and returns their ledger records.
Pixels and logits never go through Ray. Only the driver writes the ledger and the seal, so a shard counts once, whoever
wrote its files. If an actor dies, alone or with its node, its shard goes to the next free one, and Ray restarts the
actor where there is room. If the driver dies, the same command continues.
"""

import os
import re
import socket
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from kdcache.data import Split
from kdcache.errors import KDCacheError, MismatchError, RecipeError, StoreError
from kdcache.ray_cluster import cluster, import_ray
from kdcache.store import Cache, Manifest, StoreWriter, Worker, read_manifest, store_exists
from kdcache.store.backend.open import open_place
from kdcache.store.ledger import ShardRecord
from kdcache.teacher.build.build import TaughtShard, TeacherPass
from kdcache.teacher.build.manifest import device_name, libraries
from kdcache.teacher.build.options import BuildOptions
from kdcache.teacher.build.probe import TeacherProbe
from kdcache.teacher.build.reuse import Reuse
from kdcache.teacher.build.shard_queue import ShardQueue
from kdcache.teacher.load.forward import place
from kdcache.teacher.load.load import Teacher

Parts = Callable[[], tuple[Split, Teacher, BuildOptions] | tuple[Split, Teacher, BuildOptions, Cache]]
"""Returns the split, the teacher and the options of a build, and the earlier cache that it reuses, if any."""
MOST_DEATHS = 5
"""The number of processes that may die on one shard before the build fails."""


@dataclass(frozen=True)
class RayEngine:
    """Computes the shards of a build in Ray actors on the nodes of a cluster.

    Args:
        parts: a picklable function without arguments, called on every node. It returns the split, the teacher, the
            options and, if targets are reused, the earlier cache.
        actors: number of actors. None starts as many as the cluster has room for.
        num_gpus: GPUs for each actor. Fractions such as 0.5 share a GPU.
        address: address of the Ray cluster. None uses a running cluster, or starts one on this machine.
    Raises: RecipeError if Ray is not installed, or if `parts` cannot be pickled.
    """

    parts: Parts
    actors: int | None = None
    num_gpus: float = 0.0
    address: str | None = None

    def __post_init__(self) -> None:
        _check_pickled(self.parts)

    @contextmanager
    def connected(self, manifest: Manifest) -> Iterator[None]:
        """Connect to the Ray cluster for the duration of a with block.

        `manifest` describes the cache that will be built. It gives the number of CPU threads of an actor.

        Raises: RecipeError if there is no cluster, or if it has no room for an actor.
        """
        with cluster(self.address) as ray:
            self._room(ray, manifest.build.threads)
            yield

    def shards(self, writer: StoreWriter) -> Iterator[TaughtShard]:
        """Yield each missing shard of `writer` when an actor has written its files.

        Raises: RecipeError if the cluster has no room for an actor; StoreError for a node without the data;
            MismatchError for a node with other library versions; any error of the teacher.
        """
        with cluster(self.address) as ray:
            yield from self._shards(ray, writer)

    def _shards(self, ray: Any, writer: StoreWriter) -> Iterator[TaughtShard]:
        threads = writer.manifest.build.threads
        count = self._room(ray, threads)
        kind = ray.remote(_actor_class(ray)).options(num_cpus=threads, num_gpus=self.num_gpus, max_restarts=-1)
        task = _Task(self.parts, os.getcwd(), str(writer.place), writer.manifest.model_dump_json())
        todo, deaths, free = deque(writer.missing), Counter[Any](), deque[Any]()
        actors = [kind.remote(task) for _ in range(min(count, len(todo)))]
        # An actor gets a shard when it runs: one without room must not keep a shard waiting.
        running: dict[Any, tuple[Any, int | None]] = {actor.ready.remote(): (actor, None) for actor in actors}

        def hand_out() -> None:
            while todo and free:
                actor, following = free.popleft(), todo.popleft()
                running[actor.teach.remote(following)] = (actor, following)

        while todo or any(shard is not None for _, shard in running.values()):
            hand_out()
            (ended, *_), _ = ray.wait(list(running), num_returns=1)
            actor, shard = running.pop(ended)
            try:
                taught = ray.get(ended)
            except ray.exceptions.RayTaskError as error:
                raise error.cause if isinstance(error.cause, KDCacheError) else error from None
            except ray.exceptions.RayActorError as error:
                if shard is not None:
                    todo.appendleft(shard)
                deaths[actor if shard is None else shard] += 1
                _check_deaths(shard, deaths[actor if shard is None else shard], error)
                running[actor.ready.remote()] = (actor, None)
                continue
            del deaths[actor]
            free.append(actor)
            hand_out()  # before the ledger is written, so that no actor waits for it
            if taught is not None:
                yield taught

    def _room(self, ray: Any, threads: int) -> int:
        """Return the number of actors to start. Raises: RecipeError if not even one fits."""
        needs = {kind: each for kind, each in (("CPU", threads), ("GPU", self.num_gpus)) if each > 0}
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        fits = sum(min(int(node.get(kind, 0) / each) for kind, each in needs.items()) for node in nodes)
        if fits < 1:
            needed = ", ".join(f"{each:g} {kind}" for kind, each in needs.items())
            there = "; ".join(", ".join(f"{node.get(kind, 0):g} {kind}" for kind in ("CPU", "GPU")) for node in nodes)
            raise RecipeError(
                f"No node has room for an actor: it needs {needed}, and the nodes have {there}",
                fix="Decrease --threads or --num-gpus, or add nodes to the cluster.",
            )
        return self.actors or fits


def _check_pickled(parts: Parts) -> None:
    """Raise RecipeError without Ray, and for objects that cannot be pickled."""
    try:
        import_ray().cloudpickle.dumps(parts)  # classes and functions of `__main__` go along
    except (TypeError, AttributeError, NotImplementedError, RuntimeError, ValueError) as error:
        raise RecipeError(
            f"Cannot send the data and the teacher to actors: {type(error).__name__}: {error}",
            fix="Give a folder or spec, and a run or file.py:function. Or take what cannot be pickled, such as open "
            "files and locks, out of the objects. Or leave --engine ray out.",
        ) from error


def _check_deaths(shard: int | None, deaths: int, error: Exception) -> None:
    """Raise StoreError for a shard that keeps ending its processes, or (None) for actors that cannot start."""
    if deaths < MOST_DEATHS:
        return
    lines = str(error).strip().splitlines()
    if shard is None:
        node = re.search(r"\bip=([\w.:]+)", str(error))
        raise StoreError(
            f"Cannot start actors{f' on node {node[1]}' if node else ''}: {lines[-1]}",
            fix="Install kdcache and the modules of the data and the teacher there, in the versions of this process. "
            "If the cluster has ended, start it again: the same command continues.",
        ) from error
    raise StoreError(
        f"Shard {shard} ended {deaths} {'processes' if deaths > 1 else 'process'}, the last with {lines[0]}",
        fix="Look at the memory of the nodes (ray logs), or decrease --batch-size or --shard-records",
    ) from error


@dataclass(frozen=True)
class _Task:
    """An actor's start-up data: the function that makes a build's parts, the driver's folder, and the cache."""

    parts: Parts
    folder: str
    store: str
    manifest: str


class _ShardTeacher:
    """Computes whole shards in an actor. The teacher is loaded at the first shard."""

    def __init__(self, task: _Task) -> None:
        self._task = task
        self._writer: StoreWriter | None = None
        self._work: Any = None
        self._reuse: Reuse | None = None

    def ready(self) -> None:
        """Do nothing. The call returns as soon as the actor runs."""

    def teach(self, shard: int) -> TaughtShard:
        """Write the files of shard number `shard`."""
        if self._writer is None:
            self._load()
        assert self._writer is not None
        records: list[ShardRecord] = []
        taught = reused = 0
        before = self._damaged
        writer = self._writer
        with ShardQueue(writer.manifest, lambda *rows: records.append(writer.write_files(*rows))) as queue:
            for batch in self._work.batches([shard]):
                queue.add(batch.items, batch.rows)
                taught += len(batch.items) if batch.taught else 0
                reused += sum(item.old is not None for item in batch.items)
        return TaughtShard(records[0], taught, reused, self._damaged - before)

    @property
    def _damaged(self) -> int:
        return 0 if self._reuse is None else len(self._reuse.damaged)

    def _load(self) -> None:
        task, node = self._task, socket.gethostname()
        manifest = Manifest.model_validate_json(task.manifest)
        check_libraries(manifest, node)
        try:
            os.chdir(task.folder)
            torch.set_num_threads(manifest.build.threads)
            split, teacher, options, *earlier = task.parts()
        except KDCacheError as error:
            raise _lacks(node, error.problem.splitlines()[0]) from error
        except (OSError, ImportError) as error:
            raise _lacks(node, str(error)) from error
        if not store_exists(task.store) or read_manifest(open_place(task.store)).created != manifest.created:
            raise _lacks(node, f"{task.store} there is not the cache that the driver began")
        if (device := device_name(options.device)) != manifest.build.device:
            raise _differs(node, f"{device}, and {manifest.build.device} where the cache was begun")
        place(teacher.model, options.device)
        self._writer = StoreWriter(open_place(task.store), manifest, Worker())
        self._reuse = Reuse(earlier[0], manifest) if earlier else None
        self._work = TeacherPass(TeacherProbe(split, teacher, replace(options, fidelity=False)), manifest, self._reuse)


def _actor_class(ray: Any) -> type:
    """Return `_ShardTeacher` as a Ray actor. A start waits for room, and a shard moves to another actor."""

    class ShardTeacher(_ShardTeacher):
        ready = ray.method(max_task_retries=-1)(_ShardTeacher.ready)
        teach = ray.method(max_task_retries=0)(_ShardTeacher.teach)

    return ShardTeacher


def check_libraries(manifest: Manifest, node: str) -> None:
    """Check that this node has the library versions in the build's manifest.

    `node` is the node's name, for the message.

    Raises: MismatchError if a version differs.
    """
    here, begun = libraries(), manifest.build.libraries
    others = [
        f"{name} {here.get(name)} (the cache: {version})"
        for name, version in begun.items()
        if here.get(name) != version
    ]
    if others:
        raise _differs(node, ", ".join(others))


def _differs(node: str, what: str) -> MismatchError:
    return MismatchError(
        f"Node {node} has {what}", fix="Install the same versions on every node, or build with nodes that are the same."
    )


def _lacks(node: str, what: str) -> StoreError:
    return StoreError(
        f"Cannot compute shards on node {node}: {what}",
        fix="Put the data, the teacher and the cache on a disk that all nodes share, or the cache into an object "
        "store.",
    )
