"""YOLO26 without its package, which has an environment of its own: clients/ultralytics tests the rest."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from kdcache.data import OUTSIDE_RGB
from kdcache.errors import ModelError
from kdcache.model_table import missing_models
from kdcache.models import build_model
from kdcache.models.architectures import yolo
from kdcache.models.run import split_spec


@pytest.mark.skipif(find_spec("ultralytics") is not None, reason="ultralytics is installed")
def test_a_missing_package_is_named() -> None:
    for name in ("yolo26n-sem", "runs/best.pt"):
        with pytest.raises(ModelError, match="Missing ultralytics") as raised:
            build_model(f"ultralytics:{name}", 3)
        assert raised.value.fix == "pip install '.[ultralytics]'"
    assert "ultralytics:yolo26x-depth" in missing_models("yolo")["pip install '.[ultralytics]'"]


def test_a_checkpoint_is_a_teacher_by_itself() -> None:
    assert split_spec("ultralytics:runs/best.pt") == ("ultralytics:runs/best.pt", "default")
    assert split_spec("ultralytics:yolo26n-sem@best.safetensors") == ("ultralytics:yolo26n-sem", "best.safetensors")
    with pytest.raises(ModelError, match="Missing weights"):
        split_spec("ultralytics:yolo26n-sem")


def test_margins_are_known_by_the_colour_that_kdcache_renders() -> None:
    assert yolo.OUTSIDE_RGB == OUTSIDE_RGB
