"""The teacher's one pass over a data set, into a cache. After an interruption it continues where it stopped.

Targets that an earlier cache already has are copied from it. The teacher runs for the rest.

Three stages: threads render images (ahead, if the teacher is on a GPU), the teacher runs in the calling thread, and one
thread compresses, writes and syncs finished shards meanwhile. Memory holds two shards and a few batches, whatever the
number of records.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from kdcache.data import Split, remembered_digests
from kdcache.data.sample import FileDigest
from kdcache.display import facts_table, line
from kdcache.errors import ModelError
from kdcache.models import Outputs
from kdcache.models.foreign.wrapped import answer_as
from kdcache.store import Cache, Manifest, StoreWriter, Worker, begun_manifest, open_writer, round_targets, store_exists
from kdcache.store.format.eight_bits import stored_features
from kdcache.store.format.manifest_models import Feature, Head, Regression, Repair
from kdcache.store.freshness import BuiltFrom
from kdcache.store.ledger import ShardRecord
from kdcache.teacher.build.manifest import plan_manifest
from kdcache.teacher.build.options import BuildOptions
from kdcache.teacher.build.probe import TeacherProbe
from kdcache.teacher.build.render import Array, Rendered, render_batches
from kdcache.teacher.build.reuse import Reuse, plan_extended
from kdcache.teacher.build.shard_queue import ShardQueue
from kdcache.teacher.build.statistics import measure
from kdcache.teacher.load.forward import not_finite, out_of_memory, place, teach
from kdcache.teacher.load.load import Teacher
from kdcache_kernels import pack

Progress = Callable[[int, int], None]


class TaughtShard(NamedTuple):
    """A shard whose files another process has written. Its ledger entry is not yet in the cache.

    Attributes:
        record: the ledger entry to write.
        taught: number of records that the teacher predicted.
        reused: number of records that were copied from an earlier cache.
        damaged: number of records that were damaged in the earlier cache, so that the teacher predicted them again.
    """

    record: ShardRecord
    taught: int
    reused: int
    damaged: int


class Engine(Protocol):
    """The interface to other processes that compute a cache's missing shards and write their files.

    A class of this kind defines `connected` and `shards`. `RayEngine` is an example.
    """

    def connected(self, manifest: Manifest) -> AbstractContextManager[None]:
        """Connect to the other processes for the duration of a with block.

        `manifest` describes the cache that will be built.

        Raises: KDCacheError if the processes cannot be reached, or if their machines have too few CPUs or GPUs.
        """

    def shards(self, writer: StoreWriter) -> Iterator[TaughtShard]:
        """Yield each missing shard of `writer` when its files are written. The caller then writes its ledger entry."""


@dataclass(frozen=True)
class BuildResult:
    """The result of a build.

    Attributes:
        manifest: the cache's manifest.
        records: number of records that the teacher predicted in this call.
        kept: number of records that an earlier call had finished.
        seconds: duration of the teacher's pass.
        complete: False if other workers have not finished their shards yet.
        reused: number of records whose targets were copied from an earlier cache. If new taps were added, the teacher
            predicted these records too, and `records` includes them.
        repair: the manifest's entry on damaged shards that were computed again with other library versions, or None if
            there are none.
        damaged: number of records that could not be read in the earlier cache and were predicted again.
        out: folder or address of the cache.
    """

    manifest: Manifest
    records: int
    kept: int
    seconds: float
    complete: bool
    reused: int = 0
    repair: Repair | None = None
    damaged: int = 0
    out: str = ""

    @property
    def images_per_second(self) -> float:
        """The number of records that the teacher predicted per second."""
        return self.records / self.seconds if self.seconds else 0.0

    def __repr__(self) -> str:
        return line("BuildResult", self._facts)

    def _repr_html_(self) -> str:
        return facts_table("BuildResult", self._facts)

    @property
    def _facts(self) -> dict[str, object]:
        speed = f"{self.records:,} in {self.seconds:.1f} s, {self.images_per_second:.1f} images/s"
        return {
            "cache": self.out,
            "computed": speed if self.records else None,
            "from before": self.kept or None,
            "copied": self.reused or None,
            "state": "finished" if self.complete else "unfinished: other workers still write shards",
            **self.manifest.facts,
        }


class _Batch(NamedTuple):
    """Records of one shard, and path -> stored rows of the teacher's outputs for them."""

    items: list[Rendered]
    rows: dict[str, Array]
    taught: bool


