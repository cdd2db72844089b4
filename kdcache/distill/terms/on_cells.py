"""The base of the terms that compare logits on the target's cells."""

from typing import Any

import torch
from torch import Tensor, nn

from kdcache.distill.terms.base import Term, TermBatch, TermSetup, grid_of, shared, unit, wide
from kdcache.distill.terms.features import Projected, tap_channels
from kdcache.settings import terms as specs
from kdcache.settings.term import MAXIMUM
from kdcache.tasks import SEGMENTATION
from kdcache_kernels import average_moments, densify, relation_loss, relation_moments
from kdcache_kernels.on_cells.reference import Seen, lay_logits
from kdcache_kernels.on_cells.relations import check_logits
from kdcache_kernels.reference import NanReachesAll, divide
from kdcache_kernels.target_cells import labels_at_centres
from kdcache_kernels.topk import compute_dtype


class OnCells(Term):
    """A base of loss terms that compare logits on the teacher's cells. Subclasses implement `loss`.

    If the student's logits have another size than the grid of cells, they are resized to it.
    """

    spec: specs.OfLogits | specs.Channels

    def prepare(self, batch: TermBatch) -> None:
        """Store how the student's logits of `batch` are resized to the target's cells, as text for `describe`.

        Without a target in the batch, nothing is stored.
        """
        if batch.rows.target is not None:
            self.note_resize(batch.student.logits, batch.rows.target.values)


