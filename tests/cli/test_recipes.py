"""Recipes with a table per term, on the command line."""

from __future__ import annotations

import tomllib

import pytest

RECIPE = """
method = "none"
iterations = 2
[[term]]
kind = "dist"
weight = 0.5
[[term]]
kind = "pseudo"
threshold = 0.6
"""


@pytest.mark.parametrize("again", ["recipe", "flags"])
def test_terms_of_a_recipe_are_those_of_the_flags(world, cli, again) -> None:
    (world / "recipe.toml").write_text(RECIPE)
    base = f"train-student --cache {world}/store.zarr --model kdcache:tiny --batch-size 4"
    ended = cli(*f"{base} --recipe {world}/recipe.toml --out {world}/one".split())
    assert ended.code == 0, ended.err
    resolved = world / "one" / "recipe.toml"
    assert tomllib.loads(resolved.read_text())["term"] == [
        {"kind": "dist", "weight": 0.5},
        {"kind": "pseudo", "threshold": 0.6},
    ]
    words = f"--recipe {resolved}"
    if again == "flags":
        words = "--method none --iterations 2 --term dist,weight=0.5 --term pseudo,threshold=0.6"
    ended = cli(*f"{base} {words} --out {world}/two".split())
    assert ended.code == 0, ended.err
    one, two = ((world / name / "last.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
