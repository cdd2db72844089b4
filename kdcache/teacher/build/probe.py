"""The teacher before anything is written: what it gives for a few first views."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch

from kdcache.data import Split
from kdcache.errors import ModelError, RecipeError
from kdcache.models import EnsembleModel, NativeOutput, SegmentationModel
from kdcache.store.format.manifest_models import View
from kdcache.teacher.build.options import BuildOptions
from kdcache.teacher.build.render import render_records
from kdcache.teacher.build.statistics import taps_of
from kdcache.teacher.load.ensemble import folds_of_split
from kdcache.teacher.load.forward import coarser, not_finite, out_of_memory, teach
from kdcache.teacher.load.load import Teacher


class Asking:
    """The teacher on first views of a split: what it gives, before anything is written.

    Attributes:
        grid: (h, w) that logits are averaged to; None for the teacher's own.
    """

    def __init__(self, split: Split, teacher: Teacher, view: View, options: BuildOptions) -> None:
        self.split, self.teacher, self._view, self._options = split, teacher, view, options
        self._folds = folds_of_split(teacher, split)
        self.grid: tuple[int, int] | None = None
        if teacher.folds is not None and options.features:
            raise RecipeError(
                "features of all records come from one network, or nothing could be learnt from them together",
                received=f"{', '.join(options.features)}, and {teacher.folds} teachers of a fold each",
                remedy="leave out --features, or --folds",
            )
        teacher.model.check_taps(options.features)
        self._taps = tuple(dict.fromkeys([*options.features, *taps_of(options.statistics, teacher)]))

    def probe(self) -> NativeOutput:
        """What the teacher gives for the first record: shapes of everything. Raises ModelError, RecipeError."""
        teacher, classes = self.teacher, len(self.split.classes)
        folds: Iterable[int | None] = [None] if teacher.folds is None else range(teacher.folds)
        outputs = [self._teach([0], self._taps, teacher.speaker(fold)) for fold in folds]
        logits, features = outputs[0]
        if logits.shape[1] != classes:
            raise ModelError(
                "a teacher gives one logit per class of the data set",
                received=f"{teacher.origin} gives {logits.shape[1]}, the data set has {classes} classes",
                remedy="give --class-map FILE, or another teacher",
            )
        grids = {output.logits.shape[-2:] for output in outputs}
        if len(grids) > 1:
            raise ModelError(
                "the teachers of all folds give logits on the same grid",
                received=", ".join(f"{height}x{width}" for height, width in sorted(grids)),
                remedy="train one kind of model without each fold",
            )
        if self._options.teacher_grid == "view":
            wanted = self._grid_of_the_view()
            grid = min(wanted[0], logits.shape[-2]), min(wanted[1], logits.shape[-1])
            self.grid = None if grid == tuple(logits.shape[-2:]) else grid
            logits = coarser(logits, grid)
        return NativeOutput(logits, features)

    def logits(self, samples: Sequence[int]) -> Iterator[torch.Tensor]:
        """Raw logits (C, h, w) of the first views of some samples, a batch of each fold at a time."""
        by_fold: dict[int | None, list[int]] = {}
        for sample in samples:
            by_fold.setdefault(None if self._folds is None else self._folds[sample], []).append(sample)
        for fold, those in by_fold.items():
            for first in range(0, len(those), self._options.batch_size):
                batch = those[first : first + self._options.batch_size]
                for sample, raw in zip(batch, self._said(batch, fold), strict=True):
                    if not raw.amax(0).isfinite().all():
                        record = sample * self._view.views_per_sample
                        raise not_finite("the logits", record, self.split.ids[sample])
                    yield raw

    def _grid_of_the_view(self) -> tuple[int, int]:
        if self.teacher.model.align_corners:
            raise RecipeError(
                "logits are averaged to another grid when the head's resize has align_corners=False",
                received=f"--teacher-grid view and {self.teacher.origin}",
                remedy="use --teacher-grid own, the default",
            )
        model = self.teacher.speaker(None if self.teacher.folds is None else 0)
        model = model.plain() if isinstance(model, EnsembleModel) else model
        height, width = self._teach([0], (), model, enlarged=False).logits.shape[-2:]
        return height, width

    def _said(self, samples: Sequence[int], fold: int | None) -> torch.Tensor:
        return self._teach(samples, (), self.teacher.speaker(fold), self.grid).logits

    def _teach(
        self,
        samples: Sequence[int],
        taps: Sequence[str],
        model: SegmentationModel,
        grid: tuple[int, int] | None = None,
        *,
        enlarged: bool = True,
    ) -> NativeOutput:
        options, views = self._options, self._view.views_per_sample
        items = [render_records(self.split, self._view, [sample * views])[0] for sample in samples]
        pixels = torch.from_numpy(np.stack([item.taught if enlarged else item.pixels for item in items]))
        try:
            return NativeOutput(*teach(model, pixels, taps, options.precision, options.device, grid))
        except torch.OutOfMemoryError as error:
            raise out_of_memory(options.batch_size, error) from error
