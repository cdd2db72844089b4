"""The teacher's one pass over a data set, into a store. Interrupted, it goes on where it stopped.

Three stages: threads render images (ahead, beside a GPU), the teacher runs in the calling thread, one thread
compresses, writes and syncs finished shards meanwhile. Memory holds two shards and a few batches, whatever the number
of records.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdcache.data import Split, Window, pixel_checksum, prefetch, render
from kdcache.errors import ModelError
from kdcache.store import Manifest, StoreWriter, open_writer
from kdcache.store.schema import record_arrays
from kdcache.teacher.forward import out_of_memory, place, teach
from kdcache.teacher.plan import BuildOptions, plan_manifest
from kdcache.teacher.source import Teacher
from kdcache_kernels import pack

Array = np.ndarray[Any, Any]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class BuildResult:
    """What a build did; `records` were taught now, `kept` were there already."""

    manifest: Manifest
    records: int
    kept: int
    seconds: float

    @property
    def images_per_second(self) -> float:
        return self.records / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Rendered:
    """One record before the teacher sees it."""

    record: int
    pixels: Array  # uint8 (H, W, 3)
    label: Array  # uint8 (H, W), 255 where unlabelled
    window: tuple[float, float, float, float]  # in pixels of the source
    checksum: int
    labelled: bool


def build_cache(
    split: Split, teacher: Teacher, out: str | Path, options: BuildOptions, progress: Progress | None = None
) -> BuildResult:
    """Run the teacher over every sample of `split` and write the store `out`.

    Args:
        progress: called with (records done, records), those that were there already included.
    Raises: KDCacheError of every kind; what is finished stays, and the same call continues.
    """
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    place(teacher.model, options.device)
    manifest = plan_manifest(split, teacher, options)
    with open_writer(Path(out), manifest, split.ids) as writer:
        todo = writer.missing
        total = sum(last - first for first, last in map(manifest.shard_range, todo))
        kept = manifest.records - total
        began = time.perf_counter()
        with _ShardQueue(writer) as queue:
            done = kept
            for batch, packed in _taught(split, teacher, writer.manifest, options, todo):
                queue.add(batch, packed)
                done += len(batch)
                if progress is not None:
                    progress(done, manifest.records)
        seconds = time.perf_counter() - began
        writer.seal()
    return BuildResult(writer.manifest, total, kept, seconds)


def render_record(split: Split, record: int, size: tuple[int, int]) -> Rendered:
    """The `full` view of a sample, as build and verification see it."""
    image, label = split.image(record), split.label(record)
    window = Window.full(*image.shape[:2])
    pixels, small = render(image, label, window, flip=False, size=size)
    return Rendered(record, pixels, small, window.as_tuple(), pixel_checksum(pixels), label is not None)


def pack_batch(logits_BChw: Tensor, features: dict[str, Tensor], k: int) -> dict[str, Tensor]:
    """What the store keeps of a teacher's output: path -> tensor with a leading B, on the same device."""
    values, indices, tail = pack(logits_BChw, k)
    packed = {"targets/segmentation/values": values}
    if indices is not None and tail is not None:
        packed |= {"targets/segmentation/indices": indices, "targets/segmentation/tail": tail}
    # fp16 ends at 65504: beyond, a finite feature saturates. An infinite one stays so, to be refused.
    limit = torch.finfo(torch.float16).max
    packed |= {f"features/{tap}": f.clamp(-limit, limit).where(f.isfinite(), f).half() for tap, f in features.items()}
    return packed


def _taught(
    split: Split, teacher: Teacher, manifest: Manifest, options: BuildOptions, shards: Sequence[int]
) -> Iterator[tuple[list[Rendered], dict[str, Array]]]:
    """Batches of records with what the teacher said about them, in order.

    A batch never crosses a shard, so that a shard's bytes do not depend on where a build was interrupted. The
    result of a batch is fetched after the next one was launched: a GPU does not wait for the host.
    """
    batches = [batch for shard in shards for batch in _batches(manifest, shard)]
    k = manifest.heads["segmentation"].k
    launched: tuple[list[Rendered], dict[str, Tensor], torch.cuda.Event | None] | None = None
    for inputs in _rendered(split, batches, options):
        pixels = torch.from_numpy(np.stack([item.pixels for item in inputs]))
        try:
            logits, features = teach(teacher.model, pixels, options.features, options.precision, options.device)
            packed = pack_batch(logits, features, k)
        except torch.OutOfMemoryError as error:
            raise out_of_memory(options.batch_size, error) from error
        following = (inputs, *_to_host(packed, options.device))
        if launched is not None:
            yield launched[0], _fetch(split, *launched)
        launched = following
    if launched is not None:
        yield launched[0], _fetch(split, *launched)


