"""What a comparison says of rows that have learnt nothing."""

from __future__ import annotations

import json

import pytest

from kdcache.analysis.comparison import Row, RunScore, alike, banner, collapse, is_collapsed
from kdcache.metrics import Metrics, TaskMetrics
from kdcache.metrics.cost import Cost

ALONE = Metrics(("road", "car"), (0.75, 0.0), (1.0, 0.0), (75, 25), 0.375, 0.5, 0.75)
RANDOM = Metrics(("road", "car"), (0.6, 0.15), (0.75, 0.25), (75, 25), 0.375, 0.5, 0.625)
FINE = Metrics(("road", "car"), (0.9, 0.7), (0.95, 0.85), (75, 25), 0.8, 0.9, 0.925)


def row(*runs: Metrics) -> Row:
    scores = tuple(
        RunScore(f"runs/kl-{seed}", seed, None, TaskMetrics(one), reused=False) for seed, one in enumerate(runs)
    )
    cost = Cost((1, 1), 1, 2, None)
    return Row("kl", "m", {}, scores, cost, teacher=False, baseline=False)


@pytest.mark.parametrize(
    ("runs", "words"),
    [
        ((ALONE,), "kl collapsed: it predicts road alone (mIoU 37.50 %)"),
        ((ALONE, ALONE), "all 2 runs of kl collapsed: runs/kl-0 predicts road alone (mIoU 37.50 %)"),
        ((FINE, ALONE, FINE), "1 of 3 runs of kl collapsed: runs/kl-1 predicts road alone (mIoU 37.50 %)"),
        ((ALONE, RANDOM), "all 2 runs of kl learnt nothing: runs/kl-0 predicts road alone (mIoU 37.50 %)"),
        ((FINE, FINE), None),
    ],
)
def test_rows_that_learnt_nothing_are_named(runs: tuple[Metrics, ...], words: str | None) -> None:
    found = row(*runs)
    assert collapse(found, found.name) == words
    assert is_collapsed(found) is (words is not None and FINE not in runs)


def test_a_run_at_chance_is_so_in_the_json() -> None:
    one, two = (score.to_json()["at_chance"] for score in row(ALONE, FINE).runs)
    assert one == "predicts road alone (mIoU 37.50 %)"
    assert two is None


@pytest.mark.parametrize(
    ("runs", "said"),
    [((FINE, FINE), True), ((FINE,), False), ((FINE, ALONE), False), ((ALONE, ALONE), False), ((), False)],
)
def test_runs_that_score_alike_have_no_noise_to_speak_of(runs: tuple[Metrics, ...], said: bool) -> None:
    """An interval of no width would make any difference certain."""
    words = alike(row(*runs))
    assert (words is not None) is said
    if words is not None:
        assert words.startswith("the 2 runs of kl score exactly alike")


def test_figures_on_scenes_beside_photographs_are_marked() -> None:
    assert banner("camvid + depth:scenes:32x48,depth=exact") is not None
    assert banner("camvid + depth:nyu") is None


@pytest.mark.parametrize("measured", [ALONE, RANDOM, FINE])
def test_a_kept_evaluation_is_the_one_that_was_measured(measured: Metrics) -> None:
    assert TaskMetrics.of_json(json.loads(json.dumps(measured.to_json()))).segmentation == measured
