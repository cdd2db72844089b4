"""The modules that compute the terms of a recipe."""

from collections.abc import Mapping, Sequence

from torch import Tensor
from torch.nn import Module, Parameter

from kdcache.distill.terms.auxiliary import Auxiliary
from kdcache.distill.terms.base import Term, TermTargets
from kdcache.distill.terms.depth import DEPTH_TERMS
from kdcache.distill.terms.features import Attention, Cosine, Hint, Projected
from kdcache.distill.terms.on_cells import ChannelFeatures, ChannelLogits, Decoupled, Relations, Similarity
from kdcache.distill.terms.overlap import Dice, Lovasz, Overlap
from kdcache.distill.terms.required_arrays import arrays_of, check_student, depth_head, resolve_taps
from kdcache.distill.terms.spec import TermSpec, compares_features, head_of, of_depth, reads_teacher
from kdcache.distill.terms.unlabelled.predictions import Adversarial, Discrimination, Discriminator, Entropy
from kdcache.distill.terms.unlabelled.pseudo import Confident, Consistency, Pseudo
from kdcache.errors import RecipeError
from kdcache.heads import DEPTH, SEGMENTATION, CategoricalHead, HeadKind, RegressionHead

_PROJECTED: dict[str, type[Projected]] = {"hint": Hint, "cosine": Cosine, "cwd": ChannelFeatures}
_WITHOUT_TEACHER: dict[str, type[Overlap | Entropy | Adversarial]] = {
    "dice": Dice,
    "lovasz": Lovasz,
    "entropy": Entropy,
    "adversarial": Adversarial,
}
_PSEUDO: dict[str, type[Pseudo]] = {"pseudo": Pseudo, "consistency": Consistency}
_PLAIN: dict[str, type[Term]] = {"at": Attention, "sp": Similarity, "dkd": Decoupled, "cwd": ChannelLogits}


def make_term(
    spec: TermSpec,
    *,
    targets: TermTargets,
    student_taps: Mapping[str, int],
    student_heads: Mapping[str, HeadKind] | None = None,
    align_corners: bool = False,
    impl: str = "auto",
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    moments: tuple[Tensor, Tensor] | None = None,
) -> Term:
    """Make the module of a term, on the CPU.

    Projections are drawn from torch's global generator.

    Args:
        targets: an open cache, or `LabelTargets`.
        student_taps: the student's features -> channels, most useful last.
        student_heads: what the student's heads are in training, by name; None is a head of segmentation alone.
        align_corners: whether the student's own final resize aligns corners.
        impl: which kernels compute pseudo labels and their loss, and `dist`, as in `distill_loss`.
        class_weight: (C,) of `pseudo` and `auxiliary`; None weighs every class 1.
        label_smoothing: of `auxiliary`.
        moments: (mean, standard deviation) of the teacher's channels, (c,) each, for a term that standardises them.
    Raises: RecipeError for a store that lacks what the term reads, naming the build flag, for unknown taps, and for a
        term of features or of depth where labels stand in the teacher's place, one that standardises without `moments`,
        and one whose head the student lacks or has of another kind.
    """
    if of_depth(spec) or not compares_features(spec):
        heads = student_heads or {SEGMENTATION: CategoricalHead(targets.num_classes)}
        check_student(spec.kind, heads, head_of(spec))
    spec = resolve_taps(spec, targets.manifest, list(student_taps))
    arrays = arrays_of(spec, targets.manifest)
    if spec.standardise == "channels" and moments is None:
        raise RecipeError(
            "a term that standardises the teacher's channels is given their mean and standard deviation",
            received=f"{spec.kind} with standardise=channels and no moments",
            remedy="make_term(..., moments=channel_moments(cache, path, samples)) of kdcache.training.criterion",
        )
    if spec.kind == "auxiliary":
        return Auxiliary(
            spec,
            targets,
            align_corners=align_corners,
            impl=impl,
            class_weight=class_weight,
            label_smoothing=label_smoothing,
        )
    if spec.kind in _PSEUDO:
        return _PSEUDO[spec.kind](
            spec, targets, arrays, align_corners=align_corners, impl=impl, class_weight=class_weight
        )
    if of_depth(spec):
        assert student_heads is not None, "check_student refuses a student without a head of depth"
        student = student_heads[DEPTH]
        assert isinstance(student, RegressionHead), "check_student refuses another kind"
        taught = reads_teacher(spec)
        return DEPTH_TERMS[spec.kind](
            spec,
            targets,
            student=student,
            teacher=depth_head(targets.manifest) if taught else None,
            align_corners=align_corners,
            teacher_align_corners=taught and targets.manifest.heads[DEPTH].align_corners,
        )
    if spec.kind in _WITHOUT_TEACHER:
        return _WITHOUT_TEACHER[spec.kind](spec, targets, align_corners=align_corners)
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
    if spec.kind == "dist":
        return Relations(spec, targets, arrays, impl=impl)
    return _PLAIN[spec.kind](spec, targets, arrays)


def with_companions(terms: Sequence[Term]) -> list[Term]:
    """The terms, each adversarial one followed by its discriminator's loss, consistency by its confident share."""
    all_terms: list[Term] = []
    for term in terms:
        all_terms.append(term)
        if isinstance(term, Adversarial):
            all_terms.append(Discrimination(term))
        if isinstance(term, Consistency):
            all_terms.append(Confident(term))
    return all_terms


def discriminator_parameters(criterion: Module) -> list[Parameter]:
    """Parameters of the discriminators of a loss, which learn beside the student by a rate of their own."""
    found = (module for module in criterion.modules() if isinstance(module, Discriminator))
    return [parameter for module in found for parameter in module.parameters()]
