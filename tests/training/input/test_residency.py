"""Records that stay: the same samples from memory as from the store, and never more than half of what is free."""

from __future__ import annotations

import itertools
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from kdcache.data import open_split
from kdcache.distill import SEGMENTATION, Batch, Target
from kdcache.distill.batch import tensors_of
from kdcache.errors import CorruptError, RecipeError
from kdcache.store import Cache, Records, open_cache
from kdcache.training import CacheDataset, LabelledDataset, make_config, train
from kdcache.training.input import residency
from kdcache.training.input.device_prefetch import feed
from kdcache.training.input.loader import Draws, make_loader
from kdcache.training.input.residency import free_bytes, keep_records
from kdcache.training.input.resident_records import DeviceTargets, RamRecords, decoded_bytes

CPU = torch.device("cpu")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets how many bytes are free."""
    return lambda count: monkeypatch.setattr(residency, "free_bytes", lambda: count)


@pytest.fixture(scope="session")
def top_k(make_cache: Callable[..., Path]) -> Cache:
    """A store with all three arrays of a target, and pixels."""
    return open_cache(make_cache(top_k=3))


def clones(batches: Any) -> list[list[torch.Tensor]]:
    return [[part.clone() for part in tensors_of(batch)] for batch in batches]


def equal(one: list[list[torch.Tensor]], two: list[list[torch.Tensor]]) -> bool:
    return len(one) == len(two) and all(
        a.dtype == b.dtype and torch.equal(a, b)
        for left, right in zip(one, two, strict=True)
        for a, b in zip(left, right, strict=True)
    )


def loader(dataset: CacheDataset, workers: int) -> Any:
    return make_loader(Draws(dataset, 0), first=0, last=9, batch_size=4, workers=workers, pin_memory=False)


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("augment", ["warp", "none"])
def test_batches_from_memory_are_those_of_the_store(top_k: Cache, workers: int, augment: str) -> None:
    kept = CacheDataset(top_k, augment=augment)
    keep_records(kept, "ram", CPU)
    assert isinstance(kept.records, RamRecords)
    assert equal(clones(loader(kept, workers)), clones(loader(CacheDataset(top_k, augment=augment), workers)))


def test_a_row_is_read_from_the_store_once(top_k: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[tuple[int, str]] = []
    read_into = Cache.read_into

    def count(self: Cache, record: int, path: str, out: np.ndarray) -> None:
        reads.append((record, path))
        read_into(self, record, path, out)

    monkeypatch.setattr(Cache, "read_into", count)
    dataset = CacheDataset(top_k)
    keep_records(dataset, "ram", CPU)
    assert not reads, "nothing is read in advance"
    assert len(clones(loader(dataset, 0))) == 9
    assert sorted(reads) == sorted({(record, path) for record in range(6) for path in dataset.paths})


def test_memory_is_taken_as_records_are_read(top_k: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store of a hundred times what is resident here opens at once."""
    path = "pixels/image"
    monkeypatch.setattr(Cache, "__len__", lambda self: 100_000)
    before = psutil.Process().memory_info().rss
    kept = RamRecords(top_k, [path])
    kept.read_into(5, path, np.empty((32, 48, 3), np.uint8))
    assert psutil.Process().memory_info().rss - before < decoded_bytes(top_k, [path]) / 20


def test_threads_that_fill_one_record_agree(top_k: Cache) -> None:
    path = top_k.target_paths()[0]
    expected = [top_k.read(record, [path])[path] for record in range(6)]
    for _ in range(20):
        kept, barrier = RamRecords(top_k, [path]), threading.Barrier(4)

        def read(start: int, kept: RamRecords = kept, barrier: threading.Barrier = barrier) -> bool:
            out = np.empty_like(expected[0])
            barrier.wait()
            right = []
            for record in range(6):
                kept.read_into(record, path, out)
                right.append(np.array_equal(out, expected[record]))
            return all(right)

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(read, range(4)))


def test_a_damaged_record_is_told_of_and_not_kept(make_cache: Callable[..., Path]) -> None:
    path = make_cache()
    array = "targets/segmentation/values"
    shard = next(p for p in (path / array / "c").rglob("*") if p.is_file())
    content = bytearray(shard.read_bytes())
    content[40] ^= 1
    shard.write_bytes(content)
    cache = open_cache(path)
    kept = RamRecords(cache, [array])
    out = np.empty(cache.specs[array].shape, np.float16)
    read_records: list[int] = []
    for record in 2 * [*range(6)]:
        try:
            kept.read_into(record, array, out)
        except CorruptError:
            read_records.append(record)
    assert len(read_records) == 2
    assert read_records[0] == read_records[1]


