"""The bar of a training: what its note begins with, and that scores replace those of the validation before."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from rich.console import Console
from rich.progress import Progress

from kdcache.training.run.training_progress import TrainingProgress

STEP = {"loss": 1.5, "ce": 1.0, "kl": 0.5, "lr": 0.1, "images_per_second": 9.0, "wait_share": 0.25}


def score(**values: float) -> Any:
    return cast(Any, SimpleNamespace(**values))


def test_scores_stand_first_and_are_those_of_the_last_validation() -> None:
    with Progress(console=Console(quiet=True)) as bar:
        watched = TrainingProgress(bar, "train")
        watched.started(step=0, iterations=9, parameters=1)
        watched.stepped(1, STEP)
        assert bar.tasks[0].fields["note"] == "loss 1.500 ce 1.000 kl 0.500 9.0 img/s, 25 % waiting"
        for rmse in (4.0, 3.0):
            watched.validating(1, 2)
            watched.validated(2, "depth", score(rmse=rmse, abs_rel=0.1), best=True, ema=False)
        watched.validating(1, 2)
        assert bar.tasks[0].fields["note"] == "depth rmse 3 m validating 1/2"
        watched.validated(3, "segmentation", score(miou=0.5), best=True, ema=False)
        watched.validated(3, "segmentation", score(miou=0.6), best=True, ema=True)
        watched.stepped(4, STEP)
        assert bar.tasks[0].fields["note"].startswith("depth rmse 3 m, mIoU 50.00, EMA 60.00 loss 1.500")


@pytest.mark.parametrize("quiet", [False, True])
def test_a_quiet_bar_still_warns(quiet: bool, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(console=Console(stderr=True, quiet=quiet)) as bar:
        watched = TrainingProgress(bar, "train")
        watched.note("the cache has 4 views")
        watched.note("warning: training shares sequences")
    shown = capsys.readouterr().err
    assert "warning: training shares sequences" in shown
    assert "note: warning" not in shown
    assert ("note: the cache has 4 views" in shown) != quiet
