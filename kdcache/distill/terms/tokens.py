"""Terms that compare similarities: between the cells of an image, and between an image and earlier ones.

Neither compares channels, so student and teacher keep their own. Both need whole views.
Source of both: LightlyTrain's method `distillationv3`, without its live teacher and without mixed inputs.
"""

import torch
from torch import Tensor, nn

from kdcache.distill.batch import Batch
from kdcache.distill.terms.base import Term, TermBatch, TermSetup, divide, grid_of, unit, wide
from kdcache.distill.terms.features import tap_channels
from kdcache.distill.terms.on_cells import divergence, images_counted
from kdcache.settings import terms as specs
from kdcache_kernels.target_cells import resize

_NOTHING = -1e30
"""In the place of the logarithm of 0: two distributions over nothing are then equal, where -inf would give NaN."""


class TokenSimilarity(Term):
    """The loss term `similarity`: how similar the cells of an image are to each other, for student and teacher.

    For each cell, p is softmax(cosine / T) over all cells of the image, where the cosine compares the features of two
    cells. The loss is the mean over cells of KL(p of the teacher || p of the student).

    The student's features are resized to the teacher's cells. Each cell is weighted by its share of counted pixels, and
    in the mean also by the gate. The teacher's cosines come from the array statistics/similarity.<tap> (8 bits) or
    features/<tap>.

    Default weight 1, as published, and temperature T = 0.07. The weighted term's gradient is 5.4 times the
    cross-entropy's in the first step, and 0.9 times in step 51. It is 0.4 times in steps 101 to 201, and 0.2 times in
    steps 551 to 651 (student EfficientNet-Lite0 on CamVid, docs/dev/decisions/0014).
    """

    kind = "similarity"
    spec: specs.TokenSimilarity
    pair: Tensor

    def __init__(self, spec: specs.TokenSimilarity, setup: TermSetup) -> None:
        super().__init__(spec, setup)
        room, _, name = setup.arrays[0].partition("/")
        height, width = getattr(setup.targets.manifest, room)[name].size
        self._grid, cells = (height, width), height * width
        # Where the cosine of two cells lies in the stored row, to whose end a 1 is added for a cell with itself.
        pair_nn = torch.full((cells, cells), cells * (cells - 1) // 2)
        rows, columns = torch.triu_indices(cells, cells, 1)
        pair_nn[rows, columns] = pair_nn[columns, rows] = torch.arange(len(rows))
        self.register_buffer("pair", pair_nn, persistent=False)

    def prepare(self, batch: TermBatch) -> None:
        """Store how the student's features of `batch` are resized to the teacher's cells, as text for `describe`."""
        student = batch.student.features[self._student_tap]
        self.note_resize(student, student.new_empty(self._grid, device="meta"))

    def grid(self, batch: TermBatch) -> tuple[int, int]:
        """Return the (h, w) of the teacher's cells. They come from the cache's manifest, and `batch` is ignored."""
        return self._grid

    def loss(self, batch: TermBatch, count: Tensor | None) -> Tensor:
        """Return the mean over cells of KL(p of the teacher || p of the student), 0-dimensional.

        p is softmax(cosine / temperature) of a cell's features with the features of each cell of the same image.
        `count` is the denominator, 0-dimensional. None uses the batch's own number of counted cells.
        """
        student_Bchw = wide(batch.student.features[self._student_tap])
        cells = self.cells(batch, self._grid, student_Bchw)
        student_Bnn = cosines(resize(student_Bchw, self._grid))
        log_s, log_t = (
            self._log_rows(x_Bnn, cells.counted.flatten(1))
            for x_Bnn in (student_Bnn, self._teacher(batch, student_Bnn))
        )
        loss_Bn = divergence(log_t, log_s).sum(2)
        return self.mean(loss_Bn.view_as(cells.counted), cells, count)

    def _teacher(self, batch: TermBatch, like: Tensor) -> Tensor:
        """Return the teacher's cosines (B, n, n)."""
        stored = batch.rows.arrays[self._arrays[0]].to(like.dtype)
        if stored.ndim == 4:
            return cosines(stored)
        values = torch.cat([stored * (2 / 255) - 1, stored.new_ones(len(stored), 1)], 1)
        return values[:, self.pair]

    def _log_rows(self, cosines_Bnn: Tensor, share_Bn: Tensor) -> Tensor:
        """Return log-probabilities over the cells, which enter by their share."""
        logits_Bnn = cosines_Bnn / self.spec.temperature + share_Bn.masked_fill(share_Bn == 0, 1).log()[:, None]
        return logits_Bnn.masked_fill(share_Bn[:, None] == 0, _NOTHING).log_softmax(2)


def cosines(features_Bchw: Tensor) -> Tensor:
    """Return the cosine (B, n, n) of every pair of the n = h w cells of an image. A cell of zeros has cosine 0."""
    tokens_Bnc = unit(features_Bchw.flatten(2).mT, 2)
    return tokens_Bnc @ tokens_Bnc.mT


class Queue(Term):
    """The loss term `queue`: how similar an image is to the last images, for student and teacher.

    The term keeps a queue of the teacher's summaries of the last images. A summary is one feature vector per image. p
    is softmax(cosine / T) of an image's summary with all summaries in the queue. The loss is the mean over images of
    KL(p of the teacher || p of the student).

    The student's summary is the mean of its features over the counted pixels, weighted by the gate and projected by a
    trained linear layer. Checkpoints include the queue. It is empty in the first step, whose loss is 0. In your own
    loop, call `criterion.after_step(batch)` after the optimizer's step.

    Default weight 1, T = 0.07 and 1024 summaries. The weighted term's gradient is 0.2 to 0.5 times the cross-entropy's
    (docs/dev/decisions/0014).
    """

    kind = "queue"
    spec: specs.Queue
    ring: Tensor
    seen_images: Tensor

    def __init__(self, spec: specs.Queue, setup: TermSetup) -> None:
        super().__init__(spec, setup)
        student, teacher = tap_channels(spec, setup)
        self.projection = nn.Linear(student, teacher)
        self.register_buffer("ring", torch.zeros(spec.length, teacher))
        self.register_buffer("seen_images", torch.zeros((), dtype=torch.int64))

    def prepare(self, batch: TermBatch) -> None:
        """Remember the channels of the student's projection, for `describe`."""
        tap, layer = self._student_tap, self.projection
        self._description = (
            f"{self.kind}: the mean of the student's {tap} is projected from {layer.in_features} to "
            f"{layer.out_features} channels"
        )

    def loss(self, batch: TermBatch, count: Tensor | None) -> Tensor:
        """Return the mean over images of KL(p of the teacher || p of the student), 0-dimensional.

        p is softmax(cosine / temperature) of an image's feature vector with each vector in the queue.
        `count` is the denominator, 0-dimensional. None uses the batch's own number of images with a counted pixel.
        """
        student_Bchw = wide(batch.student.features[self._student_tap])
        weight_Bhw = self.cells(batch, grid_of(student_Bchw), student_Bchw).weight
        pooled_Bc = divide((student_Bchw * weight_Bhw[:, None]).sum((2, 3)), weight_Bhw.sum((1, 2))[:, None])
        both = self.projection(pooled_Bc), batch.rows.arrays[self._arrays[0]].to(student_Bchw.dtype).flatten(1)
        log_s, log_t = (self._log_rows(unit(x_Bc, 1)) for x_Bc in both)
        loss_B = divergence(log_t, log_s).sum(1).masked_fill(weight_Bhw.sum((1, 2)) == 0, 0)
        return divide(loss_B.sum(), self.count(batch) if count is None else count)

    def count(self, batch: TermBatch) -> Tensor:
        """Return the denominator of the loss: the number of images with a counted pixel, 0-dimensional."""
        return images_counted(self, batch)

    def after_step(self, batch: Batch) -> None:
        """Replace the oldest summaries in the queue by those of a batch, from all processes.

        A summary is the teacher's feature vector of one image.
        """
        rows_Nc = self.of_all(unit(wide(batch.arrays[self._arrays[0]]).flatten(1), 1))
        length, total = len(self.ring), len(rows_Nc)
        kept = min(length, total)
        places = (self.seen_images + torch.arange(total - kept, total, device=rows_Nc.device)) % length
        self.ring.index_copy_(0, places, rows_Nc[total - kept :].to(self.ring.dtype))
        self.seen_images += total

    def _log_rows(self, unit_Bc: Tensor) -> Tensor:
        """Return log-probabilities over the summaries that the queue already holds."""
        logits_BN = unit_Bc @ self.ring.to(unit_Bc.dtype).mT / self.spec.temperature
        missing_N = torch.arange(len(self.ring), device=self.ring.device) >= self.seen_images
        return logits_BN.masked_fill(missing_N, _NOTHING).log_softmax(1)
