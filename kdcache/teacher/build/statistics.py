"""Statistics of a tap's features, for terms that need no more.

    at:TAP            sum of squares over a tap's channels, divided by the largest (Zagoruyko 2017, arXiv 1612.03928)
    similarity:TAP    cosines between the cells of a tap, in 8 bits

Shapes: B batch, c channels of a tap, h' w' its grid of n cells, p = n (n - 1) / 2 pairs of them.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from kdcache.errors import RecipeError
from kdcache.settings.removed import STATISTICS, removal
from kdcache.store.format.eight_bits import pairs
from kdcache.store.format.manifest_models import Statistic
from kdcache.teacher.load.load import Teacher

KINDS: tuple[Literal["at", "similarity"], ...] = ("at", "similarity")


def statistics_of(names: Sequence[str], features: Mapping[str, Tensor]) -> dict[str, Statistic]:
    """Return the manifest's entry for each statistic, by its name in the cache, such as `at.stage4`.

    Args:
        names: the statistics, such as `at:stage4`.
        features: tap -> features (B, c, h, w).
    Raises: RecipeError for similarities of a tap with one cell.
    """
    entries: dict[str, Statistic] = {}
    for name in names:
        kind, _, tap = name.partition(":")
        size = _grid(features[tap])
        if kind == "similarity" and not pairs(size):
            raise RecipeError(
                f"Cannot store similarities between the cells of {tap}: it has 1x1 cells",
                fix=f"Store {tap} itself with --features {tap}, for the term queue, or name a tap with a grid.",
            )
        entries[f"{kind}.{tap}"] = Statistic(kind="similarity" if kind == "similarity" else "at", tap=tap, size=size)
    return entries


def _grid(feature_Bchw: Tensor) -> tuple[int, int]:
    height, width = feature_Bchw.shape[-2:]
    return height, width


def taps_of(names: Sequence[str], teacher: Teacher) -> list[str]:
    """Return the taps that the statistics `names`, such as `at:stage4`, are computed from, each once.

    Raises: RecipeError for an unknown statistic; ModelError for a tap that the teacher does not have.
    """
    taps = []
    for name in names:
        kind, _, tap = name.partition(":")
        if (gone := removal(kind, STATISTICS)) is not None:
            raise gone
        if kind not in KINDS or not tap:
            raise RecipeError(
                f"Unknown statistic: {name!r}", fix="Write at:TAP or similarity:TAP, for example --statistics at:head"
            )
        teacher.model.check_taps([tap])
        taps.append(tap)
    return list(dict.fromkeys(taps))


def measure(statistics: Mapping[str, Statistic], features: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Compute statistics of a batch's features.

    Args:
        statistics: the manifest's entries, by name.
        features: tap -> features (B, c, h, w).
    Returns: path in the cache -> float16 tensor on the features' device: (B, h, w), or (B, n * (n - 1) / 2) for
        similarities between n cells.
    """
    computed = {}
    for name, statistic in statistics.items():
        feature = features[str(statistic.tap)]
        computed[f"statistics/{name}"] = (
            similarities(feature) if statistic.kind == "similarity" else attention(feature).half()
        )
    return computed


def similarities(feature_Bchw: Tensor) -> Tensor:
    """Return the cosines between all pairs of different cells of features (B, c, h, w), as whole numbers from 0 to 255.

    A number q stands for the cosine 2 q / 255 - 1. A cell of zeros has the cosine 0 with every other cell.

    Returns: float16 (B, n * (n - 1) / 2) for n = h * w cells: the upper triangle of the matrix of pairs, row by row.
        NaN for features that are not finite.
    """
    tokens_Bnc = feature_Bchw.float().flatten(2).mT
    # Divided first: squares of large features would overflow.
    largest_Bn1 = tokens_Bnc.abs().amax(2, keepdim=True)
    tokens_Bnc = F.normalize(tokens_Bnc / largest_Bn1.where(largest_Bn1 > 0, 1), dim=2)
    cells = tokens_Bnc.shape[1]
    rows, columns = torch.triu_indices(cells, cells, 1, device=tokens_Bnc.device)
    cosines_Bp = (tokens_Bnc @ tokens_Bnc.mT)[:, rows, columns]
    return ((cosines_Bp + 1) * 127.5).round().clamp(0, 255).half()


def attention(feature_Bchw: Tensor) -> Tensor:
    """Return each image's attention map from features (B, c, h, w).

    The map is the sum of squares over channels, divided by the largest such sum of the image.

    Returns: float32 (B, h, w), 0 to 1. A map of zeros stays zero.
    """
    feature = feature_Bchw.float()
    # Divided first: squares of large features would overflow.
    largest = feature.abs().amax((1, 2, 3), keepdim=True)
    energy = (feature / largest.where(largest > 0, 1)).square().sum(1)
    most = energy.amax((1, 2), keepdim=True)
    return energy / most.where(most > 0, 1)
