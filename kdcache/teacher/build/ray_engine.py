"""A build on a Ray cluster: actors teach whole shards and write their files, this process hands them out.

An actor loads the teacher once and gets numbers of shards; it writes their array files and returns their ledger
records. Pixels and logits never go through Ray. Only the driver writes the ledger and the seal: a shard counts once,
whoever wrote its files. The shard of an actor that dies, alone or with its node, goes to the next free one, and Ray
starts the actor again where there is room; the same command goes on after the driver's own death.
"""

import os
import socket
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from kdcache.data import Split
from kdcache.errors import KDCacheError, MismatchError, RecipeError, StoreError
from kdcache.ray_cluster import cluster
from kdcache.store import Manifest, StoreWriter, Worker, read_manifest, store_exists
from kdcache.store.backend.open import open_place
from kdcache.store.ledger import ShardRecord
from kdcache.teacher.build.build import Pass
from kdcache.teacher.build.manifest import device_name, libraries
from kdcache.teacher.build.options import BuildOptions
from kdcache.teacher.build.probe import TeacherProbe
from kdcache.teacher.build.shard_queue import ShardQueue
from kdcache.teacher.load.forward import place
from kdcache.teacher.load.load import Teacher

Parts = Callable[[], tuple[Split, Teacher, BuildOptions]]
MOST_DEATHS = 5
"""Processes that one shard may cost before it counts as their cause."""


@dataclass(frozen=True)
class RayEngine:
    """The actors of a build.

    Args:
        parts: makes the split, the teacher and the options, on every node; it is pickled.
        actors: how many; None is as many as the cluster has room for.
        num_gpus: of each actor, also a part of one.
        address: of a running cluster, as of `ray.init`; None is the one that RAY_ADDRESS names, or one of this machine.
    """

    parts: Parts
    actors: int | None = None
    num_gpus: float = 0.0
    address: str | None = None

    def records(self, writer: StoreWriter) -> Iterator[ShardRecord]:
        """The records of the missing shards, as their files are written; for `StoreWriter.finish`.

        Raises: RecipeError without Ray or without room in the cluster; StoreError, MismatchError for a node that lacks
            the data or has other libraries; what the teacher raises.
        """
        with cluster(self.address) as ray:
            yield from self._records(ray, writer)

    def _records(self, ray: Any, writer: StoreWriter) -> Iterator[ShardRecord]:
        threads = writer.manifest.build.threads
        count = self._room(ray, threads)
        kind = ray.remote(_actor_class(ray)).options(num_cpus=threads, num_gpus=self.num_gpus, max_restarts=-1)
        task = _Task(self.parts, os.getcwd(), str(writer.place), writer.manifest.model_dump_json())
        todo, deaths, free = deque(writer.missing), Counter[int](), deque[Any]()
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
                record = ray.get(ended)
            except ray.exceptions.RayTaskError as error:
                raise error.cause if isinstance(error.cause, KDCacheError) else error from None
            except ray.exceptions.RayActorError as error:
                if shard is not None:
                    todo.appendleft(shard)
                    deaths[shard] += 1
                    _check_deaths(shard, deaths[shard], error)
                running[actor.ready.remote()] = (actor, None)
                continue
            free.append(actor)
            hand_out()  # before the ledger is written, so that no actor waits for it
            if record is not None:
                yield ShardRecord.model_validate_json(record)

    def _room(self, ray: Any, threads: int) -> int:
        """How many actors to start. Raises: RecipeError where not even one has room."""
        resources = ray.cluster_resources()
        rooms = {"CPU": (resources.get("CPU", 0), threads), "GPU": (resources.get("GPU", 0), self.num_gpus)}
        fits = min(int(there / each) for there, each in rooms.values() if each > 0)
        if fits < 1:
            wanted = ", ".join(f"{each:g} {name}" for name, (_, each) in rooms.items() if each > 0)
            there = ", ".join(f"{there:g} {name}" for name, (there, _) in rooms.items())
            raise RecipeError(
                "a cluster has room for an actor: as many CPUs as --threads, and --num-gpus GPUs",
                received=f"{wanted} for each, and a cluster with {there}",
                remedy="lower --threads or --num-gpus, or add nodes to the cluster",
            )
        return self.actors or fits


