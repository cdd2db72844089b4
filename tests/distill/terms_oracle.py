"""Every term in numpy and float64, written out sample by sample and cell by cell, and batches to hold it against."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from kdcache.distill import Batch, Target
from kdcache.distill.batch import PseudoLabels
from kdcache.distill.outputs import StudentOutputs
from kdcache.distill.terms import Term, TermBatch, loss_term, make_term

Array = np.ndarray[Any, Any]
B, C, SIZE, VIEW = 4, 5, (23, 37), (22, 34)
GRID, FEATURE, STUDENT, STUDENT_FEATURE = (6, 9), (5, 8), (7, 10), (4, 11)
CHANNELS, STUDENT_CHANNELS = 6, 4
MAXIMUM, DEEP, MAP = "targets/segmentation/max", "features/deep", "statistics/at.seen"

SPECS = {
    "pseudo": loss_term("pseudo", threshold=0.6),
    "pseudo over all pixels": loss_term("pseudo", threshold=0.6, normalise="all"),
    "pseudo by the confident share": loss_term("pseudo", threshold=0.6, normalise="share"),
    "at": loss_term("at", teacher_tap="deep"),
    "at of a stored map": loss_term("at", teacher_tap="seen"),
    "sp": loss_term("sp", teacher_tap="deep"),
    "hint": loss_term("hint", teacher_tap="deep"),
    "cosine": loss_term("cosine", teacher_tap="deep"),
    "hint of standardised channels": loss_term(
        "hint", teacher_tap="deep", standardise="channels", distance="smooth-l1"
    ),
    "cosine by two layers": loss_term("cosine", teacher_tap="deep", standardise="channels", projector="mlp"),
    "cwd": loss_term("cwd"),
    "cwd of a tap": loss_term("cwd", teacher_tap="deep", temperature=1.5),
    "dist": loss_term("dist"),
    "dist with parts": loss_term("dist", temperature=2.0, beta=0.5, gamma=3.0),
    "dkd": loss_term("dkd"),
    "dkd with parts": loss_term("dkd", temperature=1.0, alpha=2.0, beta=0.25),
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
            heads={"segmentation": SimpleNamespace(k=self.k, classes=self.num_classes, raw=True)},
            features={"deep": SimpleNamespace(channels=CHANNELS, size=FEATURE)},
            statistics={"at.seen": SimpleNamespace(kind="at", tap="seen", size=FEATURE)},
        )


MOMENTS = torch.linspace(-1, 1, CHANNELS), torch.linspace(0.5, 2, CHANNELS)
"""Mean and standard deviation of the teacher's channels."""


def term_of(name: str, dtype: torch.dtype = torch.float64) -> Term:
    torch.manual_seed(5)
    moments = MOMENTS if "standardised" in name or "two layers" in name else None
    taps = {"head": STUDENT_CHANNELS}
    return make_term(SPECS[name], targets=Store(), student_taps=taps, moments=moments).to(dtype)


def term_batch(
    logits: Tensor,
    features: dict[str, Tensor],
    labels: Tensor | None,
    target: Target | None,
    arrays: dict[str, Tensor],
    pixel_weight: Tensor | None,
    size: tuple[int, int],
    counted: Tensor | None = None,
    window: Tensor | None = None,
    flip: Tensor | None = None,
    *,
    shown: Tensor | None = None,
    pseudo: dict[str, PseudoLabels] | None = None,
) -> TermBatch:
    """The inputs of a term, of rows with labels of depth alone if `labels` is None."""
    depth = torch.full((len(logits), *size), math.nan, device=logits.device)
    rows = Batch(
        labels={"depth": depth} if labels is None else {"segmentation": labels},
        targets={} if target is None else {"segmentation": target},
        arrays=arrays,
        window=window,
        flip=flip,
        pseudo=pseudo or {},
    )
    return TermBatch(StudentOutputs(logits, {}, features), rows, pixel_weight, counted, shown)


