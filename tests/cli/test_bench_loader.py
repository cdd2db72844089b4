"""`kdcache bench-loader` as a user meets it; what its figures mean is tests/bench/loader/test_run.py."""

from __future__ import annotations

import json

import numpy as np
import pytest

from kdcache.bench.loader import LOADERS, READERS
from kdcache_cli.verbs.bench_loader import EVERYTHING

SMALL = "--records 4 --batch-size 2 --repeats 2 --device cpu"


@pytest.fixture(autouse=True)
def _short_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdcache.bench.loader.run.LEAST_TURN_S", 1e-4)
    monkeypatch.setattr("kdcache.bench.loader.turns._POLL_S", 1e-3)


def test_tables_and_a_file(cli, made, tmp_path) -> None:
    words = f"{SMALL} --against memcpy,decoder,direct,zarr,files,inline,ring --steps 2 --augment warp"
    ended = cli("bench-loader", "--cache", made / "store.zarr", *words.split(), "--json", tmp_path / "l.json")
    assert ended.code == 0, ended.err
    for text in (
        "decoder",
        "zarr-python z[i]",
        "inline",
        "ring, 2 threads",
        "peak",
        "fed by ring",
        "one batch from memory",
    ):
        assert text in ended.out
    assert "every record compared" in ended.err
    told = json.loads((tmp_path / "l.json").read_text())
    assert told["theme"] == "loader"
    assert {"date", "commit", "command", "machine", "settings", "store"} < set(told)
    assert told["command"].startswith("kdcache bench-loader")
    assert [(table["kind"], table["augment"]) for table in told["tables"]] == [
        ("readers", "none"),
        ("loaders", "none"),
        ("loaders", "warp"),
        ("steps", "warp"),
    ]
    direct = next(row for row in told["tables"][0]["rows"] if row["name"] == "direct")
    assert {"best", "p20", "p50", "p80", "repeats"} == set(direct["pace"]["time"])
    assert direct["per_second"] == pytest.approx(1e3 / direct["pace"]["time"]["p50"])
    assert set(direct["ratio"]) == {"decoder", "zarr"}
    assert told["libraries"]["zarr"] == told["machine"]["packages"]["zarr"]


def test_readers_alone(cli, made) -> None:
    ended = cli("bench-loader", "--cache", made / "source.zarr", *SMALL.split(), "--against", "direct,memcpy")
    assert ended.code == 0, ended.err
    assert "Loaders" not in ended.out
    assert "training step" not in ended.out


def test_everything_is_the_default() -> None:
    assert EVERYTHING.split(",") == [*READERS, *LOADERS]


def test_a_reader_that_cannot_run_says_why(cli, made, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tensorstore", None)
    words = f"{SMALL} --against tensorstore,memcpy"
    ended = cli("bench-loader", "--cache", made / "store.zarr", *words.split())
    assert ended.code == 0, ended.err
    assert "tensorstore z[i]: not installed (pip install tensorstore)" in ended.out


def test_a_wrong_reader_ends_the_benchmark(cli, made, monkeypatch) -> None:
    zeros = lambda source: lambda record: [np.zeros_like(row) for row in source.rows[record]]  # noqa: E731
    monkeypatch.setitem(READERS, "direct", ("direct", zeros))
    ended = cli("bench-loader", "--cache", made / "store.zarr", *SMALL.split(), "--against", "memcpy,direct")
    assert ended.code == 2
    assert "direct reads record" in ended.err
    assert ended.out == ""


WRONG = {
    "contestant": ("--against zar", "did you mean 'zarr'"),
    "nobody": ("--against ,", "','"),
    "augment": ("--augment replay", "'replay'"),
    "folder": ("--json {tmp}/nowhere/l.json", "nowhere"),
    "store": ("--cache {tmp}/none.zarr", "none.zarr does not exist"),
    "student": ("--student kdcache:huge", "kdcache:huge"),
    "no data set": ("--cache {made}/source.zarr --against inline", "--data"),
}


@pytest.mark.parametrize(("words", "received"), WRONG.values(), ids=WRONG)
def test_wrong_input(cli, made, tmp_path, words, received) -> None:
    given = words.format(tmp=tmp_path, made=made).split()
    ended = cli("bench-loader", "--cache", made / "store.zarr", *SMALL.split(), *given)
    assert ended.code == 2, ended.out
    assert received in ended.err
    assert ended.err.count("received") == 1
    assert ended.err.count("remedy") == 1
    assert "should not have happened" not in ended.err
    assert ended.out == ""


def test_the_help_teaches(cli) -> None:
    ended = cli("bench-loader", "--help")
    assert ended.code == 0
    shown = " ".join(ended.out.split())
    for text in ("bytes that zarr-python reads", "x decoder", "x memory", "--against", "--augment"):
        assert text in shown
