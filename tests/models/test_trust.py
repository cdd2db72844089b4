"""Code that a file names runs only when it may."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from kdcache.errors import ModelError
from kdcache.models import trusting
from kdcache.models.trust import check_trusted

WHERE = "runs/x/model.json"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with code that would end the test if it ran."""
    (tmp_path / "pack").mkdir()
    for name in ("my_code", "pack/__init__", "pack/sub"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(spec: str) -> bool:
    try:
        check_trusted(spec, WHERE)
    except ModelError as error:
        return all(text in str(error) for text in (spec, WHERE, "--trust"))
    return False


def test_listed_models_are_no_code(here: Path) -> None:
    assert not any(map(refused, ("kdcache:tiny", "torchvision:fcn_resnet50", "smp:unet-resnet18")))


@pytest.mark.parametrize("spec", ["my_code:build", "my_code.py:build", "pack.sub:build", "builtins:exec", "os:system"])
def test_a_function_is_refused_and_not_imported(here: Path, spec: str) -> None:
    assert refused(spec)
    assert not {"my_code", "pack"} & set(sys.modules)


@pytest.mark.parametrize(
    ("spec", "source"),
    [("my_code:build", "my_code.py"), ("./my_code.py:build", "my_code.py"), ("pack.sub:build", "pack/__init__.py")],
)
def test_what_would_be_imported_is_named(here: Path, spec: str, source: str) -> None:
    with pytest.raises(ModelError) as caught:
        check_trusted(spec, WHERE)
    assert f"{here}/{source} would be imported, and build called" in caught.value.problem


def test_trust_is_for_the_block_alone(here: Path) -> None:
    with trusting():
        assert not refused("my_code:build")
        with trusting(False):  # asks for nothing, and takes nothing away
            assert not refused("my_code:build")
    with trusting(False):
        assert refused("my_code:build")
    assert refused("my_code:build")
