"""Pictures of one image have its depth, its label and their difference, where the model predicts metres."""

from __future__ import annotations

import numpy as np
import torch

from kdcache.analysis.gallery import Gallery, Shown
from kdcache.analysis.per_image import score_images
from kdcache.data import open_split
from kdcache.models import build_model

SIZE = (24, 40)


def shown(spec: str, split) -> Shown:
    torch.manual_seed(0)
    model = build_model(spec, 7).eval()
    return Shown(spec, model, SIZE, "cpu", score_images(model, split, SIZE))


def titles(spec: str, depth: str) -> list[str]:
    split = open_split(f"scenes:40x56,train=2,val=1{depth}", "val")
    panels, _ = Gallery(split).one_model(shown(spec, split), 0)
    return [title for title, _ in panels]


def test_depth_stands_below_the_classes() -> None:
    names = titles("kdcache:tiny+depth", ",depth=exact")
    assert names[-3:-1] == ["depth, ground truth", "depth, prediction"]
    assert names[-1].startswith("depth, absolute error: mean ")
    assert titles("kdcache:tiny+depth", "")[-1] == "depth, prediction"
    assert not any("depth" in name for name in titles("kdcache:tiny", ",depth=exact"))


def test_the_error_is_that_of_the_prediction() -> None:
    split = open_split("scenes:40x56,train=2,val=1,depth=exact", "val")
    model = shown("kdcache:tiny+depth", split)
    pictures = dict(Gallery(split).one_model(model, 0)[0])
    label, metres = pictures["depth, ground truth"].values, pictures["depth, prediction"].values
    error = next(one.values for name, one in pictures.items() if name.startswith("depth, absolute error"))
    known = np.isfinite(label)
    np.testing.assert_array_equal(error[known], np.abs(metres - label)[known])
    assert np.isnan(error[~known]).all()
    assert pictures["depth, ground truth"].high == pictures["depth, prediction"].high


def test_depth_without_a_label_has_no_error_and_no_bar_for_one() -> None:
    split = open_split("scenes:40x56,train=2,val=1", "val")
    models = [shown("kdcache:tiny+depth", split), shown("kdcache:hydra", split)]
    figure = Gallery(split).side_by_side(models, 0, "title")
    names = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert names.count("no label of depth") == 2
    assert {"kdcache:tiny+depth: depth", "kdcache:hydra: depth"} <= set(names)
    assert sum(axes.get_ylabel() == "m" for axes in figure.axes) == 2  # bars: of the predictions alone
