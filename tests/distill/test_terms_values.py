"""Every term beside the same formula in numpy and float64."""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from terms_oracle import (
    FEATURE,
    GRID,
    MAXIMUM,
    SIZE,
    SPECS,
    VIEW,
    B,
    C,
    Store,
    batch_of,
    changed,
    dkd_oracle,
    gradients,
    inputs_of,
    oracle,
    part_of,
    term_batch,
    term_of,
)
from torch import Tensor
from torch.nn import functional as F

from kdcache.distill import SEGMENTATION, Batch, Gate, GateSpec, Target
from kdcache.distill.terms import Term, loss_term, make_term
from kdcache.distill.terms.unlabelled.pseudo import most_confident
from kdcache.metrics.calibration import ConfidenceCounts


@pytest.mark.parametrize("counted", [False, True], ids=["every pixel", "some pixels"])
@pytest.mark.parametrize("gated", [False, True], ids=["all", "gated"])
@pytest.mark.parametrize("moved", [False, True], ids=["whole", "windows"])
@pytest.mark.parametrize("name", SPECS)
def test_a_term_is_its_formula(name: str, moved: bool, gated: bool, counted: bool) -> None:
    term, batch = term_of(name), batch_of(moved=moved, gated=gated, counted=counted)
    expected = oracle(term, batch)
    assert expected > 1e-4
    assert term(batch).item() == pytest.approx(expected, rel=1e-6 if term.kind == "dist" else 1e-9)
    single = term_of(name, torch.float32)
    batch = changed(
        batch, logits=batch.student.logits.float(), features={"head": batch.student.features["head"].float()}
    )
    loss = single(batch)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=3e-5)


@pytest.mark.parametrize("counted", [False, True], ids=["every pixel", "some pixels"])
@pytest.mark.parametrize("gated", [False, True], ids=["all", "gated"])
@pytest.mark.parametrize("name", SPECS)
def test_a_gradient_is_that_of_the_value(name: str, gated: bool, counted: bool) -> None:
    term, batch = term_of(name), batch_of(gated=gated, counted=counted)
    (x,) = inputs_of(term, batch)

    def value(x: Tensor, *parameters: Tensor) -> Tensor:
        actual: Tensor = torch.func.functional_call(
            term,
            dict(zip(dict(term.named_parameters()), parameters, strict=True)),
            changed(batch, features={"head": x}) if term.student_taps() else changed(batch, logits=x),
        )
        return actual

    parameters = [p.detach().clone().requires_grad_() for p in term.parameters()]
    assert torch.autograd.gradcheck(value, (x.requires_grad_(), *parameters), fast_mode=True)


@pytest.mark.parametrize("name", SPECS)
def test_single_precision_gradients_are_those_of_double(name: str) -> None:
    _, expected = gradients(term_of(name), batch_of(gated=True))
    _, actual = gradients(term_of(name, torch.float32), batch_of(gated=True, dtype=torch.float32))
    for one, other in zip(actual, expected, strict=True):
        assert (one - other).norm() <= 2e-5 * other.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SPECS)
def test_narrow_inputs_are_added_up_in_single_precision(name: str, dtype: torch.dtype) -> None:
    batch = batch_of(dtype=dtype)
    exact = changed(
        batch, logits=batch.student.logits.double(), features={"head": batch.student.features["head"].double()}
    )
    with torch.autocast("cpu", torch.bfloat16):
        loss, (gradient, *_) = gradients(term_of(name, torch.float32), batch)
    assert (loss.dtype, gradient.dtype) == (torch.float32, dtype)
    assert loss.item() == pytest.approx(term_of(name)(exact).item(), rel=3e-5)


