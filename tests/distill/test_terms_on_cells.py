"""`dkd` and `cwd` in the precisions of trainings: against float64, and what does not count or is not finite."""

from __future__ import annotations

import pytest
import torch
from terms_oracle import DEEP, GRID, MAXIMUM, SIZE, B, C, Store, batch_of, changed, oracle, term_of
from torch import Tensor

from kdcache.distill import Target
from kdcache.distill.terms import Term, TermBatch, loss_term, make_term
from kdcache_kernels import ShapeError

TERMS = ("dkd", "dkd with parts", "cwd", "cwd of a tap")
every_term = pytest.mark.parametrize("name", TERMS)


def leaf_of(term: Term, batch: TermBatch) -> Tensor:
    return batch.student.features["head"] if term.student_taps() else batch.student.logits


def learn(term: Term, batch: TermBatch, autocast: bool = False) -> tuple[Tensor, Tensor]:
    """The loss, and its gradient by what the student gave."""
    leaf = leaf_of(term, batch).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = term(batch)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def cast(batch: TermBatch, dtype: torch.dtype) -> TermBatch:
    """The batch with the student's outputs in a dtype."""
    return changed(
        batch,
        logits=batch.student.logits.to(dtype),
        features={k: x.to(dtype) for k, x in batch.student.features.items()},
    )


@every_term
@pytest.mark.parametrize("gated", [False, True], ids=["all", "gated and counted"])
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 2e-6), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)], ids=str
)
def test_precisions_of_trainings(name: str, gated: bool, dtype: torch.dtype, bound: float) -> None:
    """The loss is that of the same rounded outputs in float64, under autocast also; so is the gradient."""
    batch = cast(batch_of(gated=gated, counted=gated), dtype)
    loss, gradient = learn(term_of(name, torch.float32), batch)
    exact = cast(batch, torch.float64)
    expected, wanted = learn(term_of(name), exact)
    assert (loss.dtype, gradient.dtype) == (torch.float32, dtype)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert (gradient.double() - wanted).abs().max() <= bound * wanted.abs().max()
    assert expected.item() == pytest.approx(oracle(term_of(name), exact), rel=1e-9)
    again, gradient_again = learn(term_of(name, torch.float32), batch, autocast=True)
    assert torch.equal(again, loss)
    assert torch.equal(gradient_again, gradient)


@pytest.mark.parametrize("kind", ["dkd", "cwd"])
@pytest.mark.parametrize("classes", [2, 19, 150])
def test_any_number_of_classes(kind: str, classes: int) -> None:
    """Also where a logit is far above all others, so that a probability is 1 in float32."""
    generator = torch.Generator().manual_seed(classes)
    batch, store = batch_of(), Store(k=classes, num_classes=classes)
    term = make_term(loss_term(kind), targets=store, student_taps={})
    logits = 8 * torch.randn(B, classes, *GRID, generator=generator)
    values = (8 * torch.randn(B, classes, *GRID, generator=generator)).half()
    logits[:, 1] += 40
    batch = changed(batch, logits=logits, target=Target(values))
    loss, gradient = learn(term, batch)
    expected, wanted = learn(term, cast(batch, torch.float64))
    assert loss.item() == pytest.approx(expected.item(), rel=2e-6)
    assert (gradient - wanted).abs().max() <= 5e-6 * wanted.abs().max()


@every_term
@pytest.mark.parametrize("how", ["none counted", "gate shut", "beside the view", "no image"])
def test_where_there_is_nothing_to_learn(name: str, how: str) -> None:
    batch = batch_of(dtype=torch.float32)
    assert batch.rows.target is not None
    if how == "none counted":
        batch = changed(batch, counted=torch.zeros(B, *SIZE, dtype=torch.bool))
    elif how == "gate shut":
        batch = changed(batch, pixel_weight=torch.zeros(B, *SIZE))
    elif how == "beside the view":
        batch = changed(batch, window=torch.tensor([[23.0, 0, 31, 9]] * B, dtype=torch.float64))
    else:
        batch = changed(
            batch,
            logits=batch.student.logits[:0],
            features={tap: x[:0] for tap, x in batch.student.features.items()},
            labels=batch.rows.label[:0],
            target=Target(batch.rows.target.values[:0]),
            arrays={path: x[:0] for path, x in batch.rows.arrays.items()},
            window=None,
            flip=None,
        )
    loss, gradient = learn(term_of(name, torch.float32), batch)
    assert loss == 0
    assert (gradient == 0).all()


def test_one_class_has_no_rest() -> None:
    """`dkd` of one class is exactly 0, as is its gradient."""
    batch = batch_of(dtype=torch.float32)
    assert batch.rows.target is not None
    batch = changed(batch, logits=batch.student.logits[:, :1], target=Target(batch.rows.target.values[:, :1]))
    loss, gradient = learn(make_term(loss_term("dkd"), targets=Store(1, 1), student_taps={}), batch)
    assert loss == 0
    assert (gradient == 0).all()


