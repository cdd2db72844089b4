"""Run folders as the evaluation reads them: which runs there are, their settings, their models.

A run is what `train-teacher` or `train-student` wrote (`recipe.toml`, `model.json`, weights); a model that no run has
trained is `SPEC@FILE`. Files are read as files: this room knows nothing of training.
"""

import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdcache.data import ClassList, parse_fold
from kdcache.errors import RecipeError
from kdcache.models import SegmentationModel
from kdcache.models.run import DESCRIPTION, RunModel, open_model, read_run_model, split_spec, weights_path

RECIPE = "recipe.toml"


@dataclass(frozen=True)
class Run:
    """A trained run, or a model by `SPEC@FILE`, which has no folder and no settings.

    Attributes:
        text: as the user named it, or its path below the folder that the user named.
        settings: of its recipe; keys are flags without the two dashes.
    """

    text: str
    folder: Path | None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The folder's name, or SPEC@FILE."""
        return self.text if self.folder is None else self.folder.resolve().name

    @property
    def title(self) -> str:
        """What pictures call it: its `--name`, or as the user named it."""
        return str(self.settings.get("name") or self.text)

    @property
    def key(self) -> tuple[int | None, str | None]:
        """Seed and fold: what tells runs of one recipe apart."""
        return self.settings.get("seed"), self.fold

    @property
    def fold(self) -> str | None:
        """The fold of the data that this run was not trained on: I/K."""
        found = self.settings.get("fold", self.settings.get("val-fold"))
        return None if found is None else str(found)

    def own_fold(self) -> tuple[int, int]:
        """Raises RecipeError for a run that left out none."""
        if self.fold is None:
            raise RecipeError(
                "a run is judged on its own fold when its training left one out",
                received=f"{self.text} was trained on all samples",
                remedy="train with --fold I/K, or leave out --own-fold",
            )
        return parse_fold(self.fold)

    def open(
        self, classes: ClassList, which: str = "best", size: tuple[int, int] | None = None
    ) -> tuple[SegmentationModel, RunModel]:
        """The model in eval mode on the CPU, and what it is.

        Raises: MismatchError for other classes; RecipeError without weights; ModelError when they do not fit.
        """
        if self.folder is not None:  # before its weights are read
            read_run_model(self.folder).check_classes(classes.names, "the data")
        return open_model(self.text if self.folder is None else str(self.folder), classes, size, which)


def find_runs(texts: Sequence[str | Path], which: str = "best") -> list[Run]:
    """Runs, SPEC@FILE, and all the runs below folders that are none themselves; each once, in this order.

    Raises: RecipeError for a folder that is and holds no run, and for a run without the weights `which`.
    """
    found: dict[Path | str, Run] = {}
    for text in map(str, texts):
        if split_spec(text) is not None:
            found.setdefault(text, Run(text, None))
            continue
        for folder in _runs_below(Path(text)):
            _check_weights(folder, which)
            found.setdefault(folder.resolve(), Run(str(folder), folder, _read_settings(folder)))
    return list(found.values())


def _runs_below(folder: Path) -> Iterator[Path]:
    if not folder.exists() or _is_run(folder):
        read_run_model(folder)  # refuses what is none
        yield folder
        return
    seen = False
    for where, names, _ in os.walk(folder):
        # A store has thousands of folders, and no run in any of them.
        names[:] = sorted(name for name in names if not (Path(where) / name / "zarr.json").exists())
        if _is_run(Path(where)):
            names.clear()
            read_run_model(Path(where))
            seen = True
            yield Path(where)
    if not seen:
        nothing = f"has no {DESCRIPTION}, nor has any folder below it" if folder.is_dir() else "is a file"
        raise RecipeError(
            "a run is a folder that train-teacher or train-student wrote, or a folder that holds some",
            received=f"{folder} {nothing}",
            remedy="give the --out of a training, or the folder of several",
        )


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (DESCRIPTION, RECIPE))


def _check_weights(folder: Path, which: str) -> None:
    if not weights_path(folder, which).is_file():
        present = sorted(file.stem for file in folder.glob("*.safetensors"))
        raise RecipeError(
            f"a run is judged by its weights, here {which}.safetensors",
            received=f"{folder} has " + (", ".join(present) if present else "no weights yet"),
            remedy="let the training finish (the same command with --resume), or name only the runs that have",
        )


def _read_settings(folder: Path) -> Mapping[str, Any]:
    """Of the recipe; {} for a folder that holds a model alone."""
    path = folder / RECIPE
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise RecipeError(
            "a run's recipe is a TOML file",
            received=f"{path}: {str(error).splitlines()[0]}",
            remedy="restore it from a copy, or give another run",
        ) from error
