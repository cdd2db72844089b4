"""Every term beside the same formula in numpy and float64, written out sample by sample and cell by cell."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kdcache.distill import Target
from kdcache.distill.terms import Term, TermBatch, TermSpec, make_term
from kdcache.distill.terms.pseudo import most_confident

Array = np.ndarray[Any, Any]
B, C, SIZE, VIEW = 4, 5, (23, 37), (22, 34)
GRID, FEATURE, STUDENT, STUDENT_FEATURE = (6, 9), (5, 8), (7, 10), (4, 11)
CHANNELS, STUDENT_CHANNELS = 6, 4
MAXIMUM, DEEP, MAP = "targets/segmentation/max", "features/deep", "statistics/at.seen"

SPECS = {
    "pseudo": TermSpec("pseudo", threshold=0.6),
    "at": TermSpec("at", teacher_tap="deep"),
    "at of a stored map": TermSpec("at", teacher_tap="seen"),
    "sp": TermSpec("sp", teacher_tap="deep"),
    "hint": TermSpec("hint", teacher_tap="deep"),
    "cosine": TermSpec("cosine", teacher_tap="deep"),
    "cwd": TermSpec("cwd"),
    "cwd of a tap": TermSpec("cwd", teacher_tap="deep", temperature=1.5),
    "dist": TermSpec("dist"),
    "dist with parts": TermSpec("dist", temperature=2.0, beta=0.5, gamma=3.0),
    "dkd": TermSpec("dkd"),
    "dkd with parts": TermSpec("dkd", temperature=1.0, alpha=2.0, beta=0.25),
}


@dataclass
class Store:
    """What terms look at of a cache."""

    k: int = C
    num_classes: int = C
    view_size: tuple[int, int] = VIEW
    align_corners: bool = False

    @property
    def manifest(self) -> Any:
        return SimpleNamespace(
            heads={"segmentation": SimpleNamespace(k=self.k, classes=C, raw=True)},
            features={"deep": SimpleNamespace(channels=CHANNELS, size=FEATURE)},
            statistics={"at.seen": SimpleNamespace(kind="at", tap="seen", size=FEATURE)},
        )


def term_of(name: str, dtype: torch.dtype = torch.float64) -> Term:
    torch.manual_seed(5)
    return make_term(SPECS[name], targets=Store(), student_taps={"head": STUDENT_CHANNELS}).to(dtype)


def batch_of(
    *, moved: bool = True, gated: bool = False, dtype: torch.dtype = torch.float64, seed: int = 0
) -> TermBatch:
    """Random maps, of which every image shows another window: the whole, a mirrored part, more than there is."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(shape, generator=generator, dtype=torch.float64)

    window = torch.tensor([0.0, 0.0, *VIEW], dtype=torch.float64).repeat(B, 1)
    flip = torch.zeros(B, dtype=torch.bool)
    if moved:
        window[1], flip[1] = torch.tensor([3.3, 5.25, 14.8, 22.0]), True
        window[2] = torch.tensor([-6.5, -3.0, 30.0, 50.5])
        window[3] = torch.tensor([10.0, 8.0, 40.0, 20.0])
    raw = normal(B, C, *GRID, scale=2.5)
    top = raw.amax(1)
    empty = torch.empty(0, dtype=torch.float16)
    target = Target((raw - top[:, None]).half(), torch.empty(0, dtype=torch.uint8), empty, window, flip)
    labels = torch.randint(0, C, (B, *SIZE), generator=generator, dtype=torch.uint8)
    labels[torch.rand(B, *SIZE, generator=generator) < 0.3] = 255
    weight = torch.rand(B, *SIZE, generator=generator) * (torch.rand(B, *SIZE, generator=generator) < 0.6)
    seen = normal(B, *FEATURE).square()
    stored = {MAXIMUM: top.float(), DEEP: normal(B, CHANNELS, *FEATURE).half(), MAP: (seen / seen.amax()).half()}
    features = {"head": normal(B, STUDENT_CHANNELS, *STUDENT_FEATURE).to(dtype)}
    logits = normal(B, C, *STUDENT, scale=2.0).to(dtype)
    return TermBatch(logits, features, labels, target, stored, weight if gated else None, SIZE)


