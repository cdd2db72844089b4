"""What `kdcache.bench.loader` measures: the right thing, in turns, or nothing. No time is asserted."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

from kdcache.bench.loader import LOADERS, READERS, Settings, Table, measure, readers, run, streams, turns
from kdcache.data import open_split
from kdcache.errors import CorruptError, MismatchError, ModelError, RecipeError, StoreError, VersionError
from kdcache.models import build_model
from kdcache.store import Cache, Records, open_cache
from kdcache.teacher import BuildOptions, Teacher, build_cache
from kdcache.training import CacheDataset
from kdcache.training.input.batch import Row
from kdcache.training.input.loader import Draws

SCENES = "scenes:32x48,train=6,val=2"
SMALL: dict[str, Any] = {"records": 8, "batch_size": 2, "repeats": 2, "steps": 0}


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    def make(**options: Any) -> Path:
        samples = open_split(SCENES, "train")
        torch.manual_seed(5)
        model = build_model("kdcache:tiny", len(samples.classes)).eval()
        path = tmp_path_factory.mktemp("store") / "cache.zarr"
        chosen = BuildOptions(**{"size": (32, 48), "views": 1, "batch_size": 4, "shard_records": 4, **options})
        build_cache(samples, Teacher(model, "test"), path, chosen)
        return path

    return make


@pytest.fixture(scope="session")
def top_k_path(build: Callable[..., Path]) -> Path:
    """Three arrays per target, two shards."""
    return build(top_k=3)


@pytest.fixture
def store(top_k_path: Path) -> Cache:
    return open_cache(top_k_path)


@pytest.fixture(autouse=True)
def _short_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdcache.bench.loader.run.LEAST_TURN_S", 1e-4)
    monkeypatch.setattr("kdcache.bench.loader.turns._POLL_S", 1e-3)


@pytest.fixture
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever begins to time fails."""

    def refuse(*_: object) -> None:
        raise AssertionError("timed")

    monkeypatch.setattr(run, "in_turn", refuse)


def table(cache: Cache, *names: str, **changes: Any) -> Table:
    (only,) = measure(cache, Settings(against=names, **SMALL | changes)).tables
    return only


def test_every_reader_reads_every_record(store: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    verified = []
    verify = run.verify
    monkeypatch.setattr(run, "verify", lambda *words: (verified.append(words[0]), verify(*words)))
    told = table(store, *READERS)
    absent = {"tensorstore", "zarrs"} - {name for name in ("tensorstore", "zarrs") if find_spec(name)}
    absent |= set() if hasattr(zarr.core.codec_pipeline, "FusedCodecPipeline") else {"fused"}
    here = [row for row in told.rows if row.name not in absent]
    assert [row.name for row in told.rows] == list(READERS)
    assert all(row.problem for row in told.rows if row.name in absent)
    assert verified == [row.title for row in here]
    paces = {row.name: row.pace for row in here}
    for row in here:
        pace, ratios = row.pace, told.ratios(row)
        assert pace is not None
        assert pace.time.repeats == 2
        assert pace.time.p20 <= pace.time.p50 <= pace.time.p80
        assert pace.per_second == pytest.approx(1e3 / pace.time.p50)
        assert ratios["zarr"] == pytest.approx(pace.per_second / paces["zarr"].per_second)
        assert ratios["decoder"] == pytest.approx(pace.per_second / paces["decoder"].per_second)


DEFAULT, ZARRS = "BatchedCodecPipeline", "ZarrsCodecPipeline"
FUSED = "FusedCodecPipeline"


def pipelines_used(cache: Cache, monkeypatch: pytest.MonkeyPatch, *names: str) -> list[str]:
    """The pipelines that read, in the order of their first record."""
    used = []

    def watch(kind: type[Any]) -> None:
        read = kind.read

        async def noted(self: Any, *words: Any, **options: Any) -> Any:
            used.append(type(self).__name__)
            return await read(self, *words, **options)

        monkeypatch.setattr(kind, "read", noted)
        if hasattr(kind, "read_sync"):  # the fused one's way where nothing waits
            read_sync = kind.read_sync

            def noted_sync(self: Any, *words: Any, **options: Any) -> Any:
                used.append(type(self).__name__)
                return read_sync(self, *words, **options)

            monkeypatch.setattr(kind, "read_sync", noted_sync)

    modules = [zarr.core.codec_pipeline, pytest.importorskip("zarrs")]
    for name in (DEFAULT, ZARRS, FUSED):
        for module in modules:
            if hasattr(module, name):
                watch(getattr(module, name))
    table(cache, *names)
    return list(dict.fromkeys(used))


def test_each_reader_of_zarr_python_has_its_own_pipeline(store: Cache, monkeypatch) -> None:
    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):  # what a user's environment may say
        assert pipelines_used(store, monkeypatch, "direct", "zarr") == [DEFAULT]
    assert pipelines_used(store, monkeypatch, "zarrs") == [DEFAULT, ZARRS]  # the first draws the records


