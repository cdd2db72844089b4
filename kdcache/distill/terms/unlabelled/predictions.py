"""Terms on predictions only: a student's uncertainty, and whether predictions reveal an image's stream."""

import math
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdcache.distill.terms.base import Term, TermBatch, TermSetup, divide, wide
from kdcache.settings import terms as specs
from kdcache_kernels.target_cells import resize


class Entropy(Term):
    """The loss term `entropy`: the mean over pixels of -sum(p log p) / log C, so that predictions become more certain.

    p are the student's probabilities of the C classes at the label's size. The term reads no label and no target.
    Pixels without a label count, but pixels outside the image do not. The term needs memory for several tensors
    (B, C, H, W). Default weight 0.001.

    Source: Vu et al. 2019 (ADVENT), arXiv 1811.12833, equation 3, divided by log C as in the authors' code.
    """

    kind = "entropy"
    reads_shown = True

    def loss(self, batch: TermBatch, count: Tensor | None) -> Tensor:
        """Return the mean entropy, in 0..1, over the pixels that show the image, 0-dimensional.

        `count` is the denominator, 0-dimensional. None uses the batch's own number of such pixels.
        """
        logits_BCHW = resize(wide(batch.student.logits), batch.rows.size, self.student_align_corners)
        log_BCHW = logits_BCHW.log_softmax(1)
        entropy_BHW = -(log_BCHW.exp() * log_BCHW).sum(1) / math.log(logits_BCHW.shape[1])
        if batch.shown is not None:
            entropy_BHW = torch.where(batch.shown, entropy_BHW, 0)
        return divide(entropy_BHW.sum(), self.count(batch) if count is None else count)

    def count(self, batch: TermBatch) -> Tensor:
        """Return the denominator of the loss: the number of pixels that show the image, 0-dimensional."""
        like = wide(batch.student.logits)
        if batch.shown is None:
            return like.new_full((), len(like) * batch.rows.size[0] * batch.rows.size[1])
        return batch.shown.sum().to(like.dtype)


