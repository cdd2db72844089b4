"""Validation without labels: the feature loss of held-out records."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch

from kdcache.data import Augmentation
from kdcache.distill import Batch, DistillLoss
from kdcache.distill.outputs import unpacked
from kdcache.distill.terms import Term
from kdcache.models import SegmentationModel
from kdcache.models.native import in_eval_mode
from kdcache.store import Records
from kdcache.training.distributed import World
from kdcache.training.input.batch import row_of
from kdcache.training.input.cache_dataset import CacheDataset


class FeatureScore(NamedTuple):
    """The feature loss of held-out samples.

    Attributes:
        loss: the weighted sum of the feature terms.
        terms: name of a feature term -> its weighted loss.
        samples: number of held-out samples.
    """

    loss: float
    terms: dict[str, float]
    samples: int

    def to_json(self) -> dict[str, Any]:
        """Return the attributes as a dict for JSON: name -> value."""
        return self._asdict()


class FeatureJudge:
    """Computes the feature loss of a model on held-out samples, as a validation without labels (`--val-share`).

    Every process computes all samples, in one order and in batches of one size. So the loss does not depend on the
    number of processes. Calling the object with a model returns the `FeatureScore`.

    Args:
        dataset: the training's samples. Its held-out samples are used.
        criterion: the training's loss, with its projections as they are at the time of a call.
        batch_size: samples that go through a model at once.
        device: where the model is.
        world: the processes that train together.
    """

    def __init__(
        self, dataset: CacheDataset, criterion: DistillLoss, batch_size: int, device: torch.device, world: World
    ) -> None:
        self._dataset = CacheDataset(
            Records(dataset.cache, dataset.split),
            augment="replay",
            size=dataset.size,
            targets=dataset.heads,
            augmentation=Augmentation.off(),
            extras=dataset.extras,
            part=replace(dataset.part, judging=True, samples=None, labels=None),
            tasks=dataset.tasks,
            depth_zoom=dataset.depth_zoom,
        )
        self._criterion, self._batch_size, self._device, self._world = criterion, batch_size, device, world

    def __len__(self) -> int:
        return len(self._dataset)

    @torch.no_grad()
    def __call__(self, model: SegmentationModel) -> FeatureScore:
        """Return the model's score, computed in eval mode. Raises: KDCacheError for a record that cannot be read."""
        criterion = self._criterion
        totals: dict[str, float] = {}
        with self._world.together(), in_eval_mode(model), in_eval_mode(criterion), _alone(criterion):
            for batch in self._batches():
                batch = batch.to(self._device)
                assert batch.pixels is not None
                outputs = model(model.normalise(batch.pixels), criterion.student_taps)
                term_batch = criterion.term_batch(unpacked(outputs), batch, criterion.gate_of(batch))
                for name, term in _feature_terms(criterion):
                    totals[name] = totals.get(name, 0.0) + term.weight * float(term(term_batch)) * len(batch)
        terms = {name: total / len(self) for name, total in totals.items()}
        # The process that writes the run decides for all: buffers of batch normalisation may differ.
        return self._world.gather(FeatureScore(sum(terms.values()), terms, len(self)))[0]

    def _batches(self) -> Iterator[Batch]:
        for first in range(0, len(self), self._batch_size):
            numbers = range(first, min(first + self._batch_size, len(self)))
            batch = self._dataset.empty(len(numbers))
            for place, number in enumerate(numbers):
                self._dataset.draw_into(number, 0, np.random.default_rng(number), row_of(batch, place))
            yield batch


def _feature_terms(criterion: DistillLoss) -> Iterator[tuple[str, Term]]:
    """Yield name and term of each feature term with a weight above 0. Schedules and balances are ignored."""
    for name, term in zip(criterion.names[2:], criterion.terms, strict=True):
        if term.spec.reads_taps and term.weight > 0 and not term.measured:
            yield name, term


@contextmanager
def _alone(criterion: DistillLoss) -> Iterator[None]:
    """Keep terms from reading the rows of other processes, in a with block."""
    terms = criterion.terms
    gathers = [term.gather for term in terms]
    try:
        for term in terms:
            term.gather = None
        yield
    finally:
        for term, gather in zip(terms, gathers, strict=True):
            term.gather = gather