@pytest.mark.parametrize("how", ["beside the view", "gate shut", "none counted"])
@pytest.mark.parametrize("name", SPECS)
def test_without_counted_pixels_there_is_nothing_to_learn(name: str, how: str) -> None:
    batch = batch_of()
    assert batch.rows.target is not None
    if how == "gate shut":
        batch = changed(batch, pixel_weight=torch.zeros(B, *SIZE))
    elif how == "none counted":
        batch = changed(batch, counted=torch.zeros(B, *SIZE, dtype=torch.bool))
    else:
        away = torch.tensor([VIEW[0] + 1.0, 0.0, VIEW[0] + 9.0, 9.0], dtype=torch.float64).repeat(B, 1)
        batch = changed(batch, window=away)
    loss, actual = gradients(term_of(name), batch)
    assert loss.item() == 0
    assert all((gradient == 0).all() for gradient in actual)


@pytest.mark.parametrize("how", ["beside the view", "not counted"])
@pytest.mark.parametrize("name", SPECS)
def test_an_image_without_counted_pixels_is_as_one_that_is_not_there(name: str, how: str) -> None:
    batch, term = batch_of(counted=how == "not counted"), term_of(name)
    assert batch.rows.target is not None
    if batch.counted is None:
        assert batch.rows.window is not None
        batch.rows.window[3] = torch.tensor([0.0, -20.0, 10.0, -1.0])
    else:
        batch.counted[3] = False
    rows = 4**2 / 3**2 if name == "sp" else 1  # it divides by the square of the batch, however little that shows
    assert rows * term(batch).item() == pytest.approx(term(part_of(batch, slice(0, 3))).item(), rel=1e-9)


@pytest.mark.parametrize("name", [name for name, spec in SPECS.items() if spec.kind != "pseudo"])
def test_maps_of_zeros_have_finite_gradients(name: str) -> None:
    for student, teacher in ((0, 1), (1, 0), (0, 0)):
        batch = batch_of(dtype=torch.float32)
        assert batch.rows.target is not None
        batch = term_batch(
            student * batch.student.logits,
            {"head": student * batch.student.features["head"]},
            batch.rows.label,
            Target(teacher * batch.rows.target.values),
            {path: teacher * array for path, array in batch.rows.arrays.items()},
            None,
            SIZE,
            window=batch.rows.window,
            flip=batch.rows.flip,
        )
        term = term_of(name, torch.float32)
        torch.nn.init.zeros_(list(term.parameters())[-1]) if list(term.parameters()) else None
        loss, actual = gradients(term, batch)
        assert loss.isfinite()
        assert all(gradient.isfinite().all() for gradient in actual)
        assert max(gradient.abs().max() for gradient in actual) < 1e3


@pytest.mark.parametrize("name", SPECS)
def test_a_mirrored_image_learns_the_mirrored_thing(name: str) -> None:
    """Mirroring student, labels and the flag leaves the loss as it is."""
    batch = batch_of(moved=False, gated=True)
    assert batch.rows.target is not None
    assert batch.pixel_weight is not None
    mirrored = term_batch(
        batch.student.logits.flip(-1),
        {"head": batch.student.features["head"].flip(-1)},
        batch.rows.label.flip(-1),
        batch.rows.target,
        batch.rows.arrays,
        batch.pixel_weight.flip(-1),
        SIZE,
        window=batch.rows.window,
        flip=torch.ones(B, dtype=torch.bool),
    )
    term = term_of(name)
    assert term(mirrored).item() == pytest.approx(term(batch).item(), rel=1e-9)


@pytest.mark.parametrize("name", SPECS)
def test_terms_are_repeatable_where_only_that_is_allowed(name: str) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        runs = [gradients(term_of(name, torch.float32), batch_of(dtype=torch.float32)) for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(runs[0][0], runs[1][0])
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))


def test_channels_from_a_store_are_those_of_live_logits() -> None:
    """values + max, as float16 and float32 keep them, against the logits that they were made from."""
    generator = torch.Generator().manual_seed(9)
    live = 6 * torch.randn(B, C, *GRID, generator=generator, dtype=torch.float64) + 11
    batch = batch_of(moved=False)
    assert batch.rows.target is not None
    top = live.amax(1)
    target = Target((live - top[:, None]).half())
    batch = changed(batch, target=target, arrays={MAXIMUM: top.float()})
    loss, (gradient,) = gradients(term_of("cwd"), batch)
    student = batch.student.logits.detach().requires_grad_()
    s, t = ((x.flatten(2) / 4).log_softmax(-1) for x in (F.interpolate(student, GRID, mode="bilinear"), live))
    expected = 16 * F.kl_div(s, t, reduction="sum", log_target=True) / (B * C)
    (wanted,) = torch.autograd.grad(expected, student)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)
    assert (gradient - wanted).norm() <= 1e-3 * wanted.norm()
    shifted = changed(batch, arrays={MAXIMUM: torch.zeros_like(batch.rows.arrays[MAXIMUM])})
    assert term_of("cwd")(shifted).item() != pytest.approx(expected.item(), rel=0.05)


