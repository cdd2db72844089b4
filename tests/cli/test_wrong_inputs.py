"""A recorded list of wrong commands and their errors, to the letter: wrong_inputs.txt.

    $ VERB ...        a command, without the program's name, run in the folder of `world`
    | ...             what it prints, without the panel's frame

After a change that is meant, write the list again and read the difference:

    KDCACHE_RECORD=1 python -m pytest tests/cli/test_wrong_inputs.py
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kdcache.data import write_scenes

LIST = Path(__file__).with_name("wrong_inputs.txt")
SECTIONS = [
    [(command, printed) for command, printed in re.findall(r"^\$ (.*)\n((?:\|.*\n)*)", section, re.M)]
    for section in LIST.read_text(encoding="utf-8").split("\n# ")[1:]
]
NAMES = re.findall(r"^# (.*)$", LIST.read_text(encoding="utf-8"), re.M)
TRAINING = "--model kdcache:tiny --iterations 2 --batch-size 2 --val-every 2"
MADE = (
    f"train-teacher --data data {TRAINING} --size 32x48 --out teacher",
    "train-teacher --data metres --model kdcache:tiny+depth --iterations 2 --batch-size 2 --val-every 2 --size 32x48"
    " --out both",
    "build-teacher-cache --data data --teacher teacher --views full --shard-records 4 --out store.zarr",
    "build-teacher-cache --data data --teacher teacher --views full --pixels source --out source.zarr",
    "build-teacher-cache --data data --teacher teacher --views full --features head --raw-logits --out taps.zarr",
    "build-teacher-cache --data metres --teacher both --views full --out both.zarr",
    f"train-student --cache store.zarr {TRAINING} --method kl --out student",
)
FILES = {
    "none.toml": "= 3",
    "key.toml": "temprature = 2.0\n",
    "stream.toml": '[stream]\nname = "a"\n',
    "removed.toml": "rounds = 2\n",
    "ids.txt": "train-000000\nzebra\n",
    "weights.pth": "no weights",
    "data.yaml": "names: {0: road}\n",
    "occupied/thesis.tex": "thesis",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, cli: Callable[..., Any]) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("wrong")
    write_scenes(root / "data", "scenes:36x52,train=6,val=2")
    write_scenes(root / "metres", "scenes:36x52,train=4,val=2,depth=exact")
    for name, content in FILES.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(content, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for command in MADE:
            ended = cli(*command.split())
            assert ended.code == 0, ended.err
        yield root


def printed(cli: Callable[..., Any], folder: Path, command: str) -> str:
    """Return what a command prints as an error, as in the list."""
    ended = cli(*command.split())
    assert ended.code == 2, f"{command}: {ended}"
    assert ended.err.count("fix: ") == 1, ended.err
    assert not Path("new").exists(), command
    lines = (line.strip("│╭─╮╰╯ ") for line in ended.err.replace(str(folder), "FOLDER").splitlines())
    return "".join(f"| {line}\n" for line in lines if line not in ("", "error"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU takes what the list refuses")
@pytest.mark.parametrize("commands", SECTIONS, ids=NAMES)
def test_the_same_errors_as_recorded(commands, folder, cli, tree, monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    before = tree(folder)
    now = [(command, printed(cli, folder, command)) for command, _ in commands]
    assert tree(folder) == before, "nothing is written or lost"
    if os.environ.get("KDCACHE_RECORD"):
        _record(dict(now))
    else:
        assert now == commands


def _record(errors: dict[str, str]) -> None:
    text = LIST.read_text(encoding="utf-8")
    for command, error in errors.items():
        text = re.sub(
            rf"^\$ {re.escape(command)}\n(\|.*\n)*", lambda _, c=command, e=error: f"$ {c}\n{e}", text, flags=re.M
        )
    LIST.write_text(text, encoding="utf-8")


def test_the_list_is_long() -> None:
    assert sum(map(len, SECTIONS)) >= 200