def seen_on_cells(
    term: "OnCells | ChannelFeatures", batch: TermBatch, student_BCxx: Tensor, teacher_BChw: Tensor
) -> Seen:
    """Resample the student's and the teacher's maps to common cells, and divide them by the temperature.

    The cells divide the student's image into as many rows and columns as the teacher's map has.

    Args:
        term: gives the temperature.
        batch: gives windows and masks.
        student_BCxx: the student's logits or features, on any grid.
        teacher_BChw: the teacher's logits or features, with as many channels.
    Returns: both maps (B, C, h, w), each cell's counted share and weight, and whether a counted logit is not finite.
    Raises: ShapeError if the numbers of channels differ.
    """
    check_logits(student_BCxx, teacher_BChw)
    return lay_logits(
        student_BCxx,
        teacher_BChw,
        term.cells(batch, grid_of(teacher_BChw), wide(student_BCxx)),
        temperature=term.spec.temperature,
        view_size=term.targets.view_size,
        window_B4=batch.rows.window,
        flip_B=batch.rows.flip,
    )


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return p (log p - log q) + q - p for log-probabilities of equal shape. Each value is at least 0.

    The sum over the axis of the classes is KL(p || q). Equal distributions give exactly 0.
    """
    p, q = log_p.exp(), log_q.exp()
    return p * (log_p - log_q) + (q - p)


def mean_of(total: Tensor, count: Tensor, spoilt: Tensor, student: Tensor) -> Tensor:
    """Return total / count, and 0 if the count is 0. If `spoilt` is True, return NaN with a NaN gradient everywhere.

    Args:
        total: the sum of the losses, 0-dimensional.
        count: the denominator, 0-dimensional.
        spoilt: 0-dimensional bool, True if a counted logit is not finite.
        student: the student's logits, which get the NaN gradient.
    """
    mean: Tensor = NanReachesAll.apply(divide(total, count, spoilt), student)
    return mean


class Decoupled(OnCells):
    """The loss term `dkd` (decoupled knowledge distillation): T^2 * (alpha * TCKD + beta * NCKD), mean over cells.

    p is the probability of the target class at temperature T. TCKD is the KL between teacher and student of the pair
    (p, 1 - p). NCKD is the KL of the other classes, renormalised without the target class. The target class is the
    label of the pixel at the cell's centre. For void, it is the teacher's best class. Cells are weighted by their share
    of counted pixels, and by the gate.

    Default weight 0.02, alpha 1, beta 8, temperature 4. The weighted term's gradient is 1 to 1.3 times the
    cross-entropy's. The published weight is 1. Alpha, beta and temperature are the paper's for CIFAR-100. On ImageNet
    the authors use beta 0.5 and temperature 1. On CIFAR-100 their code raises the weight over the first 20 of 240
    epochs. `--distill-schedule warmup:N` raises it over N steps.
    Source: Zhao et al. 2022, arXiv 2203.08679, equation 7.
    """

    kind = "dkd"
    spec: specs.Decoupled

    def loss(self, batch: TermBatch, count: Tensor | None) -> Tensor:
        """Return T^2 * (alpha * TCKD + beta * NCKD), averaged over cells: 0-dimensional.

        TCKD is the KL between teacher and student of the target class against all others. NCKD is their KL among the
        other classes. The target class is the label at the cell's centre, or for void the teacher's best class.

        `count` is the denominator, 0-dimensional. None uses the batch's own number of counted cells.
        """
        assert batch.rows.target is not None  # by `reads_target`; all classes are kept, by `check_terms`
        maps = seen_on_cells(self, batch, batch.student.logits, batch.rows.target.values)
        classes_C11 = torch.arange(maps.teacher.shape[1], device=maps.teacher.device)[:, None, None]
        is_target_BChw = classes_C11 == _target_class(batch.rows.labels.get(SEGMENTATION), maps.teacher)
        log_t, log_s = (_split(x, is_target_BChw) for x in (maps.teacher, maps.student))
        tckd_Bhw, nckd_Bhw = (divergence(p, q).sum(1) for p, q in zip(log_t, log_s, strict=True))
        total = ((self.spec.alpha * tckd_Bhw + self.spec.beta * nckd_Bhw) * maps.cells.weight).sum()
        count = maps.cells.counted.sum() if count is None else count
        return self.spec.temperature**2 * mean_of(total, count, maps.spoilt, batch.student.logits)


def _target_class(labels_BHW: Tensor | None, teacher_BChw: Tensor) -> Tensor:
    """Return the label at each cell's centre, or the teacher's best class at void, (B, 1, h, w) int64."""
    best_B1hw = teacher_BChw.argmax(1, keepdim=True)
    if labels_BHW is None:
        return best_B1hw
    C, h, w = teacher_BChw.shape[1:]
    label_B1hw = labels_at_centres(labels_BHW, (h, w))[:, None].long()
    return torch.where((label_B1hw >= 0) & (label_B1hw < C), label_B1hw, best_B1hw)


def _split(logits_BChw: Tensor, is_target_BChw: Tensor) -> tuple[Tensor, Tensor]:
    """Return log-probabilities of (target, all others), and of the other classes among themselves (target: -1e30)."""
    rest_BChw = logits_BChw.masked_fill(is_target_BChw, -1e30)
    target_B1hw = logits_BChw.masked_fill(~is_target_BChw, 0).sum(1, keepdim=True)
    # Both relative to the largest of the rest: with large logits in it, logsumexp would be rounded as these are.
    top_B1hw = rest_BChw.detach().amax(1, keepdim=True)
    rest_BChw, target_B1hw = rest_BChw - top_B1hw, target_B1hw - top_B1hw
    pair_B2hw = torch.cat([target_B1hw, rest_BChw.logsumexp(1, keepdim=True)], 1).log_softmax(1)
    return pair_B2hw, rest_BChw.log_softmax(1)


class Relations(OnCells):
    """The loss term `dist`: T^2 * (beta * inter + gamma * intra), which compares how predictions correlate.

    `inter` and `intra` are means of 1 - Pearson correlation between the student's and the teacher's
    softmax(logits / T). `inter` correlates over the classes of a cell, and is averaged over cells. `intra` correlates
    over the cells of the whole batch, of all processes together, and is averaged over classes. Cells are weighted by
    their share of counted pixels, and by the gate. With a single class the loss is 0.

    Default weight 1, beta = gamma = 1, temperature 1 (the authors' for segmentation). The weighted term's gradient is 1
    to 1.6 times the cross-entropy's. Before a student has learnt anything, it is 11 times the cross-entropy's. Float64
    uses the reference implementation.
    Source: Huang et al. 2022, arXiv 2205.10536, equations 8 to 10.
    """

    kind = "dist"
    spec: specs.Relations

    def loss(self, batch: TermBatch, count: Tensor | None) -> Tensor:
        """Return T^2 * (beta * inter + gamma * intra), 0-dimensional. `inter` and `intra` are defined in the class.

        `count` is the denominator of `inter`, 0-dimensional. None uses the batch's own number of counted cells.
        """
        logits, options = self._logits(batch), self._options(batch)
        moments = None
        if self.gather is not None:
            moments = average_moments(self.of_all(relation_moments(*logits, **options)[None]))
        return relation_loss(
            *logits, **options, beta=self.spec.beta, gamma=self.spec.gamma, count=count, moments_6C=moments
        )

    def _logits(self, batch: TermBatch) -> tuple[Tensor, Tensor]:
        """Return the student's and the teacher's logits of all classes, each on its own grid."""
        target = batch.rows.target
        assert target is not None  # by `reads_target`
        if target.indices is None:
            return batch.student.logits, target.values
        num_classes, dtype = self.targets.num_classes, compute_dtype(batch.student.logits.dtype)
        impl = self._options(batch)["impl"]
        return batch.student.logits, densify(target.values, target.indices, target.tail, num_classes, dtype, impl=impl)

    def _options(self, batch: TermBatch) -> dict[str, Any]:
        """Return the arguments that `relation_loss` and `relation_moments` share."""
        return {
            "view_size": self.targets.view_size,
            "size": batch.rows.size,
            "temperature": self.spec.temperature,
            "window_B4": batch.rows.window,
            "flip_B": batch.rows.flip,
            "pixel_weight_BHW": batch.pixel_weight,
            "counted_BHW": batch.counted,
            "impl": "reference" if batch.student.logits.dtype == torch.float64 else self.impl,
        }


class Similarity(Term):
    """The loss term `sp`: compares which images of a batch have similar features, for student and teacher.

    Q has a tap's features, one row (c h w) per image. Each cell's features are multiplied by the root of its weight:
    its share of counted pixels, times the gate. G is the matrix Q Q^T with each of its rows divided by the row's norm.
    The loss is the sum of the squared differences between the teacher's and the student's G, divided by the squared
    number of images. The images of all processes count together. Student and teacher keep their own channels and cells.

    Default weight 50. The weighted term's gradient is 0.8 to 1.4 times the cross-entropy's in a batch of 8. The
    published weight is 3000, for classification in batches of 64 images.
    Source: Tung and Mori 2019, arXiv 1907.09682, section 3.
    """

    kind = "sp"

    def loss(self, batch: TermBatch, count: Tensor | None) -> Tensor:
        """Return the mean squared difference between the teacher's and the student's similarities of images.

        These are the matrices G in the docstring of the class. The mean is over all pairs of images, 0-dimensional.
        `count` is ignored.
        """
        student_Bchw = wide(batch.student.features[self._student_tap])
        teacher_Bchw = self.seen(batch, batch.rows.arrays[self._arrays[0]], student_Bchw.dtype)
        rows = student_Bchw.shape[0]
        student_bx, teacher_bx = (self.of_all(self._rows(batch, maps)) for maps in (student_Bchw, teacher_Bchw))
        b = student_bx.shape[0]
        difference_bb = unit(teacher_bx @ teacher_bx.mT, 1) - unit(student_bx @ student_bx.mT, 1)
        return shared(difference_bb.square().sum() / b**2, rows, b)

    def count(self, batch: TermBatch) -> Tensor:
        """Return 1, 0-dimensional, because `loss` itself divides by the squared number of images of all processes."""
        return wide(batch.student.logits).new_ones(())

    def _rows(self, batch: TermBatch, features_Bchw: Tensor) -> Tensor:
        """Return Q of this process's images.

        Each factor has the root of a cell's weight, so their product has the weight.
        """
        share_Bhw = self.cells(batch, grid_of(features_Bchw), features_Bchw).weight
        return (features_Bchw * share_Bhw.sqrt()[:, None]).flatten(1)


def images_counted(term: Term, batch: TermBatch) -> Tensor:
    """Return the number of images of a batch that have a counted pixel in a cell of `term`, 0-dimensional."""
    counted_Bhw = term.cells(batch, term.grid(batch), wide(batch.student.logits)).counted
    return _images_of(counted_Bhw)


def _images_of(counted_Bhw: Tensor) -> Tensor:
    return (counted_Bhw > 0).flatten(1).any(1).to(counted_Bhw.dtype).sum()


def compare_channels(
    term: "ChannelLogits | ChannelFeatures",
    batch: TermBatch,
    student_BCxx: Tensor,
    teacher_BChw: Tensor,
    count: Tensor | None,
) -> Tensor:
    """Return T^2 / C * sum over C channels of KL(p_t || p_s), averaged over images: 0-dimensional.

    p_t and p_s are the softmax of a channel / T over all cells of an image, for teacher and student.

    Args:
        term: gives the temperature T.
        batch: gives windows and masks.
        student_BCxx: the student's logits or features, on any grid.
        teacher_BChw: the teacher's logits or features, with as many channels.
        count: the denominator, 0-dimensional. None uses the batch's own number of images with a counted pixel.
    Raises: ShapeError if the numbers of channels differ.
    """
    maps = seen_on_cells(term, batch, student_BCxx, teacher_BChw)
    counted_Bhw, weight_Bhw = maps.cells
    log_t, log_s = (_over_cells(x, weight_Bhw) for x in (maps.teacher, maps.student))
    # A gate that is not finite is no weight above 0: `_over_cells` would leave it out without a word.
    spoilt = maps.spoilt | (~weight_Bhw.isfinite() & (counted_Bhw > 0)).any()
    total = divergence(log_t, log_s).sum(-1).mean(1).sum()
    count = _images_of(counted_Bhw) if count is None else count
    return term.spec.temperature**2 * mean_of(total, count, spoilt, student_BCxx)


def _over_cells(logits_BChw: Tensor, weight_Bhw: Tensor) -> Tensor:
    """Return log-probabilities (B, C, h w) of each image and channel over cells. Cells are weighted, above 0."""
    weight_B1n = weight_Bhw.flatten(1)[:, None]
    logits_BCn = logits_BChw.flatten(2) + torch.where(weight_B1n > 0, weight_B1n, 1).log()
    # A finite floor: an image without counted cells then has two equal distributions, where -inf would give NaN.
    return logits_BCn.masked_fill(weight_B1n <= 0, -1e30).log_softmax(-1)


class ChannelLogits(OnCells):
    """The loss term `cwd` of logits: compares at which cells each class is strong.

    For each class, p is the softmax of its logits / T over all cells of an image. Each cell's exponential is multiplied
    by the cell's share of counted pixels, weighted by the gate.

    The loss is T^2 / C times the sum over the C classes of KL(p of the teacher || p of the student). It is averaged
    over the images with a counted pixel. The cache must hold raw logits (`--raw-logits`).

    Default weight 0.15, temperature 4. The weighted term's gradient is 0.8 to 1 times the cross-entropy's. The
    published weight is 3.
    Source: Shu et al. 2021, arXiv 2011.13256, section 3.
    """

    kind = "cwd"
    spec: specs.Channels

    @classmethod
    def of(cls, spec: specs.Channels, setup: TermSetup) -> Term:
        """Make the module of the loss term `cwd`: for features if the settings `spec` name a tap, else for logits.

        `setup` has the inputs for making a loss term's module, such as the cache and the student's taps.
        """
        return ChannelFeatures(spec, setup) if spec.reads_taps else cls(spec, setup)

    def loss(self, batch: TermBatch, count: Tensor | None) -> Tensor:
        """Return the mean over images of T^2 / C times the sum over classes of KL, 0-dimensional.

        KL compares a class's softmax over the cells, teacher's and student's, as the class `ChannelLogits` describes.
        `count` is the denominator, 0-dimensional. None uses the batch's own number of images with a counted pixel.
        """
        assert batch.rows.target is not None  # by `reads_target`; all classes are kept, by `check_terms`
        teacher_BChw = batch.rows.target.values.to(compute_dtype(batch.student.logits.dtype))
        if MAXIMUM in self._arrays:
            teacher_BChw = teacher_BChw + batch.rows.arrays[MAXIMUM][:, None].to(teacher_BChw.dtype)
        return compare_channels(self, batch, batch.student.logits, teacher_BChw, count)

    def count(self, batch: TermBatch) -> Tensor:
        """Return the denominator of the loss: the number of images with a counted pixel, 0-dimensional."""
        return images_counted(self, batch)


class ChannelFeatures(Projected):
    """The loss term `cwd` of a tap: compares at which cells each channel of the features is strong.

    For each channel, p is the softmax of its values / T over all cells of an image. The loss is T^2 / C times the sum
    over the C channels of KL(p of the teacher || p of the student), averaged over the images with a counted pixel.

    If student and teacher have different numbers of channels, a trained 1x1 convolution projects the student's
    features.

    Default weight 3, temperature 4. The weighted term's gradient is 0.4 to 1.3 times the cross-entropy's. The published
    weight is 50.
    """

    spec: specs.Channels

    def __init__(self, spec: specs.Channels, setup: TermSetup) -> None:
        super().__init__(spec, setup)
        student, teacher = tap_channels(spec, setup)
        # A bias would move all positions alike, which a softmax over them does not see.
        self.projection = nn.Identity() if student == teacher else nn.Conv2d(student, teacher, 1, bias=False)

    def loss(self, batch: TermBatch, count: Tensor | None) -> Tensor:
        """Return the mean over images of T^2 / C times the sum over channels of KL, 0-dimensional.

        KL compares the teacher's and the student's softmax of a channel over the cells. `count` is the denominator,
        0-dimensional. None uses the batch's own number of images with a counted pixel.
        """
        student_Bchw = self.projection(wide(batch.student.features[self._student_tap]))
        teacher_Bchw = self.standardised(batch.rows.arrays[self._arrays[0]], student_Bchw.dtype)
        return compare_channels(self, batch, student_Bchw, teacher_Bchw, count)

    def count(self, batch: TermBatch) -> Tensor:
        """Return the denominator of the loss: the number of images with a counted pixel, 0-dimensional."""
        return images_counted(self, batch)