# The oracle


def sampled(image: Tensor, batch: TermBatch, sample: int, grid: tuple[int, int]) -> Array:
    """(c, h, w): a map of the view at the cells of a window, tap by tap."""
    assert batch.target is not None
    found = np.zeros((image.shape[0], *grid))
    (y0, x0, y1, x1), values = batch.target.window[sample].tolist(), image.double().numpy()
    _, height, width = values.shape
    for i in range(grid[0]):
        for j in range(grid[1]):
            column = grid[1] - 1 - j if batch.target.flip[sample] else j
            y = (y0 + (i + 0.5) * (y1 - y0) / grid[0]) * height / VIEW[0] - 0.5
            x = (x0 + (column + 0.5) * (x1 - x0) / grid[1]) * width / VIEW[1] - 0.5
            y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
            top, left = int(y), int(x)
            below, right, dy, dx = min(top + 1, height - 1), min(left + 1, width - 1), y - top, x - left
            found[:, i, j] = (1 - dy) * ((1 - dx) * values[:, top, left] + dx * values[:, top, right]) + dy * (
                (1 - dx) * values[:, below, left] + dx * values[:, below, right]
            )
    return found


def shares(batch: TermBatch, sample: int, grid: tuple[int, int]) -> tuple[Array, Array]:
    """(h, w) twice: the counted share of every cell, and that times the gate, pixel by pixel."""
    assert batch.target is not None
    y0, x0, y1, x1 = batch.target.window[sample].tolist()
    counted, gated = np.zeros(grid), np.zeros(grid)
    for row in range(SIZE[0]):
        for column in range(SIZE[1]):
            x = (SIZE[1] - 1 - column if batch.target.flip[sample] else column) + 0.5
            inside = 0 <= y0 + (row + 0.5) * (y1 - y0) / SIZE[0] <= VIEW[0]
            inside = inside and 0 <= x0 + x * (x1 - x0) / SIZE[1] <= VIEW[1]
            gate = 1.0 if batch.pixel_weight is None else float(batch.pixel_weight[sample, row, column])
            # A pixel belongs to the cells that it overlaps, each by the part of the cell that it fills.
            for i in range(int(row * grid[0] / SIZE[0]), math.ceil((row + 1) * grid[0] / SIZE[0])):
                for j in range(int(column * grid[1] / SIZE[1]), math.ceil((column + 1) * grid[1] / SIZE[1])):
                    part = 1.0
                    for at, cell, cells, pixels in ((row, i, grid[0], SIZE[0]), (column, j, grid[1], SIZE[1])):
                        long = pixels / cells
                        part *= max(0.0, min(at + 1, (cell + 1) * long) - max(at, cell * long)) / long
                    counted[i, j] += part * inside
                    gated[i, j] += part * inside * gate
    return counted, gated


def resized(image: Tensor, grid: tuple[int, int]) -> Array:
    found: Array = F.interpolate(image[None].double(), grid, mode="bilinear")[0].detach().numpy()
    return found


def softmax(x: Array, axis: int = 0) -> Array:
    e = np.exp(x - x.max(axis, keepdims=True))
    return np.asarray(e / e.sum(axis, keepdims=True))


def oracle(term: Term, batch: TermBatch) -> float:
    formula: Callable[[Term, TermBatch], float] = {
        "pseudo": pseudo_oracle,
        "at": at_oracle,
        "sp": sp_oracle,
        "hint": lambda term, batch: projected_oracle(term, batch, lambda s, t: ((s - t) ** 2).mean(0)),
        "cosine": lambda term, batch: projected_oracle(
            term, batch, lambda s, t: 1 - (s * t).sum(0) / np.sqrt((s * s).sum(0) * (t * t).sum(0))
        ),
        "cwd": cwd_oracle,
        "dist": dist_oracle,
        "dkd": dkd_oracle,
    }[term.kind]
    return formula(term, batch)


