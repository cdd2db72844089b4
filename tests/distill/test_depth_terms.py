"""Terms of a depth head beside oracles: against labels, against a teacher through windows, in parts of a batch."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from depth_oracle import ORACLES, Map, Mask
from target_oracle import GRID, LABEL, VIEW, C
from torch import Tensor
from torch.nn import functional as F

from kdcache.distill import SEGMENTATION, Batch, DistillLoss, Gate, GateSpec, LabelTargets, Target, mean_counts
from kdcache.distill.terms import Term, check_terms, loss_term, make_term, parse_method, parse_term
from kdcache.errors import DataError, RecipeError
from kdcache.heads import CategoricalHead, Parameterisation, RegressionHead
from kdcache.models import Outputs
from kdcache.tasks import DEPTH

STUDENT = RegressionHead(parameterisation="softplus", max_depth=50.0)
TEACHER = RegressionHead(parameterisation="exp", max_depth=80.0)
HEADS = {SEGMENTATION: CategoricalHead(C), DEPTH: STUDENT}
KINDS = {
    "depth-l1": "l1",
    "depth-berhu": "berhu",
    "depth-silog": "silog",
    "depth-gradient": "gradient_matching",
    "depth-ssi": "scale_shift_invariant",
}
MAPS = {"depth-gradient": np.log, "depth-ssi": np.reciprocal}
"""What a kind compares, where that is not metres."""


def stored(head: RegressionHead, *, align_corners: bool = False) -> Any:
    """What a manifest says of a head; `align_corners` as its teacher resizes."""
    facts = {"channels": 1, "unit": head.unit, "parameterisation": head.parameterisation, "range": head.range}
    return SimpleNamespace(kind="regression", size=GRID, align_corners=align_corners, **facts)


class Store:
    """A store with logits and depth."""

    def __init__(self, teacher: Any = stored(TEACHER), *, logits: bool = True) -> None:
        self.num_classes, self.view_size, self.align_corners = C, VIEW, False
        heads = {SEGMENTATION: SimpleNamespace(k=C, classes=C, raw=True)} if logits else {}
        if teacher is not None:
            heads[DEPTH] = teacher
        self.manifest = SimpleNamespace(heads=heads, features={})


def term_of(kind: str, reference: str, targets: Any = None, heads: Any = HEADS, **options: Any) -> Term:
    spec = loss_term(kind, reference=reference, **options)
    return make_term(spec, targets=targets or Store(), student_taps={}, student_heads=heads)


def values(raw: np.ndarray, head: RegressionHead) -> np.ndarray:
    """The definition of a depth head, in float64."""
    depth = np.exp(raw) if head.parameterisation == "exp" else np.logaddexp(raw, 0)
    return depth if head.max_depth is None else np.minimum(depth, head.max_depth)


def batch_of(batch: int = 4, *, moved: bool = True, dtype: torch.dtype = torch.float32) -> tuple[Outputs, Batch]:
    """Outputs and a batch: one image without labels of depth, one of two pixels; one window in, one beyond the view."""
    generator = torch.Generator().manual_seed(4)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    outputs = Outputs({SEGMENTATION: normal(batch, C, 6, 9), DEPTH: 2 + 1.5 * normal(batch, 1, 5, 8)}, {})
    label = (8 * (0.8 * normal(batch, *LABEL)).exp()).float()
    label[torch.rand(label.shape, generator=generator) < 0.4] = math.nan
    label[1 % batch] = math.nan
    if batch > 2:
        label[2, :, 3:], label[2, 2:] = math.nan, math.nan
    window = torch.tensor([0.0, 0.0, *VIEW], dtype=torch.float64).repeat(batch, 1)
    flip = torch.zeros(batch, dtype=torch.bool)
    if moved:
        window[0], flip[0] = torch.tensor([3.3, 5.25, 14.8, 22.0]), True
        window[-1] = torch.tensor([-6.5, -3.0, 30.0, 50.5])
    taught = (8 * (0.7 * normal(batch, 1, *GRID)).exp()).to(dtype)
    return outputs, Batch(
        labels={SEGMENTATION: torch.full((batch, *LABEL), 255, dtype=torch.uint8), DEPTH: label},
        targets={SEGMENTATION: Target(normal(batch, C, *GRID).half()), DEPTH: Target(taught)},
        window=window,
        flip=flip,
    )


def sampled(map_1hw: Tensor, window: Tensor, flip: Tensor, align_corners: bool) -> tuple[np.ndarray, np.ndarray]:
    """A map of the view at the label's pixels by grid_sample, and which of these lie in the view."""
    y0, x0, y1, x1 = window.tolist()
    y = y0 + (torch.arange(LABEL[0]).double() + 0.5) * (y1 - y0) / LABEL[0]
    x = x0 + (torch.arange(LABEL[1]).double() + 0.5) * (x1 - x0) / LABEL[1]
    x = x.flip(0) if flip else x
    at = ((2 * (p - 0.5) / (n - 1) if align_corners else 2 * p / n) - 1 for p, n in ((y, VIEW[0]), (x, VIEW[1])))
    gy, gx = at
    grid = torch.stack([gx.expand(*LABEL), gy[:, None].expand(*LABEL)], -1)[None]
    one = F.grid_sample(map_1hw.double()[None], grid, padding_mode="border", align_corners=align_corners)[0, 0]
    inside = ((y >= 0) & (y <= VIEW[0]))[:, None] & ((x >= 0) & (x <= VIEW[1]))[None]
    return one.numpy(), inside.numpy()


