"""The training of a teacher that is a run: on which samples, and which fold of them it left out."""

from kdcache.data import parse_fold
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
        fold = run.recipe.get("fold")
        return Training(ids_digest=digest, fold=None if fold is None else parse_fold(str(fold)))
    except (RecipeError, ValueError):  # a teacher needs no recipe: it is only not known then
        return None
