"""Cards: the front matter is YAML, names from elsewhere are no markup."""

from __future__ import annotations

import re

import pytest
import yaml

from kdcache.sharing import store_card
from kdcache.store import inspect_store, open_cache, open_writer


def front_matter(card):
    assert card.startswith("---\n")
    return yaml.safe_load(card.split("---\n")[1])


def test_the_card_of_a_store(made) -> None:
    summary = inspect_store(made / "store.zarr")
    card = store_card(summary)
    assert card.startswith("# store: outputs of kdcache:tiny on data\n")
    assert f"--seal {summary.seal}" in card
    assert f"weights sha256:{summary.manifest.teacher.weights}" in card
    assert f"seal sha256:{summary.seal}" in card.split("@misc")[1]
    assert str(made) not in card, "where it lies is private"
    assert "hf://" not in card


def test_front_matter_is_what_the_hub_reads(made) -> None:
    card = store_card(inspect_store(made / "store.zarr"), address="hf://datasets/me/x", licence="cc-by-4.0")
    assert front_matter(card)["license"] == "cc-by-4.0"
    assert front_matter(card)["task_categories"] == ["image-segmentation"]
    assert "kdcache copy hf://datasets/me/x x.zarr" in card


@pytest.mark.parametrize("pixels", ["stored", "source"])
def test_the_card_says_whether_pixels_are_inside_and_trains_accordingly(made, pixels: str) -> None:
    summary = inspect_store(made / "store.zarr")
    assert summary.manifest.view.pixels == "stored"
    view = summary.manifest.view.model_copy(update={"pixels": pixels})
    manifest = summary.manifest.model_copy(update={"view": view})
    card = store_card(type(summary)(**{**vars(summary), "manifest": manifest}), licence="mit")
    assert ("Images and labels are in it," in card) == (pixels == "stored")
    assert ("Images and labels are not in it" in card) == (pixels == "source")
    assert ("train-student --cache store.zarr --data DATA" in card) == (pixels == "source")


def test_names_from_elsewhere_are_text(made) -> None:
    summary = inspect_store(made / "store.zarr")
    manifest = summary.manifest
    dataset = manifest.dataset.model_copy(update={"name": 'a: "b" | [x](y)\n# `c` \x1b[2J<b> {d}'})
    changed = manifest.model_copy(update={"dataset": dataset})
    card = store_card(type(summary)(**{**vars(summary), "manifest": changed}), licence="mit")
    assert "\x1b" not in card
    assert front_matter(card)["pretty_name"] == 'store: outputs of kdcache:tiny on a: "b" | [x](y) # `c` [2J<b> {d}'
    assert not re.search(r"(?<!\\)[\[<`|]", card.split("\n# ")[1].split("\n")[0])
    assert r"\{d\}" in card.split("@misc")[1]


def test_a_store_that_is_half_built(made, tmp_path) -> None:
    source = open_cache(made / "store.zarr")
    open_writer(tmp_path / "half.zarr", source.manifest, source.ids).close()
    card = store_card(inspect_store(tmp_path / "half.zarr"))
    assert "incomplete" in card.split("@misc")[1]
    assert "--seal" not in card
