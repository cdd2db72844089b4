"""The table of models is what the models are; it is read without torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

from kdcache import model_table
from kdcache.models.registry import describe_model, describe_models


def test_the_table_is_what_the_models_are() -> None:
    assert model_table.list_models() == describe_models(), "scripts/list-models writes the table anew"


@pytest.mark.parametrize(("pattern", "specs"), [("SEGFORMER:B0", ["segformer:b0"]), ("nothing of this name", [])])
def test_a_pattern_is_part_of_the_spec(pattern: str, specs: list[str]) -> None:
    assert [info.spec for info in model_table.list_models(pattern)] == specs


def test_a_backbone_of_timm_is_described() -> None:
    pytest.importorskip("timm")
    info = describe_model("timm:resnet18")
    assert info.heads == ()
    assert {tap: (t.channels, t.stride) for tap, t in info.taps.items() if tap in ("stage1", "stage5")} == {
        "stage1": (64, 2),
        "stage5": (512, 32),
    }


def test_the_verb_imports_no_torch() -> None:
    code = (
        "import sys; from kdcache_cli.app import app\n"
        "try: app(['models', 'kdcache:'])\nexcept SystemExit: pass\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "kdcache:tiny" in done.stdout
