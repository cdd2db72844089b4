"""The modules that compute the terms of a recipe."""

from collections.abc import Mapping

from torch import Tensor

from kdcache.distill.terms.attention import Attention
from kdcache.distill.terms.base import Term, TermTargets
from kdcache.distill.terms.channels import ChannelFeatures, ChannelLogits
from kdcache.distill.terms.decoupled import Decoupled
from kdcache.distill.terms.features import Cosine, Hint, Projected
from kdcache.distill.terms.needs import arrays_of, resolve_taps
from kdcache.distill.terms.overlap import Dice, Lovasz, Overlap
from kdcache.distill.terms.pseudo import Pseudo
from kdcache.distill.terms.relations import Relations
from kdcache.distill.terms.similarity import Similarity
from kdcache.distill.terms.spec import TermSpec, compares_features
from kdcache.errors import RecipeError

_PROJECTED: dict[str, type[Projected]] = {"hint": Hint, "cosine": Cosine, "cwd": ChannelFeatures}
_ON_LABELS: dict[str, type[Overlap]] = {"dice": Dice, "lovasz": Lovasz}
_PLAIN: dict[str, type[Term]] = {
    "at": Attention,
    "sp": Similarity,
    "cwd": ChannelLogits,
    "dist": Relations,
    "dkd": Decoupled,
}


def make_term(
    spec: TermSpec,
    *,
    targets: TermTargets,
    student_taps: Mapping[str, int],
    align_corners: bool = False,
    impl: str = "auto",
    class_weight: Tensor | None = None,
    moments: tuple[Tensor, Tensor] | None = None,
) -> Term:
    """Make the module of a term, on the CPU.

    Projections are drawn from torch's global generator.

    Args:
        targets: an open cache, or `LabelTargets`.
        student_taps: the student's features -> channels, most useful last.
        align_corners: whether the student's own final resize aligns corners.
        impl: which kernels compute `pseudo` (see `kdcache_kernels.distill_loss`).
        class_weight: (C,) of `pseudo`; None weighs every class 1.
        moments: (mean, standard deviation) of the teacher's channels, (c,) each, for a term that standardises them.
    Raises: RecipeError for a store that lacks what the term reads, naming the build flag, for unknown taps, and for a
        term of features where labels stand in the teacher's place, or one that standardises without `moments`.
    """
    spec = resolve_taps(spec, targets.manifest, list(student_taps))
    arrays = arrays_of(spec, targets.manifest)
    if spec.standardise == "channels" and moments is None:
        raise RecipeError(
            "a term that standardises the teacher's channels is given their mean and standard deviation",
            received=f"{spec.kind} with standardise=channels and no moments",
            remedy="make_term(..., moments=channel_moments(cache, path, samples)) of kdcache.train.criterion",
        )
    if spec.kind == "pseudo":
        return Pseudo(spec, targets, arrays, align_corners=align_corners, impl=impl, class_weight=class_weight)
    if spec.kind in _ON_LABELS:
        return _ON_LABELS[spec.kind](spec, targets, align_corners=align_corners)
    if spec.kind in _PROJECTED and compares_features(spec):
        assert spec.student_tap is not None and spec.teacher_tap is not None  # noqa: PT018 - just resolved
        return _PROJECTED[spec.kind](
            spec,
            targets,
            arrays,
            student_channels=student_taps[spec.student_tap],
            teacher_channels=targets.manifest.features[spec.teacher_tap].channels,
            moments=moments,
        )
    return _PLAIN[spec.kind](spec, targets, arrays)