def test_kept_records_travel_empty(top_k: Cache) -> None:
    dataset = CacheDataset(top_k)
    keep_records(dataset, "ram", CPU)
    first = dataset.draw(2, 0, np.random.default_rng(0))
    text = pickle.dumps(dataset)
    assert len(text) < decoded_bytes(top_k, dataset.paths) / 2
    again = pickle.loads(text).draw(2, 0, np.random.default_rng(0))
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(first), tensors_of(again), strict=True))


def test_auto_keeps_what_takes_at_most_half_of_what_is_free(top_k: Cache, free: Callable[[int], None]) -> None:
    needed = decoded_bytes(top_k, CacheDataset(top_k).paths)
    assert needed == 6 * (3 * 8 * 12 * 3 + 8 * 12 * 2 + 32 * 48 * 4)
    for size, kept in ((2 * needed, True), (2 * needed - 1, False)):
        free(size)
        dataset, notes = CacheDataset(top_k), list[str]()
        keep_records(dataset, "auto", CPU, note=notes.append)
        assert isinstance(dataset.records, RamRecords) is kept
        assert len(notes) == 1
        assert notes[0].startswith("resident: off, " if not kept else "resident: ")
        assert "GiB of decoded records" in notes[0]
        assert "half of" in notes[0]


def test_ram_that_does_not_fit_is_refused_with_both_figures(top_k: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residency, "free_bytes", lambda: 3 * 2**30)
    monkeypatch.setattr(residency, "decoded_bytes", lambda *_: 5 * 2**30)
    with pytest.raises(RecipeError, match="half") as caught:
        keep_records(CacheDataset(top_k), "ram", CPU)
    assert "5.0 GiB" in caught.value.problem
    assert "1.5 GiB" in caught.value.problem
    assert "--resident" in caught.value.fix