def changed(batch: TermBatch, **changes: Any) -> TermBatch:
    """The inputs of a term with other fields, by the names of `term_batch`."""
    rows, student = batch.rows, batch.student
    inner = ("labels", "target", "arrays", "size", "window", "flip", "pseudo")
    if not changes.keys().isdisjoint(inner):
        given = {"labels": rows.labels.get("segmentation"), "target": rows.target, "arrays": rows.arrays}
        given |= {"size": rows.size, "window": rows.window, "flip": rows.flip, "pseudo": rows.pseudo}
        given |= {name: changes.pop(name) for name in inner if name in changes}
        logits = changes.get("logits", student.logits)
        rows = term_batch(logits, {}, pixel_weight=None, **given).rows
    outputs = {name: changes.pop(name) for name in ("logits", "features") if name in changes}
    return replace(batch, **{"student": student._replace(**outputs), "rows": rows} | changes)


def batch_of(
    *,
    moved: bool = True,
    gated: bool = False,
    counted: bool = False,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> TermBatch:
    """Random maps, of which every image shows another window: the whole, a mirrored part, more than there is.

    Args:
        counted: whether only some pixels count: beside a block that covers cells and parts of cells, every fourth not.
    """
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
    target = Target((raw - top[:, None]).half())
    labels = torch.randint(0, C, (B, *SIZE), generator=generator, dtype=torch.uint8)
    labels[torch.rand(B, *SIZE, generator=generator) < 0.3] = 255
    weight = torch.rand(B, *SIZE, generator=generator) * (torch.rand(B, *SIZE, generator=generator) < 0.6)
    seen = normal(B, *FEATURE).square()
    stored = {MAXIMUM: top.float(), DEEP: normal(B, CHANNELS, *FEATURE).half(), MAP: (seen / seen.amax()).half()}
    features = {"head": normal(B, STUDENT_CHANNELS, *STUDENT_FEATURE).to(dtype)}
    logits = normal(B, C, *STUDENT, scale=2.0).to(dtype)
    counts = torch.rand(B, *SIZE, generator=generator) < 0.75
    counts[:, 5:, 20:] = False
    return term_batch(
        logits,
        features,
        labels,
        target,
        stored,
        weight if gated else None,
        SIZE,
        counts if counted else None,
        window,
        flip,
    )


# The oracle


def sampled(image: Tensor, batch: TermBatch, sample: int, grid: tuple[int, int]) -> Array:
    """(c, h, w): a map of the view at the cells of a window, tap by tap."""
    assert batch.rows.window is not None
    assert batch.rows.flip is not None
    result = np.zeros((image.shape[0], *grid))
    (y0, x0, y1, x1), values = batch.rows.window[sample].tolist(), image.double().numpy()
    _, height, width = values.shape
    for i in range(grid[0]):
        for j in range(grid[1]):
            column = grid[1] - 1 - j if batch.rows.flip[sample] else j
            y = (y0 + (i + 0.5) * (y1 - y0) / grid[0]) * height / VIEW[0] - 0.5
            x = (x0 + (column + 0.5) * (x1 - x0) / grid[1]) * width / VIEW[1] - 0.5
            y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
            top, left = int(y), int(x)
            below, right, dy, dx = min(top + 1, height - 1), min(left + 1, width - 1), y - top, x - left
            result[:, i, j] = (1 - dy) * ((1 - dx) * values[:, top, left] + dx * values[:, top, right]) + dy * (
                (1 - dx) * values[:, below, left] + dx * values[:, below, right]
            )
    return result


def shares(batch: TermBatch, sample: int, grid: tuple[int, int]) -> tuple[Array, Array]:
    """(h, w) twice: the counted share of every cell, and that times the gate, pixel by pixel."""
    assert batch.rows.window is not None
    assert batch.rows.flip is not None
    y0, x0, y1, x1 = batch.rows.window[sample].tolist()
    counted, gated = np.zeros(grid), np.zeros(grid)
    for row in range(SIZE[0]):
        for column in range(SIZE[1]):
            x = (SIZE[1] - 1 - column if batch.rows.flip[sample] else column) + 0.5
            inside = 0 <= y0 + (row + 0.5) * (y1 - y0) / SIZE[0] <= VIEW[0]
            inside = inside and 0 <= x0 + x * (x1 - x0) / SIZE[1] <= VIEW[1]
            inside = inside and (batch.counted is None or bool(batch.counted[sample, row, column]))
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
    result: Array = F.interpolate(image[None].double(), grid, mode="bilinear")[0].detach().numpy()
    return result


def softmax(x: Array, axis: int = 0) -> Array:
    e = np.exp(x - x.max(axis, keepdims=True))
    return np.asarray(e / e.sum(axis, keepdims=True))


def oracle(term: Term, batch: TermBatch) -> float:
    formula: Callable[[Term, TermBatch], float] = {
        "pseudo": pseudo_oracle,
        "at": at_oracle,
        "sp": sp_oracle,
        "hint": lambda term, batch: projected_oracle(
            term, batch, smooth_l1 if term.spec.distance == "smooth-l1" else lambda s, t: ((s - t) ** 2).mean(0)
        ),
        "cosine": lambda term, batch: projected_oracle(
            term, batch, lambda s, t: 1 - (s * t).sum(0) / np.sqrt((s * s).sum(0) * (t * t).sum(0))
        ),
        "cwd": cwd_oracle,
        "dist": dist_oracle,
        "dkd": dkd_oracle,
    }[term.kind]
    return formula(term, batch)


def logits_of(batch: TermBatch, sample: int, raw: bool = False) -> tuple[Array, Array]:
    assert batch.rows.target is not None
    teacher = batch.rows.target.values[sample].double()
    if raw:
        teacher = teacher + batch.rows.arrays[MAXIMUM][sample].double()
    return resized(batch.student.logits[sample], GRID), sampled(teacher, batch, sample, GRID)


def projected(term: Term, batch: TermBatch, sample: int) -> Array:
    """The student's features, resized first and then projected channel by channel; last by two layers."""
    parameters = {name: p.detach().double().numpy() for name, p in term.named_parameters()}

    def layer(features: Array, name: str) -> Array:
        weight = parameters[f"{name}.weight"][:, :, 0, 0]
        bias = parameters.get(f"{name}.bias", np.zeros(len(weight)))
        sums = [sum(w * f for w, f in zip(row, features, strict=True)) for row in weight]
        return np.stack(sums) + bias[:, None, None]

    if getattr(term.spec, "projector", None) == "mlp":
        hidden = layer(batch.student.features["head"][sample].detach().double().numpy(), "projection.0")
        gelu = hidden * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2))) / 2
        return resized(torch.from_numpy(layer(gelu, "projection.2")), FEATURE)
    features = resized(batch.student.features["head"][sample], FEATURE)
    return layer(features, "projection") if parameters else features