def _rendered(split: Split, batches: Sequence[range], options: BuildOptions) -> Iterator[list[Rendered]]:
    """The records of every batch, rendered by threads: ahead beside a GPU, batch by batch on a CPU.

    A CPU teacher's threads meet at a barrier after every operation. Rendering at the same time keeps one of them from
    its core and the others waiting: with a small teacher that took a third of the build's CPU time.
    """
    work = lambda record: render_record(split, record, options.size)  # noqa: E731
    threads = options.render_threads
    if options.device.type == "cpu":
        for batch in batches:
            yield list(prefetch(work, batch, threads=threads, ahead=len(batch)))
        return
    records = (record for batch in batches for record in batch)
    ahead = prefetch(work, records, threads=threads, ahead=4 * options.batch_size)
    for batch in batches:
        yield [next(ahead) for _ in batch]


def _batches(manifest: Manifest, shard: int) -> list[range]:
    first, last = manifest.shard_range(shard)
    step = manifest.build.batch_size
    return [range(at, min(at + step, last)) for at in range(first, last, step)]


def _to_host(packed: dict[str, Tensor], device: torch.device) -> tuple[dict[str, Tensor], torch.cuda.Event | None]:
    if device.type != "cuda":
        return packed, None
    host = {path: tensor.to("cpu", non_blocking=True) for path, tensor in packed.items()}
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return host, event


def _fetch(
    split: Split, inputs: list[Rendered], packed: dict[str, Tensor], event: torch.cuda.Event | None
) -> dict[str, Array]:
    """The arrays of a batch, once its copy is through. Raises ModelError for logits that are no numbers."""
    if event is not None:
        event.synchronize()
    for path, tensor in packed.items():
        if tensor.is_floating_point():
            finite = tensor.isfinite().flatten(1).all(1)
            if not finite.all():
                bad = inputs[int((~finite).nonzero()[0])].record
                raise ModelError(
                    "a teacher's output must be finite",
                    received=f"NaN or infinity in {path} of record {bad}, {split.ids[bad]}",
                    remedy="check the teacher's weights and normalisation; use --precision float32",
                )
    return {path: tensor.numpy() for path, tensor in packed.items()}


class _ShardQueue:
    """Collects records into whole shards and writes them in one background thread, at most one ahead."""

    def __init__(self, writer: StoreWriter) -> None:
        self._writer = writer
        self._specs = record_arrays(writer.manifest)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="kdcache-writer")
        self._writing: Future[None] | None = None
        self._arrays: dict[str, Array] = {}
        self._filled = 0

    def __enter__(self) -> "_ShardQueue":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None and self._writing is not None:
                self._writing.result()
        finally:
            self._pool.shutdown(wait=True)

    def add(self, batch: Sequence[Rendered], packed: dict[str, Array]) -> None:
        """Take one batch; the last of a shard sends the shard off, after the one before is on disk."""
        shard = batch[0].record // self._writer.manifest.build.shard_records
        first, last = self._writer.manifest.shard_range(shard)
        if not self._filled:
            self._arrays = {spec.path: np.empty((last - first, *spec.shape), spec.dtype) for spec in self._specs}
        rows = {**packed, **_record_rows(batch, self._writer.manifest)}
        place = slice(batch[0].record - first, batch[-1].record + 1 - first)
        for path, array in self._arrays.items():
            array[place] = rows[path]
        self._filled += len(batch)
        if self._filled == last - first:
            if self._writing is not None:
                self._writing.result()
            self._writing = self._pool.submit(self._writer.write_shard, shard, self._arrays)
            self._arrays, self._filled = {}, 0


def _record_rows(batch: Sequence[Rendered], manifest: Manifest) -> dict[str, Any]:
    rows: dict[str, Any] = {
        "records/sample": [item.record for item in batch],
        "records/view": 0,
        "records/window": [item.window for item in batch],
        "records/flip": 0,
        "records/pixel_checksum": np.array([item.checksum for item in batch], np.uint64),
        "records/labelled": [item.labelled for item in batch],
    }
    if manifest.view.pixels == "stored":
        rows["labels/segmentation"] = [item.label for item in batch]
        rows["pixels/image"] = [item.pixels for item in batch]
    return rows