def logits_of(batch: TermBatch, sample: int, raw: bool = False) -> tuple[Array, Array]:
    assert batch.target is not None
    teacher = batch.target.values[sample].double()
    if raw:
        teacher = teacher + batch.stored[MAXIMUM][sample].double()
    return resized(batch.logits[sample], GRID), sampled(teacher, batch, sample, GRID)


def projected(term: Term, batch: TermBatch, sample: int) -> Array:
    """The student's features, resized first and then projected channel by channel."""
    features = resized(batch.features["head"][sample], FEATURE)
    parameters = {name: p.detach().double().numpy() for name, p in term.named_parameters()}
    if not parameters:
        return features
    weight = parameters["projection.weight"][:, :, 0, 0]
    bias = parameters.get("projection.bias", np.zeros(len(weight)))
    return np.stack([sum(weight[o, i] * features[i] for i in range(len(features))) + bias[o] for o in range(len(bias))])


def pseudo_oracle(term: Term, batch: TermBatch) -> float:
    total = kept = 0.0
    assert batch.target is not None
    for sample in range(B):
        p = softmax(sampled(batch.target.values[sample], batch, sample, SIZE))
        q = softmax(resized(batch.logits[sample], SIZE))
        inside, gate = shares(batch, sample, SIZE)
        for i, j in np.argwhere((p.max(0) >= 0.6) & (inside > 0.5)):
            kept += 1
            total -= gate[i, j] * math.log(q[p[:, i, j].argmax(), i, j])
    return total / kept


def at_oracle(term: Term, batch: TermBatch) -> float:
    total = count = 0.0
    for sample in range(B):
        if "statistics/at.seen" in term.arrays():
            teacher = batch.stored[MAP][sample].double()
        else:
            teacher = batch.stored[DEEP][sample].double().square().sum(0)
        t = sampled(teacher[None], batch, sample, FEATURE)[0]
        s = resized(batch.features["head"][sample].double().square().sum(0, keepdim=True), FEATURE)[0]
        counted, gated = shares(batch, sample, FEATURE)
        s, t = (a / math.sqrt((counted * a * a).sum()) for a in (s, t))
        total += (gated * (s - t) ** 2).sum()
        count += counted.sum()
    return total / count


def sp_oracle(term: Term, batch: TermBatch) -> float:
    grams = []
    for side in ("student", "teacher"):
        rows = []
        for sample in range(B):
            own = batch.features["head"][sample].double().detach()
            grid = STUDENT_FEATURE if side == "student" else FEATURE
            q = own.numpy() if side == "student" else sampled(batch.stored[DEEP][sample], batch, sample, FEATURE)
            rows.append((q * np.sqrt(shares(batch, sample, grid)[1])).ravel())
        gram = np.array([[np.dot(a, b) for b in rows] for a in rows])
        grams.append(np.array([row / np.sqrt((row**2).sum()) for row in gram]))
    return float(((grams[0] - grams[1]) ** 2).sum() / B**2)


def projected_oracle(term: Term, batch: TermBatch, distance: Callable[[Array, Array], Array]) -> float:
    total = count = 0.0
    for sample in range(B):
        counted, gated = shares(batch, sample, FEATURE)
        t = sampled(batch.stored[DEEP][sample], batch, sample, FEATURE)
        total += (gated * distance(projected(term, batch, sample), t)).sum()
        count += counted.sum()
    return total / count