def smooth_l1(s: Array, t: Array) -> Array:
    d = np.abs(s - t)
    return np.asarray(np.where(d < 1, d**2 / 2, d - 0.5).mean(0))


def pseudo_oracle(term: Term, batch: TermBatch) -> float:
    """From sums over all counted pixels, and over those among them where the teacher is confident."""
    assert batch.rows.target is not None
    weight = np.ones(C) if term.class_weight is None else np.asarray(term.class_weight, np.float64)
    numbers, weights, totals = np.zeros(2), np.zeros(2), np.zeros(2)
    for sample in range(len(batch.student.logits)):
        p = softmax(sampled(batch.rows.target.values[sample], batch, sample, SIZE))
        q = softmax(resized(batch.student.logits[sample], SIZE))
        inside, gate = shares(batch, sample, SIZE)
        for i, j in np.argwhere(inside > 0.5):
            c = p[:, i, j].argmax()
            which = np.array([1, p[c, i, j] >= 0.6])
            numbers += which
            weights += which * weight[c]
            totals -= which * weight[c] * gate[i, j] * math.log(q[c, i, j])
    normalise = term.spec.normalise
    if normalise == "share":
        return float(totals[0] / numbers[0] * numbers[1] / numbers[0])
    return float(totals[1] / (weights[1] if normalise == "kept" else numbers[0]))


def at_oracle(term: Term, batch: TermBatch) -> float:
    total = count = 0.0
    for sample in range(B):
        if "statistics/at.seen" in term.arrays():
            teacher = batch.rows.arrays[MAP][sample].double()
        else:
            teacher = batch.rows.arrays[DEEP][sample].double().square().sum(0)
        t = sampled(teacher[None], batch, sample, FEATURE)[0]
        s = resized(batch.student.features["head"][sample].double().square().sum(0, keepdim=True), FEATURE)[0]
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
            own = batch.student.features["head"][sample].double().detach()
            grid = STUDENT_FEATURE if side == "student" else FEATURE
            q = own.numpy() if side == "student" else sampled(batch.rows.arrays[DEEP][sample], batch, sample, FEATURE)
            rows.append((q * np.sqrt(shares(batch, sample, grid)[1])).ravel())
        gram = np.array([[np.dot(a, b) for b in rows] for a in rows])
        grams.append(np.array([row / np.sqrt((row**2).sum()) for row in gram]))
    return float(((grams[0] - grams[1]) ** 2).sum() / B**2)


