"""The trainings of a teacher that is a run: the samples, the left-out fold, and the labels."""

from collections.abc import Mapping
from typing import Any

from kdcache.data import Fold, parse_fold
from kdcache.errors import RecipeError
from kdcache.run_folder import Run
from kdcache.store.format.teacher_models import Training


def trainings_of(run: Run) -> tuple[Training | None, ...]:
    """Return what a run was trained on: one entry for its data set, or one for each of its streams.

    None stands for an unknown training. If a stream also learnt from a cache, None is added for that cache's teacher.
    """
    kind, _, digest = run.model.trained_on.partition(" ")
    try:  # a teacher needs no recipe: it is only not known then
        recipe, streams = run.recipe, run.model.streams
        if recipe is None:
            return (None,)
        tables = recipe.get("stream", ())
        if kind == "data":  # of the only stream, where the training has one
            return (_training(digest, run.model.labels, {**recipe, **(tables[0] if tables else {})}),)
        if kind != "streams" or not streams or len(tables) != len(streams):
            return (None,)
        trainings = [
            _training(stream.ids_digest, stream.labels, {**recipe, **table})
            for stream, table in zip(streams, tables, strict=True)
        ]
    except (RecipeError, ValueError):
        return (None,)
    return (*trainings, None) if any(stream.taught for stream in streams) else tuple(trainings)


def _training(digest: str, labels: str | None, settings: Mapping[str, Any]) -> Training:
    """Return the training with these settings on the samples that the digest identifies.

    Raises: RecipeError or ValueError for malformed settings.
    """
    fold = fold_left_out(settings)
    if fold is None:
        return Training(ids_digest=digest, labels=labels)
    return Training(ids_digest=digest, fold=(fold.number, fold.folds), folds_by=fold.by, labels=labels)


def fold_left_out(recipe: Mapping[str, Any]) -> Fold | None:
    """Return the fold that a run with this recipe left out of its training, or None if it left out none.

    `recipe` maps flags without dashes to values.

    Raises: RecipeError for a malformed fold.
    """
    fold, by = recipe.get("fold"), recipe.get("folds-by")
    return None if fold is None else parse_fold(str(fold), None if by is None else str(by))