def cwd_oracle(term: Term, batch: TermBatch) -> float:
    total, T = 0.0, term.temperature
    for sample in range(B):
        if term.student_taps():
            s = projected(term, batch, sample)
            t = sampled(batch.stored[DEEP][sample], batch, sample, FEATURE)
        else:
            s, t = logits_of(batch, sample, raw=True)
        _, gated = shares(batch, sample, (s.shape[1], s.shape[2]))
        for channel in range(len(s)):
            p, q = (gated * np.exp(x[channel] / T) for x in (t, s))
            p, q = p[gated > 0] / p.sum(), q[gated > 0] / q.sum()
            total += (p * np.log(p / q)).sum() / len(s)
    return T**2 * total / B


def dist_oracle(term: Term, batch: TermBatch) -> float:
    T, spec = term.temperature, term.spec
    inter = count = 0.0
    students, teachers, weights = [], [], []
    for sample in range(B):
        s, t = (softmax(x / T) for x in logits_of(batch, sample))
        counted, gated = shares(batch, sample, GRID)
        for i in range(GRID[0]):
            for j in range(GRID[1]):
                inter += gated[i, j] * (1 - np.corrcoef(s[:, i, j], t[:, i, j])[0, 1])
        count += counted.sum()
        students.append(s.reshape(C, -1))
        teachers.append(t.reshape(C, -1))
        weights.append(gated.ravel())
    intra, w = 0.0, np.concatenate(weights)
    for s, t in zip(np.concatenate(students, 1), np.concatenate(teachers, 1), strict=True):
        covariance = np.cov(s, t, aweights=w)
        intra += (1 - covariance[0, 1] / math.sqrt(covariance[0, 0] * covariance[1, 1])) / C
    beta, gamma = spec.beta or 1.0, spec.gamma or 1.0
    return T**2 * (beta * inter / count + gamma * intra)


def dkd_oracle(term: Term, batch: TermBatch) -> float:
    T, spec, total, count = term.temperature, term.spec, 0.0, 0.0
    for sample in range(B):
        s, t = logits_of(batch, sample)
        counted, gated = shares(batch, sample, GRID)
        count += counted.sum()
        for i in range(GRID[0]):
            for j in range(GRID[1]):
                y = int(t[:, i, j].argmax())
                if batch.labels is not None:
                    row, column = (
                        int((n + 0.5) * size / cells) for n, size, cells in zip((i, j), SIZE, GRID, strict=True)
                    )
                    label = int(batch.labels[sample, row, column])
                    y = y if label == 255 else label
                p, q = (softmax(x[:, i, j] / T) for x in (t, s))
                tckd = p[y] * math.log(p[y] / q[y]) + (1 - p[y]) * math.log((1 - p[y]) / (1 - q[y]))
                p, q = (np.delete(x, y) / np.delete(x, y).sum() for x in (p, q))
                alpha, beta = spec.alpha or 1.0, spec.beta or 8.0
                total += gated[i, j] * (alpha * tckd + beta * (p * np.log(p / q)).sum())
    return T**2 * total / count


# The tests


def inputs_of(term: Term, batch: TermBatch) -> list[Tensor]:
    return [batch.features["head"]] if term.student_taps() else [batch.logits]


def gradients(term: Term, batch: TermBatch) -> tuple[Tensor, list[Tensor]]:
    """The loss, and its gradients by what the student gives and by the term's own parameters."""
    tensors = [x.requires_grad_() for x in inputs_of(term, batch)] + list(term.parameters())
    loss = term(batch)
    return loss, list(torch.autograd.grad(loss, tensors))


@pytest.mark.parametrize("gated", [False, True], ids=["all", "gated"])
@pytest.mark.parametrize("moved", [False, True], ids=["whole", "windows"])
@pytest.mark.parametrize("name", SPECS)
def test_a_term_is_its_formula(name: str, moved: bool, gated: bool) -> None:
    term, batch = term_of(name), batch_of(moved=moved, gated=gated)
    expected = oracle(term, batch)
    assert expected > 1e-4
    assert term(batch).item() == pytest.approx(expected, rel=1e-6 if term.kind == "dist" else 1e-9)
    single = term_of(name, torch.float32)
    batch = replace(batch, logits=batch.logits.float(), features={"head": batch.features["head"].float()})
    loss = single(batch)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=3e-5)


