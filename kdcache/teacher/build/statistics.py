"""Small maps beside the targets, made of a tap's features, for terms that need no more of it.

    at:TAP       sum of squares over a tap's channels, divided by the largest (Zagoruyko 2017, arXiv 1612.03928)

Shapes: B batch, c channels of a tap, h' w' its grid.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from kdcache.errors import RecipeError
from kdcache.settings.removed import STATISTICS, removal
from kdcache.store.format.manifest_models import Statistic
from kdcache.teacher.load.load import Teacher


def statistics_of(names: Sequence[str], features: Mapping[str, Tensor]) -> dict[str, Statistic]:
    """Return the manifest's entries for `--statistics`, which `taps_of` has checked.

    Args:
        features: tap -> (B, c, h', w'), of the taps that are named.
    """
    taps = [name.partition(":")[2] for name in dict.fromkeys(names)]
    return {f"at.{tap}": Statistic(kind="at", tap=tap, size=_grid(features[tap])) for tap in taps}


def _grid(feature_Bchw: Tensor) -> tuple[int, int]:
    height, width = feature_Bchw.shape[-2:]
    return height, width


def taps_of(names: Sequence[str], teacher: Teacher) -> list[str]:
    """Return the taps that statistics are made of.

    Raises: RecipeError for a name that is no statistic; ModelError for a tap that the teacher does not have.
    """
    taps = []
    for name in names:
        kind, _, tap = name.partition(":")
        if (gone := removal(kind, STATISTICS)) is not None:
            raise gone
        if kind != "at" or not tap:
            raise RecipeError(
                f"Unknown statistic: {name}",
                received=repr(name),
                remedy="Write at:TAP, for instance --statistics at:head.",
            )
        teacher.model.check_taps([tap])
        taps.append(tap)
    return list(dict.fromkeys(taps))


def measure(statistics: Mapping[str, Statistic], features: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return path -> (B, h', w') float16, on the same device.

    Args:
        statistics: those that `statistics_of` gave. features: tap -> (B, c, h', w').
    """
    return {f"statistics/{name}": attention(features[str(of.tap)]).half() for name, of in statistics.items()}


def attention(feature_Bchw: Tensor) -> Tensor:
    """Return sum_c F^2 divided by its largest, (B, h, w) float32 in 0..1; a map of zeros stays one."""
    feature = feature_Bchw.float()
    # Divided first: squares of large features would overflow.
    largest = feature.abs().amax((1, 2, 3), keepdim=True)
    energy = (feature / largest.where(largest > 0, 1)).square().sum(1)
    most = energy.amax((1, 2), keepdim=True)
    return energy / most.where(most > 0, 1)
