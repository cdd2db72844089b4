"""Feature terms: compare the student's features, projected to the teacher's channels, with the teacher's."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdcache.distill.terms.base import Term, TermBatch, TermSetup, divide, grid_of, unit, wide
from kdcache.errors import RecipeError
from kdcache.settings import terms as specs
from kdcache.settings.term import FeatureTerm
from kdcache_kernels.target_cells import Cells, resize

TINY = 1e-24
"""A sum of squares up to here is taken to be 0."""


class Projected(Term):
    """A base of loss terms that project the student's features to the teacher's channels, by a trained projector.

    Subclasses implement `loss`.

    | projector | layers |
    | --- | --- |
    | `linear` | a 1x1 convolution |
    | `mlp` | two 1x1 convolutions with a GELU between, as wide as the teacher's features |

    With `standardise=channels`, the mean of each of the teacher's channels is subtracted from its values. The result is
    divided by the channel's standard deviation. Checkpoints include these means and deviations.
    Source: Theia, Shang et al. 2024, arXiv 2407.20179; PHI-S, Ranzinger et al. 2024, arXiv 2410.01680, compares ways to
        standardise.
    """

    spec: specs.Projected | specs.Channels
    teacher_mean: Tensor | None
    teacher_std: Tensor | None

    def __init__(self, spec: specs.Projected | specs.Channels, setup: TermSetup) -> None:
        """Make the projector.

        Raises: RecipeError if channels are to be standardised and `setup.moments` is None.
        """
        super().__init__(spec, setup)
        options = spec if isinstance(spec, specs.Projected) else specs.Projected()
        if options.standardise == "channels" and setup.moments is None:
            raise RecipeError(
                f"{spec.kind} with standardise=channels lacks the mean and standard deviation of the teacher's "
                "channels",
                fix="Use make_term(..., moments=channel_moments(cache, tap, samples)) of kdcache.training.criterion",
            )
        student, teacher = tap_channels(spec, setup)
        self.projection: nn.Module = nn.Conv2d(student, teacher, 1)
        if options.projector == "mlp":
            self.projection = nn.Sequential(self.projection, nn.GELU(), nn.Conv2d(teacher, teacher, 1))
        mean_c, std_c = setup.moments or (None, None)
        self.register_buffer("teacher_mean", mean_c)
        self.register_buffer("teacher_std", std_c)

    def prepare(self, batch: TermBatch) -> None:
        """Remember the shapes of the student's and the teacher's features, for the text that `describe` returns."""
        student, teacher = batch.student.features[self._student_tap], batch.rows.arrays[self._arrays[0]]
        projected = f"projected from {student.shape[1]} to {teacher.shape[1]} channels"
        self.note_resize(student, teacher, then="" if isinstance(self.projection, nn.Identity) else projected)

    def both_features(self, batch: TermBatch) -> tuple[Tensor, Tensor, Cells]:
        """Return features (B, c, h, w) of student and teacher on the teacher's cells, and the `Cells` of the batch.

        The student's features are projected and resized. The teacher's features are cut to the batch's windows. The
        `Cells` say how much each cell counts and weighs in a mean.
        """
        student_Bchw = wide(batch.student.features[self._student_tap])
        teacher_Bchw = self.seen(batch, batch.rows.arrays[self._arrays[0]], student_Bchw.dtype)
        teacher_Bchw = self.standardised(teacher_Bchw, student_Bchw.dtype)
        grid = grid_of(teacher_Bchw)
        cells = self.cells(batch, grid, student_Bchw)
        # Before the resize, with which a 1x1 convolution commutes: the student's own grid is mostly the smaller one.
        return resize(self.projection(student_Bchw), grid), teacher_Bchw, cells

    def standardised(self, teacher_Bchw: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the teacher's features in `dtype`: minus the channel's mean, divided by its standard deviation.

        Without the option `standardise=channels`, the features are returned unchanged, in their own dtype.
        """
        if self.teacher_mean is None or self.teacher_std is None:
            return teacher_Bchw
        mean_c11, std_c11 = (x.to(dtype)[:, None, None] for x in (self.teacher_mean, self.teacher_std))
        return (teacher_Bchw.to(dtype) - mean_c11) / std_c11


def tap_channels(spec: FeatureTerm, setup: TermSetup) -> tuple[int, int]:
    """Return the numbers of channels of the student's tap and of the teacher's tap, from `setup`.

    The settings `spec` of the loss term must name both taps.
    """
    assert spec.student_tap is not None and spec.teacher_tap is not None, "taps are filled in"  # noqa: PT018
    return setup.student_taps[spec.student_tap], setup.targets.manifest.features[spec.teacher_tap].channels


