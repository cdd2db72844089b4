"""Small maps beside the targets: where the teacher's features are large, how sure it is, whether its members agree.

    at:TAP       sum of squares over a tap's channels, divided by the largest (Zagoruyko 2017, arXiv 1612.03928)
    confidence   largest probability        entropy   in nats        agreement   of an ensemble's members

Shapes: B batch, C classes, c channels of a tap, h w of the target, h' w' of the tap.
"""

import difflib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kdcache.errors import RecipeError
from kdcache.models import AGREEMENT, EnsembleModel
from kdcache.store.format.manifest_models import Statistic
from kdcache.teacher.load.forward import area_mean
from kdcache.teacher.load.load import Teacher

_OF_THE_DISTRIBUTION = ("confidence", "entropy", "agreement")


def statistics_of(names: Sequence[str], grid: tuple[int, int], features: Mapping[str, Tensor]) -> dict[str, Statistic]:
    """The manifest's entries for `--statistics`, which `taps_of` has checked.

    Args:
        grid: (h, w) of the target.
        features: tap -> (B, c, h', w'), of the taps that are named.
    """
    statistics = {}
    for name in dict.fromkeys(names):
        kind, _, tap = name.partition(":")
        if kind == "at":
            height, width = features[tap].shape[-2:]
            statistics[f"at.{tap}"] = Statistic(kind="at", tap=tap, size=(height, width))
        else:
            statistics[kind] = Statistic(kind=kind, size=grid)  # type: ignore[arg-type]
    return statistics


def taps_of(names: Sequence[str], teacher: Teacher) -> list[str]:
    """The taps that statistics are made of.

    Raises: RecipeError for a name that is no statistic, and for agreement where there is none; ModelError for a tap
        that the teacher does not have.
    """
    taps = []
    for name in names:
        kind, colon, tap = name.partition(":")
        if kind == "at" and tap:
            teacher.model.check_taps([tap])
            taps.append(tap)
        elif colon or kind not in _OF_THE_DISTRIBUTION:
            near = ["at:TAP"] if kind == "at" else difflib.get_close_matches(kind, _OF_THE_DISTRIBUTION, n=1)
            raise RecipeError(
                f"a statistic is at:TAP, {', '.join(_OF_THE_DISTRIBUTION[:-1])} or {_OF_THE_DISTRIBUTION[-1]}",
                received=repr(name),
                remedy=f"did you mean {near[0]}?" if near else "for instance --statistics at:head,confidence",
            )
        if kind == "agreement":
            if not isinstance(teacher.model, EnsembleModel) or len(teacher.model.members) < 2 or teacher.folds:
                raise RecipeError(
                    "agreement is that of several teachers on the same image",
                    received=f"{teacher.origin}" + (", each of which predicts its own fold" if teacher.folds else ""),
                    remedy="give --teacher several times and no --folds, or leave agreement out",
                )
            taps.append(AGREEMENT)
    return list(dict.fromkeys(taps))


def measure(
    statistics: Mapping[str, Statistic], logits_BChw: Tensor | None, features: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Path -> (B, h, w) float16, on the same device.

    Args:
        logits_BChw: as they are stored, whatever their constant; None where no statistic is of the distribution.
        features: tap -> (B, c, h', w'), AGREEMENT among them when a statistic needs it.
    """
    log_p = torch.empty(0) if logits_BChw is None else logits_BChw.float().log_softmax(1)
    maps = {}
    for name, statistic in statistics.items():
        if statistic.kind == "at":
            assert statistic.tap is not None
            maps[name] = attention(features[statistic.tap])
        elif statistic.kind == "confidence":
            maps[name] = log_p.amax(1).exp()
        elif statistic.kind == "entropy":
            # A class that the teacher rules out, -inf, has no share in it.
            maps[name] = -(log_p.exp() * log_p.clamp(min=torch.finfo(log_p.dtype).min)).sum(1)
        else:
            maps[name] = area_mean(features[AGREEMENT], statistic.size)[:, 0]
    return {f"statistics/{name}": value.half() for name, value in maps.items()}


def attention(feature_Bchw: Tensor) -> Tensor:
    """sum_c F^2 divided by its largest, (B, h, w) float32 in 0..1; a map of zeros stays one."""
    feature = feature_Bchw.float()
    # Divided first: squares of large features would overflow.
    largest = feature.abs().amax((1, 2, 3), keepdim=True)
    energy = (feature / largest.where(largest > 0, 1)).square().sum(1)
    most = energy.amax((1, 2), keepdim=True)
    return energy / most.where(most > 0, 1)