def projected_oracle(term: Term, batch: TermBatch, distance: Callable[[Array, Array], Array]) -> float:
    total = count = 0.0
    for sample in range(B):
        counted, gated = shares(batch, sample, FEATURE)
        t = sampled(batch.rows.arrays[DEEP][sample], batch, sample, FEATURE)
        if term.spec.standardise == "channels":
            mean, std = (moment.double().numpy()[:, None, None] for moment in MOMENTS)
            t = (t - mean) / std
        total += (gated * distance(projected(term, batch, sample), t)).sum()
        count += counted.sum()
    return total / count


def cwd_oracle(term: Term, batch: TermBatch) -> float:
    total, T = 0.0, term.spec.temperature
    for sample in range(B):
        if term.student_taps():
            s = projected(term, batch, sample)
            t = sampled(batch.rows.arrays[DEEP][sample], batch, sample, FEATURE)
        else:
            s, t = logits_of(batch, sample, raw=True)
        _, gated = shares(batch, sample, (s.shape[1], s.shape[2]))
        for channel in range(len(s)):
            p, q = (gated * np.exp(x[channel] / T) for x in (t, s))
            p, q = p[gated > 0] / p.sum(), q[gated > 0] / q.sum()
            total += (p * np.log(p / q)).sum() / len(s)
    return T**2 * total / B


def dist_oracle(term: Term, batch: TermBatch) -> float:
    T, spec = term.spec.temperature, term.spec
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
    beta, gamma = spec.beta, spec.gamma
    return T**2 * (beta * inter / count + gamma * intra)


def dkd_oracle(term: Term, batch: TermBatch) -> float:
    T, spec, total, count = term.spec.temperature, term.spec, 0.0, 0.0
    for sample in range(B):
        s, t = logits_of(batch, sample)
        counted, gated = shares(batch, sample, GRID)
        count += counted.sum()
        for i in range(GRID[0]):
            for j in range(GRID[1]):
                y = int(t[:, i, j].argmax())
                if "segmentation" in batch.rows.labels:
                    row, column = (
                        int((n + 0.5) * size / cells) for n, size, cells in zip((i, j), SIZE, GRID, strict=True)
                    )
                    label = int(batch.rows.label[sample, row, column])
                    y = y if label == 255 else label
                p, q = (softmax(x[:, i, j] / T) for x in (t, s))
                tckd = p[y] * math.log(p[y] / q[y]) + (1 - p[y]) * math.log((1 - p[y]) / (1 - q[y]))
                p, q = (np.delete(x, y) / np.delete(x, y).sum() for x in (p, q))
                alpha, beta = spec.alpha, spec.beta
                total += gated[i, j] * (alpha * tckd + beta * (p * np.log(p / q)).sum())
    return T**2 * total / count


# What tests do with a batch


def inputs_of(term: Term, batch: TermBatch) -> list[Tensor]:
    return [batch.student.features["head"]] if term.student_taps() else [batch.student.logits]


def gradients(term: Term, batch: TermBatch, count: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
    """The loss, and its gradients by what the student gives and by the term's own parameters."""
    tensors = [x.requires_grad_() for x in inputs_of(term, batch)] + list(term.parameters())
    loss = term(batch, count)
    return loss, list(torch.autograd.grad(loss, tensors))


def part_of(batch: TermBatch, part: slice) -> TermBatch:
    assert batch.rows.target is not None
    return term_batch(
        batch.student.logits.detach()[part],
        {tap: maps.detach()[part] for tap, maps in batch.student.features.items()},
        batch.rows.label[part],
        Target(batch.rows.target.values[part]),
        {path: array[part] for path, array in batch.rows.arrays.items()},
        None if batch.pixel_weight is None else batch.pixel_weight[part],
        SIZE,
        None if batch.counted is None else batch.counted[part],
        None if batch.rows.window is None else batch.rows.window[part],
        None if batch.rows.flip is None else batch.rows.flip[part],
    )