def references(batch: Batch, reference: str, *, align_corners: bool = False) -> list[tuple[Map, Mask]]:
    """What each image is compared with, in metres, and its valid pixels."""
    if reference == "labels":
        labels = batch.labels[DEPTH].double().numpy()
        return [(label, (label >= 1e-3) & (label <= 50)) for label in labels]
    assert batch.targets is not None
    assert batch.window is not None
    assert batch.flip is not None
    pairs = []
    for taught, window, flip in zip(batch.targets[DEPTH].values, batch.window, batch.flip, strict=True):
        raw, inside = sampled(taught.double().clamp(max=80).log(), window, flip, align_corners)
        pairs.append((np.minimum(values(raw, TEACHER), 50.0), inside))
    return pairs


def moved_references(batch: Batch, zoom: Tensor, own: Tensor) -> list[tuple[Map, Mask]]:
    """A teacher's maps divided by each window's zoom, and where a pixel was pasted that of the neighbour."""
    assert batch.targets is not None
    assert batch.window is not None
    assert batch.flip is not None
    pairs = []
    for taught, window, flip, by in zip(batch.targets[DEPTH].values, batch.window, batch.flip, zoom, strict=True):
        raw, inside = sampled(taught.double().clamp(max=80).log(), window, flip, False)
        pairs.append((np.minimum(values(raw, TEACHER) / float(by), 50.0), inside))
    owns = own.numpy()
    return [
        tuple(np.where(owns[row], a, b) for a, b in zip(pairs[row], pairs[row ^ 1], strict=True))
        for row in range(len(pairs))
    ]


def oracle(kind: str, outputs: Outputs, pairs: list[tuple[Map, Mask]]) -> float:
    """The mean over images with a valid pixel; of `depth-l1` over all valid pixels."""
    raw = F.interpolate(outputs.heads[DEPTH].detach(), LABEL, mode="bilinear")[:, 0].numpy()
    compared = MAPS.get(kind, lambda metres: metres)
    losses, weights = [], []
    for own, (reference, mask) in zip(raw, pairs, strict=True):
        p, r = np.maximum(values(own, STUDENT), 1e-3), np.where(mask, reference, 1.0)
        losses.append(ORACLES[KINDS[kind]](compared(p), compared(r), mask))
        weights.append(mask.sum() if kind == "depth-l1" else mask.any())
    return float(np.average(losses, weights=weights))


def loss_of(term: Term, outputs: Outputs, batch: Batch, targets: Any = None) -> Tensor:
    criterion = DistillLoss(targets or Store(), ce_weight=0.0, kl_weight=0.0, further=[term], impl="reference")
    return criterion(outputs, batch).terms[term.kind]


