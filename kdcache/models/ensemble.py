"""Several teachers, or one under several renderings of an image, as one model.

The distribution is the weighted mean of probabilities over the members that have learnt classes, each the mean over its
renderings: mirrored and back, and at other scales. Published on Cityscapes with flips and scales: PSPNet-R101 79.8 to
81.0 mIoU.

Probabilities are averaged instead of logits, because a member with large logits would outvote the others. They are
averaged on the finest grid of all, to which each is resized bilinearly as its own head would.

Depth is the weighted mean of metres over the members that have such a head. That has the least squared error, and does
not depend on a parameterisation: the mean of raw outputs of `exp` is the geometric mean, which is never more. Each raw
output is resized before it becomes metres, and the mean becomes a raw output again. Renderings at other scales do not
count for depth, because an enlarged image shows a nearer scene.

Shapes: B batch, C classes, H W image, h w the finest grid, M members.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdcache.errors import ModelError, RecipeError, suggest
from kdcache.heads import HeadKind, RegressionHead, raw_of
from kdcache.models.native import Outputs, SegmentationModel
from kdcache.tasks import SEGMENTATION

_WORDS = ("flip", "scales")
_LARGEST_SCALE = 8
# A probability that float32 rounds to 0 would be -inf among finite logits, and stay so after any resize.
_LEAST = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Tta:
    """Test-time augmentation: a teacher's prediction is the mean over several renderings of an image.

    Attributes:
        flip: True to also use mirrored renderings.
        scales: factors of height and width. Each gives a rendering.
    """

    flip: bool = False
    scales: tuple[float, ...] = (1.0,)

    @classmethod
    def parse(cls, text: str) -> "Tta":
        """Return the test-time augmentation that a text names, such as `flip` or `flip,scales=0.75:1.0:1.25`.

        `flip` adds mirrored images, and `scales` lists the scales of the input. Both are optional.

        Raises: RecipeError for any other text.
        """
        flip, scales = cls.flip, cls.scales
        for part in text.split(","):
            word, _, value = (piece.strip() for piece in part.partition("="))
            if word == "flip" and not value:
                flip = True
            elif word == "scales":
                scales = _scales(value)
            else:
                raise RecipeError(
                    f"Unknown part {part!r} of --tta",
                    fix=suggest(
                        part,
                        _WORDS,
                        "Write flip, scales=S:S:..., or both, for example --tta flip,scales=0.75:1.0:1.25",
                        cutoff=0.5,
                    ),
                )
        return cls(flip, scales)


class EnsembleModel(SegmentationModel):
    """Several models that predict as one, for inference only. Their probabilities are averaged.

    The input is RGB in 0 to 1, and each member normalises it as in its own training. Features come from the first
    member only, because members have different channels.

    Args:
        members: models with the same classes and the same `align_corners`.
        weights: a finite number above 0 for each member. Only their ratios count. None weighs all equally.
        tta: renderings of each image to average over. None uses the image only.

    Raises:
        ModelError: members differ in the number of classes, in `align_corners`, or in a head that several have. Or a
            shared numeric head is not in metres.
        RecipeError: a weight is invalid, or members have a depth head and 1 is missing in `tta.scales`.
    """

    def __init__(
        self, members: Sequence[SegmentationModel], weights: Sequence[float] | None = None, tta: Tta | None = None
    ) -> None:
        first = members[0]
        classified = [member for member in members if SEGMENTATION in member.learnt_heads]
        for name, what, alike in (
            ("num_classes", "classes", classified),
            ("align_corners", "resize of logits (align_corners)", members),
        ):
            if len({getattr(member, name) for member in alike}) > 1:
                raise ModelError(
                    f"The teachers of the ensemble have different {what}: "
                    f"{', '.join(f'{member.spec} {getattr(member, name)}' for member in alike)}",
                    fix="Leave out those that differ. --class-map FILE maps classes.",
                )
        kinds = _common_heads(members, tta)
        super().__init__(
            spec=" + ".join(member.spec for member in members),
            num_classes=classified[0].num_classes if classified else 0,
            stride=min(member.stride for member in members),
            taps=first.taps,
            align_corners=first.align_corners,
            head_kinds=kinds,
        )
        self.mean, self.std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        self.see_as(*members)
        self.members = nn.ModuleList(members)
        self.tta = tta
        self.shares = _shares(weights, len(members))

    @property
    def parts(self) -> list[SegmentationModel]:
        """The members as a list."""
        return list(self.members)  # type: ignore[arg-type]

    def member(self, index: int) -> SegmentationModel:
        """Return a model with only the member at `index`, and with the ensemble's test-time augmentation."""
        return self.parts[index] if self.tta is None else EnsembleModel([self.parts[index]], tta=self.tta).eval()

    def plain(self) -> SegmentationModel:
        """Return this ensemble without test-time augmentation."""
        return EnsembleModel(self.parts, self.shares).eval()

    def check_taps(self, taps: Iterable[str]) -> None:
        """Check that the first member has these taps, because only it returns features.

        Raises: ModelError for an unknown tap.
        """
        self.parts[0].check_taps(taps)

    def forward(self, x_B3HW: Tensor, taps: Sequence[str] = ()) -> Outputs:
        """Return the weighted mean of the members' predictions, in the form of one model's outputs.

        Args:
            x_B3HW: float RGB in 0 to 1. Each member normalises it.
            taps: the taps of the first member whose features are returned.
        Returns: `heads`, with `segmentation` (B, C, h, w): the log of the mean probabilities. Another head, such as
        depth, has (B, 1, h', w'): its value after the head's nonlinearity is the mean of the members' values.
        `features` are the first member's, for the image itself and not for mirrored or scaled renderings.
        Raises: ModelError for unknown taps.
        """
        self.check_taps(taps)
        answers: dict[str, list[list[Tensor]]] = {name: [[] for _ in self.parts] for name in self.head_kinds}
        features: dict[str, Tensor] = {}
        for place, member in enumerate(self.parts):
            for x, mirrored, unscaled in _renderings(x_B3HW, self.tta or Tta()):
                plain = unscaled and not mirrored
                output = member(member.standardise(x), taps if plain and place == 0 else ())
                features |= output.features
                for name in member.learnt_heads:
                    if name == SEGMENTATION or unscaled:
                        head = output.heads[name].flip(-1) if mirrored else output.heads[name]
                        answers[name][place].append(head.float().softmax(1) if name == SEGMENTATION else head.float())
        if taps and not features:
            features = self.parts[0](self.parts[0].standardise(x_B3HW), taps).features
        heads = {name: self._mean_regression(name, answers[name]) for name in self.regressions}
        if SEGMENTATION in answers:
            shares, p_of_owners = self._owners(answers[SEGMENTATION])
            mean_BChw = _weighted(shares, self._means(p_of_owners))
            heads = {SEGMENTATION: mean_BChw.clamp(min=_LEAST).log(), **heads}
        return Outputs(heads, {tap: features[tap] for tap in taps})

    def _owners(self, passes_of_members: Sequence[Sequence[Tensor]]) -> tuple[list[float], list[Sequence[Tensor]]]:
        """Return the shares and the outputs of those members that have a head. The shares sum to 1."""
        owners = [place for place, passes in enumerate(passes_of_members) if passes]
        total = sum(self.shares[place] for place in owners)
        return [self.shares[place] / total for place in owners], [passes_of_members[place] for place in owners]

    def _means(self, passes_of_owners: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """Return each member's mean probabilities over its renderings, resized to the finest grid of all members."""
        passes = [p_BChw for of_owner in passes_of_owners for p_BChw in of_owner]
        grid = max(p_BChw.shape[-2] for p_BChw in passes), max(p_BChw.shape[-1] for p_BChw in passes)
        return [
            torch.stack([self.upsample(p_BChw, grid) for p_BChw in of_owner]).mean(0) for of_owner in passes_of_owners
        ]

    def _mean_regression(self, name: str, raw_of_members: Sequence[Sequence[Tensor]]) -> Tensor:
        """Return the raw output whose value is the weighted mean of the members' values, on their finest grid."""
        kind = self.regressions[name]
        shares, raw_of_owners = self._owners(raw_of_members)
        grid = tuple(max(raw.shape[axis] for raws in raw_of_owners for raw in raws) for axis in (-2, -1))
        values = [
            torch.stack([kind.values(self.upsample(raw, (grid[0], grid[1]))) for raw in raws]).mean(0)
            for raws in raw_of_owners
        ]
        mean = _weighted(shares, values)
        return raw_of(mean if kind.parameterisation == "identity" else mean.clamp(min=_LEAST), kind.parameterisation)


def _common_heads(members: Sequence[SegmentationModel], tta: Tta | None) -> dict[str, HeadKind]:
    """Return the heads of an ensemble: each trained head of any member.

    Raises:
        ModelError: heads with the same name differ, or several members have values of a unit other than metres.
        RecipeError: there are regressions, and the scales do not include 1.
    """
    kinds: dict[str, HeadKind] = {}
    for member in members:
        for name in member.learnt_heads:
            kind = member.head_kinds[name]
            if (earlier := kinds.setdefault(name, kind)) != kind and name != SEGMENTATION:
                raise ModelError(
                    f"The teachers of the ensemble have different heads {name}: {earlier}, and {kind} of {member.spec}",
                    fix="Build a cache for each teacher and join them: kdcache train-student --cache A --cache NAME=B",
                )
    for name, kind in kinds.items():
        if not isinstance(kind, RegressionHead):
            continue
        if kind.unit != "m" and sum(name in member.learnt_heads for member in members) > 1:
            raise ModelError(
                f"Cannot average {name} of several teachers in {kind.unit}: each has a scale and shift of its own",
                fix="Build a cache for each teacher and join them: kdcache train-student --cache A --cache NAME=B",
            )
        if tta is not None and 1.0 not in tta.scales:
            raise RecipeError(
                f"Cannot average {name} over scales {':'.join(f'{scale:g}' for scale in tta.scales)}: an enlarged "
                "image shows a nearer scene",
                fix="Add 1 to the scales.",
            )
    return kinds


def _renderings(x_B3HW: Tensor, tta: Tta) -> Iterator[tuple[Tensor, bool, bool]]:
    """Yield (image, True if it is mirrored, True if it has the size of the given image)."""
    for scale in tta.scales:
        size = [max(1, round(side * scale)) for side in x_B3HW.shape[-2:]]
        same = size == list(x_B3HW.shape[-2:])
        x = x_B3HW if same else F.interpolate(x_B3HW, size, mode="bilinear", antialias=True)
        yield x, False, same
        if tta.flip:
            yield x.flip(-1), True, same


def _weighted(shares: Sequence[float], values: Sequence[Tensor]) -> Tensor:
    """Return the weighted sum in float32, added in a fixed order so that results repeat exactly."""
    total = shares[0] * values[0].float()
    for share, value in zip(shares[1:], values[1:], strict=True):
        total += share * value.float()
    return total


def _shares(weights: Sequence[float] | None, members: int) -> tuple[float, ...]:
    """Return weights that sum to 1."""
    values = [1.0] * members if weights is None else list(weights)
    if len(values) == members and all(math.isfinite(weight) and weight > 0 for weight in values):
        shares = tuple(weight / max(values) for weight in values)
        shares = tuple(share / sum(shares) for share in shares)
        if min(shares) > 0:
            return shares
    raise RecipeError(
        f"Invalid --teacher-weights {', '.join(f'{weight:g}' for weight in values) or 'none'} for {members} teachers",
        fix=f"Give a number above 0 for each teacher, for example --teacher-weights {','.join(['1'] * members)}",
    )


def _scales(text: str) -> tuple[float, ...]:
    try:
        scales = tuple(float(part) for part in text.split(":"))
    except ValueError:
        scales = ()
    if not scales or len(set(scales)) < len(scales) or not all(0 < scale <= _LARGEST_SCALE for scale in scales):
        raise RecipeError(
            f"Invalid scales of --tta: {text!r}",
            fix=f"Give different numbers above 0, at most {_LARGEST_SCALE}, with colons between, for example --tta "
            "scales=0.75:1.0:1.25",
        )
    return scales
