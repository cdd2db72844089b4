"""Plans: which commands, in which order, with which folders; and what cannot be planned."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer

from kdcache.errors import RecipeError
from kdcache.sweep import Recipe, Sweep, list_recipes, plan_sweep, read_recipe
from kdcache.sweep.plan import folder_name, words
from kdcache.sweep.recipe import Arm
from kdcache_cli.app import app
from kdcache_cli.verbs.sweep import flags_of

KNOWN = flags_of(typer.main.get_command(app))
RECIPE = Recipe(
    name="r",
    title="R",
    about="",
    data={},
    teacher={"model": "kdcache:base"},
    store={},
    student={"model": "kdcache:tiny"},
    arms=(Arm("plain", {"method": "none"}), Arm("kl", {"method": "kl"})),
)


def plan(**changes: Any) -> Sweep:
    return plan_sweep(replace(RECIPE, **changes), "scenes", Path("out"), KNOWN)


def value(command: tuple[str, ...], flag: str) -> str:
    return command[command.index(flag) + 1]


def test_each_job_comes_after_what_it_needs() -> None:
    for name in list_recipes():
        for smoke in (False, True):
            read = read_recipe(name, smoke=smoke)
            sweep = plan_sweep(read, "scenes", Path("out"), KNOWN, {table["name"]: "DIR" for table in read.stream})
            seen = set[str]()
            for job in sweep.jobs:
                assert set(job.needs) <= seen, job
                assert job.name not in seen
                seen.add(job.name)
            assert [job.words[0] for job in sweep.jobs[-2:]] == ["compare", "report"]
            done = [job.done for job in sweep.jobs if job.done is not None]
            assert len(set(done)) == len(done)


HYDRA = replace(
    RECIPE,
    teacher={"model": "kdcache:base", "stream": ["city"]},
    teachers={"second": {"seed": 1}},
    stores={"both": {"teacher": ["@teacher", "@second"]}, "mirrored": {"tta": "flip"}},
    stream=({"name": "city", "data": "CITY", "class-map": "c.txt"}, {"name": "far", "cache": "@store", "share": 0.5}),
    data={"val": "{city} + depth:{far}"},
    show={"baseline": "plain"},
    arms=(
        Arm("plain", {"stream": [{"name": "city", "class_map": "c.txt"}]}),
        Arm("far", {"stream": [{"name": "city"}, {"name": "far", "cache": "@store", "share": 0.25}]}),
        Arm("two", {"stream": [{"name": "far", "cache": "@both"}]}),
        Arm("flipped", {"stream": [{"name": "far", "cache": "@mirrored"}]}),
    ),
)


def hydra(**changes: Any) -> Sweep:
    return plan_sweep(replace(HYDRA, **changes), None, Path("out"), KNOWN, {"far": "FAR"})


def test_streams_have_their_data_stores_and_teachers() -> None:
    sweep = hydra()
    names = [job.name for job in sweep.jobs]
    assert names[:-2] == [
        *("plain", "teacher", "store far", "far", "teacher second", "store far both", "two"),
        *("store far mirrored", "flipped"),
    ]
    jobs = {job.name: job for job in sweep.jobs}
    assert value(jobs["teacher"].words, "--stream") == "city,data=CITY,split=train,class-map=c.txt"
    assert value(jobs["teacher second"].words, "--seed") == "1"
    judged = "CITY + depth:FAR"
    for job in sweep.jobs:
        if job.words[0].startswith("train-"):
            assert value(job.words, "--val") == judged
        elif job.words[0].startswith("build-"):
            assert value(job.words, "--data") == "FAR"
            teachers = [job.words[at + 1] for at, word in enumerate(job.words) if word == "--teacher"]
            assert teachers == ["out/teachers/teacher", "out/teachers/second"][: len(teachers)]
            assert len(teachers) == 1 + job.name.endswith("both")
        else:
            assert value(job.words, "--data") == judged
    streams = [word for at, word in enumerate(jobs["far"].words) if jobs["far"].words[at - 1] == "--stream"]
    assert streams == ["city,data=CITY,split=train", "far,cache=out/stores/far.zarr,share=0.25"]
    assert "--cache" not in jobs["far"].words
    assert value(jobs["two"].words, "--stream") == "far,cache=out/stores/far-both.zarr"
    assert set(jobs["store far both"].needs) == {"teacher", "teacher second"}
    assert value(jobs["comparison"].words, "--baseline") == "plain"
    kept = hydra(store={"pixels": "source"}).jobs
    assert (
        "far,data=FAR,split=train,cache=out/stores/far.zarr,share=0.25"
        in next(j for j in kept if j.name == "far").words
    )


def test_a_stream_joins_stores() -> None:
    joined = Arm("joined", {"stream": [{"name": "far", "cache": ["@store", "flip=@mirrored", "x=my.zarr"]}]})
    job = next(job for job in hydra(arms=(joined,), show={}).jobs if job.name == "joined")
    assert value(job.words, "--stream") == (
        "far,cache=out/stores/far.zarr,cache=flip=out/stores/far-mirrored.zarr,cache=x=my.zarr"
    )
    assert set(job.needs) == {"store far", "store far mirrored"}
    with pytest.raises(RecipeError, match=r"'@NAME' of a stream: 'mirored'[\s\S]*Did you mean mirrored"):
        hydra(arms=(Arm("joined", {"stream": [{"name": "far", "cache": ["@store", "flip=@mirored"]}]}),))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"stream": (*HYDRA.stream, {"name": "more"})}, "--data more=DIR"),
        ({"stores": {}}, "store"),
        ({"stores": HYDRA.stores | {"both": {"teacher": ["@teachr"]}}}, "Did you mean teacher?"),
        ({"data": {"val": "{cit}"}}, "Did you mean city"),
        ({"data": {"folds": 2}}, "its own fold"),
        ({"teachers": {"second": {"modl": "x"}}}, "Did you mean model"),
        ({"store": {"audit": "yes"}}, "audit = true"),
        ({"stores": HYDRA.stores | {"both": {"audit": 1}}}, "audit = true"),
    ],
)
def test_streams_that_cannot_be_planned_are_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(RecipeError) as caught:
        hydra(**changes)
    assert named in caught.value.fix


def test_folds_have_teachers_and_stores_of_their_own() -> None:
    sweep = plan(data={"folds": 2}, seeds=(0, 5))
    by_name = {job.name: job.words for job in sweep.jobs}
    assert len(sweep.runs["kl"]) == 4
    for fold in (0, 1):
        teacher, store, run = (
            by_name[f"teacher, fold {fold}"],
            by_name[f"store, fold {fold}"],
            by_name[f"kl, fold {fold}, seed 5"],
        )
        for command in (teacher, run):
            assert (value(command, "--fold"), value(command, "--val-fold")) == (f"{fold}/2", f"{fold}/2")
            assert value(command, "--val-split") == "train"
        assert value(store, "--teacher") == value(teacher, "--out")
        assert value(run, "--cache") == value(store, "--out")
        assert value(run, "--seed") == "5"
    assert "--own-fold" in by_name["comparison"]


def test_folds_of_whole_sequences() -> None:
    for data in ({"folds": 2}, {"held-out": "0/5"}):
        trainings = {"train-teacher", "train-student"}
        for by, verbs in (("^(.+)_", trainings), ("", set())):
            words_of = [job.words for job in plan(data=data | {"folds-by": by}).jobs]
            assert {words[0] for words in words_of if "--folds-by" in words} == verbs
            assert {value(words, "--folds-by") for words in words_of if "--folds-by" in words} == (
                {by} if by else set()
            )


def test_a_smoke_run_says_so_wherever_it_is_shown() -> None:
    for smoke in (False, True):
        shown = plan(smoke=smoke).jobs[-2:]
        assert [("--smoke" in job.words) for job in shown] == [smoke] * 2


def test_the_student_of_a_round_is_the_teacher_of_the_next_rounds_store() -> None:
    read = replace(read_recipe("self-train"), seeds=(0, 1))
    jobs = {job.name: job for job in plan_sweep(read, None, Path("out"), KNOWN, {"source": "A", "target": "B"}).jobs}
    assert value(jobs["store target"].words, "--teacher") == "out/teachers/teacher@last-ema"
    for seed, job_ends, ends in ((0, "", ""), (1, ", seed 1", "-seed1")):
        for number, share in ((1, 0.2), (2, 0.25), (3, 0.3)):
            student = jobs[f"self-training, round {number}, seed {seed}"]
            name = "store target" + (f" round-{number}{job_ends}" if number > 1 else "")
            store = value(jobs[name].words, "--out")
            assert name in student.needs
            target = [word for before, word in pairwise(student.words) if before == "--stream"][1]
            assert all(part in target for part in (f"cache={store},", "labels=none,", f"term=pseudo,quantile={share}"))
            if number > 1:
                assert store == f"out/stores/target-round-{number}{ends}.zarr"
                before = f"self-training, round {number - 1}, seed {seed}"
                assert before in jobs[name].needs
                assert value(jobs[name].words, "--teacher") == f"{value(jobs[before].words, '--out')}@last-ema"
            assert jobs[f"audit of {name}"].needs == (name,)
    report = jobs["report"].words
    audits = [word for before, word in pairwise(report) if before == "--audit"]
    assert audits == [f"out/audits/target{name}/report.json" for name in ("", "-round-2", "-round-3")]


def test_a_store_can_be_left_out_of_the_audits() -> None:
    sweep = hydra(store={"audit": True}, stores={**HYDRA.stores, "mirrored": {"tta": "flip", "audit": False}})
    names = [job.name for job in sweep.jobs if job.words[0] == "inspect"]
    assert names == ["audit of store far", "audit of store far both"]
    assert not [job for job in sweep.jobs if "--audit" in job.words and job.words[0] != "report"]
    assert "--audit" not in next(job for job in hydra().jobs if job.name == "report").words
    assert [job.name for job in plan(store={"audit": True}).jobs if job.words[0] == "inspect"] == ["audit of store"]


TWO_SOURCES = "adversarial, multi level, source and translated"


def test_the_arms_of_gta5_to_cityscapes() -> None:
    """As many rows small as whole, each with the streams that its name says."""
    whole, small = (read_recipe("gta5-cityscapes", smoke=smoke) for smoke in (False, True))
    data = {name: f"{name}-data" for name in ("source", "translated", "target")}
    sweeps = [plan_sweep(recipe, None, Path("out"), KNOWN, data) for recipe in (whole, small)]
    assert [len(sweep.runs) for sweep in sweeps] == [46, 46]
    names = [arm.name for arm in whole.arms]
    assert len([name for name in names if name.endswith("target labels alone")]) == 5
    assert len([name for name in names if name.startswith("CutMix, multi level, RandAugment")]) == 4
    jobs = {job.name: job for job in sweeps[0].jobs}
    streams = {
        name: [word.partition(",")[0] for before, word in pairwise(jobs[name].words) if before == "--stream"]
        for name in ("source alone", "2975 target labels alone", TWO_SOURCES, "CutMix")
    }
    assert list(streams.values()) == [
        ["source"],
        ["target"],
        ["source", "translated", "target"],
        ["translated", "target"],
    ]
    assert "labels=none" not in value(jobs["teacher"].words, "--stream")
    for sweep, own in zip(sweeps, ("smp:deeplabv3plus-resnet50", "kdcache:tiny"), strict=True):
        models = {job.name: value(job.words, "--model") for job in sweep.jobs if job.words[0] == "train-student"}
        for name in {*models} - {"teacher"}:
            assert models[name] == own + ("+aux" if "multi level" in name and not name.startswith("own") else ""), name
    two_levels = [word for before, word in pairwise(jobs[TWO_SOURCES].words) if before == "--stream"][-1]
    assert two_levels.count("adversarial,against=translated") == 2
    assert two_levels.count("head=auxiliary") == 1
    for store, teacher in {"store target": "teachers/teacher", "store target adapted": "runs/CutMix"}.items():
        assert value(jobs[store].words, "--teacher") == f"out/{teacher}"
    assert value(jobs["store target round-2"].words, "--teacher") == "out/runs/self-training-round-1@last"
    assert len([name for name in jobs if name.startswith("audit of store target")]) == 5
    for name in names:
        targets = [word for word in jobs.get(name, jobs["CutMix"]).words if word.startswith("target,")]
        assert all(("labels=none" in word) != ("target labels" in name) for word in targets), name


def test_a_run_that_another_names_comes_first_with_its_fold_and_seed() -> None:
    arms = (Arm("trusted", {"method": "kl", "class-trust": "auto", "trust-against": "@plain"}), *RECIPE.arms)
    sweep = plan(arms=arms, data={"held-out": "0/5"}, seeds=(0, 1))
    names = [job.name for job in sweep.jobs]
    assert names.index("plain, seed 1") < names.index("trusted, seed 1")
    trusted = next(job for job in sweep.jobs if job.name == "trusted, seed 1")
    plain = next(job for job in sweep.jobs if job.name == "plain, seed 1")
    assert value(trusted.words, "--trust-against") == value(plain.words, "--out")
    assert plain.name in trusted.needs
    assert value(plain.words, "--fold") == "0/5"
    assert value(next(job for job in sweep.jobs if job.words[0] == "compare").words, "--split") == "val"


def test_a_teacher_that_exists_is_not_trained() -> None:
    sweep = plan(teacher={"spec": "torchvision:fcn_resnet50@default"})
    assert [job.words[0] for job in sweep.jobs][:2] == ["build-teacher-cache", "train-student"]
    for verb in ("build-teacher-cache", "compare", "report"):
        command = next(job.words for job in sweep.jobs if job.words[0] == verb)
        assert value(command, "--teacher") == "torchvision:fcn_resnet50@default"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"student": {"modle": "x"}}, "model"),
        ({"teacher": {"kl-weight": 1}}, "class-weights"),
        ({"store": {"feature": "x"}}, "features"),
        ({"student": {"out": "x"}}, "Choose one of"),
        ({"arms": (Arm("a", {"metod": "kl"}),)}, "method"),
        ({"arms": (Arm("a", {"init": "@b"}),)}, "Choose one of: a"),
        ({"arms": (Arm("a", {"init": "@b"}), Arm("b", {"init": "@a"}))}, "'@' values"),
        ({"data": {"folds": 1}}, "leave it out"),
        ({"data": {"folds": 2, "held-out": "0/5"}}, "Leave out"),
        ({"data": {"held-out": "5/5"}}, ""),
        ({"data": {"folds-by": "^(.+)_"}}, "leave out --folds-by"),
        ({"data": {"folds": 2, "folds-by": "("}}, "^(.+)_"),
    ],
)
def test_what_cannot_be_planned_is_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(RecipeError) as caught:
        plan(**changes)
    assert named in caught.value.fix


def test_without_data_the_layout_is_named() -> None:
    with pytest.raises(RecipeError, match="camvid"):
        plan_sweep(read_recipe("camvid-segformer"), None, Path("out"), KNOWN)


def test_flags_are_as_one_types_them() -> None:
    flags = {
        "flip": False,
        "resume": True,
        "init": "",
        "lr": 1e-3,
        "term": [{"kind": "at", "weight": 2, "student_tap": "s"}],
    }
    typed = ["--no-flip", "--resume", "--lr", "0.001", "--term", "at,weight=2,student_tap=s"]
    assert list(words(flags)) == typed


def test_names_of_folders() -> None:
    assert folder_name("KD(KL) w=0.5") == "KD-KL-w=0.5"
    assert folder_name("../ä/..") not in ("", ".", "..")
    assert "/" not in folder_name("a/b")


def test_arms_with_other_values_have_their_own_teachers_and_stores() -> None:
    few = {
        "teacher": {"model": "kdcache:base", "limit-samples": "{limit-labels}"},
        "store": {"views": "{limit-views}"},
        "arms": tuple(
            Arm(f"{name}, {count}", {"method": name, "limit-labels": count})
            for name in ("none", "dist")
            for count in (4, 16, "")
        ),
    }
    jobs = {job.name: job for job in plan(**few).jobs}
    for count in ("4", "16"):
        assert value(jobs[f"teacher {count}"].words, "--limit-samples") == count
        assert value(jobs[f"store {count}"].words, "--teacher") == f"out/teachers/teacher-{count}"
        for arm in ("none", "dist"):
            run = jobs[f"{arm}, {count}"]
            assert value(run.words, "--cache") == f"out/stores/store-{count}.zarr"
            assert value(run.words, "--limit-labels") == count
            assert run.needs == (f"store {count}",)
    assert "--limit-samples" not in jobs["teacher"].words, "an arm without the flag"
    assert "--views" not in jobs["store"].words
    assert value(jobs["dist, "].words, "--cache") == "out/stores/store.zarr"
    assert sum(job.words[0] == "build-teacher-cache" for job in jobs.values()) == 3


def test_a_flag_in_braces_is_one_of_a_student() -> None:
    with pytest.raises(RecipeError, match="in braces: 'limit-lables'") as caught:
        plan(teacher={"limit-samples": "{limit-lables}"})
    assert caught.value.fix == "Did you mean limit-labels?"


def test_the_page_shows_the_curve_of_arms_that_differ_in_a_number() -> None:
    arms = tuple(Arm(f"kl, {count} labels", {"method": "kl", "limit-labels": count}) for count in (4, 16))
    report = plan(arms=arms, show={"curve": "limit-labels"}).jobs[-1].words
    assert value(report, "--figure") == "out/curve.png"
    for changes in ({"arms": arms}, {"arms": arms[:1], "show": {"curve": "limit-labels"}}):
        assert "--figure" not in plan(**changes).jobs[-1].words