def _check_deaths(shard: int, deaths: int, error: Exception) -> None:
    if deaths >= MOST_DEATHS:
        raise StoreError(
            f"a shard is taught within {MOST_DEATHS} attempts",
            received=f"shard {shard} ended {deaths} processes, the last with {str(error).splitlines()[0]}",
            remedy="look at the memory of the nodes (ray logs); lower --batch-size or --shard-records",
        ) from error


@dataclass(frozen=True)
class _Task:
    """What an actor is started with: how to make the parts, the driver's folder, and the store that it writes into."""

    parts: Parts
    folder: str
    store: str
    manifest: str


class _ShardTeacher:
    """An actor's work: the teacher, loaded with the first call, over whole shards."""

    def __init__(self, task: _Task) -> None:
        self._task = task
        self._writer: StoreWriter | None = None
        self._work: Any = None

    def ready(self) -> None:
        """Returns when the actor runs."""

    def teach(self, shard: int) -> str:
        """Write the files of a shard. Returns: its ledger record as JSON."""
        if self._writer is None:
            self._load()
        assert self._writer is not None
        records: list[ShardRecord] = []
        writer = self._writer
        with ShardQueue(writer.manifest, lambda *rows: records.append(writer.write_files(*rows))) as queue:
            for batch in self._work.batches([shard]):
                queue.add(batch.items, batch.rows)
        return records[0].model_dump_json()

    def _load(self) -> None:
        task, node = self._task, socket.gethostname()
        manifest = Manifest.model_validate_json(task.manifest)
        _check_libraries(manifest, node)
        try:
            os.chdir(task.folder)
            torch.set_num_threads(manifest.build.threads)
            split, teacher, options = task.parts()
        except (OSError, KDCacheError) as error:
            raise _lacks(node, str(error).replace("\n", " ")) from error
        if not store_exists(task.store) or read_manifest(open_place(task.store)).created != manifest.created:
            raise _lacks(node, f"{task.store} there is not the store that the driver began")
        if (device := device_name(options.device)) != manifest.build.device:
            raise _differs(node, f"{device}, and {manifest.build.device} where the store was begun")
        place(teacher.model, options.device)
        self._writer = StoreWriter(open_place(task.store), manifest, Worker())
        self._work = Pass(TeacherProbe(split, teacher, replace(options, fidelity=False)), manifest, None)


def _actor_class(ray: Any) -> type:
    """`_ShardTeacher` for Ray: a start is tried again until there is room, a shard goes to another actor instead."""

    class ShardTeacher(_ShardTeacher):
        ready = ray.method(max_task_retries=-1)(_ShardTeacher.ready)
        teach = ray.method(max_task_retries=0)(_ShardTeacher.teach)

    return ShardTeacher


def _check_libraries(manifest: Manifest, node: str) -> None:
    here, begun = libraries(), manifest.build.libraries
    others = [
        f"{name} {here.get(name)} (the store: {version})"
        for name, version in begun.items()
        if here.get(name) != version
    ]
    if others:
        raise _differs(node, ", ".join(others))


def _differs(node: str, what: str) -> MismatchError:
    return MismatchError(
        "all nodes of a build have the same libraries and devices: a shard's bytes do not depend on who wrote it",
        received=f"node {node} has {what}",
        remedy="install the same versions on every node, or build with the nodes that are alike",
    )


def _lacks(node: str, what: str) -> StoreError:
    return StoreError(
        "every node of a cluster sees the data, the teacher and the store by the same paths",
        received=f"on node {node}: {what}",
        remedy="put them on a disk that all nodes share, or the store into an object store",
    )
