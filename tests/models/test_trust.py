"""Code that a file names runs only when it may."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from kdcache.errors import ModelError
from kdcache.models.trust import check_trusted, remember, trusting

WHERE = "runs/x/model.json"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with code.py that would leave a trace; nothing is remembered yet."""
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "my_code.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.chdir(tmp_path / "one")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path


def refused(spec: str) -> bool:
    try:
        check_trusted(spec, WHERE)
    except ModelError as error:
        return all(text in str(error) for text in (spec, WHERE, "--trust"))
    return False


def test_listed_models_are_no_code(here: Path) -> None:
    assert not any(map(refused, ("kdcache:tiny", "torchvision:fcn_resnet50", "smp:unet-resnet18")))
    assert remember("kdcache:tiny") is None
    assert not (here / "state").exists()


@pytest.mark.parametrize("spec", ["my_code:build", "my_code.py:build", "pack.sub:build", "builtins:exec", "os:system"])
def test_a_name_is_refused_until_it_is_remembered(here: Path, spec: str) -> None:
    assert refused(spec)
    assert remember(spec) is None
    assert not refused(spec)
    assert remember(spec) is None
    assert len((here / "state/kdcache/functions").read_text().splitlines()) == 1
    assert "my_code" not in sys.modules


def test_what_would_be_imported_is_named(here: Path) -> None:
    with pytest.raises(ModelError) as caught:
        check_trusted("my_code:build", WHERE)
    assert f"{here}/one/my_code.py would be imported, and build called" in caught.value.received


@pytest.mark.parametrize("spec", ["my_code:build", "my_code.py:build", "./my_code.py:build"])
def test_another_function_or_file_of_the_same_name_is_another(
    here: Path, monkeypatch: pytest.MonkeyPatch, spec: str
) -> None:
    remember(spec)
    assert refused(spec.replace("build", "other"))
    monkeypatch.chdir(here / "two")
    assert refused(spec)
    monkeypatch.chdir(here / "one")
    assert not refused(spec)


def test_one_file_has_many_paths(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remember("my_code.py:build")
    monkeypatch.chdir(here / "two")
    assert not refused("../one/my_code.py:build")
    assert not refused(f"{here}/one/my_code.py:build")


def test_a_function_of_another_module_of_a_package_is_another(here: Path) -> None:
    (here / "one/pack").mkdir()
    for name in ("__init__", "sub", "other"):
        (here / f"one/pack/{name}.py").write_text("")
    remember("pack.sub:build")
    assert not refused("pack.sub:build")
    assert refused("pack.other:build")
    assert refused("pack:build")


def test_trust_is_for_the_block_alone(here: Path) -> None:
    with trusting():
        assert not refused("my_code:build")
        with trusting(False):  # asks for nothing, and takes nothing away
            assert not refused("my_code:build")
    with trusting(False):
        assert refused("my_code:build")
    assert refused("my_code:build")


def test_what_others_could_have_written_does_not_count(here: Path) -> None:
    remember("my_code:build")
    listed = here / "state/kdcache/functions"
    assert listed.stat().st_mode & 0o777 == 0o600
    assert listed.parent.stat().st_mode & 0o777 == 0o700
    for mode, counts in ((0o620, False), (0o602, False), (0o600, True)):
        listed.chmod(mode)
        assert refused("my_code:build") is not counts


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\n", b"[]\n", b'["my_code.py", "build"]\n'])
def test_a_list_that_is_damaged_remembers_nothing(here: Path, content: bytes) -> None:
    remember("my_code:build")
    (here / "state/kdcache/functions").write_bytes(content)
    assert refused("my_code:build")


@pytest.mark.parametrize("state", ["", "relative"])
def test_without_a_state_home_it_is_below_the_home(here: Path, monkeypatch: pytest.MonkeyPatch, state: str) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", state)
    monkeypatch.setenv("HOME", str(here / "home"))
    remember("my_code:build")
    assert json.loads((here / "home/.local/state/kdcache/functions").read_text()) == [
        f"{here}/one/my_code.py",
        "build",
    ]
    assert not refused("my_code:build")


def test_a_state_home_that_cannot_be_written_is_told(here: Path) -> None:
    (here / "state").write_text("a file")
    untold = remember("my_code:build")
    assert "my_code:build could not be noted as yours" in str(untold)
    assert "--trust" in str(untold)
    assert refused("my_code:build")


def test_no_home_is_told(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_STATE_HOME")

    def none() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", none)
    assert "--trust" in str(remember("my_code:build"))
    assert refused("my_code:build")


def test_trainings_that_begin_at_once_are_all_remembered(here: Path) -> None:
    for number in range(3):
        (here / f"one/code{number}.py").write_text("")
        remember(f"code{number}:build")
    assert not any(refused(f"code{number}:build") for number in range(3))
    assert os.listdir(here / "state/kdcache") == ["functions"]
