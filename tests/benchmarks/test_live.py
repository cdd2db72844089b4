"""benchmarks/live.py and live_teacher.py: the pair differs in the teacher alone, and times are compared as they are."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

from kdcache.data import open_split
from kdcache.errors import RecipeError
from kdcache.run_folder import Run
from kdcache.store import open_cache
from kdcache.training import CacheDataset


@pytest.fixture
def live(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("live")


def run(seconds: float, **by_step: float) -> dict[str, Any]:
    scores = {int(step[1:]): miou for step, miou in by_step.items()}
    return {"seconds": seconds, "miou": scores[max(scores)], "by_step": scores}


def test_an_interval_is_students_over_pairs(live) -> None:
    half = 4.302653 / 3**0.5
    found = live.paired([1.0, 2.0, 3.0])
    assert found == {"mean": 2.0, "low": round(2 - half, 3), "high": round(2 + half, 3)}
    alone = live.paired([1.5])
    assert alone["mean"] == 1.5
    assert math.isnan(alone["low"])
    assert math.isnan(alone["high"])


SCORES = {"s100": 10.0, "s200": 20.0, "s300": 30.0, "s400": 40.0}


@pytest.mark.parametrize(
    ("cached_s", "live_s", "miou"),
    [(50, 100, 20), (49, 100, 10), (75, 100, 30), (10, 100, 0), (100, 100, 40), (300, 100, 40)],
)
def test_at_equal_time_the_live_run_has_what_it_had_reached(live, cached_s, live_s, miou) -> None:
    assert live.at_equal_time(run(cached_s, **SCORES), run(live_s, **SCORES)) == miou


def test_pairs_are_compared_at_the_end_at_equal_time_and_by_their_seconds(live) -> None:
    cached = [run(seconds, s1=30.0, s2=50.0 + place) for place, seconds in enumerate((50, 10, 25))]
    others = [run(100, s1=40.0, s2=45.0) for _ in cached]
    found = live.compare([{"cached": ours, "live": theirs} for ours, theirs in zip(cached, others, strict=True)])
    assert found["cached_minus_live"]["mean"] == 6.0
    assert found["at_equal_time"]["mean"] == round((10 + 51 + 52) / 3, 3)
    assert found["live_over_cached_seconds"] == 4.0, "the median of 2, 10 and 4"


def test_two_pairs_have_no_median(live) -> None:
    pair = {"cached": run(1, s1=1.0), "live": run(2, s1=1.0)}
    assert live.compare([pair, pair])["live_over_cached_seconds"] is None
    assert live.compare([pair] * 3)["live_over_cached_seconds"] == 2.0


def test_runs_of_different_lengths_are_no_pair(live) -> None:
    with pytest.raises(RecipeError, match="different iterations"):
        live.compare([{"cached": run(1, s1=1.0), "live": run(2, s1=1.0, s2=2.0)}])


@pytest.fixture
def arguments(options, store, teacher_run, scenes, tmp_path) -> Any:
    paths = {"cache": str(store), "teacher": str(teacher_run), "data": scenes, "out": str(tmp_path)}
    loss = {"student": "kdcache:tiny", "kl_weight": 1.0, "temperature": 2.0, "lr": 2e-3}
    rest = {"augment": "warp", "scale": (0.5, 2.0), "threads": 1, "device": "cpu", "iterations": 2}
    return options(**paths, **loss, **rest)


def test_a_pair_has_one_recipe_one_loss_and_two_sources_of_targets(live, arguments, tmp_path, monkeypatch) -> None:
    steps, configs = [], []
    make = live.make_trainer

    def watched(config: Any, *rest: Any, **more: Any) -> Any:
        trainer = make(config, *rest, **more)
        use = trainer.use
        trainer.use = lambda step: steps.append(step) or use(step)
        configs.append((config, trainer))
        return trainer

    monkeypatch.setattr(live, "make_trainer", watched)
    lines = []
    for name, with_teacher in (("cached", False), ("live", True)):
        live.run(arguments, 3, with_teacher, tmp_path / f"{name}-3")
        lines.append(Run.open(tmp_path / f"{name}-3"))
        assert json.loads((tmp_path / f"{name}-3/peak.json").read_text()) > 1
    cached, other = (config for config, _ in configs)
    assert cached == other
    assert (cached.optimizer.seed, cached.loss.kl_weight, cached.loss.method) == (3, 1.0, "kl")
    (step,) = steps
    assert isinstance(step, live.LiveStep)
    ours, theirs = ([line for line in of.metrics if line["kind"] == "validation"] for of in lines)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] == [1, 2]
    assert [line["miou"] for line in ours] == pytest.approx([line["miou"] for line in theirs], abs=0.05)


def test_a_run_that_is_there_is_read_in_percent_and_not_trained(live, arguments, tmp_path, monkeypatch) -> None:
    live.run(arguments, 0, False, tmp_path / "cached-0")
    monkeypatch.setattr(live, "run", None)
    found = live.finished(arguments, 0, False)
    lines = [line for line in Run.open(tmp_path / "cached-0").metrics if line["kind"] == "validation"]
    assert found["by_step"] == {line["step"]: 100 * line["miou"] for line in lines}
    assert found["miou"] == found["by_step"][2], "the last one's, not the best"
    assert found["seconds"] > 0
    assert found["peak_mib"] == json.loads((tmp_path / "cached-0/peak.json").read_text())


def test_every_seed_is_a_pair(live, call, monkeypatch, tmp_path) -> None:
    asked = []

    def finished(given: Any, seed: int, with_teacher: bool) -> dict[str, Any]:
        asked.append((seed, with_teacher))
        return run(200.0, s1=40.0) if with_teacher else run(100.0, s1=50.0)

    monkeypatch.setattr(live, "finished", finished)
    words = ["--data", "camvid", "--teacher", "runs/teacher", "--cache", "a.zarr", "--pairs", 3]
    assert call(live, *words, "--json", tmp_path / "live.json") == 0
    assert asked == [(seed, with_teacher) for seed in range(3) for with_teacher in (False, True)]
    told = json.loads((tmp_path / "live.json").read_text(encoding="utf-8"))
    assert told["cached_minus_live"]["mean"] == 10
    assert told["live_over_cached_seconds"] == 2
    assert told["settings"]["teacher"] == "teacher", "no path of this machine"


def test_a_teacher_of_another_size_answers_on_the_students_grid(script, store, scenes, teacher_run) -> None:
    module, common = script("live_teacher"), script("common")
    cache = open_cache(store)
    eager = common.student_step(cache, "kdcache:tiny", torch.device("cpu"))
    teacher = module.load_teacher(str(teacher_run), open_split(scenes, "train").classes).model
    batch = next(iter(torch.utils.data.DataLoader(CacheDataset(cache, augment="none", targets=False), batch_size=2)))
    for size in (None, (64, 96)):
        step = module.LiveStep(eager, teacher, size=size)
        (taught,) = step.to_device((batch,))
        (target,) = taught.targets.values()
        assert target.values.shape == (2, cache.num_classes, 8, 12)
    wide = target.values.float().softmax(1)
    with torch.no_grad():
        pixels = torch.nn.functional.interpolate(batch.pixels.movedim(-1, 1).float(), (64, 96), mode="bilinear")
        logits = teacher(teacher.normalise(pixels.round().byte().movedim(1, -1))).logits
        expected = torch.nn.functional.avg_pool2d(logits.softmax(1), 2)
    assert torch.allclose(wide, expected, atol=2e-2)


def test_a_command_line_is_made_live(script, monkeypatch, teacher_run, store, scenes, tmp_path) -> None:
    module = script("live_teacher")
    monkeypatch.setattr(module.api, "make_trainer", module.api.make_trainer)
    made: list[Any] = []
    step = module.LiveStep
    monkeypatch.setattr(module, "LiveStep", lambda *given, **more: made.append(more) or step(*given, **more))
    words = f"train-student --model kdcache:tiny --cache {store} --val {scenes} --iterations 1 --val-every 1".split()
    words += ["--out", str(tmp_path / "run"), "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["live_teacher.py", str(teacher_run), *words])
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert not ended.value.code
    assert made == [{"size": (32, 48)}]
    assert Run.open(tmp_path / "run").result["iterations"] == 1