@pytest.mark.skipif(not hasattr(zarr.core.codec_pipeline, FUSED), reason=f"zarr {zarr.__version__} has no {FUSED}")
def test_the_fused_pipeline_reads_where_zarr_has_one(store: Cache, monkeypatch) -> None:
    assert FUSED in pipelines_used(store, monkeypatch, "fused")


def test_pipelines_that_ran_are_compared_with(store: Cache) -> None:
    pytest.importorskip("zarrs")
    told = table(store, "direct", "zarr", "zarrs")
    direct, _, zarrs = told.rows
    assert told.ratios(direct)["zarrs"] == pytest.approx(direct.pace.per_second / zarrs.pace.per_second)
    assert set(told.ratios(direct)) == {"decoder", "zarr", "zarrs"}


ABSENT: dict[str, tuple[str, Callable[[pytest.MonkeyPatch], None], str]] = {
    "zarrs": (
        "zarrs",
        lambda monkeypatch: monkeypatch.setitem(sys.modules, "zarrs.pipeline", None),
        "not installed (pip install zarrs)",
    ),
    "an older zarr": (
        "fused",
        lambda monkeypatch: monkeypatch.setattr(readers, "codec_pipeline", object()),
        f"zarr {zarr.__version__} has none (3.3 and later do, on Python 3.12 or later)",
    ),
}


@pytest.mark.parametrize(("name", "remove", "reason"), ABSENT.values(), ids=ABSENT)
def test_a_pipeline_that_is_not_there_is_left_out_by_name(store: Cache, monkeypatch, name, remove, reason) -> None:
    remove(monkeypatch)
    told = table(store, "memcpy", name)
    assert told.rows[0].pace is not None
    assert (told.rows[1].name, told.rows[1].pace, told.rows[1].problem) == (name, None, reason)
    assert name not in told.ratios(told.rows[0])


def test_zarrs_does_not_fall_back_to_what_it_is_compared_with(store: Cache, monkeypatch) -> None:
    pipeline = pytest.importorskip("zarrs.pipeline")

    def refuse(*_: object, **__: object) -> None:
        raise TypeError("unsupported codec")

    monkeypatch.setattr(pipeline, "CodecPipelineImpl", refuse)
    (row,) = table(store, "zarrs").rows
    assert row.pace is None
    assert row.problem == "not for this layout: unsupported codec"


def test_what_is_absent_gives_no_ratio(store: Cache) -> None:
    told = table(store, "direct", "decoder")
    assert told.ratios(told.rows[1])["zarr"] is None
    assert told.to_json()["rows"][1]["ratio"]["zarr"] is None


def test_records_are_drawn_at_random_and_epoch_after_epoch(store: Cache, tmp_path: Path) -> None:
    source = readers.open_source(store, 15, tmp_path)
    assert len(source.order) == 15
    assert sorted(source.order[:6]) == sorted(source.order[6:12]) == list(range(6))
    assert source.order[:6] != source.order[6:12]
    assert source.order == readers.open_source(store, 15, tmp_path).order


WRONG: dict[str, Callable[[list[Any]], list[Any]]] = {
    "a bit": lambda rows: [rows[0], rows[1] ^ 1, rows[2]],
    "the type": lambda rows: [rows[0].view(np.int16), *rows[1:]],
    "the shape": lambda rows: [rows[0][None], *rows[1:]],
    "another sign of zero": lambda rows: [np.where(rows[0] == 0, -rows[0], rows[0]), *rows[1:]],
}