def test_processes_keep_records_of_their_own(
    source_path: Path, scenes: str, free: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Worker processes of the loader, and those of torchrun on this machine."""

    def dataset() -> CacheDataset:
        return CacheDataset(Records(open_cache(source_path), open_split(scenes, "train")))

    needed, notes = decoded_bytes(dataset().cache, dataset().paths), list[str]()
    free(6 * needed)
    auto = dataset()
    keep_records(auto, "auto", CPU, workers=3, note=notes.append)
    assert auto.records is auto.cache
    assert "3 worker processes" in notes.pop()
    keep_records(dataset(), "ram", CPU, workers=3, note=notes.append)
    assert "in 3 processes" in notes.pop()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match="half"):
        keep_records(dataset(), "ram", CPU, workers=3)
    keep_records(dataset(), "auto", CPU, note=notes.append)
    assert "in 2 processes" in notes.pop()


def test_what_is_not_possible_is_refused(top_k: Cache, scenes: str) -> None:
    labelled = LabelledDataset(open_split(scenes, "train"), (32, 48))
    keep_records(labelled, "auto", CPU)
    for dataset, choice, rule in (
        (labelled, "ram", "Cannot use --resident ram for a data folder"),
        (CacheDataset(top_k), "gpu", "Cannot use --resident gpu on the device cpu"),
    ):
        with pytest.raises(RecipeError, match=rule):
            keep_records(dataset, choice, CPU)


def test_off_keeps_nothing_and_nothing_to_keep_is_told(top_k: Cache, source_path: Path, scenes: str) -> None:
    dataset = CacheDataset(top_k)
    keep_records(dataset, "off", CPU, note=pytest.fail)
    assert dataset.records is top_k
    notes: list[str] = []
    bare = CacheDataset(Records(open_cache(source_path), open_split(scenes, "train")), targets=False)
    keep_records(bare, "ram", CPU, note=notes.append)
    assert notes == ["resident: off, no record is read from this cache"]


def test_free_is_what_the_control_group_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    system = psutil.virtual_memory().available
    monkeypatch.setattr(residency, "CGROUP", tmp_path)
    assert free_bytes() == pytest.approx(system, rel=0.2)
    for name, text in {"memory.max": "1000000", "memory.current": "700000", "memory.stat": "anon 9\n"}.items():
        (tmp_path / name).write_text(text + "\n")
    assert free_bytes() == 300_000
    (tmp_path / "memory.stat").write_text("anon 9\ninactive_file 200000\n")
    assert free_bytes() == 500_000, "cached files can be given up"
    (tmp_path / "memory.current").write_text("1300000")
    assert free_bytes() == 0
    (tmp_path / "memory.max").write_text("max\n")
    assert free_bytes() > 2**20


def on_device(cache: Cache, device: torch.device) -> CacheDataset:
    dataset = CacheDataset(cache)
    dataset.on_device = DeviceTargets.load(cache, device)
    return dataset


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("store", ["dense", "top_k"])
def test_targets_gathered_by_number_are_those_that_are_read(
    cache: Cache, top_k: Cache, workers: int, store: str
) -> None:
    source = cache if store == "dense" else top_k
    dataset = on_device(source, CPU)
    batch = next(iter(loader(dataset, workers)))
    assert batch.targets == {}
    assert batch.record.dtype == torch.int64
    assert batch.record.shape == (4,)
    gathered = (replace(batch, record=None) for batch in feed(loader(dataset, workers), CPU, dataset.on_device))
    assert equal(clones(gathered), clones(loader(CacheDataset(source), workers)))


def test_wide_class_numbers_are_gathered() -> None:
    indices = torch.arange(5 * 6).reshape(5, 2, 1, 3).to(torch.int32).add(65000).to(torch.uint16)
    targets = DeviceTargets({SEGMENTATION: Target(torch.randn(5, 2).half(), indices)})
    out = targets.empty(3)
    targets.gather_into(torch.tensor([4, 0, 4]), out)
    gathered = out[SEGMENTATION]
    assert gathered.indices is not None
    assert gathered.indices.dtype == torch.uint16
    assert np.array_equal(gathered.indices.numpy(), indices.numpy()[[4, 0, 4]])
    assert gathered.tail is None


def test_a_process_draws_numbers_alone(top_k: Cache) -> None:
    dataset = on_device(top_k, CPU)
    twin = pickle.loads(pickle.dumps(dataset))
    sample: Batch = twin.draw(3, 0, np.random.default_rng(0))
    assert sample.targets == {}
    assert sample.record is not None
    assert sample.record.item() == 3


def test_a_run_from_memory_is_the_run_from_the_store(
    student: dict[str, Any], tmp_path: Path, read_metrics: Callable[..., list[dict[str, Any]]]
) -> None:
    losses = []
    for choice in ("ram", "off"):
        train(make_config(**student | {"resident": choice, "val": None}), tmp_path / choice)
        losses.append([row["loss"] for row in read_metrics(tmp_path / choice, "train")])
    assert losses[0] == losses[1]


def test_a_run_resumes_with_other_records_kept_but_not_in_another_order(
    student: dict[str, Any], tmp_path: Path
) -> None:
    settings = student | {"val": None}
    train(make_config(**settings), tmp_path)
    assert 'shuffle = "full"' in (tmp_path / "recipe.toml").read_text()
    train(make_config(**settings | {"resident": "off", "shuffle": "full"}), tmp_path, resume=True)
    with pytest.raises(RecipeError, match="resumes") as caught:
        train(make_config(**settings | {"shuffle": "window"}), tmp_path, resume=True)
    assert "--shuffle window (was full)" in caught.value.problem


@gpu
def test_auto_keeps_targets_on_the_gpu(
    top_k: Cache, student: dict[str, Any], tmp_path: Path, read_metrics: Callable[..., list[dict[str, Any]]]
) -> None:
    dataset, notes = CacheDataset(top_k), list[str]()
    keep_records(dataset, "auto", torch.device("cuda"), note=notes.append)
    assert dataset.on_device is not None
    assert "on the GPU" in notes[0]
    losses = []
    for choice in ("gpu", "off"):
        config = make_config(**student | {"resident": choice, "val": None, "device": "cuda", "amp": "off"})
        train(config, tmp_path / choice)
        losses.append([row["loss"] for row in read_metrics(tmp_path / choice, "train")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@gpu
def test_targets_that_do_not_fit_the_gpu(top_k: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2**10, 2**30))
    with pytest.raises(RecipeError, match="half"):
        keep_records(CacheDataset(top_k), "gpu", torch.device("cuda"))
    dataset = CacheDataset(top_k)
    keep_records(dataset, "auto", torch.device("cuda"))
    assert isinstance(dataset.records, RamRecords)


def test_every_view_of_a_sample_stays(make_cache: Callable[..., Path]) -> None:
    """Records are kept, not samples."""
    cache = open_cache(make_cache(views=3, view_seed=7, view_scale=(1.5, 3.0)))
    stored, ram, device = (CacheDataset(cache, augment="replay") for _ in range(3))
    ram.records, device.on_device = RamRecords(cache, ram.paths), DeviceTargets.load(cache, CPU)
    for index, epoch in itertools.product(range(len(stored)), (0, 1, 2, 0)):
        read, kept, row = (one.draw(index, epoch, np.random.default_rng(0)) for one in (stored, ram, device))
        assert all(torch.equal(a, b) for a, b in zip(tensors_of(kept), tensors_of(read), strict=True))
        out = device.on_device.empty(1)
        device.on_device.gather_into(row.record[None], out)
        assert torch.equal(out[SEGMENTATION].values[0], read.target.values)