@pytest.mark.parametrize("gated", [False, True], ids=["all", "gated"])
@pytest.mark.parametrize("name", SPECS)
def test_a_gradient_is_that_of_the_value(name: str, gated: bool) -> None:
    term, batch = term_of(name), batch_of(gated=gated)
    (x,) = inputs_of(term, batch)

    def value(x: Tensor, *parameters: Tensor) -> Tensor:
        found: Tensor = torch.func.functional_call(
            term,
            dict(zip(dict(term.named_parameters()), parameters, strict=True)),
            replace(batch, features={"head": x}) if term.student_taps() else replace(batch, logits=x),
        )
        return found

    parameters = [p.detach().clone().requires_grad_() for p in term.parameters()]
    assert torch.autograd.gradcheck(value, (x.requires_grad_(), *parameters), fast_mode=True)


@pytest.mark.parametrize("name", SPECS)
def test_single_precision_gradients_are_those_of_double(name: str) -> None:
    _, expected = gradients(term_of(name), batch_of(gated=True))
    _, found = gradients(term_of(name, torch.float32), batch_of(gated=True, dtype=torch.float32))
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 2e-5 * other.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SPECS)
def test_narrow_inputs_are_added_up_in_single_precision(name: str, dtype: torch.dtype) -> None:
    batch = batch_of(dtype=dtype)
    exact = replace(batch, logits=batch.logits.double(), features={"head": batch.features["head"].double()})
    with torch.autocast("cpu", torch.bfloat16):
        loss, (gradient, *_) = gradients(term_of(name, torch.float32), batch)
    assert (loss.dtype, gradient.dtype) == (torch.float32, dtype)
    assert loss.item() == pytest.approx(term_of(name)(exact).item(), rel=3e-5)


@pytest.mark.parametrize("how", ["beside the view", "gate shut"])
@pytest.mark.parametrize("name", SPECS)
def test_without_counted_pixels_there_is_nothing_to_learn(name: str, how: str) -> None:
    batch = batch_of()
    assert batch.target is not None
    if how == "gate shut":
        batch = replace(batch, pixel_weight=torch.zeros(B, *SIZE))
    else:
        away = torch.tensor([VIEW[0] + 1.0, 0.0, VIEW[0] + 9.0, 9.0], dtype=torch.float64).repeat(B, 1)
        batch = replace(batch, target=batch.target._replace(window=away))
    loss, found = gradients(term_of(name), batch)
    assert loss.item() == 0
    assert all((gradient == 0).all() for gradient in found)


@pytest.mark.parametrize("name", SPECS)
def test_an_image_beside_the_view_is_as_one_that_is_not_there(name: str) -> None:
    batch, term = batch_of(), term_of(name)
    assert batch.target is not None
    batch.target.window[3] = torch.tensor([0.0, -20.0, 10.0, -1.0])
    rows = 4**2 / 3**2 if name == "sp" else 1  # it divides by the square of the batch, however little that shows
    assert rows * term(batch).item() == pytest.approx(term(part_of(batch, slice(0, 3))).item(), rel=1e-9)


@pytest.mark.parametrize("name", [name for name, spec in SPECS.items() if spec.kind != "pseudo"])
def test_maps_of_zeros_have_finite_gradients(name: str) -> None:
    for student, teacher in ((0, 1), (1, 0), (0, 0)):
        batch = batch_of(dtype=torch.float32)
        assert batch.target is not None
        batch = TermBatch(
            student * batch.logits,
            {"head": student * batch.features["head"]},
            batch.labels,
            batch.target._replace(values=teacher * batch.target.values),
            {path: teacher * array for path, array in batch.stored.items()},
            None,
            SIZE,
        )
        term = term_of(name, torch.float32)
        torch.nn.init.zeros_(list(term.parameters())[-1]) if list(term.parameters()) else None
        loss, found = gradients(term, batch)
        assert loss.isfinite()
        assert all(gradient.isfinite().all() for gradient in found)
        assert max(gradient.abs().max() for gradient in found) < 1e3


