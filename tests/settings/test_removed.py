"""A removed name fails with its replacement, wherever it is given."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w

import kdcache
from kdcache.errors import RecipeError
from kdcache.settings import entries, removed
from kdcache.settings.removed import Removed
from kdcache.settings.streams import parse_stream
from kdcache.settings.training import TRAINING
from kdcache.sweep import read_recipe
from kdcache.training import make_config, read_config
from kdcache_cli.app import main

FIX = "Write --method kl instead."


@pytest.fixture(autouse=True)
def gone(monkeypatch: pytest.MonkeyPatch) -> None:
    for table, name in ((removed.SETTINGS, "old_flag"), (removed.VERBS, "old-verb"), (removed.KEYS, "old_key")):
        monkeypatch.setitem(table, name, Removed(FIX, unused=3))  # type: ignore[arg-type]


def _recipe(tmp_path: Path, **content: Any) -> Any:
    path = tmp_path / "recipe.toml"
    path.write_text(tomli_w.dumps(content))
    return read_recipe(str(path))


WAYS: dict[str, Callable[[Path], Any]] = {
    "keyword": lambda tmp: kdcache.train(tmp / "run", model="kdcache:tiny", data="scenes", old_flag=1),
    "config": lambda tmp: make_config(verb="train-teacher", data="scenes", model="kdcache:tiny", old_flag=1),
    "stream": lambda tmp: parse_stream("a,old-flag=1"),
    "recipe": lambda tmp: _recipe(tmp, old_key=1),
    "table of a recipe": lambda tmp: _recipe(tmp, arm=[{"name": "a"}], data={"old-flag": 1}),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_removed_name_fails_with_its_replacement(way: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="was removed") as error:
        WAYS[way](tmp_path)
    assert error.value.fix == (FIX if way != "keyword" else "Write method='kl' instead.")


@pytest.mark.parametrize("words", ["train-student --old-flag 1", "old-verb", "old-verb OUT --flag"])
def test_a_removed_word_of_the_command_line_fails(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words.split())
    assert ended.value.code == 2
    assert FIX in capsys.readouterr().err


def test_a_removed_key_of_flags_in_a_file_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Somebody wrote it, so that it fails also with the value that is unused in a run's own recipe."""
    (tmp_path / "mine.toml").write_text("old-flag = 3\n")
    with pytest.raises(SystemExit) as ended:
        main(["train-student", "--recipe", str(tmp_path / "mine.toml"), "--out", str(tmp_path / "run")])
    assert ended.value.code == 2
    assert FIX in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("words", removed.FLAGS)
def test_a_removed_flag_or_value_of_one_verb_fails(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words.split())
    assert ended.value.code == 2
    printed = " ".join(capsys.readouterr().err.split())
    assert f"{words} was removed" in printed
    assert removed.FLAGS[words].fix in printed.replace(" │ │ ", " ")


@pytest.mark.parametrize("name", ["PastedTarget", "channel_loss", "decoupled_loss"])
def test_a_removed_name_of_python_fails(name: str) -> None:
    with pytest.raises(ImportError, match=f"{name} was removed. Fix: "):
        exec(f"from kdcache_kernels import {name}")


@pytest.mark.parametrize(("value", "read"), [(3, True), (4, False)])
def test_an_earlier_run_is_read_unless_it_used_a_removed_setting(tmp_path: Path, value: int, read: bool) -> None:
    config = make_config(verb="train-teacher", data="scenes", model="kdcache:tiny")
    (tmp_path / "recipe.toml").write_text(config.to_toml() + f"old_flag = {value}\n")
    if read:
        assert read_config(tmp_path) == config
    else:
        with pytest.raises(RecipeError, match="Cannot read") as error:
            read_config(tmp_path)
        assert "old-flag was removed" in error.value.problem


def test_nothing_is_both_there_and_removed() -> None:
    assert not set(removed.SETTINGS) - {"old_flag"} & set(entries(*TRAINING))
