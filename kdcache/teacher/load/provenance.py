"""The training of a teacher that is a run: on which samples, without which fold of them, with which labels."""

from collections.abc import Mapping
from typing import Any

from kdcache.data import Fold, parse_fold
from kdcache.errors import RecipeError
from kdcache.run_folder import Run
from kdcache.store.format.manifest_models import Training


def training_of(run: Run) -> Training | None:
    """The training of a run; None where it is not recorded, or for a run from a store, whose teacher had its own."""
    kind, _, digest = run.model.trained_on.partition(" ")
    if kind != "data":
        return None
    try:
        if run.recipe is None:
            return None
        fold, labels = fold_left_out(run.recipe), run.model.labels
        if fold is None:
            return Training(ids_digest=digest, labels=labels)
        return Training(ids_digest=digest, fold=(fold.number, fold.folds), folds_by=fold.by, labels=labels)
    except (RecipeError, ValueError):  # a teacher needs no recipe: it is only not known then
        return None


def fold_left_out(recipe: Mapping[str, Any]) -> Fold | None:
    """The fold that a run with this recipe was trained without. Raises: RecipeError for one that is malformed."""
    fold, by = recipe.get("fold"), recipe.get("folds-by")
    return None if fold is None else parse_fold(str(fold), None if by is None else str(by))