def test_a_top_k_target_serves_relations() -> None:
    batch, k = batch_of(), C - 1
    assert batch.rows.target is not None
    values, indices = batch.rows.target.values.double().topk(k, 1)
    rest = batch.rows.target.values.double().scatter(1, indices, -math.inf)
    tail = rest.logsumexp(1) - values.logsumexp(1)
    packed = Target(values.half(), indices.to(torch.uint8), tail.half())
    term = make_term(SPECS["dist"], targets=Store(k=k), student_taps={})
    assert term(changed(batch, target=packed)).item() == pytest.approx(term_of("dist")(batch).item(), rel=1e-3)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_the_most_confident_of_each_class(share: float) -> None:
    rng = np.random.default_rng(3)
    argmax = rng.integers(0, 4, (2, 11, 13)).astype(np.uint8)
    confidence = rng.choice(np.linspace(0, 1, 40), (2, 11, 13)).astype(np.float16)  # many are equal, some are 0
    actual = most_confident(torch.from_numpy(argmax), torch.from_numpy(confidence), share, 6).numpy()
    assert not actual[confidence == 0].any()
    for name in range(6):
        of_class = (argmax == name) & (confidence > 0)
        labelled = actual & of_class
        assert labelled.sum() >= share * of_class.sum()
        if labelled.any():
            least = confidence[labelled].min()
            assert (confidence[of_class & ~labelled] < least).all()  # equal ones go together
            assert (confidence[of_class] > least).sum() < share * of_class.sum()  # no fewer would do


def test_no_pixel_of_an_empty_batch_is_confident() -> None:
    confidence = torch.zeros(1, 2, 2, dtype=torch.float16)
    assert not most_confident(torch.zeros(1, 2, 2, dtype=torch.uint8), confidence, 0.5, 3).any()


def test_the_most_confident_are_those_of_a_report() -> None:
    rng = np.random.default_rng(4)
    argmax = rng.integers(0, 3, (2, 11, 13)).astype(np.uint8)
    confidence = rng.choice(np.linspace(0.3, 1, 30), (2, 11, 13)).astype(np.float16)
    counts = ConfidenceCounts(3)
    counts.update(torch.from_numpy(argmax), torch.from_numpy(confidence), None)
    least = np.array(counts.quantile_thresholds(0.4))
    actual = most_confident(torch.from_numpy(argmax), torch.from_numpy(confidence), 0.4, 3).numpy()
    assert (actual == (confidence >= least[argmax])).all()


def test_pseudo_labels_by_quantile_learn() -> None:
    term = make_term(loss_term("pseudo", quantile=0.4), targets=Store(), student_taps={})
    loss, (gradient,) = gradients(term.double(), batch_of())
    assert loss > 0
    assert gradient.norm() > 0


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("aligned", [False, True])
def test_pseudo_labels_meet_the_student_as_it_is_resized(aligned: bool, gated: bool) -> None:
    """And the teacher as its own head is, which does the opposite here."""
    batch = batch_of(moved=False)
    assert batch.rows.target is not None
    store = Store(align_corners=not aligned)
    term = make_term(loss_term("pseudo", threshold=0.6), targets=store, student_taps={}, align_corners=aligned).double()
    weight = torch.full((B, *VIEW), 0.5, dtype=torch.float64) if gated else None
    batch = changed(batch, labels=None, size=VIEW, pixel_weight=weight)
    t, z = (
        F.interpolate(x.double(), VIEW, mode="bilinear", align_corners=corners)
        for x, corners in ((batch.rows.target.values, not aligned), (batch.student.logits, aligned))
    )
    confidence, best = t.softmax(1).max(1)
    sure = confidence.half() >= 0.6
    expected = F.cross_entropy(z, best, reduction="none")[sure].mean() * (0.5 if gated else 1.0)
    assert term(batch).item() == pytest.approx(expected.item(), rel=1e-9)


