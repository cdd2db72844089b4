"""What a teacher that is a run says of its own training: on which samples, and which fold of them it left out."""

import tomllib
from pathlib import Path
from typing import Any

from kdcache.data import parse_fold
from kdcache.errors import RecipeError
from kdcache.models.run import read_run_model
from kdcache.store.parts import Training

_RECIPE = "recipe.toml"


def read_settings(run: str) -> dict[str, Any]:
    """Settings of a run. Raises RecipeError for what is none."""
    read_run_model(Path(run))
    path = Path(run) / _RECIPE
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(
            "the teacher of a fold is a run, whose recipe says which fold it left out",
            received=f"{path}: {str(error).splitlines()[0]}",
            remedy="give the --out of train-teacher --fold I/K",
        ) from error


def training_of(run: str) -> Training | None:
    """The training of a run; None where it does not say, or was trained from a store, whose teacher had its own."""
    kind, _, digest = read_run_model(Path(run)).trained_on.partition(" ")
    if kind != "data":
        return None
    try:
        fold = read_settings(run).get("fold")
        return Training(ids_digest=digest, fold=None if fold is None else parse_fold(str(fold)))
    except (RecipeError, ValueError):  # a teacher needs no recipe: it is only not known then
        return None
