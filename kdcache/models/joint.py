"""Heads of several models as those of one: segmentation of one teacher, depth of another.

Pixels are normalised to 0..1 here, and by each model as it was trained. Features are the first model's.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from kdcache.errors import ModelError
from kdcache.heads import SEGMENTATION, HeadKind
from kdcache.models.native import Outputs, SegmentationModel


@dataclass(frozen=True)
class Part:
    """A model, and the names of those of its heads that are used."""

    model: SegmentationModel
    heads: tuple[str, ...]


class JointModel(SegmentationModel):
    """Several models as one, for inference: each answers with the heads that are taken from it.

    Args:
        parts: models with different heads and equal `align_corners`; the first gives the features.
    Raises: ModelError for a head that a model does not have or has not learnt, and for models that resize otherwise.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        kinds: dict[str, HeadKind] = {}
        for part in parts:
            for name in part.heads:
                if name not in part.model.head_kinds:
                    raise ModelError(
                        "a head is taken from a teacher that has it",
                        received=f"{name!r} of {part.model.spec} with {', '.join(part.model.head_kinds) or 'none'}",
                        remedy="give --teacher NAME=TEACHER with a head of that teacher",
                    )
                if name in part.model.untrained:
                    raise ModelError(
                        "a head is taken from a teacher that has learnt it",
                        received=f"{name!r} of {part.model.spec}, whose run learnt nothing of it",
                        remedy="give the run of a training that learns it, or take another head from this one",
                    )
                kinds[name] = part.model.head_kinds[name]
        if len({part.model.align_corners for part in parts}) > 1:
            raise ModelError(
                "teachers of one store resize alike (align_corners)",
                received=", ".join(f"{part.model.spec} {part.model.align_corners}" for part in parts),
                remedy="build a store of each",
            )
        first, *others = parts
        super().__init__(
            spec=", ".join([first.model.spec, *(f"{'+'.join(p.heads)}={p.model.spec}" for p in others)]),
            num_classes=next((part.model.num_classes for part in parts if SEGMENTATION in part.heads), 0),
            stride=min(part.model.stride for part in parts),
            taps=first.model.taps,
            align_corners=first.model.align_corners,
            head_kinds=kinds,
        )
        self.mean, self.std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        self.see_as(*(part.model for part in parts))
        self.models = nn.ModuleList(part.model for part in parts)
        self._heads = tuple(part.heads for part in parts)

    @property
    def parts(self) -> list[Part]:
        """The models and the heads that are taken from each."""
        return [Part(model, heads) for model, heads in zip(self.models, self._heads, strict=True)]  # type: ignore[arg-type]

    def check_taps(self, taps: Iterable[str]) -> None:
        self.parts[0].model.check_taps(taps)

    def forward(self, x_B3HW: Tensor, taps: Sequence[str] = ()) -> Outputs:
        """Heads of all models; `x_B3HW` is RGB in 0..1 (see `normalise`)."""
        heads: dict[str, Tensor] = {}
        features: dict[str, Tensor] = {}
        for place, part in enumerate(self.parts):
            outputs = part.model(part.model.standardise(x_B3HW), taps if place == 0 else ())
            heads |= {name: outputs.heads[name] for name in part.heads}
            features |= outputs.features
        return Outputs(heads, features)
