"""Which runs are one row, and what a row is called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kdcache.analysis.compare import choose_baseline, choose_control
from kdcache.analysis.groups import CONTROL, Group, group_runs
from kdcache.analysis.runs import Entry
from kdcache.run_folder import Run

COMMON = {"verb": "train-student", "model": "kdcache:tiny", "method": "kl", "term": [], "kl-weight": 1.0, "lr": 0.001}


def run(folder: str, **settings: Any) -> Entry:
    given = {key.replace("_", "-"): value for key, value in settings.items()}
    return Entry(f"runs/{folder}", Run(Path(f"/runs/{folder}")), {**COMMON, "seed": 0, **given})


def names(*runs: Entry) -> list[str]:
    return [group.name for group in group_runs(runs)[0]]


def test_runs_that_differ_in_seed_and_fold_are_one_row() -> None:
    runs = [run(f"kl-{seed}-{fold}", seed=seed, fold=f"{fold}/2") for seed in (0, 1) for fold in (0, 1)]
    (row,), notes = group_runs([*runs, run("kl-2", seed=2, val_fold="0/2")])
    assert len(row.runs) == 5
    assert notes == []


def test_named_runs_are_one_row_over_folds_with_stores_of_their_own() -> None:
    runs = [
        run(
            f"{name}-{fold}",
            name=name,
            method=method,
            fold=f"{fold}/2",
            cache=f"store-{fold}",
            trust_against=f"p-{fold}",
        )
        for name, method in (("KD(KL)", "kl"), ("B0", "none"))
        for fold in (0, 1)
    ]
    rows, _ = group_runs(runs)
    assert [(row.name, len(row.runs)) for row in rows] == [("KD(KL)", 2), ("B0", 2)]
    # Without names another store is another recipe, and one name for two recipes makes no row of them.
    assert len(names(*(run(f"r{n}", cache=f"store-{n}", fold=f"{n}/2") for n in (0, 1)))) == 2
    assert names(run("a", name="x"), run("b", name="x", kl_weight=0.5)) == ["a", "b"]


@pytest.mark.parametrize("setting", ["threads", "workers", "impl", "step", "resident", "device", "cache_dir"])
def test_the_machine_tells_no_rows_apart(setting: str) -> None:
    assert len(names(run("a"), run("b", seed=1, **{setting: "other"}))) == 1


@pytest.mark.parametrize(
    ("setting", "values"),
    [("size", [[24, 40], [48, 80]]), ("method", ["kl", "none"]), ("data", ["camvid", "voc"]), ("val", ["a", "b"])],
)
def test_what_decides_the_score_tells_rows_apart(setting: str, values: list[Any]) -> None:
    """Runs of two sizes, methods or data sets are no repetition of each other, whatever their seeds."""
    rows, notes = group_runs([run(f"{seed}", seed=seed, **{setting: value}) for seed, value in enumerate(values)])
    assert [len(row.runs) for row in rows] == [1, 1]
    assert [row.differs[setting] for row in rows] == values
    assert notes == []
    assert rows[0].unlikeness(rows[1]) == 1


@pytest.mark.parametrize(
    ("runs", "expected"),
    [
        ([run("a", method="none"), run("b")], ["none", "kl"]),
        ([run("a"), run("b", kl_weight=0.5)], ["kl-weight 1.0", "kl-weight 0.5"]),
        (
            [run("a", method="none"), run("b"), run("c", kl_weight=0.5)],
            ["none", "kl, kl-weight 1.0", "kl, kl-weight 0.5"],
        ),
        (
            [run("a", method="none"), run("b", model="kdcache:base"), run("c", model="kdcache:base", method="none")],
            ["kdcache:tiny, none", "kdcache:base, kl", "kdcache:base, none"],
        ),
        ([run("a"), run("b", init="w.pt")], ["no init", "init w.pt"]),
        ([run("a"), run("b", distill_void=False)], ["no distill-void", "distill-void false"]),
        (
            [run("a"), run("b", term=[{"kind": "cosine", "weight": 0.1}, {"kind": "at"}])],
            ["no term", "cosine,weight=0.1 + at"],
        ),
        (
            [run("a"), run("b", stream=[{"name": "x", "share": 0.5}, {"name": "y", "limit-labels": 3}])],
            ["no stream", "streams x,share=0.5 + y,limit-labels=3"],
        ),
        (
            [run("a", method="none"), run("b"), run("c", teacher="labels")],
            ["none", "kl", f"kl, {CONTROL}"],
        ),
        ([run("a", teacher="store"), run("b", teacher="labels")], ["a", CONTROL]),
        ([run("a", name="KD"), run("b", name="KD'", teacher="labels")], ["KD", f"KD', {CONTROL}"]),
        ([run("a")], ["a"]),
        ([run("a"), Entry("kdcache:tiny@w.pt", None)], ["a", "kdcache:tiny@w.pt"]),
    ],
)
def test_a_row_is_called_what_it_is_alone_in(runs: list[Entry], expected: list[str]) -> None:
    assert names(*runs) == expected


def test_the_fewest_settings_name_and_the_others_are_told() -> None:
    """A reader of `none` and `kl` must learn that the learning rate is another one too."""
    groups, notes = group_runs([run("a", method="none", lr=0.01), run("b")])
    assert [group.name for group in groups] == ["none", "kl"]
    assert notes == ["The rows also differ in lr."]
    assert groups[0].differs == {"method": "none", "lr": 0.01}
    # A run from the data itself beside one from a store of it: nothing that a reader could misread.
    _, notes = group_runs([run("a", method="none", verb="train-teacher", data="camvid"), run("b", cache="camvid.zarr")])
    assert notes == ["The rows also differ in cache."]


def test_the_same_run_twice_is_no_repetition() -> None:
    """Two runs of one seed have no standard deviation: they are the same, or differ by the machine."""
    groups, notes = group_runs([run("a"), run("b", threads=2), run("c", seed=1)])
    assert [group.name for group in groups] == ["a", "b", "c"]
    assert "runs/a, runs/b have the same settings and seed 0" in notes[0]
    same = [Entry("x/a", Run(Path("/x/a")), COMMON), Entry("y/a", Run(Path("/y/a")), COMMON)]
    assert names(*same) == ["x/a", "y/a"]


@pytest.mark.parametrize(
    ("settings", "taught"),
    [({"method": "none"}, False), ({"method": "kl"}, True), ({"method": "none", "term": [{"kind": "at"}]}, True)],
)
def test_who_was_taught(settings: dict[str, Any], taught: bool) -> None:
    assert Group("a", (run("a", **settings),), {}).taught is taught


def rows_of(*runs: Entry) -> dict[str, Group]:
    return {group.runs[0].name: group for group in group_runs(runs)[0]}


def stream(name: str, **settings: Any) -> dict[str, Any]:
    return {"name": name, "share": 0.5, **settings}


def test_a_row_is_plain_by_what_its_streams_learn_from() -> None:
    """The top-level method says nothing where there are streams."""
    silog = {"kind": "depth-silog", "reference": "teacher"}
    plain = [stream("a", method="none"), stream("b", method="depth-silog", data="d")]
    taught = [stream("a", method="none"), stream("b", method="kl", data="d")]
    rows = rows_of(
        run("plain", method="dist", stream=plain),
        run("taught", method="none", stream=taught),
        run("other", method="none", stream=[plain[0], stream("b", method="none", term=[silog], data="d")]),
        run("control", method="none", stream=[taught[0], {**taught[1], "teacher": "labels"}]),
        run("depth", method="depth-l1+depth-gradient"),
        run("bare", method="none"),
    )
    assert {name: row.taught for name, row in rows.items()} == {
        "plain": False,
        "taught": True,
        "other": True,
        "control": True,
        "depth": False,
        "bare": False,
    }
    assert [name for name, row in rows.items() if row.control] == ["control"]
    groups = list(rows.values())
    # Of the plain rows the one with streams is most like those with streams; the control has the terms of `taught`.
    assert choose_baseline(rows["taught"], groups) is rows["plain"]
    assert choose_baseline(rows["other"], groups) is rows["plain"]
    assert choose_control(rows["taught"], groups) is rows["control"]
    assert choose_control(rows["other"], groups) is None


def test_a_row_is_distilled_where_a_teachers_targets_taught_it() -> None:
    rows = rows_of(
        run("plain", method="none"),
        run("dice", method="dice"),
        run("kl", method="kl"),
        run("control", method="kl", teacher="labels"),
        run("stream", method="none", stream=[stream("a", method="none"), stream("b", method="pseudo", cache="c")]),
        run("itself", method="none", stream=[stream("a", method="none"), stream("b", method="consistency", data="d")]),
    )
    assert [name for name, row in rows.items() if row.distilled] == ["kl", "stream"]
