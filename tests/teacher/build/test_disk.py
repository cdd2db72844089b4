"""What a disk's rates say, and that measuring them leaves nothing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kdcache.errors import RecipeError
from kdcache.teacher.build.disk import DiskRate, bound_of, measure_disk


def estimate(teach: float, render: float, bytes_per_record: float) -> Any:
    cost = SimpleNamespace(bytes_per_record=bytes_per_record, bytes=100 * bytes_per_record, seconds=100 * teach)
    return SimpleNamespace(chosen=cost, seconds=SimpleNamespace(teach=teach, render=render))


RATES = [([1] * 10, False), ([1] * 8 + [3, 3], True), ([1.0] * 9 + [1.5], False)]


@pytest.mark.parametrize(("seconds", "slows"), RATES)
def test_a_second_regime_is_the_last_part_beside_the_first(seconds: list[float], slows: bool) -> None:
    rate = DiskRate.of("here", [(100, each) for each in seconds])
    assert (rate.bytes, rate.seconds, rate.first) == (1000, sum(seconds), 100)
    assert rate.last == pytest.approx(200 / sum(seconds[-2:]))
    assert rate.slows_down is slows


@pytest.mark.parametrize(
    ("teach", "render", "size", "name"), [(3, 1, 10, "teacher"), (1, 3, 10, "decoding"), (1, 1, 300, "disk")]
)
def test_a_build_waits_for_the_slowest(teach: float, render: float, size: float, name: str) -> None:
    disk = DiskRate.of("here", [(1000, 1), (100, 1)])
    bound = bound_of(estimate(teach, render, size), disk, 1)
    assert bound.name == name
    assert bound.seconds == {"teacher": teach, "decoding": render, "disk": size / 100}
    assert bound.build_seconds == max(100 * teach, size)
    assert bound.to_json(disk)["slows_down"] is True


def test_nothing_is_left_and_limits_hold(tmp_path) -> None:
    seen: list[tuple[str, int, int]] = []
    rate = measure_disk(f"{tmp_path}/new/cache.zarr", most_bytes=40_000_000, progress=lambda *at: seen.append(at))
    assert (rate.bytes, rate.folder, len(seen)) == (40_000_000, str(tmp_path), 3)
    assert seen[-1][1:] == (40_000_000, 40_000_000)
    assert list(tmp_path.iterdir()) == []
    assert measure_disk(str(tmp_path), most_bytes=40_000_000, most_seconds=1e-9).bytes < 40_000_000


def test_an_object_store_is_never_written_to() -> None:
    with pytest.raises(
        RecipeError, match="Cannot measure the disk of s3://bucket/cache: it is an object store"
    ) as caught:
        measure_disk("s3://bucket/cache")
    assert "--out" in caught.value.fix


def test_a_folder_without_room_is_named(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("os.statvfs", lambda _: SimpleNamespace(f_bavail=0, f_frsize=1))
    with pytest.raises(RecipeError, match="no space is free"):
        measure_disk(str(tmp_path))
