"""Grey and void pixels are as pixels that are not there: to KL and to every term, through DistillLoss.

Every grid divides the image evenly and logits have its size, so that nothing on the left half depends on the right.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kdcache.distill import SEGMENTATION, Batch, DistillLoss, Gate, Target
from kdcache.distill.terms import loss_term, make_term
from kdcache.errors import DataError, RecipeError
from kdcache.models import Outputs

B, C, HEIGHT, WIDTH, CELL = 4, 5, 12, 16, 4
LEFT = WIDTH // 2
SPECS = [
    loss_term("pseudo"),
    loss_term("at", teacher_tap="deep"),
    loss_term("sp", teacher_tap="deep"),
    loss_term("hint", teacher_tap="deep"),
    loss_term("cosine", teacher_tap="deep"),
    loss_term("cwd"),
    loss_term("dist"),
    loss_term("dkd"),
    loss_term("pseudo", quantile=0.3),
    loss_term("cwd", teacher_tap="deep"),
]
OVER_CELLS = ("kl", "pseudo", "at", "hint", "cosine", "dkd")


def criterion_of(width: int, **options: Any) -> DistillLoss:
    manifest = SimpleNamespace(
        heads={"segmentation": SimpleNamespace(k=C, classes=C, raw=True)},
        features={"deep": SimpleNamespace(channels=6, size=(HEIGHT // CELL, width // CELL))},
    )
    store: Any = SimpleNamespace(num_classes=C, view_size=(HEIGHT, width), align_corners=False, manifest=manifest)
    torch.manual_seed(5)
    terms = [make_term(spec, targets=store, student_taps={"head": 4}).double() for spec in SPECS]
    return DistillLoss(store, **{"ce_weight": 0.0, "kl_weight": 1.0, "further": terms, "impl": "reference", **options})


class Scene:
    """The columns below `width` of a random batch."""

    def __init__(self, width: int = WIDTH) -> None:
        generator = torch.Generator().manual_seed(1)

        def normal(channels: int, cell: int = 1) -> Tensor:
            x = torch.randn(B, channels, HEIGHT // cell, WIDTH // cell, generator=generator, dtype=torch.float64)
            return x[..., : width // cell]

        self.width = width
        raw, self.logits, self.head, self.deep = 3 * normal(C), 2 * normal(C), normal(4, CELL), normal(6, CELL).half()
        self.labels = torch.randint(0, C, (B, HEIGHT, WIDTH), generator=generator, dtype=torch.uint8)[..., :width]
        self.top = raw.amax(1)
        self.values = (raw - self.top[:, None]).half()
        self.inside: Tensor | None = None
        self.arrays = {"targets/segmentation/max": self.top.float(), "features/deep": self.deep}

    def greyed(self, x1: int = LEFT) -> Scene:
        self.inside = torch.tensor([0.0, 0.0, HEIGHT, x1], dtype=torch.float64).repeat(B, 1)
        return self

    def voided(self) -> Scene:
        self.labels = self.labels.clone()
        self.labels[..., LEFT:] = 255
        return self

    def batch(self) -> Batch:
        window = torch.tensor([0.0, 0.0, HEIGHT, self.width], dtype=torch.float64).repeat(B, 1)
        return Batch(
            labels={SEGMENTATION: self.labels},
            targets={SEGMENTATION: Target(self.values)},
            arrays=self.arrays,
            window=window,
            flip=torch.zeros(B, dtype=torch.bool),
            inside=self.inside,
        )

    @property
    def outputs(self) -> Outputs:
        return Outputs({"segmentation": self.logits}, {"head": self.head})

    def losses(self, **options: Any) -> dict[str, float]:
        criterion = criterion_of(self.width, **options)
        terms = criterion(self.outputs, self.batch()).terms
        assert tuple(terms) == criterion.names
        return {name: value.item() for name, value in terms.items() if name != "ce"}


def by_formula(scene: Scene) -> dict[str, float]:
    """Means over all pixels or cells of a scene, in float64."""
    s, t, label = scene.logits, scene.values.double(), scene.labels.long()
    hint = criterion_of(scene.width).further[3]
    mine, theirs = hint.projection(scene.head), scene.deep.double()
    cosine = criterion_of(scene.width).further[4].projection(scene.head)
    sure, best = t.softmax(1).max(1)
    return {
        "kl": 4 * F.kl_div((s / 2).log_softmax(1), (t / 2).softmax(1), reduction="none").sum(1).mean().item(),
        "pseudo": F.cross_entropy(s, best, reduction="none")[sure >= 0.7].mean().item(),
        "hint": (mine - theirs).square().mean().item(),
        "cosine": (1 - F.cosine_similarity(cosine, theirs)).mean().item(),
        "dkd": decoupled(s / 4, t / 4, label).mean().item(),
    }


def decoupled(s: Tensor, t: Tensor, label: Tensor) -> Tensor:
    """T^2 (TCKD + 8 NCKD) of every pixel at T = 4."""
    p, q = t.softmax(1), s.softmax(1)
    p_y, q_y = (x.gather(1, label[:, None]) for x in (p, q))
    tckd = p_y * (p_y / q_y).log() + (1 - p_y) * ((1 - p_y) / (1 - q_y)).log()
    p, q = p / (1 - p_y), q / (1 - q_y)
    nckd = (p * (p / q).log()).scatter(1, label[:, None], 0).sum(1, keepdim=True)
    return 16 * (tckd + 8 * nckd)


@pytest.mark.parametrize("how", ["grey", "void"])
def test_what_does_not_count_is_as_what_is_not_there(how: str) -> None:
    actual = Scene().greyed().losses() if how == "grey" else Scene().voided().losses(distill_void=False)
    left = Scene(LEFT)
    assert actual == pytest.approx(left.losses(), rel=1e-6)
    assert {name: actual[name] for name in by_formula(left)} == pytest.approx(by_formula(left), rel=1e-6)
    assert all(abs(actual[name] / value - 1) > 1e-3 for name, value in Scene().losses().items()), "the halves differ"


def test_void_pixels_that_teach_count() -> None:
    assert Scene().voided().losses()["hint"] == Scene().losses()["hint"]


@pytest.mark.parametrize("grey", [False, True], ids=["whole", "grey"])
def test_a_gate_does_not_change_what_a_mean_is_over(grey: bool) -> None:
    """Half of everything: a mean halves, a distribution over positions or a product that is normalised does not."""
    scene = Scene().greyed() if grey else Scene()
    plain, gated = scene.losses(), scene.losses(gate=Gate(class_weight=torch.full((C,), 0.5)))
    for name, value in plain.items():
        kind = name.split("_")[0]
        if kind == "dist":  # between cells of classes a half, over cells all
            assert 0.5 * value < gated[name] < value
        else:
            assert gated[name] == pytest.approx((0.5 if kind in OVER_CELLS else 1) * value, rel=1e-6), name


def test_a_cell_that_counts_in_part_weighs_by_that_part() -> None:
    """The grey begins amid the third of four columns of cells."""
    scene = Scene().greyed(2 * CELL + 1)
    mine = criterion_of(WIDTH).further[3].projection(scene.head)
    per_cell = (mine - scene.deep.double()).square().mean(1)
    share = torch.tensor([1, 1, 1 / CELL, 0], dtype=torch.float64).expand_as(per_cell)
    assert scene.losses()["hint"] == pytest.approx(((per_cell * share).sum() / share.sum()).item(), rel=1e-6)


def test_terms_are_told_what_a_batch_lacks() -> None:
    scene = Scene()
    criterion = criterion_of(scene.width, kl_weight=0.0)
    batch = scene.batch()
    with pytest.raises(RecipeError, match="dist, dkd, pseudo"):
        criterion(scene.outputs, replace(batch, targets={}))
    with pytest.raises(RecipeError, match=r"extras=criterion\.arrays") as caught:
        criterion(scene.outputs, replace(batch, arrays={}))
    assert "features/deep" in caught.value.problem
    with pytest.raises(RecipeError, match="lack features: head"):
        criterion(scene.logits, batch)
    with pytest.raises(DataError, match="window="):
        criterion(scene.outputs, replace(batch, labels={SEGMENTATION: scene.labels[:, : HEIGHT // 2]}))
    with pytest.raises(RecipeError, match="dist, dkd, pseudo"):
        criterion.counts(replace(batch, targets={}))
    with pytest.raises(RecipeError, match=r"extras=criterion\.arrays"):
        criterion.counts(replace(batch, arrays={}))
    with pytest.raises(DataError, match="window="):
        criterion.counts(replace(batch, labels={SEGMENTATION: scene.labels[:, : HEIGHT // 2]}))
    without = replace(batch, targets=None)
    alone = criterion(scene.logits, without)
    assert {value.item() for value in alone.terms.values()} == {0.0}
    assert alone.loss.item() == 0.0
    assert not criterion.parts(scene.logits, without)


def test_a_term_of_weight_0_needs_no_array() -> None:
    scene = Scene()
    criterion, batch = criterion_of(scene.width), replace(scene.batch(), arrays={})
    for term in criterion.further:
        term.weight = 0.0
    counts = criterion.counts(batch)
    assert [count.item() for count in counts.terms] == [0.0] * len(SPECS)
    for losses in (criterion(scene.logits, batch), criterion(scene.logits, batch, counts)):
        assert losses.loss.item() == losses.kl.item() > 0
        assert {value.item() for name, value in losses.terms.items() if name != "kl"} == {0.0}
    assert list(criterion.parts(scene.logits, batch)) == ["kl"]


def test_what_shows_the_image_is_half_open() -> None:
    """Of pixels whose centres lie on its edges, the first row and column count."""
    window = torch.tensor([[0.0, 0.0, 4.0, 4.0]], dtype=torch.float64)
    inside = torch.tensor([[1.0, 1.0, 3.0, 3.0]], dtype=torch.float64)
    form: Any = SimpleNamespace(view_size=(4, 4))
    for flip, expected in ((False, [[[True, False], [False, False]]]), (True, [[[False, True], [False, False]]])):
        shown = Batch(window=window, flip=torch.tensor([flip]), inside=inside).shown(form, (2, 2))
        assert shown is not None
        assert shown.tolist() == expected
