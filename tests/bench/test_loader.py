"""benchmarks/loader.py: it times the right thing, in turns, or nothing. No time is asserted."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import zarr

from kdcache.data import open_split
from kdcache.errors import CorruptError
from kdcache.models import build_model
from kdcache.store import open_cache
from kdcache.teacher import BuildOptions, Teacher, build_cache
from kdcache.training import CacheDataset

SMALL = "--records 8 --batch-size 2 --repeats 3 --steps 3"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three arrays per target, two shards."""
    samples = open_split("scenes:32x48,train=6,val=2", "train")
    torch.manual_seed(5)
    teacher = Teacher(build_model("kdcache:tiny", len(samples.classes)).eval(), "test")
    path = tmp_path_factory.mktemp("loader") / "cache.zarr"
    build_cache(samples, teacher, path, BuildOptions(size=(32, 48), views=1, batch_size=4, shard_records=4, top_k=3))
    return path


@pytest.fixture
def loader(script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = script("loader")
    monkeypatch.setattr(module, "LEAST_TURN_S", 1e-4)
    monkeypatch.setattr(sys.modules["turns"], "POLL_S", 1e-3)
    return module


@pytest.fixture
def tables(loader: ModuleType, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """A function that runs the script with some words and returns the tables of its result file."""

    def run(words: str, cache: Path = store) -> Any:
        result = tmp_path / "loader.json"
        monkeypatch.setattr(
            sys, "argv", ["loader.py", "--cache", str(cache), *f"{SMALL} {words}".split(), "--json", str(result)]
        )
        loader.main()
        told = json.loads(result.read_text())
        assert told["store"]["records"] == 6
        assert len(told["store"]["arrays"]) == 3
        return told["tables"]

    return run


def figures(table: Any) -> dict[str, Any]:
    return {row["name"]: row for row in table["rows"] if "pace" in row}


def test_readers_are_compared_with_zarr_python(tables, loader) -> None:
    (table,) = tables("--against " + " ".join(loader.READERS))
    assert [row["name"] for row in table["rows"]] == list(loader.READERS)
    rows = figures(table)
    assert {"direct", "zarr"} <= set(rows)
    for row in rows.values():
        assert row["pace"]["time"]["repeats"] == 3
        assert row["ratio"]["zarr"] == pytest.approx(row["per_second"] / rows["zarr"]["per_second"])
    assert all(row["problem"] for row in table["rows"] if "pace" not in row)


def test_loaders_and_the_steps_that_they_feed(tables) -> None:
    none, warp, steps = tables("--against inline ring default --augment warp")
    assert [(table["kind"], table["augment"]) for table in (none, warp, steps)] == [
        ("loaders", "none"),
        ("loaders", "warp"),
        ("steps", "warp"),
    ]
    assert list(figures(warp)) == ["inline", "ring", "default"]
    assert list(figures(steps)) == ["memory", "inline", "ring", "default"]
    fed = figures(steps)["ring"]
    assert fed["ratio"]["memory"] == pytest.approx(figures(steps)["memory"]["per_second"] / fed["per_second"])


@pytest.mark.slow  # worker processes import torch
def test_worker_processes_load_the_same_and_count(tables) -> None:
    loaders, _ = tables("--against inline dataloader")
    assert figures(loaders)["dataloader"]["cpu_us"] > 0
    assert figures(loaders)["dataloader"]["ratio"]["inline"] > 0


@pytest.fixture
def untimed(loader: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever begins to time fails."""

    def refuse(*_: object) -> None:
        raise AssertionError("timed")

    monkeypatch.setattr(loader, "in_turn", refuse)


WRONG: dict[str, Callable[[list[Any]], list[Any]]] = {
    "a bit": lambda rows: [rows[0], rows[1] ^ 1, rows[2]],
    "the type": lambda rows: [rows[0].view(np.int16), *rows[1:]],
    "the shape": lambda rows: [rows[0][None], *rows[1:]],
    "another sign of zero": lambda rows: [np.where(rows[0] == 0, -rows[0], rows[0]), *rows[1:]],
}


@pytest.mark.parametrize("spoil", WRONG.values(), ids=WRONG)
def test_a_wrong_reader_is_not_timed(tables, loader, monkeypatch, untimed, spoil) -> None:
    def spoilt(source: Any) -> Any:
        read = loader.direct(source)
        return lambda record: spoil([row.copy() for row in read(record)])

    monkeypatch.setitem(loader.READERS, "direct", ("direct", spoilt))
    with pytest.raises(loader.DifferenceError, match="direct reads other bytes"):
        tables("--against direct")


class Darker(CacheDataset):
    """Right but for one pixel of one sample."""

    def draw_into(self, index: int, epoch: int, rng: np.random.Generator, out: Any) -> None:
        super().draw_into(index, epoch, rng, out)
        if index == 3:
            out["pixels"][-1, -1, -1] ^= 1


@pytest.mark.parametrize("name", ["ring", "inline"])
def test_a_wrong_loader_is_not_timed(tables, loader, monkeypatch, untimed, name) -> None:
    title, _, *rest = loader.LOADERS[name]
    monkeypatch.setitem(loader.LOADERS, name, (title, Darker, *rest))
    with pytest.raises(loader.DifferenceError, match=name):
        tables(f"--against {name}")


def test_a_damaged_cache_is_told_of_in_our_words(tables, tmp_path, untimed, store) -> None:
    import shutil

    copy = shutil.copytree(store, tmp_path / "damaged.zarr")
    shard = next(path for path in (copy / "targets/segmentation/values/c").rglob("*") if path.is_file())
    content = bytearray(shard.read_bytes())
    content[40] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CorruptError):
        tables("--against zarr", copy)


@pytest.mark.parametrize(("module", "name"), [("zarrs", "zarrs"), ("tensorstore", "tensorstore")])
def test_a_library_that_is_not_installed_is_named(tables, monkeypatch, module, name) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    (table,) = tables(f"--against direct {name}")
    assert "direct" in figures(table)
    assert module in table["rows"][1]["problem"]


def test_each_reader_of_zarr_python_has_its_own_pipeline(loader, store) -> None:
    pytest.importorskip("zarrs")
    path = store / "targets/segmentation/values"
    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):  # what a user's environment may say
        default = loader.open_zarr(path)
    other = loader.open_zarr(path, "zarrs.ZarrsCodecPipeline")
    names = [type(array.async_array.codec_pipeline).__name__ for array in (default, other)]
    assert names == ["BatchedCodecPipeline", "ZarrsCodecPipeline"]


def test_records_are_drawn_at_random_and_epoch_after_epoch(loader, store) -> None:
    order = loader.open_source(open_cache(store), 15).order
    assert len(order) == 15
    assert sorted(order[:6]) == sorted(order[6:12]) == list(range(6))
    assert order[:6] != order[6:12]


def test_samples_that_hold_nan_can_be_compared(loader) -> None:
    nan = torch.tensor([[float("nan"), 0.0]], dtype=torch.float16)
    assert loader.bits(nan) == loader.bits(nan.clone())
    assert loader.bits(nan) != loader.bits(-nan)
    assert loader.bits(nan) != loader.bits(nan.T)


def test_a_closed_stream_has_no_threads(loader, store) -> None:
    stream = loader.Stream("ring", open_cache(store), "none", 2, torch.device("cpu"))
    ours = [thread for thread in threading.enumerate() if thread.name.startswith("kdcache-loader")]
    assert ours
    stream.close()
    for thread in ours:
        thread.join(10)
    assert not any(thread.is_alive() for thread in ours)


def test_ratios_are_how_many_times_as_fast_and_of_steps_as_slow(loader) -> None:
    turns = sys.modules["turns"]
    spread = sys.modules["kdcache.bench.timing"].Spread

    def pace(p50: float, cpu: float | None = None) -> Any:
        return turns.Pace(spread.of([p50 / 2, p50, 9 * p50]), None if cpu is None else spread.of([0.0, cpu, 9.0]))

    paces = {"direct": pace(0.5, 0.25), "zarr": pace(4.0), "fused": "not installed"}
    found = loader.table("readers", dict.fromkeys(paces, "a title"), paces)
    direct, slow, absent = found["rows"]
    assert (direct["ratio"], slow["ratio"]) == ({"zarr": 8}, {"zarr": 1})
    assert (direct["per_second"], direct["cpu_us"], slow["cpu_us"]) == (2000, 250, None)
    assert absent == {"name": "fused", "title": "a title", "problem": "not installed"}
    steps = {"memory": pace(100.0), "ring": pace(102.0), "inline": pace(99.0)}
    rows = loader.table("steps", dict.fromkeys(steps, "a title"), steps)["rows"]
    assert [row["ratio"] for row in rows] == [{"memory": 1}, {"memory": 1.02}, {"memory": 0.99}], "not clipped"


def test_buffers_are_emptied_before_a_turn_and_a_turn_is_over_its_samples(loader, store, monkeypatch) -> None:
    """Of each loader: at least as many batches are taken off the clock as it can hold ready."""
    taken: dict[str, list[int]] = {}
    contestants: list[Any] = []

    def take(self: Any, count: int = 1) -> Any:
        taken.setdefault(self.title, []).append(count)
        return original(self, count)

    original = loader.Stream.take
    monkeypatch.setattr(loader.Stream, "take", take)

    def turns(given: Any, rounds: int) -> dict[str, Any]:
        for one in given:
            taken.clear()
            one.before()
            one.work()
            contestants.append((one, *next(iter(taken.values()), ())))
        return {one.name: "no time" for one in given}

    monkeypatch.setattr(loader, "in_turn", turns)
    given = SimpleNamespace(batch_size=2, records=10, repeats=3, steps=7, device="cpu")
    names = ["inline", "ring", "resident", "default"]
    loader.measure_loaders(open_cache(store), names, "none", given)
    for one, emptied, timed in contestants:
        assert emptied > loader.LOADERS[one.name][3], "what is held ready, and the one in the making"
        assert (timed, one.samples) == (5, 10)
    contestants.clear()
    loader.measure_steps(open_cache(store), names, "none", given)
    assert [(one.name, one.samples) for one, *_ in contestants] == [(name, 3) for name in ("memory", *names)]
    for one, *counts in contestants[1:]:
        assert counts == [1, *counts[1:]]
        assert len(counts) - 3 > loader.LOADERS[one.name][3]


def test_a_pass_over_records_that_is_too_short_is_repeated(loader, monkeypatch) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(loader, "LEAST_TURN_S", 0.1)
    monkeypatch.setattr(loader, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    read: list[int] = []

    def reader(record: int) -> None:
        read.append(record)
        clock.now += 0.01

    contestant = loader.reading("direct", reader, (4, 5, 6, 7))
    assert read == [4, 5, 6, 7], "a first pass warms it up"
    contestant.before()
    assert read[4:] == [4]
    contestant.work()
    assert contestant.samples == len(read[5:]) == 12


def test_contestants_take_turns(script) -> None:
    turns, seen = script("turns"), []

    def contestant(name: str, *processes: int) -> Any:
        return turns.Contestant(name, lambda: seen.append(name), 4, lambda: seen.append(f"before {name}"), processes)

    paces = turns.in_turn([contestant("a"), contestant("b", 2**30)], 3)
    assert seen == 3 * ["before a", "a", "before b", "b"]
    assert paces["a"].time.repeats == 3
    assert paces["a"].cpu is not None
    assert paces["b"].cpu is None, "no such process, no figure"
    mine, both = turns.cpu_seconds(()), turns.cpu_seconds((os.getpid(),))
    assert both > 1.5 * mine
