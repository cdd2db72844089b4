"""benchmarks/build.py: rates, ratios and bounds of made-up turns, what each part measures, and a small build."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from kdcache.data import open_split
from kdcache.errors import RecipeError
from kdcache.models import build_model
from kdcache.store import open_cache
from kdcache.teacher import BuildOptions, Teacher


@pytest.fixture
def build(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("build")


def turns(module: ModuleType, **rates: tuple[float, ...]) -> dict[str, list[Any]]:
    """Turns of some rates; an image takes a hundredth of its rate in CPU milliseconds."""
    return {name: [module.Measured(rate, rate / 100) for rate in values] for name, values in rates.items()}


def test_a_rate_is_images_over_seconds(build, clock, monkeypatch) -> None:
    monkeypatch.setattr(build, "time", clock)
    watch = build.Stopwatch()
    clock.work(500)
    assert watch.over(8) == pytest.approx((16.0, 62.5))


def test_the_ratio_is_the_build_over_its_slower_part_turn_by_turn(build) -> None:
    found = build.figures(
        turns(
            build,
            bare_inference=(10.0, 20, 40),
            writer_alone=(50.0, 8, 100),
            render_alone=(9.0, 9, 9),
            build=(9.0, 10, 20),
        )
    )
    assert found["ratio"] == {"p20": 0.5, "p50": 0.9, "p80": 1.25}, "no ratio is clipped"
    assert found["bare_inference_images_per_s"]["p50"] == 20
    assert found["build_over_bare_inference"] == 0.5, "best over best"
    assert found["build_over_inference_and_writing"] == round((1 / 20) / (1 / 40 + 1 / 100), 4)
    assert found["cpu_ms_per_image"] == {
        "bare_inference": 0.2,
        "writer_alone": 0.5,
        "render_alone": 0.09,
        "build": 0.1,
    }


def test_parts_take_turns_after_a_forward_pass(build) -> None:
    order: list[str] = []
    names = ("bare_inference", "render_alone", "writer_alone", "build")
    parts = {name: lambda name=name: order.append(name) or build.Measured(len(order), 1.0) for name in names}
    found = build.take_turns(parts, 3)
    assert order == ["bare_inference", *names * 3]
    assert [of.images_per_s for of in found["bare_inference"]] == [2, 6, 10], "the warm-up is no turn"


@pytest.mark.parametrize(("ratio", "met"), [(1.0499, True), (1.0501, False)])
def test_the_bound_of_two_heads(build, ratio, met) -> None:
    assert build.heads_met({"build_over_inference_and_writing": ratio}) is met


@pytest.mark.parametrize(
    ("speed", "bytes_", "met"),
    [(0.901, 1.0, True), (0.899, 1.0, False), (1.5, 1.009, True), (1.5, 1.011, False), (1.5, 0.989, False)],
)
def test_the_bounds_of_features(build, speed, bytes_, met) -> None:
    row = {"build_over_bare_inference": speed, "planned_over_built_bytes": bytes_}
    assert build.features_met(row) is met


def test_memory_is_compared_between_n_and_four_n_records(build) -> None:
    assert build.memory_counts(256) == [128, 512]


@pytest.fixture
def parts(build, scenes, monkeypatch) -> Any:
    """A teacher, options, a split of six images, and the numbers of images that rates are over."""
    split = build.cycled(open_split(scenes, "train"), 6)
    torch.manual_seed(0)
    teacher = Teacher(build_model("kdcache:tiny", len(split.classes)).eval(), "kdcache:tiny")
    over: list[int] = []
    monkeypatch.setattr(build.Stopwatch, "over", lambda self, images: over.append(images))
    return SimpleNamespace(
        split=split, teacher=teacher, options=BuildOptions((32, 48), views=1, batch_size=2), over=over
    )


def test_each_part_is_over_the_images_that_it_takes(build, parts, tmp_path, monkeypatch) -> None:
    rows: list[int] = []
    teach = build.teach
    monkeypatch.setattr(
        build, "teach", lambda model, pixels, *rest: rows.append(len(pixels)) or teach(model, pixels, *rest)
    )
    build.bare_inference(parts.split, parts.teacher, parts.options, 6)
    assert (rows, parts.over) == ([2, 2, 2], [6])
    build.writer_alone(parts.split, parts.teacher, parts.options, tmp_path / "store.zarr")
    assert parts.over == [6, 6]
    assert len(list((tmp_path / "store.zarr/ledger").glob("*.json"))) >= 1
    drawn: list[int] = []
    monkeypatch.setattr(build, "render_records", lambda split, view, records, depth: drawn.extend(records) or [None])
    build.render_alone(parts.split, parts.options)
    assert (sorted(drawn), parts.over) == (list(range(6)), [6, 6, 6])


def test_a_split_is_repeated_until_it_is_long_enough(build, scenes) -> None:
    inner = open_split(scenes, "train")
    split = build.cycled(inner, 11)
    assert len(split) == len(set(split.ids)) == 11
    assert (split.image(9) == inner.image(1)).all()
    assert (split.label(9) == inner.label(1)).all()
    assert split.has_label(10)


def test_the_peak_is_in_mib(build, options, monkeypatch, tmp_path, capsys, scenes) -> None:
    usage = SimpleNamespace(getrusage=lambda who: SimpleNamespace(ru_maxrss=2048), RUSAGE_SELF=0)
    monkeypatch.setattr(build, "resource", usage)
    given = {"data": scenes, "split": "train", "size": "32x48", "device": "cpu", "peak_memory": 5}
    build.build_and_report_memory(options(**given, out=tmp_path / "store.zarr"))
    assert capsys.readouterr().out.split() == ["2.0"]
    assert len(open_cache(tmp_path / "store.zarr")) == 5


WORDS = "--data scenes:32x48,train=4,val=2 --size 32x48 --records 8 --batch-size 4 --teachers kdcache:tiny --repeats"


def test_a_small_build(build, call, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(build, "peak_memory_mib", lambda given, records, folder: float(records))
    assert call(build, *WORDS.split(), 3, "--json", tmp_path / "build.json") == 0
    told = json.loads((tmp_path / "build.json").read_text(encoding="utf-8"))
    (row,) = told["builds"]
    assert told["peak_memory_mib_over_records"] == {"4": 4.0, "16": 16.0}
    assert (row["records"], row["heads"], row["teacher"]) == (8, ["segmentation"], "kdcache:tiny")
    assert row["bytes_per_record"] > 0


def test_too_few_repeats(build, call) -> None:
    with pytest.raises(RecipeError, match="Too few repeats for a median: 2"):
        call(build, *WORDS.split(), 2)


@pytest.mark.parametrize("flag", ["--heads-only", "--features-only"])
def test_a_missed_bound_is_an_exit_code(build, call, monkeypatch, tmp_path, flag) -> None:
    good = {"build_over_inference_and_writing": 1.0, "build_over_bare_inference": 1.0, "planned_over_built_bytes": 1.0}
    for code, row in (
        (0, good),
        (1, {**good, "build_over_inference_and_writing": 1.2, "build_over_bare_inference": 0.5}),
    ):
        monkeypatch.setattr(build, "measure", lambda spec, given, folder, row=row: row)
        assert call(build, flag, "head", "--json", tmp_path / "a.json") == code
        assert json.loads(Path(tmp_path / "a.json").read_text(encoding="utf-8"))["met"] is (code == 0)
