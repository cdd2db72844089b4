"""Run the teacher on a few first views before anything is written."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch

from kdcache.data import Split
from kdcache.errors import ModelError, RecipeError, suggest
from kdcache.models import EnsembleModel, Outputs, SegmentationModel
from kdcache.store.format.manifest import well_formed_parts
from kdcache.tasks import METRES, SEGMENTATION, in_metres
from kdcache.teacher.build.options import BuildOptions, view_of, with_zoom
from kdcache.teacher.build.render import Array, render_records
from kdcache.teacher.build.statistics import taps_of
from kdcache.teacher.load.ensemble import folds_of_split
from kdcache.teacher.load.forward import coarser, not_finite, out_of_memory, teach
from kdcache.teacher.load.load import Teacher


def heads_of(options: BuildOptions, teacher: Teacher) -> tuple[str, ...]:
    """Return the names of the teacher's heads to store, in the teacher's order.

    Without `options.heads` these are all heads that the teacher has learnt.

    Raises: RecipeError for heads that the teacher does not have or has not learnt, and if nothing would be stored. Also
        for options such as `top_k` that need a segmentation head, if none is stored.
    """
    trained = teacher.model.learnt_heads
    wrong = next((name for name in options.heads if name not in trained), None)
    if wrong is not None or (options.features_only and options.heads):
        raise RecipeError(
            f"Unknown heads in --heads {','.join(options.heads)}: {teacher.origin} has {', '.join(trained) or 'none'}"
            + (f", and learnt nothing of {wrong}" if wrong in teacher.model.untrained else "")
            if wrong is not None
            else f"Use either --heads or --features-only, not both: --heads {','.join(options.heads)}",
            fix=suggest(wrong or "", trained, "Leave out --heads, which stores all."),
        )
    heads = () if options.features_only else tuple(name for name in trained if name in (options.heads or trained))
    if not heads and not (options.features_only and (options.features or options.statistics)):
        raise RecipeError(
            f"Nothing to store of {teacher.origin}: it has {', '.join(trained) or 'no head'}"
            + (", and --features-only needs --features or --statistics" if options.features_only else ""),
            fix="Add --features-only --features TAP (kdcache models lists taps).",
        )
    _check_logit_options(options, heads)
    return heads


def _check_logit_options(options: BuildOptions, heads: Sequence[str]) -> None:
    of_logits = {
        "--top-k": options.top_k is not None,
        "--raw-logits": options.raw_logits,
    }
    given = [flag for flag, used in of_logits.items() if used and SEGMENTATION not in heads]
    if options.teacher_grid == "view" and set(heads) != {SEGMENTATION}:
        given.append("--teacher-grid view")
    if given:
        raise RecipeError(
            f"{', '.join(given)} needs a {SEGMENTATION} head, but this cache stores "
            f"{', '.join(heads) or 'features only'}",
            fix="Leave it out, or store other heads (--heads).",
        )


def _check_images(teacher: Teacher, options: BuildOptions) -> None:
    """Check that a teacher takes the images of a build. Raises: ModelError with the size or the fit that it takes."""
    teacher.model.check_size(*_size_seen(options))
    if teacher.model.processor.pads and options.fit != "pad":
        raise ModelError(
            f"{teacher.origin} was trained on padded images, and --fit {options.fit} gives it others",
            fix="Add --fit pad",
        )


def _size_seen(options: BuildOptions) -> tuple[tuple[int, int], str]:
    """Return the (H, W) of the images that a teacher sees, and the flag that sets it."""
    if options.teacher_size is not None:
        return options.teacher_size, "--teacher-size"
    return (options.size, "--size") if options.crop is None else (options.crop, "--crop")


class TeacherProbe:
    """Runs the teacher on a few views before a build, to find the shapes of its outputs and the errors of storing them.

    Attributes:
        split: the data set.
        teacher: the teacher, on the options' device.
        options: the options of the build.
        view: how views are drawn and rendered.
        folds: for each sample, the index of the ensemble member that predicts it. None if all members predict together.
        heads: names of the heads to store.
        metres: True if a head or a label of the split has depth in metres.
        taps: names of the taps that features and statistics need.
        grid: (h, w) of the coarser map that the build stores, set by `probe`. None is the size of the teacher's map.
    Raises: RecipeError for unknown heads and conflicting options; ModelError for an unknown tap or an unsuitable image
        size.
    """

    @well_formed_parts()
    def __init__(self, split: Split, teacher: Teacher, options: BuildOptions) -> None:
        self.heads = heads_of(options, teacher)
        kinds = [teacher.model.head_kinds[name] for name in self.heads]
        self.metres = in_metres(split.tasks) or any(getattr(kind, "unit", None) == METRES for kind in kinds)
        self.split, self.teacher, self.options = split, teacher, with_zoom(options, metres=self.metres)
        self.view = view_of(self.options)
        _check_images(teacher, options)
        self.folds = folds_of_split(teacher, split)
        self.grid: tuple[int, int] | None = None
        if teacher.folds is not None and options.features:
            raise RecipeError(
                f"Cannot store features ({', '.join(options.features)}) of {teacher.folds} teachers with a fold each",
                fix="Leave out --features, or --folds",
                rule="A student cannot learn from the features of several networks together.",
            )
        teacher.model.check_taps(options.features)
        self.taps = tuple(dict.fromkeys([*options.features, *taps_of(options.statistics, teacher)]))

    def probe(self) -> Outputs:
        """Run the teacher on the first view, to find the shapes of its outputs.

        Returns: the heads to store, (1, C, h, w) on the cache's grid, and the features (1, c, h, w) of each tap.
        Raises: ModelError if teacher and data set have different numbers of classes, or if ensemble members have
            different grids; RecipeError for `--teacher-grid view` with a head that aligns corners.
        """
        teacher, classes = self.teacher, len(self.split.classes)
        folds: Iterable[int | None] = [None] if teacher.folds is None else range(teacher.folds)
        outputs = [self._teach([0], self.taps, teacher.model_for(fold)) for fold in folds]
        heads = {name: outputs[0].heads[name] for name in self.heads}
        if SEGMENTATION not in heads:
            return Outputs(heads, outputs[0].features)
        logits = heads[SEGMENTATION]
        if logits.shape[1] != classes:
            raise ModelError(
                f"{teacher.origin} gives {logits.shape[1]} logits, but the data set has {classes} classes",
                fix="Give --class-map FILE, or another teacher.",
            )
        grids = {output.logits.shape[-2:] for output in outputs}
        if len(grids) > 1:
            raise ModelError(
                "The teachers of the folds give logits on different grids: "
                f"{', '.join(f'{height}x{width}' for height, width in sorted(grids))}",
                fix="Train one kind of model without each fold.",
            )
        if self.options.teacher_grid == "view":
            height, width = self._grid_of_the_view()
            grid = min(height, logits.shape[-2]), min(width, logits.shape[-1])
            self.grid = None if grid == tuple(logits.shape[-2:]) else grid
            logits = coarser(logits, grid)
        return Outputs({**heads, SEGMENTATION: logits}, outputs[0].features)

    def logits(self, samples: Sequence[int]) -> Iterator[torch.Tensor]:
        """Yield raw logits (C, h, w) of the first view of each sample.

        `samples` are sample indices. With folds, the samples of each fold come together, so the order may differ.

        Raises: ModelError for NaN or infinite logits, or if the GPU's memory is full.
        """
        by_fold: dict[int | None, list[int]] = {}
        for sample in samples:
            by_fold.setdefault(None if self.folds is None else self.folds[sample], []).append(sample)
        for fold, members in by_fold.items():
            for first in range(0, len(members), self.options.batch_size):
                batch = members[first : first + self.options.batch_size]
                outputs = self._teach(batch, (), self.teacher.model_for(fold), self.grid)
                for sample, raw in zip(batch, outputs.logits, strict=True):
                    if not raw.amax(0).isfinite().all():
                        record = sample * self.view.views_per_sample
                        raise not_finite("the logits", record, self.split.ids[sample])
                    yield raw

    def features(self, samples: Sequence[int], taps: Sequence[str]) -> Iterator[dict[str, Array]]:
        """Yield the features of the taps `taps` for the first view of each sample: tap -> float32 (c, h, w).

        `samples` are sample indices, in the order of the result.

        Raises: ModelError for NaN or infinite features, or if the GPU's memory is full.
        """
        for first in range(0, len(samples), self.options.batch_size):
            batch = samples[first : first + self.options.batch_size]
            outputs = self._teach(batch, taps, self.teacher.model_for(None))
            maps = {tap: outputs.features[tap].float().cpu().numpy() for tap in taps}
            for row, sample in enumerate(batch):
                for tap in taps:
                    if not np.isfinite(maps[tap][row]).all():
                        raise not_finite(f"features/{tap}", sample * self.view.views_per_sample, self.split.ids[sample])
                yield {tap: maps[tap][row] for tap in taps}

    def _grid_of_the_view(self) -> tuple[int, int]:
        if self.teacher.model.align_corners:
            raise RecipeError(
                f"Cannot use --teacher-grid view with {self.teacher.origin}: its head resizes with align_corners",
                fix="Use --teacher-grid own, the default.",
            )
        model = self.teacher.model_for(None if self.teacher.folds is None else 0)
        model = model.plain() if isinstance(model, EnsembleModel) else model
        height, width = self._teach([0], (), model, enlarged=False).logits.shape[-2:]
        return height, width

    def _teach(
        self,
        samples: Sequence[int],
        taps: Sequence[str],
        model: SegmentationModel,
        grid: tuple[int, int] | None = None,
        *,
        enlarged: bool = True,
    ) -> Outputs:
        options, views = self.options, self.view.views_per_sample
        items = [render_records(self.split, self.view, [sample * views])[0] for sample in samples]
        pixels = torch.from_numpy(np.stack([item.taught if enlarged else item.pixels for item in items]))
        try:
            return teach(model, pixels, taps, options.precision, options.device, grid)
        except torch.OutOfMemoryError as error:
            raise out_of_memory(options.batch_size) from error