class Hint(Projected):
    """The loss term `hint`: the mean squared difference between the student's projected features and the teacher's.

    The mean is over channels and cells. FitNets uses half the sum instead. With `distance=smooth-l1`, a difference d
    counts as d^2 / 2 if |d| is at most 1, and else as |d| - 1/2. Unless `standardise=channels` is given, the loss
    depends on the scale of the teacher's features.

    Default weight 1. The weighted term's gradient is 0.2 to 0.7 times the cross-entropy's.
    Source: Romero et al. 2015, arXiv 1412.6550, section 2.2; smooth L1: Girshick 2015, arXiv 1504.08083, equation 3.
    """

    kind = "hint"
    spec: specs.Hint

    def loss(self, batch: TermBatch, count: Tensor | None) -> Tensor:
        """Return the mean squared difference between the student's projected features and the teacher's, 0-dimensional.

        The mean is over channels and cells. With the option `distance=smooth-l1` it is the mean smooth L1 difference.
        `count` is the denominator, 0-dimensional. None uses the batch's own number of counted cells.
        """
        student_Bchw, teacher_Bchw, cells = self.both_features(batch)
        if self.spec.distance == "smooth-l1":
            return self.mean(F.smooth_l1_loss(student_Bchw, teacher_Bchw, reduction="none").mean(1), cells, count)
        return self.mean((student_Bchw - teacher_Bchw).square().mean(1), cells, count)


class Cosine(Projected):
    """The loss term `cosine`: the mean over cells of 1 - cos(projected student's features, teacher's features).

    A cell of zeros on either side has the cosine 0 and no gradient.

    Default weight 2. The weighted term's gradient is 0.5 to 0.8 times the cross-entropy's.
    Source: PyTorch's knowledge distillation tutorial, whose feature loss compares whole images instead of cells.
    """

    kind = "cosine"

    def loss(self, batch: TermBatch, count: Tensor | None) -> Tensor:
        """Return the mean over cells of 1 - the cosine between student's and teacher's feature vector, 0-dimensional.

        The student's features are projected to the teacher's channels before. `count` is the denominator,
        0-dimensional. None uses the batch's own number of counted cells.
        """
        student_Bchw, teacher_Bchw, cells = self.both_features(batch)
        return self.mean(1 - cosine(student_Bchw, teacher_Bchw), cells, count)


def cosine(a_Bchw: Tensor, b_Bchw: Tensor) -> Tensor:
    """Return the cosine (B, h, w) of two maps' channels at each cell. A cell of zeros has cosine 0."""
    ab, aa, bb = ((x * y).sum(1) for x, y in ((a_Bchw, b_Bchw), (a_Bchw, a_Bchw), (b_Bchw, b_Bchw)))
    usable = (aa > TINY) & (bb > TINY)
    return torch.where(usable, ab * torch.where(usable, aa, 1).rsqrt() * torch.where(usable, bb, 1).rsqrt(), 0)


class Attention(Term):
    """The loss term `at`: the mean squared difference between the attention maps of student and teacher.

    An attention map is the sum over channels of the squared features, divided by its L2 norm over the image's cells.
    The teacher's map comes from features/<tap>, or from statistics/at.<tap>. The student's map is resized to the
    teacher's cells. Each cell is weighted by its share of counted pixels, in the norm and in the mean. In the mean, the
    gate also weighs it.

    The default weight is h w / 2 for a teacher's map of h x w cells. Then the term is at most 1, because the
    mean squared difference of two maps with norm 1 is at most 2 / (h w). At 72 x 72 cells the default weight is 2592
    (published: 1000 to 10000). The weighted term's gradient is 0.6 times the cross-entropy's for features of the
    decoder, and 2 to 4 times for deep features.
    Source: Zagoruyko and Komodakis 2017, arXiv 1612.03928, section 3.1.
    """

    kind = "at"

    def __init__(self, spec: specs.Attention, setup: TermSetup) -> None:
        super().__init__(spec, setup)
        if spec.weight is None:
            room, _, name = setup.arrays[0].partition("/")
            h, w = getattr(setup.targets.manifest, room)[name].size
            self.weight = h * w / 2

    def prepare(self, batch: TermBatch) -> None:
        """Remember the size of both models' maps, from which `describe` says how the attention is resized."""
        self.note_resize(
            batch.student.features[self._student_tap], batch.rows.arrays[self._arrays[0]], "the attention of "
        )

    def loss(self, batch: TermBatch, count: Tensor | None) -> Tensor:
        """Return the mean squared difference of the attention maps over cells, 0-dimensional.

        `count` is the denominator, 0-dimensional. None uses the batch's own number of counted cells.
        """
        student_Bhw = energy(wide(batch.student.features[self._student_tap]))
        stored = batch.rows.arrays[self._arrays[0]].to(student_Bhw.dtype)
        teacher_Bhw = stored if stored.ndim == 3 else energy(stored)
        teacher_Bhw = self.seen(batch, teacher_Bhw[:, None], student_Bhw.dtype)[:, 0]
        grid = grid_of(teacher_Bhw)
        cells = self.cells(batch, grid, student_Bhw)
        share_Bhw = cells.counted.sqrt()
        maps = (resize(student_Bhw[:, None], grid)[:, 0], teacher_Bhw)
        # Both carry the root of the share, so that the square carries the share; the gate comes on top.
        student_Bhw, teacher_Bhw = (unit(a * share_Bhw, (1, 2)) for a in maps)
        gate_Bhw = cells.weight / cells.counted.masked_fill(cells.counted == 0, 1)
        total = ((student_Bhw - teacher_Bhw).square() * gate_Bhw).sum()
        return divide(total, cells.counted.sum() if count is None else count)


def energy(features_Bchw: Tensor) -> Tensor:
    """Return the sum of squares over the channels, (B, h, w)."""
    return features_Bchw.square().sum(1)
