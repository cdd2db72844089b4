"""What stands in the way of a connection to a Ray cluster."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from kdcache import ray_cluster
from kdcache.errors import RecipeError


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RecipeError, match=r"pip install '.\[ray\]'"):
        ray_cluster.import_ray()


def test_what_a_cluster_answers_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray hangs the answer of a cluster, such as that a token is missing, onto its error as a traceback in a text."""

    def refuse(**_: Any) -> None:
        token = "Traceback:\n  File x\nray.AuthenticationError: token is missing. Note: much more.\n"
        raise ConnectionError("Failed to connect to Ray cluster") from RuntimeError(token)

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: False, init=refuse))
    with pytest.raises(RecipeError) as refused, ray_cluster.cluster("there"):
        pass
    assert refused.value.problem == "No Ray cluster at there: ray.AuthenticationError: token is missing"