@contextmanager
def deterministic_cudnn() -> Iterator[None]:
    """Make cuDNN choose the same algorithm every time, for the duration of a with block."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before


@deterministic_cudnn()
def build_cache(
    split: Split,
    teacher: Teacher,
    out: str | Path,
    options: BuildOptions,
    progress: Progress | None = None,
    worker: Worker | None = None,
    reuse: Cache | None = None,
    engine: Engine | None = None,
) -> BuildResult:
    """Run a teacher over every sample of a split and write its outputs into a cache.

    After an interruption, the same call continues. Finished shards are kept.

    Args:
        split: the data set.
        teacher: the teacher. It is moved to the device in `options`.
        out: folder or object-store address of the cache.
        options: which views are rendered and what is stored.
        progress: called with (records done, total records). Records of earlier calls count as done.
        worker: this process's part of a build that several processes share. Default: all of it.
        reuse: an earlier cache of the same teacher. Its targets are copied for views that render to the same pixels.
            None copies nothing.
        engine: other processes that compute the shards. None computes them in this process.
    Raises: KDCacheError, the base class of all errors of kdcache.
    """
    place(teacher.model, options.device)
    if store_exists(out):  # begun before: its manifest has the figures
        options = replace(options, fidelity=False)
    if (begun := begun_manifest(out)) is not None:
        answer_as(teacher.model, begun.heads, begun.view.teacher_size or begun.view.size)
    probe = TeacherProbe(split, teacher, options)
    if reuse is None:
        manifest, earlier = plan_manifest(probe), None
    else:
        manifest = plan_extended(probe, reuse)
        earlier = Reuse(reuse, manifest)
    data = BuiltFrom(split, partial(_checksums, split, manifest, options))
    with (
        # A store is begun where somebody can go on with it.
        nullcontext() if engine is None or store_exists(out) else engine.connected(manifest),
        open_writer(out, manifest, split.ids, worker, data) as writer,
        remembered_digests(split.data) as of_file,
    ):
        share = sum(map(manifest.shard_records, writer.worker.shards(manifest.shards)))
        already = share - sum(map(manifest.shard_records, writer.missing))
        work = TeacherPass(probe, writer.manifest, earlier, of_file)
        done = taught = reused = damaged = 0
        began = time.perf_counter()
        if progress is not None:
            progress(already, share)
        for shard in () if engine is None else engine.shards(writer):
            writer.finish(shard.record)
            done += shard.record.records[1] - shard.record.records[0]
            taught, reused, damaged = taught + shard.taught, reused + shard.reused, damaged + shard.damaged
            if progress is not None:
                progress(already + done, share)
        for shards in writer.passes():
            with ShardQueue(writer.manifest, writer.write_shard) as queue:
                for batch in work.batches(shards):
                    queue.add(batch.items, batch.rows)
                    done += len(batch.items)
                    taught += len(batch.items) if batch.taught else 0
                    reused += sum(item.old is not None for item in batch.items)
                    if progress is not None:
                        progress(already + done, share)
        seconds = time.perf_counter() - began
        complete = writer.seal()
    damaged += 0 if earlier is None else len(earlier.damaged)
    return BuildResult(
        writer.manifest, taught, share - done, seconds, complete, reused, writer.repaired, damaged, str(out)
    )


def _checksums(split: Split, manifest: Manifest, options: BuildOptions, shard: int) -> dict[str, Array]:
    """Render a shard's records and return their checksums of pixels and labels, by path of the checksum array."""
    rendered = list(render_batches(split, manifest, [shard], threads=options.render_threads, ahead=False))
    return {
        "records/pixel_checksum": np.array([item.checksum for item in rendered], np.uint64),
        "records/label_checksum": np.array([item.label_checksum for item in rendered], np.uint64),
    }


def pack_batch(
    outputs: Outputs, heads: Mapping[str, Head | Regression], features: Mapping[str, Feature]
) -> dict[str, Tensor]:
    """Convert a teacher's outputs for B records to the form in which the cache stores them.

    Args:
        outputs: the result of `teach`.
        heads: the manifest's entry for each head to store.
        features: the manifest's entry for each tap to store.
    Returns: path in the cache -> tensor (B, ...) on the device of the outputs. Features that are to be stored in 8 bits
        are still float32.
    """
    packed: dict[str, Tensor] = {}
    for name, head in heads.items():
        if isinstance(head, Regression):
            packed[f"targets/{name}/values"] = outputs.heads[name].to(getattr(torch, head.dtype))
            continue
        values, indices, tail = pack(outputs.heads[name], head.k)
        packed[f"targets/{name}/values"] = values
        if indices is not None and tail is not None:
            packed |= {f"targets/{name}/indices": indices, f"targets/{name}/tail": tail}
        if head.raw:
            packed[f"targets/{name}/max"] = outputs.heads[name].float().amax(1)
    # fp16 ends at 65504: beyond, a finite feature saturates. An infinite one stays so, to be refused.
    limit = torch.finfo(torch.float16).max
    for tap, feature in features.items():
        maps = outputs.features[tap]
        maps = maps.clamp(-limit, limit).where(maps.isfinite(), maps)
        packed[f"features/{tap}"] = maps.float() if feature.dtype == "uint8" else maps.half()
    return packed