@pytest.mark.parametrize("void", [255, 2])
def test_a_confidence_at_the_threshold_is_enough(void: int) -> None:
    """Two classes alike: both have one half. Other voids than 255 are no labels to a gate either."""
    batch = batch_of(moved=False)
    assert batch.rows.target is not None
    values = torch.full_like(batch.rows.target.values, -1000)
    values[:, :2] = 0
    batch = changed(batch, target=Target(values))
    at, above = (
        make_term(loss_term("pseudo", threshold=threshold), targets=Store(), student_taps={})
        for threshold in (0.5, 0.51)
    )
    assert at.double()(batch) > 0
    assert above.double()(batch) == 0
    labels = torch.full((B, *SIZE), void, dtype=torch.uint8)
    gated = Batch(
        labels={SEGMENTATION: labels},
        targets={SEGMENTATION: Target(values)},
        window=batch.rows.window,
        flip=batch.rows.flip,
    )
    weights = [
        Gate(GateSpec(kind, threshold), ignore_index=void)(gated, Store())
        for kind, threshold in (("confidence", 0.5), ("confidence", 0.51), ("correct", 0.0))
    ]
    assert [bool((weight == 1).all()) for weight in weights] == [True, False, True]


@pytest.mark.parametrize("labels", ["none", "void"])
def test_decoupled_without_labels_takes_the_teachers_class(labels: str) -> None:
    batch, term = batch_of(), term_of("dkd")
    batch = changed(batch, labels=None if labels == "none" else torch.full_like(batch.rows.label, 255))
    assert term(batch).item() == pytest.approx(dkd_oracle(term, changed(batch, labels=None)), rel=1e-9)


class Crew:
    """Two processes as two threads: what each one shares is there for both when both have shared."""

    def __init__(self) -> None:
        self.barrier, self.parts = threading.Barrier(2, timeout=30), [torch.empty(0)] * 2

    def exchange(self, rank: int, tensor: Tensor) -> list[Tensor]:
        self.barrier.wait()
        self.parts[rank] = tensor.detach().clone()
        self.barrier.wait()
        return [tensor if other == rank else part for other, part in enumerate(self.parts)]

    def join(self, term: Term, rank: int) -> Term:
        term.gather = lambda tensor: torch.cat(self.exchange(rank, tensor))
        return term


@pytest.mark.parametrize("gated", [False, True], ids=["all", "gated and counted"])
@pytest.mark.parametrize("name", SPECS)
def test_parts_of_a_batch_average_to_the_whole(name: str, gated: bool) -> None:
    """Losses, gradients by what the student gave, and gradients of the term's own parameters."""
    whole, crew = batch_of(gated=gated, counted=gated), Crew()
    loss, (gradient, *by_parameters) = gradients(term_of(name), whole)
    terms = [crew.join(term_of(name), rank) for rank in range(2)]
    with ThreadPoolExecutor(2) as pool:
        halves = [part_of(whole, slice(0, 2)), part_of(whole, slice(2, 4))]
        count = torch.stack([term.count(half) for term, half in zip(terms, halves, strict=True)]).mean(0)
        parts = list(pool.map(gradients, terms, halves, [count, count]))
    assert (parts[0][0] + parts[1][0]).item() / 2 == pytest.approx(loss.item(), rel=1e-9)
    joined = torch.cat([actual[1][0] for actual in parts]) / 2
    assert (joined - gradient).norm() <= 1e-9 * gradient.norm()
    for one, two, expected in zip(parts[0][1][1:], parts[1][1][1:], by_parameters, strict=True):
        assert ((one + two) / 2 - expected).norm() <= 1e-9 * expected.norm()


