"""Terms as a user names them: methods, recipes, taps, and what a store must have been built with."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kdcache.distill.terms import (
    KINDS,
    LossTerm,
    check_terms,
    loss_term,
    make_term,
    parse_method,
    parse_term,
)
from kdcache.distill.terms.unlabelled.pseudo import Pseudo
from kdcache.errors import RecipeError
from kdcache.heads import CategoricalHead, RegressionHead
from kdcache.settings.terms import KL
from kdcache.store import Cache
from kdcache.tasks import AUXILIARY, DEPTH, SEGMENTATION

STUDENT = {"stage1": 8, "stage2": 16, "head": 32}


HEADS = {SEGMENTATION: CategoricalHead(7), AUXILIARY: CategoricalHead(7), DEPTH: RegressionHead()}
ON_DEPTH = {kind for kind in KINDS if kind.startswith("depth-")}


def manifest(*, k: int = 7, features: tuple[str, ...] = (), maps: tuple[str, ...] = (), raw: bool | None = None) -> Any:
    head = SimpleNamespace(k=k, classes=7, size=(6, 9)) if raw is None else SimpleNamespace(k=k, classes=7, raw=raw)
    facts = {"channels": 1, "unit": "m", "parameterisation": "exp", "range": (0.0, 80.0)}
    depth = SimpleNamespace(kind="regression", align_corners=False, **facts)
    actual = SimpleNamespace(
        heads={"segmentation": head, "depth": depth},
        features={tap: SimpleNamespace(channels=5, size=(1, 1) if tap == "summary" else (3, 4)) for tap in features},
    )
    if maps:
        actual.statistics = {"confidence": SimpleNamespace()} | {
            f"at.{tap}": SimpleNamespace(size=(72, 72)) for tap in maps
        }
    return actual


def store(**options: Any) -> Any:
    contents = manifest(**options)
    return SimpleNamespace(num_classes=7, view_size=(24, 36), align_corners=False, manifest=contents)


def test_methods() -> None:
    assert parse_method("none") == ()
    assert parse_method("kl") == (KL(),)
    assert parse_method("kl + at+dkd") == (KL(), loss_term("at"), loss_term("dkd"))
    assert parse_method("cwd") == (loss_term("cwd"),)
    for kind in KINDS:
        assert [spec.kind for spec in parse_method(f"{kind}+kl")] == [kind, "kl"]


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("kll", "Did you mean kl"),
        ("kl+cosin", "Did you mean cosine"),
        ("kl+kl", r"\[\[term\]\]"),
        ("at+at", r"\[\[term\]\]"),
        ("none+kl", "next to none"),
        ("", "for example"),
        ("kl+", "for example"),
        ("ce+kl", "Unknown loss term 'ce'"),
    ],
)
def test_what_is_no_method_is_refused(text: str, remedy: str) -> None:
    with pytest.raises(RecipeError, match=remedy):
        parse_method(text)


def test_a_spec_goes_through_a_recipe() -> None:
    spec = parse_term({"kind": "cosine", "weight": 0.1, "student-tap": "head", "teacher_tap": "stage4"})
    assert spec == loss_term("cosine", weight=0.1, student_tap="head", teacher_tap="stage4")
    assert parse_term(spec.table()) == spec
    assert loss_term("pseudo", quantile=0.5).table() == {"kind": "pseudo", "quantile": 0.5}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"weight": 1.0}, "Add kind"),
        ({"kind": "attn"}, "(?s)Unknown loss term 'attn'.*Choose one of|Did you mean at"),
        ({"kind": "dst"}, "Did you mean dist"),
        ({"kind": "kl"}, "--kl-weight"),
        ({"kind": "dkd", "alhpa": 1.0}, "Did you mean alpha"),
        ({"kind": "sp", "temperature": 2.0}, "(?s)'temperature' of sp.*options are weight, student_tap, teacher_tap"),
        ({"kind": "at", "weight": -1.0}, "a number from 0 on"),
        ({"kind": "at", "weight": math.nan}, "a number"),
        ({"kind": "at", "weight": "1"}, "a number"),
        ({"kind": "at", "weight": True}, "a number"),
        ({"kind": "cwd", "temperature": 0.0}, "a number above 0"),
        ({"kind": "dkd", "beta": math.inf}, "a number"),
        ({"kind": "hint", "teacher_tap": 4}, "Give text"),
        ({"kind": "pseudo", "threshold": 1.0}, "above 0 to below 1"),
        ({"kind": "pseudo", "quantile": 0.0}, "above 0 to below 1"),
        ({"kind": "pseudo", "threshold": 0.5, "quantile": 0.5}, "Leave one of them out"),
        ({"kind": "pseudo", "normalise": "some"}, "(?s)normalise of pseudo: .*Give one of kept, all, share"),
        ({"kind": "pseudo", "class-weights": "mean"}, "(?s)class_weights of pseudo: .*Give one of none, median, sqrt"),
        ({"kind": "dkd", "normalise": "all"}, "(?s)'normalise' of dkd.*options are"),
        ({"kind": "hint", "standardise": "all"}, "(?s)standardise of hint: .*Give one of none, channels"),
        ({"kind": "hint", "projector": "3"}, "(?s)projector of hint: .*Give one of linear, mlp"),
        ({"kind": "hint", "distance": "l1"}, "(?s)distance of hint: .*Give one of mse, smooth-l1"),
        ({"kind": "cosine", "distance": "mse"}, "(?s)'distance' of cosine.*options are"),
        ({"kind": "consistency", "threshold": 1.0}, "above 0 to below 1"),
        ({"kind": "consistency", "by": "teacher"}, "(?s)by of consistency: .*Give one of student, ema, store"),
        ({"kind": "consistency", "quantile": 0.5, "threshold": 0.9}, "Leave one of them out"),
        (
            {"kind": "consistency", "class_weights": "sqrt"},
            "(?s)'class_weights' of consistency.*options are weight, threshold, quantile, normalise, by",
        ),
        ({"kind": "dice", "threshold": 0.5}, "(?s)'threshold' of dice.*options are weight"),
    ],
)
def test_what_is_no_term_is_refused(table: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_term(table)


@pytest.mark.parametrize(
    ("kind", "contents", "flag"),
    [
        ("sp", {}, "--features TAP"),
        ("hint", {}, "--features TAP"),
        ("cosine", {"maps": ("deep",)}, "--features TAP"),
        ("at", {}, "--statistics at:TAP"),
        ("cwd", {}, "--raw-logits"),
        ("cwd", {"raw": False}, "--raw-logits"),
        ("cwd", {"raw": False, "k": 3}, "--top-k 7 --raw-logits"),
        ("dkd", {"k": 3}, "--top-k 7"),
    ],
)
def test_a_store_without_the_arrays_is_refused_with_the_flag(kind: str, contents: dict[str, Any], flag: str) -> None:
    with pytest.raises(RecipeError, match=f"{kind} needs ") as raised:
        check_terms([loss_term("pseudo"), loss_term(kind)], manifest(**contents))
    assert f"Build the cache with {flag} as well" in raised.value.fix
    assert raised.value.problem.startswith(f"{kind} needs ")
    assert "but the cache has " in raised.value.problem
    with pytest.raises(RecipeError):
        make_term(loss_term(kind), targets=store(**contents), student_taps=STUDENT)


def test_all_that_is_missing_is_said_at_once() -> None:
    specs = [loss_term("at"), loss_term("cosine", teacher_tap="head"), loss_term("hint", teacher_tap="head")]
    with pytest.raises(RecipeError) as raised:
        check_terms([*specs, loss_term("cwd")], manifest(features=("stage1",)))
    assert "with --features head --raw-logits as well" in raised.value.fix
    assert "features/head, but the cache has stage1" in raised.value.problem


def test_a_store_that_has_all_serves_all() -> None:
    check_terms([loss_term(kind) for kind in KINDS], manifest(features=("deep", "summary"), raw=True))
    check_terms([loss_term("dist"), loss_term("pseudo")], manifest(k=2))


@pytest.mark.parametrize(
    ("spec", "contents", "taps"),
    [
        (loss_term("hint"), {"features": ("stage2",)}, ("stage2", "stage2")),
        (loss_term("hint"), {"features": ("stage2", "deep")}, ("head", "deep")),
        (loss_term("hint"), {"features": ("stage2", "summary")}, ("stage2", "stage2")),
        (loss_term("queue"), {"features": ("summary", "stage2")}, ("head", "summary")),
        (loss_term("similarity"), {"features": ("stage2", "summary")}, ("stage2", "stage2")),
        (loss_term("hint", teacher_tap="stage1"), {"features": ("stage1", "deep")}, ("stage1", "stage1")),
        (loss_term("hint", student_tap="stage1"), {"features": ("stage2",)}, ("stage1", "stage2")),
        (loss_term("at"), {"features": ("stage2",), "maps": ("stage1",)}, ("stage1", "stage1")),
        (loss_term("cwd", student_tap="head"), {"features": ("stage2",)}, ("head", "stage2")),
        (loss_term("cwd"), {"features": ("stage2",), "raw": True}, (None, None)),
        (loss_term("dist"), {}, (None, None)),
    ],
)
def test_default_taps(spec: LossTerm, contents: dict[str, Any], taps: tuple[str | None, str | None]) -> None:
    actual = spec.resolved(manifest(**contents), list(STUDENT))
    assert tuple(getattr(actual, tap, None) for tap in ("student_tap", "teacher_tap")) == taps


def test_the_default_tap_is_nearest_in_cells_and_of_equals_the_last() -> None:
    taps = {"s8": (12, 16), "s16": (6, 8), "out": (6, 8), "s32": (3, 4)}
    contents = manifest(features=("norm",))
    for size, tap in (((6, 8), "out"), ((7, 9), "out"), ((2, 2), "s32"), ((24, 32), "s8")):
        contents.features["norm"].size = size
        assert loss_term("cosine").resolved(contents, list(taps), taps).student_tap == tap
    same = manifest(features=("s16",))
    for size, tap in (((6, 8), "s16"), ((12, 16), "s8")):  # of equals the one of the same name
        same.features["s16"].size = size
        assert loss_term("cosine").resolved(same, list(taps), taps).student_tap == tap


def test_unknown_taps_of_the_student_are_refused() -> None:
    with pytest.raises(RecipeError, match="Did you mean stage2"):
        loss_term("at", student_tap="stage22").resolved(manifest(features=("deep",)), list(STUDENT))
    with pytest.raises(RecipeError, match="Choose one of none, or a student with taps"):
        loss_term("at").resolved(manifest(features=("deep",)), [])


def test_what_a_term_reads() -> None:
    contents = manifest(features=("deep",), maps=("deep",), raw=True)
    reads = {
        kind: loss_term(kind).resolved(contents, list(STUDENT)).arrays(contents) for kind in ("at", "sp", "cwd", "dkd")
    }
    assert reads == {
        "at": ("statistics/at.deep",),  # a tenth of the features
        "sp": ("features/deep",),
        "cwd": ("targets/segmentation/max",),
        "dkd": (),
    }
    targets = store(features=("deep", "summary"), maps=("deep",), raw=True)
    for kind in KINDS:
        term = make_term(loss_term(kind), targets=targets, student_taps=STUDENT, student_heads=HEADS)
        assert term.reads_target == (kind in ("pseudo", "cwd", "dist", "dkd"))
        on_labels = kind in ("dice", "lovasz", "auxiliary", "entropy", "adversarial", "consistency") or (
            kind in ON_DEPTH - {"depth-ssi"}
        )
        assert term.reads_teacher == (not on_labels)
        assert term.student_taps() == (() if term.reads_target or on_labels or kind in ON_DEPTH else ("head",))
        assert term.head == ("depth" if kind in ON_DEPTH else "auxiliary" if kind == "auxiliary" else None)
        assert (term.gather, term.describe() is None) == (None, kind != "consistency")


def test_weights_of_the_spec_and_of_the_kind() -> None:
    targets = store(features=("deep", "summary"), raw=True)
    weights = {
        kind: make_term(loss_term(kind), targets=targets, student_taps=STUDENT, student_heads=HEADS).weight
        for kind in KINDS
    }
    documented = {"sp": 50.0, "hint": 1.0, "cosine": 2.0, "cwd": 0.15, "dist": 1.0, "dkd": 0.02, "pseudo": 1.0}
    depth = {"depth-l1": 0.1, "depth-berhu": 0.04, "depth-silog": 0.1, "depth-ssi": 0.3, "depth-gradient": 0.5}
    assert (
        weights
        == documented
        | {"at": 6, "dice": 1.0, "lovasz": 1.0, "entropy": 0.001, "adversarial": 0.001, "consistency": 1.0}
        | {"auxiliary": 0.1, "similarity": 1.0, "queue": 1.0}
        | depth
    )
    channels, dkd, pseudo = (
        make_term(spec, targets=targets, student_taps=STUDENT)
        for spec in (loss_term("cwd", teacher_tap="deep"), loss_term("dkd"), loss_term("pseudo"))
    )
    assert (channels.weight, channels.spec.temperature, dkd.spec.temperature) == (3.0, 4.0, 4.0)
    assert isinstance(pseudo, Pseudo)
    assert pseudo.threshold == 0.7
    mapped = make_term(loss_term("at"), targets=store(maps=("deep",)), student_taps=STUDENT)
    assert mapped.weight == 2592
    term = make_term(loss_term("cwd", weight=0.25, temperature=1.5), targets=targets, student_taps=STUDENT)
    assert (term.weight, term.spec.temperature) == (0.25, 1.5)


def test_projections_are_the_terms_own_parameters() -> None:
    targets = store(features=("deep", "summary"), raw=True)
    shapes = {
        kind: [tuple(p.shape) for p in make_term(loss_term(kind), targets=targets, student_taps=STUDENT).parameters()]
        for kind in set(KINDS) - ON_DEPTH - {"adversarial", "auxiliary"}
    }
    assert {kind for kind, actual in shapes.items() if actual} == {"hint", "cosine", "queue"}
    assert shapes["hint"] == [(5, 32, 1, 1), (5,)]
    spec = loss_term("cwd", teacher_tap="deep")
    term = make_term(spec, targets=targets, student_taps=STUDENT)
    assert [tuple(p.shape) for p in term.parameters()] == [(5, 32, 1, 1)]
    assert not list(make_term(spec, targets=targets, student_taps={"head": 5}).parameters())
    torch.manual_seed(1)
    one = make_term(loss_term("hint"), targets=targets, student_taps=STUDENT)
    torch.manual_seed(1)
    two = make_term(loss_term("hint"), targets=targets, student_taps=STUDENT)
    two.load_state_dict(one.state_dict())
    assert torch.equal(one.state_dict()["projection.weight"], two.state_dict()["projection.weight"])


def test_a_term_that_standardises_needs_moments() -> None:
    spec, targets = loss_term("hint", standardise="channels"), store(features=("deep",))
    with pytest.raises(RecipeError, match="mean and standard deviation"):
        make_term(spec, targets=targets, student_taps=STUDENT)
    term = make_term(spec, targets=targets, student_taps=STUDENT, moments=(torch.zeros(5), torch.ones(5)))
    assert {"teacher_mean", "teacher_std"} <= set(term.state_dict())
    assert "teacher_mean" not in make_term(loss_term("hint"), targets=targets, student_taps=STUDENT).state_dict()


def test_a_store_of_today_serves_what_it_can(dense: Cache, sparse: Cache) -> None:
    check_terms([loss_term("pseudo"), loss_term("dist"), loss_term("dkd")], dense.manifest)
    with pytest.raises(RecipeError, match="--top-k 7"):
        check_terms([loss_term("dkd")], sparse.manifest)
    with pytest.raises(RecipeError, match="--raw-logits"):
        make_term(loss_term("cwd"), targets=dense, student_taps={})
