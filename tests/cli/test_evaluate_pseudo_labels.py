"""`kdcache evaluate` of exported pseudo labels."""

from __future__ import annotations

import json

import pytest


@pytest.fixture
def pseudo(world, cli):
    done = cli("export-pseudo-labels", world / "store.zarr", "--quantile", "0.5", "--out", world / "pseudo")
    assert done.code == 0, done.err
    return world / "pseudo"


def test_a_folder_is_judged_by_the_data(world, cli, pseudo) -> None:
    told = cli("evaluate", pseudo, "--data", world / "data", "--listing", world / "iou.txt")
    assert told.code == 0, told.err
    content = json.loads((pseudo / "quality-train.json").read_text())
    assert f"{100 * content['miou']:.2f}" in told.out
    assert f"{100 * content['precision']:.2f}" in told.out
    assert 0.4 < content["kept"] < 0.8
    assert (content["split"], content["fold"]) == ("train", None)
    assert (pseudo / "quality-train.md").read_text().startswith("# ")
    assert (world / "iou.txt").read_text().endswith(f"===> mIoU: {round(100 * content['miou'], 2)}\n")
    again = cli("export-pseudo-labels", world / "store.zarr", "--quantile", "0.5", "--out", pseudo)
    assert again.code == 0, again.err
    half = cli("evaluate", pseudo, "--data", world / "data", "--fold", "0/2", "--json", world / "half.json")
    assert half.code == 0, half.err
    assert json.loads((world / "half.json").read_text())["images"] < content["images"]


def test_flags_of_models_and_other_splits_are_refused(world, cli, pseudo) -> None:
    sized = cli("evaluate", pseudo, "--data", world / "data", "--size", "32x48")
    assert sized.code == 2
    assert "--size" in sized.err
    other = cli("evaluate", pseudo, "--data", world / "data", "--split", "val")
    assert other.code == 2
    assert "0 of the" in other.err
    two = cli("evaluate", pseudo, "--data", world / "data", "--data", world / "data")
    assert two.code == 2
    assert "2 data sets" in two.err