@pytest.mark.parametrize("spoil", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("name", ["direct", "decoder"])
def test_a_wrong_reader_is_not_timed(store: Cache, monkeypatch, untimed, name, spoil) -> None:
    title, make = READERS[name]

    def spoilt(source: readers.Source) -> readers.Reader:
        read = make(source)
        return lambda record: spoil([row.copy() for row in read(record)])

    monkeypatch.setitem(READERS, name, (title, spoilt))
    with pytest.raises(StoreError, match="the same bytes") as caught:
        table(store, "memcpy", name)
    assert caught.value.received.startswith(f"{title} reads record")
    assert caught.value.remedy


def test_a_reader_of_other_records_is_not_timed(store: Cache, monkeypatch, untimed) -> None:
    title, make = READERS["direct"]
    monkeypatch.setitem(READERS, "direct", (title, lambda source: lambda record: make(source)((record + 1) % 6)))
    with pytest.raises(StoreError, match="the same bytes"):
        table(store, "direct")


def test_a_library_that_is_not_installed(store: Cache, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorstore", None)
    memcpy, tensorstore = table(store, "tensorstore", "memcpy").rows
    assert memcpy.pace is not None
    assert tensorstore.pace is None
    assert "not installed" in tensorstore.problem


def test_a_layout_that_the_bare_decoder_does_not_know(store: Cache, monkeypatch) -> None:
    def refuse(path: Path) -> None:
        raise VersionError("rule", received=f"{path}: gzip", remedy="remedy")

    monkeypatch.setattr(readers, "read_layout", refuse)
    (row,) = table(store, "decoder").rows
    assert row.pace is None
    assert "gzip" in row.problem


LAYOUTS: dict[str, dict[str, Any]] = {
    "plain": {"compressors": None},
    "zstd": {"compressors": zarr.codecs.ZstdCodec(level=1)},
    "blosc": {"compressors": zarr.codecs.BloscCodec(cname="lz4", shuffle="shuffle", typesize=4)},
    "several records in a chunk": {"compressors": None, "chunks": (2, 3)},
    "index first": {"shards": {"shape": (4, 3), "index_location": "start"}},
}


@pytest.mark.parametrize("options", LAYOUTS.values(), ids=LAYOUTS)
def test_the_bare_decoder_decodes_what_zarr_python_reads(tmp_path: Path, options) -> None:
    chosen = {"chunks": (1, 3), "shards": (4, 3), "compressors": None, **options}
    array = zarr.create_array(tmp_path / "a", shape=(6, 3), dtype="float32", **chosen)
    array[...] = np.random.default_rng(0).random((6, 3), np.float32)
    decode = readers._chunk_decoder(tmp_path / "a", {0, 3, 5})
    for record in (5, 0, 3):
        assert decode(record).tobytes() == np.asarray(array[record]).tobytes()


def test_a_damaged_store_is_told_of_in_our_words(build, untimed) -> None:
    path = build()
    cache = open_cache(path)
    shard = next((path / "targets/segmentation/values/c").rglob("0"))
    shard = shard if shard.is_file() else next(p for p in shard.rglob("*") if p.is_file())
    content = bytearray(shard.read_bytes())
    content[40] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CorruptError):
        table(cache, "zarr")


def test_records_must_fit_into_memory(store: Cache, monkeypatch, untimed) -> None:
    monkeypatch.setattr(readers, "available_bytes", lambda: 2**10)
    with pytest.raises(RecipeError, match="memory") as caught:
        table(store, "memcpy")
    assert "--records" in caught.value.remedy


def test_loaders_load_the_same(store: Cache) -> None:
    told = table(store, "ring", "inline", augments=("warp",))
    assert [row.title for row in told.rows] == ["inline", "ring, 2 threads"]
    assert all(row.pace is not None for row in told.rows)
    assert told.ratios(told.rows[1])["dataloader"] is None


@pytest.mark.slow  # worker processes import torch
def test_worker_processes_load_the_same_and_count(store: Cache) -> None:
    told = table(store, *LOADERS, augments=("warp",), workers=1, records=4)
    assert told.augment == "warp"
    assert [row.title for row in told.rows] == [
        "inline",
        "DataLoader, 1 workers",
        "ring, 2 threads",
        "ring, 2 threads, records in memory",
        "inline, records in memory",
    ]
    for row in told.rows:
        assert row.pace is not None
        assert row.pace.cpu is not None
        assert row.peak_mib is not None
        assert told.ratios(row)["inline"] > 0
    assert told.rows[1].peak_mib > told.rows[2].peak_mib, "a process with torch in it"


class Darker(CacheDataset):
    """Right but for one pixel of one sample."""

    def draw_into(self, index: int, epoch: int, rng: np.random.Generator, out: Row) -> None:
        super().draw_into(index, epoch, rng, out)
        if index == 3:
            out.pixels[-1, -1, -1] ^= 1


@pytest.mark.parametrize("name", ["ring", "inline"])
@pytest.mark.parametrize("fed", [False, True])
def test_a_wrong_loader_is_not_timed(store: Cache, monkeypatch, untimed, name, fed) -> None:
    monkeypatch.setitem(LOADERS, name, (LOADERS[name][0], Darker))
    if fed:  # as if the table of loaders had been left out
        monkeypatch.setattr(run, "_measure_loaders", lambda *_: None)
    with pytest.raises(StoreError, match="the same batches") as caught:
        table(store, name, steps=2 if fed else 0)
    assert caught.value.received.startswith(name)


def test_samples_that_hold_nan_can_be_compared() -> None:
    nan = torch.tensor([[float("nan"), 0.0]], dtype=torch.float16)
    assert torch.equal(streams._bits(nan), streams._bits(nan.clone()))
    assert not torch.equal(streams._bits(nan), streams._bits(-nan))
    assert not torch.equal(streams._bits(nan), streams._bits(nan.T))


def test_a_stream_ends_its_threads(store: Cache) -> None:
    import threading

    def ours() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name.startswith("kdcache-loader")]

    with streams.Stream("ring", lambda kind: kind(store), batch_size=2, workers=0, threads=2) as stream:
        stream.verify(Draws(CacheDataset(store), 0))
        assert ours()
    for thread in threading.enumerate():
        if thread.name.startswith("kdcache-loader"):
            thread.join(10)
    assert not ours()


