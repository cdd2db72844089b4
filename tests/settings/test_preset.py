"""Presets are settings of a training, and what is given wins."""

from __future__ import annotations

import pytest

from kdcache.errors import RecipeError
from kdcache.settings import entries
from kdcache.settings.preset import preset_names, read_preset
from kdcache.settings.training import TRAINING
from kdcache.training import make_config


def test_the_presets() -> None:
    assert preset_names() == ["all-labels", "control", "domain-adaptation", "few-labels"]


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_is_a_training(name: str) -> None:
    values = read_preset(name)
    assert values.keys() <= entries(*TRAINING).keys()
    config = make_config(verb="train-student", model="kdcache:tiny", cache="c.zarr", **values)
    assert config.optimizer.iterations == values["iterations"]


def test_a_control_differs_from_its_run_by_the_targets_alone() -> None:
    assert read_preset("control") == {**read_preset("few-labels"), "teacher": "labels"}


def test_another_name() -> None:
    with pytest.raises(RecipeError, match=r"Unknown preset few-label") as caught:
        read_preset("few-label")
    assert caught.value.fix == "Did you mean few-labels?"
    with pytest.raises(RecipeError) as caught:
        read_preset("xyz")
    assert "all-labels, control" in caught.value.fix
