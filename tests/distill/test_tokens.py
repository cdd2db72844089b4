"""The terms `similarity` and `queue` against float64 arithmetic, cell by cell, and the life of the ring."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kdcache.distill import Batch, Criterion, DistillLoss, Target
from kdcache.distill.terms import Term, TermBatch, loss_term, make_term, parse_term
from kdcache.errors import RecipeError
from tests.distill.terms_oracle import (
    DEEP,
    FEATURE,
    STUDENT_CHANNELS,
    Store,
    batch_of,
    changed,
    resized,
    shares,
    softmax,
)

CELLS = FEATURE[0] * FEATURE[1]
STORED, SUMMARY = "statistics/similarity.deep", "features/summary"
B, WIDTH = 4, 6


class Kept(Store):
    """A store with similarities of a tap, and with a summary."""

    @property
    def manifest(self) -> Any:
        about = super().manifest
        about.features["summary"] = SimpleNamespace(channels=WIDTH, size=(1, 1), dtype="float16")
        about.statistics["similarity.deep"] = SimpleNamespace(kind="similarity", tap="deep", size=FEATURE)
        return about


class Features(Store):
    """A store with the features of that tap alone."""


def term_of(kind: str, store: Store | None = None, **options: Any) -> Term:
    torch.manual_seed(6)
    spec = loss_term(kind, **options)
    return make_term(spec, targets=store or Kept(), student_taps={"head": STUDENT_CHANNELS}).double()


def batch(seed: int = 0, **changes: Any) -> TermBatch:
    """A batch of whole views, with similarities in bytes and summaries."""
    made = batch_of(moved=False, seed=seed, **changes)
    generator = torch.Generator().manual_seed(seed + 90)
    pairs = torch.randint(60, 256, (B, CELLS * (CELLS - 1) // 2), generator=generator, dtype=torch.uint8)
    summary = torch.randn(B, WIDTH, 1, 1, generator=generator).half()
    return changed(made, window=None, flip=None, arrays={**made.rows.arrays, STORED: pairs, SUMMARY: summary})


def matrix(row: Tensor) -> np.ndarray[Any, Any]:
    """(n, n) of the bytes of an upper triangle."""
    full, at = np.eye(CELLS), 0
    for i in range(CELLS):
        for j in range(i + 1, CELLS):
            full[i, j] = full[j, i] = 2 * int(row[at]) / 255 - 1
            at += 1
    return full


def tokens(maps: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    flat = maps.reshape(len(maps), -1).T
    return np.array([row / math.sqrt((row**2).sum()) for row in flat])


def kl(p: np.ndarray[Any, Any], q: np.ndarray[Any, Any]) -> float:
    return float(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0))


def similarity_oracle(term: Term, batch: TermBatch, *, features: bool = False) -> float:
    total = count = 0.0
    T = term.spec.temperature
    view = whole(batch)
    for sample in range(B):
        own = tokens(resized(batch.student.features["head"][sample], FEATURE))
        student = own @ own.T
        if features:
            deep = tokens(batch.rows.arrays[DEEP][sample].double().numpy())
            teacher = deep @ deep.T
        else:
            teacher = matrix(batch.rows.arrays[STORED][sample])
        counted, gated = (part.ravel() for part in shares(view, sample, FEATURE))
        inside = np.flatnonzero(counted > 0)
        for i in range(CELLS):
            p, q = (softmax(x[i, inside] / T + np.log(counted[inside])) for x in (teacher, student))
            total += gated[i] * kl(p, q)
            count += counted[i]
    return total / count


def whole(batch: TermBatch) -> TermBatch:
    """The same with the windows that None stands for."""
    window = torch.tensor([0.0, 0.0, *Store().view_size], dtype=torch.float64).repeat(B, 1)
    return changed(batch, window=window, flip=torch.zeros(B, dtype=torch.bool))


def queue_oracle(term: Term, batch: TermBatch, ring: list[np.ndarray[Any, Any]]) -> float:
    total = count = 0.0
    T, view = term.spec.temperature, whole(batch)
    weight, bias = (p.detach().double().numpy() for p in (term.projection.weight, term.projection.bias))
    for sample in range(B):
        maps = batch.student.features["head"][sample].detach().double().numpy()
        gated = shares(view, sample, maps.shape[1:])[1]
        pooled = np.array([(channel * gated).sum() / gated.sum() for channel in maps])
        student, teacher = weight @ pooled + bias, batch.rows.arrays[SUMMARY][sample].double().numpy().ravel()
        p, q = (
            softmax(np.array([x @ y / np.linalg.norm(x) / np.linalg.norm(y) for y in ring]) / T)
            for x in (teacher, student)
        )
        total, count = total + kl(p, q), count + 1
    return total / count


def stored(seed: int, rows: int = B) -> Batch:
    """What a term remembers of a batch."""
    summary = torch.randn(rows, WIDTH, 1, 1, generator=torch.Generator().manual_seed(seed)).half()
    return Batch(labels={"segmentation": torch.zeros(rows, 4, 4, dtype=torch.uint8)}, arrays={SUMMARY: summary})


def rows_of(*batches: Batch) -> list[np.ndarray[Any, Any]]:
    return [row.double().numpy().ravel() for each in batches for row in each.arrays[SUMMARY]]


@pytest.mark.parametrize("changes", [{}, {"gated": True}, {"counted": True}, {"gated": True, "counted": True}])
@pytest.mark.parametrize("features", [False, True], ids=["bytes", "features"])
def test_similarity_is_its_formula(changes: dict[str, bool], features: bool) -> None:
    term, made = term_of("similarity", Features() if features else Kept()), batch(**changes)
    assert term.arrays() == ((DEEP,) if features else (STORED,))
    assert term(made).item() == pytest.approx(similarity_oracle(term, made, features=features), rel=1e-9)


def test_similarity_by_lightlytrains_formula() -> None:
    """KL of softmaxes of cosines, `batchmean` over all cells, where every pixel counts."""
    term, made = term_of("similarity", Features()), batch()
    s, t = (
        F.normalize(x.double().flatten(2).mT, dim=-1)
        for x in (F.interpolate(made.student.features["head"], FEATURE, mode="bilinear"), made.rows.arrays[DEEP])
    )
    wanted = F.kl_div(
        F.log_softmax((s @ s.mT).flatten(0, 1) / 0.07, -1),
        F.softmax((t @ t.mT).flatten(0, 1) / 0.07, -1),
        reduction="batchmean",
    )
    assert term(made).item() == pytest.approx(float(wanted), rel=1e-9)


@pytest.mark.parametrize("kind", ["similarity", "queue"])
def test_gradients(kind: str) -> None:
    term = term_of(kind, temperature=0.5)
    term.after_step(stored(3, 9))
    made = batch(counted=True)

    def loss(features: Tensor) -> Tensor:
        return term(changed(made, features={"head": features}))

    assert torch.autograd.gradcheck(
        loss, made.student.features["head"][:, :, :2, :3].clone().requires_grad_(), eps=1e-6
    )


def test_a_student_like_its_teacher_has_no_loss() -> None:
    term, made = term_of("similarity", Features()), batch()
    same = changed(made, features={"head": made.rows.arrays[DEEP].double().requires_grad_()})
    loss = term(same)
    (gradient,) = torch.autograd.grad(loss, same.student.features["head"])
    assert abs(loss.item()) < 1e-12
    assert float(gradient.abs().max()) < 1e-10


@pytest.mark.parametrize("kind", ["similarity", "queue"])
def test_nothing_counted_and_cells_of_zeros(kind: str) -> None:
    term = term_of(kind)
    term.after_step(stored(3))
    made = batch()
    none = changed(made, counted=torch.zeros(B, *made.rows.size, dtype=torch.bool))
    zeros = changed(made, features={"head": torch.zeros_like(made.student.features["head"])})
    for each, value in ((none, 0.0), (zeros, None)):
        features = each.student.features["head"].detach().requires_grad_()
        loss = term(changed(each, features={"head": features}))
        (gradient,) = torch.autograd.grad(loss, features)
        assert loss.isfinite()
        assert gradient.isfinite().all()
        assert value is None or (loss.item() == 0 and not gradient.any())


def test_parts_of_a_batch_average_to_the_whole() -> None:
    for kind in ("similarity", "queue"):
        term = term_of(kind)
        term.after_step(stored(3))
        made = batch(counted=True, gated=True)
        halves = [
            changed(
                made,
                logits=made.student.logits[part],
                features={"head": made.student.features["head"][part]},
                labels=None,
                target=None,
                arrays={path: array[part] for path, array in made.rows.arrays.items()},
                pixel_weight=made.pixel_weight[part],
                counted=made.counted[part],
            )
            for part in (slice(0, 1), slice(1, B))
        ]
        count = (term.count(halves[0]) + term.count(halves[1])) / 2
        parts = [term(half, count).item() for half in halves]
        assert sum(parts) / 2 == pytest.approx(term(made).item(), rel=1e-9)


def test_queue_is_its_formula() -> None:
    term, made = term_of("queue", length=8), batch(counted=True, gated=True)
    assert term(made).item() == 0, "there is nothing to compare with"
    first, second = stored(1, 3), stored(2)
    term.after_step(first)
    assert term(made).item() == pytest.approx(queue_oracle(term, made, rows_of(first)), rel=1e-6)
    term.after_step(second)
    assert term(made).item() == pytest.approx(queue_oracle(term, made, rows_of(first, second)), rel=1e-6)
    assert term(made).item() == term(made).item(), "a forward remembers nothing"


def test_the_oldest_summaries_leave_the_ring() -> None:
    term, made = term_of("queue", length=5), batch()
    batches = [stored(seed, rows) for seed, rows in ((1, 3), (2, 4), (3, 12), (4, 1))]
    for last in range(len(batches)):
        term.after_step(batches[last])
        kept = rows_of(*batches[: last + 1])[-5:]
        assert term(made).item() == pytest.approx(queue_oracle(term, made, kept), rel=1e-6)
    assert int(term.seen_images) == 20


def test_the_ring_is_that_of_one_process_and_of_a_run_that_resumes() -> None:
    alone, halves, resumed = (term_of("queue", length=7) for _ in range(3))
    for seed in range(5):
        whole_batch = stored(seed)
        alone.after_step(whole_batch)
        first, second = whole_batch.rows(2), whole_batch.rows(2, 2)
        other = F.normalize(second.arrays[SUMMARY].float().flatten(1), dim=1)
        halves.gather = lambda rows, other=other: torch.cat([rows, other])  # of process 0
        halves.after_step(first)
        if seed == 2:
            resumed.load_state_dict(alone.state_dict())
        if seed > 2:
            resumed.after_step(whole_batch)
    assert torch.equal(alone.ring, resumed.ring)
    assert (alone.ring - halves.ring).abs().max() < 1e-6
    assert int(alone.seen_images) == int(resumed.seen_images) == int(halves.seen_images) == 20


def test_a_loss_restores_bytes_and_remembers() -> None:
    """Through `DistillLoss` and `Criterion`, from a batch as the loader gives it."""

    class Eight(Kept):
        @property
        def manifest(self) -> Any:
            about = super().manifest
            about.features["deep"].dtype = "uint8"
            return about

    made, generator = batch(), torch.Generator().manual_seed(8)
    bytes_ = torch.randint(0, 256, made.rows.arrays[DEEP].shape, generator=generator, dtype=torch.uint8)
    scales = torch.rand(B, 2, WIDTH, generator=generator).half()
    arrays = {DEEP: bytes_, "scales/deep": scales, SUMMARY: made.rows.arrays[SUMMARY]}
    low, step = scales.double()[..., None, None].unbind(1)
    floats = {"features/deep": (low + step * bytes_).float(), SUMMARY: arrays[SUMMARY]}
    assert made.rows.target is not None
    given = Batch(
        labels={"segmentation": made.rows.label},
        targets={"segmentation": Target(made.rows.target.values)},
        arrays=arrays,
    )
    numbers = given.numbers
    assert numbers.keys() == floats.keys()
    assert (numbers[DEEP] - floats[DEEP]).abs().max() < 1e-4
    torch.manual_seed(1)
    specs = [loss_term("hint", teacher_tap="deep"), loss_term("queue", length=9)]
    terms = [make_term(spec, targets=Eight(), student_taps={"head": STUDENT_CHANNELS}) for spec in specs]
    assert terms[0].arrays() == (DEEP, "scales/deep")
    criterion = DistillLoss(Eight(), kl_weight=0, further=terms)
    logits = made.student.logits.float()
    heads, features = {"segmentation": logits}, {"head": made.student.features["head"].float()}
    outputs = SimpleNamespace(logits=logits, heads=heads, features=features)
    losses = criterion(outputs, given)
    plain = changed(made, logits=outputs.logits, features=outputs.features, arrays=floats, counted=None)
    assert losses.terms["hint"].item() == pytest.approx(terms[0](plain).item(), rel=1e-5)
    assert losses.terms["queue"].item() == 0
    both = Criterion([criterion], ["a"], [1.0])
    both.after_step((given,))
    assert int(terms[1].seen_images) == B
    assert criterion(outputs, given).terms["queue"].item() > 0
    assert "further.1.ring" in criterion.state_dict()


def test_options_and_what_a_store_lacks() -> None:
    assert parse_term("queue,length=64,temperature=0.1").length == 64
    with pytest.raises(RecipeError, match=r"length of queue: 0\.5"):
        parse_term("queue,length=0.5")
    with pytest.raises(RecipeError, match="similarity needs ") as caught:
        term_of("similarity", teacher_tap="seen")
    assert "--statistics similarity:seen" in caught.value.fix
    with pytest.raises(RecipeError, match="queue needs ") as caught:
        term_of("queue", Features())
    assert "--features TAP" in caught.value.fix
    with pytest.raises(RecipeError, match="queue needs "):
        term_of("queue", teacher_tap="deep")
