"""The curve of a sweep: which points it has, and that it is drawn."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from test_plan import RECIPE

from kdcache.analysis.groups import CONTROL
from kdcache.errors import RecipeError
from kdcache.sweep import read_recipe
from kdcache.sweep.curve import CURVE, read_lines, write_curve
from kdcache.sweep.recipe import Arm

ARMS = (
    *(Arm(f"CutMix, {n} labels", {"stream": [{"name": "far", "limit_samples": n}, {"name": "near"}]}) for n in (8, 80)),
    Arm("8 labels at 80x80", {"stream": [{"name": "far", "limit_samples": 8}]}),
    Arm("all", {"stream": [{"name": "far"}, {"name": "near", "limit_samples": 3}]}),
    Arm("not run", {"stream": [{"name": "far", "limit_samples": 5}]}),
    Arm("of the arm", {"limit-labels": 4}),
)
ROWS = [
    {"name": arm.name, "runs": [{"miou": 0.25 + 0.01 * number}, {"miou": 0.27 + 0.01 * number}, {"miou": None}]}
    for number, arm in enumerate(ARMS)
    if arm.name != "not run"
]


def test_arms_that_differ_in_the_number_alone_are_a_line() -> None:
    lines = read_lines(ARMS, "far.limit-samples", ROWS)
    assert list(lines) == ["CutMix, N labels", "N labels at 80x80"]
    assert lines["CutMix, N labels"] == [pytest.approx((8, 26, 1)), pytest.approx((80, 27, 1))]
    assert list(read_lines(ARMS, "limit-labels", ROWS)) == ["of the arm"]
    assert read_lines(ARMS, "far.share", ROWS) == {}


def test_a_control_has_its_line_under_the_name_of_its_arm() -> None:
    arms = [Arm(f"control, {count}", {"limit-labels": count}) for count in (4, 16)]
    rows = [{"name": f"{arm.name}, {CONTROL}", "runs": [{"miou": 0.5}]} for arm in arms]
    assert read_lines(tuple(arms), "limit-labels", rows) == {"control, N": [(4, 50, 0), (16, 50, 0)]}


@pytest.mark.parametrize("banner", [None, "Smoke run on procedural scenes"])
def test_it_is_drawn_where_a_recipe_names_a_key(tmp_path: Path, banner: str | None) -> None:
    (tmp_path / "comparison.json").write_text(json.dumps({"rows": ROWS, "banner": banner}))
    for show, drawn in (({}, False), ({"curve": "near.limit-samples"}, False), ({"curve": "far.limit-samples"}, True)):
        write_curve(replace(RECIPE, arms=ARMS, show=show), tmp_path)
        assert (tmp_path / CURVE).exists() == drawn
    with Image.open(tmp_path / CURVE) as image:
        assert min(image.size) > 300
    with pytest.raises(RecipeError, match="curv"):
        read_recipe("voc-compare", changes=["show.curv=x"])