class TeacherPass:
    """Runs the teacher over the records of shards, or copies their outputs from an earlier cache.

    Args:
        probe: the split, the teacher and the options of the build.
        manifest: the manifest of the build.
        reuse: finds the records of the earlier cache that can be copied. None copies nothing.
        of_file: a function that returns a file's digest. None reads the file.
    """

    def __init__(
        self, probe: TeacherProbe, manifest: Manifest, reuse: Reuse | None, of_file: FileDigest | None = None
    ) -> None:
        self._split, self._teacher, self._options = probe.split, probe.teacher, probe.options
        self._folds, self._taps = probe.folds, probe.taps
        self._manifest, self._reuse, self._of_file = manifest, reuse, of_file

    def batches(self, shards: Iterable[int]) -> Iterator[_Batch]:
        """Yield all records of some shards with their outputs, in batches, shard by shard.

        `shards` are shard numbers. A batch never spans two shards. The teacher already runs on the next batch while the
        caller handles the current one, so a GPU does not wait.
        """
        launched: Callable[[], _Batch] | None = None
        for items, unknown in self._sorted_out(shards):
            following = self._launch(items) if unknown else partial(self._take_over, items)
            if launched is not None:
                yield launched()
            launched = following
        if launched is not None:
            yield launched()

    def _sorted_out(self, shards: Iterable[int]) -> Iterator[tuple[list[Rendered], bool]]:
        """Yield batches of records, each with True if the teacher must run on it.

        It is False if an earlier cache has all outputs.

        A batch for the teacher has records of one fold only.
        """
        manifest, reuse, options = self._manifest, self._reuse, self._options
        waiting: dict[tuple[bool, int | None], list[Rendered]] = {}
        ahead = options.device.type != "cpu"
        rendered = render_batches(
            self._split, manifest, shards, threads=options.render_threads, ahead=ahead, of_file=self._of_file
        )
        for item in rendered:
            if reuse is not None:
                item = replace(item, old=reuse.find(item, self._split.ids[item.sample]))
            if self._folds is not None:
                item = replace(item, fold=self._folds[item.sample])
            unknown = reuse is None or item.old is None or not reuse.complete
            waiting.setdefault((unknown, item.fold if unknown else None), []).append(item)
            ended = item.record + 1 == manifest.shard_range(item.record // manifest.build.shard_records)[1]
            for kind, items in list(waiting.items()):
                if ended or len(items) == manifest.build.batch_size:
                    yield waiting.pop(kind), kind[0]

    def _launch(self, items: list[Rendered]) -> Callable[[], _Batch]:
        """Start the teacher on a batch, and return a function that waits for its result."""
        options, heads, head = self._options, self._manifest.heads, self._manifest.segmentation
        pixels = torch.from_numpy(np.stack([item.taught for item in items]))
        model, grid = self._teacher.model_for(items[0].fold), head.size if head and head.resampled else None
        try:
            outputs = teach(model, pixels, self._taps, options.precision, options.device, grid)
            packed = pack_batch(outputs, heads, self._manifest.features)
            packed |= measure(self._manifest.statistics, outputs.features)
        except torch.OutOfMemoryError as error:
            raise out_of_memory(options.batch_size) from error
        return partial(self._fetch, items, *_to_host(packed, options.device))

    def _fetch(self, items: list[Rendered], packed: dict[str, Tensor], event: torch.cuda.Event | None) -> _Batch:
        """Return a batch when its copy is complete. Raises ModelError for logits that are not finite."""
        if event is not None:
            event.synchronize()
        for path, tensor in packed.items():
            if tensor.is_floating_point():
                finite = tensor.isfinite().flatten(1).all(1)
                if not finite.all():
                    bad = items[int((~finite).nonzero()[0])]
                    raise not_finite(path, bad.record, self._split.ids[bad.sample])
        self._check_ranges(items, packed)
        rows = round_targets({path: tensor.numpy() for path, tensor in packed.items()}, self._manifest.codec)
        rows = stored_features(rows, self._manifest.features)
        places = [place for place, item in enumerate(items) if item.old is not None]
        if places:
            for path, stored in self._take_over([items[place] for place in places]).rows.items():
                rows[path][places] = stored
        return _Batch(items, rows, taught=True)

    def _check_ranges(self, items: list[Rendered], packed: Mapping[str, Tensor]) -> None:
        """Raise ModelError for values of a regression outside the range of its head, except for rounding."""
        for name, head in self._manifest.regressions.items():
            if head.range is None:
                continue
            values = packed[f"targets/{name}/values"].flatten(1)
            low, high = torch.tensor(head.range, dtype=values.dtype)
            outside = ((values < low) | (values > high)).any(1)
            if outside.any():
                bad = items[int(outside.nonzero()[0])]
                raise ModelError(
                    f"Values beyond {head.range[0]:g} to {head.range[1]:g} {head.unit} in {name} of record "
                    f"{bad.record}, {self._split.ids[bad.sample]}",
                    fix="Declare the head's max_depth as large as its values get.",
                )

    def _take_over(self, items: list[Rendered]) -> _Batch:
        assert self._reuse is not None
        return _Batch(items, self._reuse.rows([item.old for item in items if item.old is not None]), taught=False)


def _to_host(packed: dict[str, Tensor], device: torch.device) -> tuple[dict[str, Tensor], torch.cuda.Event | None]:
    if device.type != "cuda":
        return packed, None
    host = {path: tensor.to("cpu", non_blocking=True) for path, tensor in packed.items()}
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return host, event