@pytest.mark.parametrize("name", SPECS)
def test_a_mirrored_image_learns_the_mirrored_thing(name: str) -> None:
    """Mirroring student, labels and the flag leaves the loss as it is."""
    batch = batch_of(moved=False, gated=True)
    assert batch.target is not None
    assert batch.labels is not None
    assert batch.pixel_weight is not None
    mirrored = TermBatch(
        batch.logits.flip(-1),
        {"head": batch.features["head"].flip(-1)},
        batch.labels.flip(-1),
        batch.target._replace(flip=torch.ones(B, dtype=torch.bool)),
        batch.stored,
        batch.pixel_weight.flip(-1),
        SIZE,
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
    assert batch.target is not None
    top = live.amax(1)
    target = batch.target._replace(values=(live - top[:, None]).half())
    batch = replace(batch, target=target, stored={MAXIMUM: top.float()})
    loss, (gradient,) = gradients(term_of("cwd"), batch)
    student = batch.logits.detach().requires_grad_()
    s, t = ((x.flatten(2) / 4).log_softmax(-1) for x in (F.interpolate(student, GRID, mode="bilinear"), live))
    expected = 16 * F.kl_div(s, t, reduction="sum", log_target=True) / (B * C)
    (wanted,) = torch.autograd.grad(expected, student)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)
    assert (gradient - wanted).norm() <= 1e-3 * wanted.norm()
    shifted = replace(batch, stored={MAXIMUM: torch.zeros_like(batch.stored[MAXIMUM])})
    assert term_of("cwd")(shifted).item() != pytest.approx(expected.item(), rel=0.05)


def test_a_top_k_target_serves_relations() -> None:
    batch, k = batch_of(), C - 1
    assert batch.target is not None
    values, indices = batch.target.values.double().topk(k, 1)
    rest = batch.target.values.double().scatter(1, indices, -math.inf)
    tail = rest.logsumexp(1) - values.logsumexp(1)
    packed = batch.target._replace(values=values.half(), indices=indices.to(torch.uint8), tail=tail.half())
    term = make_term(SPECS["dist"], targets=Store(k=k), student_taps={})
    assert term(replace(batch, target=packed)).item() == pytest.approx(term_of("dist")(batch).item(), rel=1e-3)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_the_most_confident_of_each_class(share: float) -> None:
    rng = np.random.default_rng(3)
    argmax = rng.integers(0, 4, (2, 11, 13)).astype(np.uint8)
    confidence = rng.choice(np.linspace(0, 1, 40), (2, 11, 13)).astype(np.float16)  # many are equal, some are 0
    found = most_confident(torch.from_numpy(argmax), torch.from_numpy(confidence), share, 6).numpy()
    assert not found[confidence == 0].any()
    for name in range(6):
        of_class = (argmax == name) & (confidence > 0)
        kept = found & of_class
        assert kept.sum() == math.floor(share * of_class.sum())
        if kept.any():
            assert confidence[kept].min() >= confidence[of_class & ~kept].max(initial=0)


def test_pseudo_labels_by_quantile_learn() -> None:
    term = make_term(TermSpec("pseudo", quantile=0.4), targets=Store(), student_taps={})
    loss, (gradient,) = gradients(term.double(), batch_of())
    assert loss > 0
    assert gradient.norm() > 0