@pytest.mark.parametrize("reference", ["labels", "teacher"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_term_is_its_definition(kind: str, reference: str) -> None:
    outputs, batch = batch_of()
    expected = oracle(kind, outputs, references(batch, reference))
    assert expected > 0.01
    assert loss_of(term_of(kind, reference), outputs, batch).item() == pytest.approx(expected, rel=1e-9)
    single = Outputs({head: output.half() for head, output in outputs.heads.items()}, {})
    value = loss_of(term_of(kind, reference), single, batch)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected, rel=5e-3)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_samples_of_another_stream_are_pasted_with_their_depth(kind: str, known: bool) -> None:
    """Where nothing is known of what was pasted, it does not count."""
    outputs, batch = batch_of()
    own = torch.rand(4, *LABEL, generator=torch.Generator().manual_seed(7)) < 0.6
    source = batch.map(lambda tensor: tensor.flip(0))
    pasted = source.targets_alone() if known else Batch()
    pairs = list(zip(references(batch, "teacher"), references(source, "teacher"), own.numpy(), strict=True))
    moved = [(np.where(at, a[0], b[0]), np.where(at, a[1], b[1]) if known else a[1] & at) for a, b, at in pairs]
    value = loss_of(term_of(kind, "teacher"), outputs, replace(batch, own=own, pasted=pasted))
    assert value.item() == pytest.approx(oracle(kind, outputs, moved), rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_is_resized_as_its_own_head_resizes(kind: str) -> None:
    """With aligned corners, in the space of its raw output, from float16; a map of a live teacher is the same."""
    outputs, batch = batch_of(dtype=torch.float16)
    store = Store(stored(TEACHER, align_corners=True))
    expected = oracle(kind, outputs, references(batch, "teacher", align_corners=True))
    term = term_of(kind, "teacher", store)
    assert loss_of(term, outputs, batch, store).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("reference", ["labels", "teacher"])
@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_a_batch_learn_what_the_batch_does(kind: str, reference: str) -> None:
    """Two parts of two, whose images with valid pixels and whose pixels differ in number: loss and gradient."""
    outputs, batch = batch_of()
    batch = replace(
        batch, inside=torch.tensor([[0.0, 0, 22, 34], [5, 5, 9, 9], [0, 0, 22, 20], [2, 0, 20, 34]]).double()
    )
    raw = outputs.heads[DEPTH].requires_grad_()
    criterion = DistillLoss(
        Store(),
        ce_weight=0.0,
        kl_weight=0.0,
        further=[term_of(kind, reference, weight=0.7), term_of("depth-l1", "labels")],
        impl="reference",
    )
    (expected,) = torch.autograd.grad(criterion(outputs, batch).loss, raw)
    assert expected.norm() > 0
    parts = [batch.rows(2), batch.rows(2, 2)]
    counts = mean_counts([criterion.counts(part, torch.float64) for part in parts])
    rows = [Outputs({head: out[at : at + 2] for head, out in outputs.heads.items()}, {}) for at in (0, 2)]
    losses = [criterion(own, part, counts).loss for own, part in zip(rows, parts, strict=True)]
    assert torch.stack(losses).mean().item() == pytest.approx(criterion(outputs, batch).loss.item(), rel=1e-12)
    (actual,) = torch.autograd.grad(torch.stack(losses).mean(), raw)
    assert (actual - expected).norm() <= 1e-12 * expected.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_the_raw_output_alone(kind: str) -> None:
    outputs, batch = batch_of()
    raw = outputs.heads[DEPTH].requires_grad_()
    criterion = DistillLoss(Store(), ce_weight=0.0, kl_weight=0.0, further=[term_of(kind, "labels")], impl="reference")

    def loss(own: Tensor) -> Tensor:
        part: Tensor = criterion(Outputs({**outputs.heads, DEPTH: own}, {}), batch).loss
        return part

    if kind != "depth-berhu":  # whose bound is a constant to the gradient: see the loss's own test
        assert torch.autograd.gradcheck(loss, (raw,), fast_mode=True)
    (gradient,) = torch.autograd.grad(loss(raw), raw)
    assert (gradient[1] == 0).all()  # without a valid label
    assert gradient[3].norm() > 0


@pytest.mark.parametrize("reference", ["labels", "teacher"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_without_a_valid_pixel_costs_nothing(kind: str, reference: str) -> None:
    outputs, batch = batch_of()
    raw = outputs.heads[DEPTH].requires_grad_()
    nothing = replace(
        batch,
        labels={**batch.labels, DEPTH: torch.full_like(batch.labels[DEPTH], math.nan)},
        targets={**(batch.targets or {}), DEPTH: Target(torch.full((4, 1, *GRID), math.nan, dtype=torch.float16))},
    )
    criterion = DistillLoss(Store(), ce_weight=0.0, kl_weight=0.0, further=[term_of(kind, reference)], impl="reference")
    loss = criterion(outputs, nothing).loss
    (gradient,) = torch.autograd.grad(loss, raw)
    assert loss == 0
    assert (gradient == 0).all()


def test_a_cell_without_a_value_touches_the_pixels_that_read_it_alone() -> None:
    outputs, batch = batch_of(moved=False)
    assert batch.targets is not None
    taught = batch.targets[DEPTH].values.clone()
    taught[0, 0, 2, 3] = math.nan
    broken = replace(batch, targets={**batch.targets, DEPTH: Target(taught)})
    pairs = references(batch, "teacher")
    known = (~taught.isnan()).double()
    for image, (reference, _) in enumerate(pairs):
        pairs[image] = (reference, F.interpolate(known, LABEL, mode="bilinear")[image, 0].numpy() > 1 - 1e-9)
    assert 0 < (~pairs[0][1]).sum() < 0.1 * pairs[0][1].size
    expected = oracle("depth-silog", outputs, pairs)
    assert loss_of(term_of("depth-silog", "teacher"), outputs, broken).item() == pytest.approx(expected, rel=1e-9)


def test_a_relative_teacher_is_compared_by_shape() -> None:
    """Its disparity, scaled and shifted at will, costs nothing to a student whose inverse depth it is."""
    outputs, batch = batch_of(moved=False)
    student = RegressionHead(parameterisation="exp", max_depth=None)
    raw = 0.2 * outputs.heads[DEPTH].float()
    disparity = 40 * (-raw).exp() - 3
    heads = {**HEADS, DEPTH: student}
    relative = RegressionHead(unit="relative", parameterisation="identity", max_depth=None)
    target = replace(batch, targets={DEPTH: Target(disparity)})
    small = Outputs({SEGMENTATION: outputs.logits, DEPTH: raw}, {})
    term = make_term(loss_term("depth-ssi"), targets=Store(stored(relative)), student_taps={}, student_heads=heads)
    assert term.reads_teacher
    criterion = DistillLoss(Store(stored(relative)), ce_weight=0.0, kl_weight=0.0, further=[term], impl="reference")
    # Between cells, the mean of inverses is not the inverse of the geometric mean.
    same = criterion(small, target).loss.item()
    other = criterion(Outputs({SEGMENTATION: outputs.logits, DEPTH: raw.flip(-1)}, {}), target).loss.item()
    assert same < 0.2 * other
    with pytest.raises(RecipeError, match=r"(?s)depth-silog needs depth in metres.*'relative'.*depth-ssi"):
        term_of("depth-silog", "teacher", Store(stored(relative)))
    with pytest.raises(RecipeError, match=r"the student's head depth has unit 'relative'"):
        term_of("depth-l1", "labels", heads={DEPTH: relative, SEGMENTATION: CategoricalHead(C)})


@pytest.mark.parametrize("parameterisation", ["softplus", "exp"])
def test_a_prediction_beyond_the_range_learns_its_way_back(parameterisation: Parameterisation) -> None:
    _, batch = batch_of()
    head = RegressionHead(parameterisation=parameterisation, max_depth=50.0)
    heads = {**HEADS, DEPTH: head}
    for start in (60.0 if parameterisation == "softplus" else 5.0, -9.0):
        raw = torch.full((4, 1, 5, 8), start, requires_grad=True)
        outputs = Outputs({SEGMENTATION: torch.zeros(4, C, 5, 8), DEPTH: raw}, {})
        criterion = DistillLoss(
            Store(), ce_weight=0.0, kl_weight=0.0, further=[term_of("depth-silog", "labels", heads=heads)]
        )
        (gradient,) = torch.autograd.grad(criterion(outputs, batch).loss, raw)
        assert gradient.isfinite().all()
        assert gradient.sum() * start > 0


def test_gates_void_and_schedules_of_classes_leave_labels_of_depth_alone() -> None:
    outputs, batch = batch_of()
    further = [term_of("depth-silog", reference, weight=1.0) for reference in ("labels", "teacher")]
    plain = DistillLoss(Store(), kl_weight=0.0, ce_weight=0.0, further=further, impl="reference")
    other = DistillLoss(
        Store(),
        kl_weight=0.0,
        ce_weight=0.0,
        further=further,
        gate=Gate(GateSpec("confidence", 0.99)),
        distill_void=False,
        scheduled=True,
        impl="reference",
    )
    other.set_distill_weight_scale(0.25)
    expected, actual = plain(outputs, batch), other(outputs, batch)
    assert actual.terms == expected.terms
    assert actual.loss.item() == pytest.approx(
        (actual.terms["depth-silog"] + 0.25 * actual.terms["depth-silog_2"]).item()
    )
    parts = other.parts(outputs, batch)
    assert list(parts) == ["depth-silog", "depth-silog_2"]
    assert other(outputs, replace(batch, targets=None)).terms["depth-silog_2"] == 0


def test_labels_teach_depth_without_a_store() -> None:
    outputs, batch = batch_of(moved=False)
    labels = LabelTargets(C, LABEL, GRID)
    term = term_of("depth-silog", "labels", labels)
    expected = oracle("depth-silog", outputs, references(batch, "labels"))
    criterion = DistillLoss(ce_weight=0.0, kl_weight=0.0, further=[term], impl="reference")
    losses = criterion(outputs, replace(batch, targets=None))
    assert losses.terms["depth-silog"].item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_waits_on_a_gpu(kind: str) -> None:
    outputs, batch = batch_of()
    expected = [loss_of(term_of(kind, reference), outputs, batch) for reference in ("labels", "teacher")]
    moved = Outputs({head: out.cuda().requires_grad_() for head, out in outputs.heads.items()}, {})
    there = batch.to("cuda")
    further = [term_of(kind, "labels"), term_of(kind, "teacher")]
    criterion = DistillLoss(Store(), ce_weight=0.0, kl_weight=0.0, further=further, impl="reference")
    criterion(moved, there).loss.backward()  # first uses may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = criterion(moved, there, criterion.counts(there, torch.float64))
        losses.loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    own = losses.terms[kind].item(), losses.terms[f"{kind}_2"].item()
    assert own == pytest.approx([loss.item() for loss in expected], rel=1e-9)


def test_methods_name_terms_of_depth() -> None:
    assert parse_method("kl+depth-silog")[1:] == (loss_term("depth-silog"),)
    assert parse_term({"kind": "depth-l1", "reference": "teacher"}).reads_teacher
    assert term_of("depth-ssi", "labels", alpha=0.0).spec.alpha == 0
    with pytest.raises(RecipeError, match=r"(?s)reference of depth-l1: .*Give one of labels, teacher"):
        loss_term("depth-l1", reference="lidar")
    with pytest.raises(RecipeError, match=r"(?s)'alpha' of depth-l1.*options are weight, reference"):
        loss_term("depth-l1", alpha=0.5)


@pytest.mark.parametrize("kind", ["kl", "pseudo", "dist", "dkd"])
@pytest.mark.parametrize("segmentation", [None, RegressionHead()], ids=["absent", "regression"])
def test_a_regression_is_asked_for_no_logits(kind: str, segmentation: Any) -> None:
    store = Store(logits=False)
    if segmentation is not None:
        store.manifest.heads[SEGMENTATION] = segmentation
    with pytest.raises(
        RecipeError, match=rf"(?s){kind} needs logits of a categorical head.*depth \(regression\).*--heads"
    ):
        check_terms(parse_method(kind), store.manifest)


@pytest.mark.parametrize("depth", [None, SimpleNamespace(k=5, classes=5)], ids=["absent", "categorical"])
def test_a_store_without_depth_teaches_none(depth: Any) -> None:
    with pytest.raises(RecipeError, match=r"(?s)depth-silog needs targets of a regression head depth.*--heads depth"):
        check_terms([loss_term("depth-silog", reference="teacher")], Store(depth).manifest)
    check_terms([loss_term("depth-silog")], Store(depth).manifest)
    with pytest.raises(RecipeError, match=r"(?s)without a cache, or with --teacher labels.*reference=labels"):
        check_terms([loss_term("depth-ssi")], None)


@pytest.mark.parametrize(
    ("kind", "heads", "received"),
    [
        (
            "depth-silog",
            {SEGMENTATION: CategoricalHead(C)},
            r"regression head depth, but the student has segmentation \(categorical\).*MODEL\+depth",
        ),
        (
            "depth-silog",
            {DEPTH: CategoricalHead(3)},
            r"regression head depth, but the student has depth \(categorical\)",
        ),
        ("dist", {DEPTH: RegressionHead()}, r"categorical head segmentation, but the student has depth \(regression\)"),
        (
            "dice",
            {SEGMENTATION: RegressionHead()},
            r"categorical head segmentation, but the student has segmentation \(regression\)",
        ),
    ],
)
def test_a_student_without_the_head_is_refused(kind: str, heads: Any, received: str) -> None:
    with pytest.raises(RecipeError, match=f"(?s){received}"):
        make_term(loss_term(kind), targets=Store(), student_taps={}, student_heads=heads)


def test_batches_and_outputs_that_lack_depth_are_refused() -> None:
    outputs, batch = batch_of()
    term = term_of("depth-l1", "labels")
    with pytest.raises(RecipeError, match="depth-l1 needs the student's head depth"):
        loss_of(term, Outputs({SEGMENTATION: outputs.logits}, {}), batch)
    bare = replace(batch, labels={SEGMENTATION: batch.label}, targets={SEGMENTATION: batch.target})
    with pytest.raises(RecipeError, match="depth-l1 needs labels of depth"):
        loss_of(term, outputs, bare)
    with pytest.raises(RecipeError, match="depth-l1 needs targets of depth"):
        loss_of(term_of("depth-l1", "teacher"), outputs, bare)
    half = {**batch.labels, DEPTH: batch.labels[DEPTH][:, ::2]}
    with pytest.raises(DataError, match="different sizes: depth "):
        loss_of(term, outputs, replace(batch, labels=half))


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_s_metres_follow_zoom_and_pasting(kind: str) -> None:
    outputs, batch = batch_of()
    zoom = torch.tensor([2.0, 0.5, 1.25, 3.0], dtype=torch.float64)
    own = torch.rand(4, *LABEL, generator=torch.Generator().manual_seed(1)) < 0.6
    changed = replace(batch, zoom=zoom, own=own)
    wanted = oracle(kind, outputs, moved_references(batch, zoom, own))
    term = term_of(kind, "teacher")
    assert loss_of(term, outputs, changed).item() == pytest.approx(wanted, rel=1e-5)
    assert loss_of(term, outputs, batch).item() != pytest.approx(wanted, rel=1e-2)
    # What lies beyond the image is grey with whoever it was pasted from.
    inside = torch.tensor([[0.0, 0.0, *VIEW], [4.0, 6.0, 15.0, 20.0], [0.0, 0.0, *VIEW], [0.0, 0.0, *VIEW]]).double()
    shown = replace(batch, inside=inside).shown(Store(), LABEL)
    assert shown is not None
    pasted = torch.where(own, shown, shown[[1, 0, 3, 2]]).numpy()
    pairs = [(r, m & p) for (r, m), p in zip(moved_references(batch, zoom, own), pasted, strict=True)]
    value = loss_of(term, outputs, replace(changed, inside=inside)).item()
    assert value == pytest.approx(oracle(kind, outputs, pairs), rel=1e-5)