def test_steps_are_compared_with_the_batch_from_memory(store: Cache) -> None:
    report = measure(store, Settings(against=("ring", "inline"), **SMALL | {"steps": 3}))
    loaders, steps = report.tables
    assert loaders.kind == "loaders"
    assert [row.name for row in steps.rows] == ["memory", "ring", "inline"]
    assert steps.ratios(steps.rows[0])["memory"] == 1
    memory, ring = steps.rows[0].pace, steps.rows[1].pace
    assert steps.ratios(steps.rows[1])["memory"] == pytest.approx(ring.time.p50 / memory.time.p50)
    told = report.to_json()
    assert told["settings"]["device"] == "cpu"
    assert set(told["store"]["arrays"]) == {f"targets/segmentation/{name}" for name in ("values", "indices", "tail")}


def test_what_is_wrong_is_told_before_anything_is_measured(store: Cache, build, untimed) -> None:
    with pytest.raises(ModelError):
        measure(store, Settings(against=("memcpy", "ring"), student="kdcache:huge", **SMALL | {"steps": 1}))
    without_pixels = open_cache(build(pixels="source"))
    with pytest.raises(MismatchError, match="data set beside it"):
        measure(without_pixels, Settings(against=("memcpy", "inline"), **SMALL))


def test_a_store_without_pixels_is_loaded_beside_its_data(build) -> None:
    cache = open_cache(build(pixels="source"))
    report = measure(Records(cache, open_split(SCENES, "train")), Settings(against=("inline", "ring"), **SMALL))
    assert all(row.pace is not None for row in report.tables[0].rows)


def test_contestants_take_turns() -> None:
    seen: list[str] = []

    def contestant(name: str, *processes: int) -> turns.Contestant:
        before = lambda: seen.append(f"before {name}")  # noqa: E731
        return turns.Contestant(name, name, lambda: seen.append(name), 4, before=before, processes=processes)

    paces = turns.in_turn([contestant("a"), contestant("b", 2**30)], 2)
    assert seen == 2 * ["before a", "a", "before b", "b"]
    assert paces["a"].time.repeats == 2
    assert paces["a"].cpu_us is not None
    assert paces["b"].cpu is None, "no such process, no figure"


def test_the_time_of_other_processes_counts() -> None:
    import os

    mine, both = turns._cpu_seconds(()), turns._cpu_seconds((os.getpid(),))
    assert mine is not None
    assert both > 1.5 * mine