@pytest.mark.parametrize("labels", ["none", "void"])
def test_decoupled_without_labels_takes_the_teachers_class(labels: str) -> None:
    batch, term = batch_of(), term_of("dkd")
    assert batch.labels is not None
    batch = replace(batch, labels=None if labels == "none" else torch.full_like(batch.labels, 255))
    assert term(batch).item() == pytest.approx(dkd_oracle(term, replace(batch, labels=None)), rel=1e-9)


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
        term.average = lambda tensor: torch.stack(self.exchange(rank, tensor)).mean(0).detach()
        term.gather = lambda tensor: torch.cat(self.exchange(rank, tensor))
        return term


def part_of(batch: TermBatch, part: slice) -> TermBatch:
    assert batch.target is not None
    assert batch.labels is not None
    return TermBatch(
        batch.logits.detach()[part],
        {tap: maps.detach()[part] for tap, maps in batch.features.items()},
        batch.labels[part],
        Target(*(x[part] if x.numel() else x for x in batch.target[:5])),
        {path: array[part] for path, array in batch.stored.items()},
        None if batch.pixel_weight is None else batch.pixel_weight[part],
        SIZE,
    )


@pytest.mark.parametrize("gated", [False, True], ids=["all", "gated"])
@pytest.mark.parametrize("name", SPECS)
def test_parts_of_a_batch_average_to_the_whole(name: str, gated: bool) -> None:
    """Losses, gradients by what the student gave, and gradients of the term's own parameters."""
    whole, crew = batch_of(gated=gated), Crew()
    loss, (gradient, *by_parameters) = gradients(term_of(name), whole)
    terms = [crew.join(term_of(name), rank) for rank in range(2)]
    with ThreadPoolExecutor(2) as pool:
        parts = list(pool.map(gradients, terms, [part_of(whole, slice(0, 2)), part_of(whole, slice(2, 4))]))
    assert (parts[0][0] + parts[1][0]).item() / 2 == pytest.approx(loss.item(), rel=1e-9)
    joined = torch.cat([found[1][0] for found in parts]) / 2
    assert (joined - gradient).norm() <= 1e-9 * gradient.norm()
    for one, two, expected in zip(parts[0][1][1:], parts[1][1][1:], by_parameters, strict=True):
        assert ((one + two) / 2 - expected).norm() <= 1e-9 * expected.norm()


@pytest.mark.parametrize("name", SPECS)
def test_the_user_is_told_what_is_resized_and_projected(name: str) -> None:
    term, batch = term_of(name), batch_of()
    term.prepare(batch)
    said = term.describe() or ""
    kind, resizes = SPECS[name].kind, "resized from" in said
    assert resizes == (kind not in ("pseudo", "sp"))
    assert ("projected from 4 to 6 channels" in said) == (kind in ("hint", "cosine") or name == "cwd of a tap")
    assert ("7x10 to the teacher's 6x9" in said) == (kind in ("dist", "dkd") or name == "cwd")
    assert ("4x11 to the teacher's 5x8" in said) == (resizes and bool(term.student_taps()))
    assert batch.target is not None
    alike = replace(batch, logits=batch.logits[:, :, :6, :9], features={"head": torch.zeros(B, 6, *FEATURE)})
    term.prepare(alike)
    if not list(term.parameters()):
        assert term.describe() is None


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECS)
def test_a_compiled_term_is_the_same(name: str) -> None:
    batch = batch_of(dtype=torch.float32)
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
    batch = batch_of(gated=True, dtype=torch.float32)
    expected = term_of(name)(batch_of(gated=True)).item()
    moved = TermBatch(
        batch.logits.to(device).requires_grad_(),
        {tap: feature.to(device) for tap, feature in batch.features.items()},
        None if batch.labels is None else batch.labels.to(device),
        None if batch.target is None else batch.target.to(device),
        {path: array.to(device) for path, array in batch.stored.items()},
        None if batch.pixel_weight is None else batch.pixel_weight.to(device),
        batch.size,
    )
    term = term_of(name, torch.float32).to(device)
    term(moved)  # first uses may wait: constants are copied, kernels compiled
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = term(moved)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.item() == pytest.approx(expected, rel=1e-4)