@every_term
def test_an_image_that_does_not_count_has_no_gradient(name: str) -> None:
    batch = batch_of(dtype=torch.float32, counted=True)
    assert batch.counted is not None
    batch.counted[0] = False
    _, gradient = learn(term_of(name, torch.float32), batch)
    assert (gradient[0] == 0).all()
    assert (gradient[1] != 0).any()


@every_term
@pytest.mark.parametrize("where", ["student", "teacher", "gate"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_what_is_not_finite_shows_where_it_counts(name: str, where: str, value: float) -> None:
    """Nor a logit so large that its difference to another overflows: loss and whole gradient are not finite."""
    if value == 3e38 and where != "student":
        value = float("nan")  # float16 has none so large, and a gate of 3e38 is a number
    counted = torch.ones(B, *SIZE, dtype=torch.bool)
    counted[0, :12, :20] = False

    def spoilt(at: int | None) -> TermBatch:
        batch = changed(batch_of(moved=False, gated=True, dtype=torch.float32), counted=counted)
        assert batch.rows.target is not None
        assert batch.pixel_weight is not None
        if at is None:
            return batch
        if where == "gate":
            batch.pixel_weight[0, 22 * at, 36 * at] = value
        else:
            term = term_of(name)
            teacher = batch.rows.arrays[DEEP] if term.student_taps() else batch.rows.target.values
            (leaf_of(term, batch) if where == "student" else teacher)[0, 2, -at, -at] = value
        return batch

    expected, wanted = learn(term_of(name, torch.float32), spoilt(None))
    hidden, gradient = learn(term_of(name, torch.float32), spoilt(0))
    assert hidden.item() == pytest.approx(expected.item(), rel=1e-6)
    assert (gradient - wanted).abs().max() <= 1e-6 * wanted.abs().max()
    shown, gradient = learn(term_of(name, torch.float32), spoilt(1))
    assert not shown.isfinite()
    assert gradient.isnan().all()


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64], ids=str)
def test_labels_of_any_integer(dtype: torch.dtype) -> None:
    """Below 0 and from C on there is no label; strides are any."""
    batch, term = batch_of(), term_of("dkd")
    labels = torch.where(batch.rows.label == 255, -100, batch.rows.label.long()).to(dtype)
    labels[labels == 1] = C
    apart = torch.stack([labels, labels], -1).flatten(2)[:, :, ::2]
    void = torch.where((labels < 0) | (labels >= C), 255, labels.long()).to(torch.uint8)
    assert term(changed(batch, labels=apart)).item() == term(changed(batch, labels=void)).item()


def test_of_equal_logits_the_first_is_the_target() -> None:
    batch, term = batch_of(moved=False), term_of("dkd")
    assert batch.rows.target is not None
    even = changed(batch, target=Target(torch.zeros_like(batch.rows.target.values)), labels=None)
    first = changed(even, labels=torch.zeros(B, *SIZE, dtype=torch.uint8))
    assert term(even).item() == term(first).item() != 0


@pytest.mark.parametrize("name", ["dkd", "dkd with parts", "cwd"])
def test_a_student_near_its_teacher_keeps_its_digits(name: str) -> None:
    """The value is a few thousandths of a nat, the difference of numbers that are a thousand times as large."""
    batch = batch_of(moved=False, gated=True, dtype=torch.float32)
    assert batch.rows.target is not None
    raw = batch.rows.target.values.float() + batch.rows.arrays[MAXIMUM][:, None]
    noise = torch.randn(raw.shape, generator=torch.Generator().manual_seed(6))
    near = changed(batch, logits=raw + 0.02 * noise)
    loss, gradient = learn(term_of(name, torch.float32), near)
    expected, wanted = learn(term_of(name), cast(near, torch.float64))
    assert loss.item() == pytest.approx(expected.item(), rel=2e-4)
    assert (gradient - wanted).abs().max() <= 2e-5 * wanted.abs().max()


@every_term
def test_equal_logits_teach_nothing(name: str) -> None:
    """Not even a rounding: no loss, no gradient."""
    batch = batch_of(moved=False, dtype=torch.float32)
    assert batch.rows.target is not None
    same = batch.rows.target.values.float()
    zero = torch.zeros_like(batch.rows.arrays[MAXIMUM])
    deep = batch.rows.arrays[DEEP].float()
    batch = changed(batch, logits=same, features={"head": deep}, arrays=batch.rows.arrays | {MAXIMUM: zero})
    spec = term_of(name).spec
    term = make_term(spec, targets=Store(), student_taps={"head": deep.shape[1]})
    loss, gradient = learn(term, batch)
    assert loss == 0
    assert (gradient == 0).all()


@pytest.mark.parametrize("name", ["dkd", "cwd"])
def test_students_of_other_classes_are_refused(name: str) -> None:
    batch = batch_of(dtype=torch.float32)
    term = term_of(name, torch.float32)
    with pytest.raises(ShapeError, match="class list"):
        term(changed(batch, logits=batch.student.logits[:, :-1]))