class Discriminator(nn.Sequential):
    """A network that tells two streams apart by the student's probability maps.

    It maps (B, C, H, W), with C = `num_classes`, to (B, 1, h, w): one number for each patch of the image. It has five
    4x4 convolutions of stride 2, or fewer if a side of `size` (H, W) has less than 32 pixels. Channels double from 64.
    The optimizer trains the discriminator with the learning rate `RATE` and Adam's betas `BETAS`. Gradient clipping
    leaves it out.

    Source: Tsai et al. 2018 (AdaptSegNet), arXiv 1802.10349, section 3.3, and the authors' code for `RATE` and `BETAS`.
    """

    RATE: ClassVar[float] = 1e-4
    BETAS: ClassVar[tuple[float, float]] = (0.9, 0.99)

    def __init__(self, num_classes: int, size: tuple[int, int]) -> None:
        halvings = max(1, min(5, int(math.log2(min(size)))))
        channels = [num_classes, *(64 * 2**number for number in range(halvings - 1)), 1]
        layers: list[nn.Module] = []
        for before, after in pairwise(channels):
            layers += [nn.Conv2d(before, after, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        super().__init__(*layers[:-1])


class Adversarial(Term):
    """The loss term `adversarial`: makes the student's predictions on this stream look like those on another stream.

    A discriminator D learns to tell the two streams apart by the student's probability maps q at the label's size. The
    student learns to deceive D. With `loss=vanilla` the term is the mean over patches of -log D(q), with
    `loss=least-squares` the mean of (D(q) - 1)^2. `against` names the other stream. D learns in the same step, through
    a second term that `companions` returns. With `head=auxiliary`, q are the auxiliary head's probabilities, and D is
    another network.

    Default weight 0.001, or 0.01 with least squares. With `head=auxiliary` the default is a fifth of these weights, as
    in the authors' code.
    Source: Tsai et al. 2018 (AdaptSegNet), arXiv 1802.10349, equations 4 and 5; least squares: Mao et al. 2017, arXiv
        1611.04076, which AdaptSegNet's code uses only without the auxiliary head.
    """

    kind = "adversarial"
    spec: specs.Adversarial

    def __init__(self, spec: specs.Adversarial, setup: TermSetup) -> None:
        super().__init__(spec, setup)
        self.square = spec.loss == "least-squares"
        self.kind = _named(spec.kind, self.head)
        self.discriminator = Discriminator(setup.targets.num_classes, setup.targets.view_size)

    def companions(self) -> tuple[Term, ...]:
        """Return a tuple with one term, which trains the discriminator."""
        return (Discrimination(self),)

    def loss(self, batch: TermBatch, count: Tensor | None) -> Tensor:
        """Return the student's loss, 0-dimensional: small if the discriminator takes this stream for the other stream.

        The other stream is the one that the setting `against` names. Only the student gets a gradient, not the
        discriminator. `count` is ignored: the loss is a plain mean over the discriminator's outputs.
        """
        fixed = {name: parameter.detach() for name, parameter in self.discriminator.named_parameters()}
        passes = torch.func.functional_call(
            self.discriminator, fixed, (self._probabilities(self._own(batch), batch.rows.size),)
        )
        return self._distance(passes, 1.0)

    def discrimination(self, batch: TermBatch) -> Tensor:
        """Return the discriminator's own loss, 0-dimensional: its mean over this stream and the other stream.

        The other stream is the one that the setting `against` names. The student gets no gradient.
        """
        rows = (self._own(batch), self._against(batch))
        own_patches, other_patches = (
            self.discriminator(self._probabilities(logits.detach(), batch.rows.size)) for logits in rows
        )
        return (self._distance(own_patches, 0.0) + self._distance(other_patches, 1.0)) / 2

    def count(self, batch: TermBatch) -> Tensor:
        """Return 1, a 0-dimensional tensor, as the denominator of the loss, which is a mean already.

        The discriminator gives equally many numbers for every image. So the mean over equal parts of a batch is the
        whole batch's mean, without a common denominator.
        """
        return wide(batch.student.logits).new_ones(())

    def _own(self, batch: TermBatch) -> Tensor:
        """Return the logits for this stream's rows."""
        return batch.student.logits if self.head is None else batch.student.heads[self.head]

    def _against(self, batch: TermBatch) -> Tensor:
        """Return the logits for the other stream's rows."""
        others = (
            batch.student.others[self.spec.against] if self.spec.against else next(iter(batch.student.others.values()))
        )
        return others.logits if self.head is None else others.heads[self.head]

    def _probabilities(self, logits: Tensor, size: tuple[int, int]) -> Tensor:
        dtype = next(self.discriminator.parameters()).dtype
        return resize(wide(logits), size, self.student_align_corners).softmax(1).to(dtype)

    def _distance(self, passes: Tensor, label: float) -> Tensor:
        """Return the mean distance of the discriminator's outputs from a label: 0 for this stream, 1 for the other."""
        labels = torch.full_like(passes, label)
        return F.mse_loss(passes, labels) if self.square else F.binary_cross_entropy_with_logits(passes, labels)


class Discrimination(Term):
    """The loss term, with weight 1, that trains the discriminator of the loss term `adversary`."""

    def __init__(self, adversary: Adversarial) -> None:
        super().__init__(adversary.spec, adversary.setup)
        self.kind, self.weight = _named("discriminator", self.head), 1.0
        self._adversary = (adversary,)  # in a tuple: its parameters are the other term's

    @property
    def teaches_student(self) -> bool:
        """False, because only the discriminator gets a gradient."""
        return False

    def loss(self, batch: TermBatch, count: Tensor | None) -> Tensor:
        """Return the discriminator's loss, 0-dimensional: small if it tells the two streams apart.

        `count` is ignored.
        """
        return self._adversary[0].discrimination(batch)

    def count(self, batch: TermBatch) -> Tensor:
        """Return 1, a 0-dimensional tensor, because `loss` is a plain mean with equally many terms for every image."""
        return wide(batch.student.logits).new_ones(())


def discriminator_parameters(criterion: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of all discriminators in a loss. They have their own learning rate."""
    found = (module for module in criterion.modules() if isinstance(module, Discriminator))
    return [parameter for module in found for parameter in module.parameters()]


def _named(part: str, head: str | None) -> str:
    """Return a term's name with its head: `adversarial-auxiliary`, or `adversarial` for segmentation."""
    return part if head is None else f"{part}-{head}"