@pytest.mark.parametrize("name", SPECS)
def test_the_user_is_told_what_is_resized_and_projected(name: str) -> None:
    term, batch = term_of(name), batch_of()
    term.prepare(batch)
    description = term.describe() or ""
    kind, resizes = SPECS[name].kind, "resized from" in description
    assert resizes == (kind not in ("pseudo", "sp"))
    assert ("projected from 4 to 6 channels" in description) == (kind in ("hint", "cosine") or name == "cwd of a tap")
    assert ("7x10 to the teacher's 6x9" in description) == (kind in ("dist", "dkd") or name == "cwd")
    assert ("4x11 to the teacher's 5x8" in description) == (resizes and bool(term.student_taps()))
    assert batch.rows.target is not None
    alike = changed(batch, logits=batch.student.logits[:, :, :6, :9], features={"head": torch.zeros(B, 6, *FEATURE)})
    term.prepare(alike)
    if not list(term.parameters()):
        assert term.describe() is None


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECS)
def test_a_compiled_term_is_the_same(name: str) -> None:
    batch = batch_of(gated=True, counted=True, dtype=torch.float32)
    expected, wanted = gradients(term_of(name, torch.float32), batch)
    term = term_of(name, torch.float32)
    torch.compiler.reset()
    compiled = torch.compile(term, fullgraph=True, dynamic=False, backend="aot_eager")
    tensors = [x.requires_grad_() for x in inputs_of(term, batch)] + list(term.parameters())
    loss = compiled(batch)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for one, other in zip(torch.autograd.grad(loss, tensors), wanted, strict=True):
        assert (one - other).norm() <= 1e-4 * other.norm()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("name", SPECS)
def test_a_gpu_says_what_the_cpu_says_without_waiting(name: str) -> None:
    """In float32; while nothing may wait for the device, as inside a CUDA graph."""
    device = torch.device("cuda")
    batch = batch_of(gated=True, counted=True, dtype=torch.float32)
    expected = term_of(name)(batch_of(gated=True, counted=True)).item()
    moved = changed(
        batch,
        logits=batch.student.logits.to(device).requires_grad_(),
        features={tap: feature.to(device) for tap, feature in batch.student.features.items()},
        rows=batch.rows.to(device),
        pixel_weight=batch.pixel_weight.to(device),
        counted=batch.counted.to(device),
    )
    term = term_of(name, torch.float32).to(device)
    term(moved)  # first uses may wait: constants are copied, kernels compiled
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = term(moved)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("gated", [False, True], ids=["all", "gated"])
@pytest.mark.parametrize("normalise", ["kept", "all", "share"])
def test_pseudo_labels_are_weighed_by_class(normalise: str, gated: bool) -> None:
    """Against the oracle; two unequal parts that share their counts learn what the batch does; 0 without any label."""
    spec = loss_term("pseudo", threshold=0.6, normalise=normalise)
    weight = torch.tensor([0.5, 2.0, 0.0, 1.0, 3.0])
    term = make_term(spec, targets=Store(), student_taps={}, class_weight=weight)
    batch = batch_of(gated=gated, counted=True)
    expected = oracle(term, batch)
    assert expected > 0.1
    loss, (gradient,) = gradients(term, batch)
    assert loss.item() == pytest.approx(expected, rel=1e-9)
    assert oracle(make_term(spec, targets=Store(), student_taps={}), batch) != pytest.approx(expected, rel=1e-3)
    parts = [part_of(batch, part) for part in (slice(0, 2), slice(2, 4))]
    count = torch.stack([term.count(part) for part in parts]).mean(0)
    shared = [gradients(term, part, count) for part in parts]
    assert sum(part.item() for part, _ in shared) / 2 == pytest.approx(expected, rel=1e-9)
    assert (torch.cat([part[0] for _, part in shared]) / 2 - gradient).norm() <= 1e-9 * gradient.norm()
    unsure = make_term(replace(spec, threshold=0.9999999), targets=Store(), student_taps={})
    loss, (gradient,) = gradients(unsure, batch)
    assert (loss.item(), gradient.abs().sum().item()) == (0, 0)
