"""The members of a comparison: runs, and models as `SPEC@FILE` without a run."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kdcache.data import Changes, ClassList, Fold, Split, open_split, parse_fold
from kdcache.data.changes import name_changes
from kdcache.errors import DataError, MismatchError, RecipeError
from kdcache.heads import RegressionHead
from kdcache.models import SegmentationModel
from kdcache.models.run import load_run, open_model, split_spec
from kdcache.run_folder import MODEL, Run, RunModel, is_run
from kdcache.run_samples import RunSamples
from kdcache.settings.recipe import with_defaults
from kdcache.tasks import SEGMENTATION


@dataclass(frozen=True)
class Entry:
    """A model to compare: a run, or SPEC@FILE.

    Attributes:
        text: its name as the user wrote it, or its path below a folder that the user named.
        run: the run, or None for SPEC@FILE.
        settings: the run's recipe by flag (without dashes), or {} if there is none.
    """

    text: str
    run: Run | None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name of the run's folder, or SPEC@FILE."""
        return self.text if self.run is None else str(replace(self.run, folder=Path(self.run.folder.resolve().name)))

    @property
    def key(self) -> tuple[int | None, str | None]:
        """(seed, fold) of the run, with None for an unknown seed and for no fold. A row's runs differ only in these."""
        return self.settings.get("seed"), self.fold

    @property
    def fold(self) -> str | None:
        """The fold that the training left out or validated on: "I/K", for whole sequences "I/K by PATTERN", or None."""
        fold, by = self.settings.get("fold", self.settings.get("val-fold")), self.settings.get("folds-by")
        return None if fold is None else f"{fold}" + ("" if by is None else f" by {by}")

    @property
    def note(self) -> str | None:
        """A warning if the run's training has not ended, else None."""
        if self.run is None or not self.settings or self.run.result:
            return None
        return f"The training of {self.text} has not ended (no complete result.json). Its weights so far are judged."

    def own_fold(self) -> Fold:
        """Return the fold that the training left out. Raises: RecipeError if it left out none."""
        if self.fold is None:
            raise RecipeError(
                f"Cannot use --own-fold: {self.text} was trained on all samples",
                fix="Train with --fold I/K, or leave out --own-fold",
            )
        return parse_fold(self.fold.partition(" ")[0], self.settings.get("folds-by"))

    def load(
        self, classes: ClassList, which: str = "best", size: tuple[int, int] | None = None
    ) -> tuple[SegmentationModel, RunModel]:
        """Load the model in eval mode on the CPU. Return it with its description.

        Args:
            classes: the classes of the data, which the model must have.
            which: weights of the run, such as "best" or "last".
            size: (H, W) of the model's input in pixels. None takes the size of the run or the exported file.
        Raises: MismatchError for other classes. RecipeError if the run does not have weights. ModelError if they do not
        fit.
        """
        if self.run is None:
            return open_model(self.text, classes if len(classes) else unnamed_classes, size, which)
        check_classes(self.run.model, classes, "the data")  # before the weights are read
        model, description = load_run(self.run, which)
        return model, description if size is None else description.model_copy(update={"size": size})


def regressions_of(entry: Entry, classes: ClassList, which: str) -> Mapping[str, RegressionHead]:
    """Return the numeric heads that a run or SPEC@FILE predicts, by name. SPEC@FILE is loaded to find out.

    `classes` are the classes of the data. `which` are the run's weights, such as "best" or "last".

    Raises: for SPEC@FILE, RecipeError if the weights are missing, ModelError if they do not fit, or MismatchError for
        other classes than the data's.
    """
    return entry.run.model.judged_heads if entry.run is not None else entry.load(classes, which, (1, 1))[1].judged_heads


def check_judged(entries: Sequence[Entry]) -> None:
    """Check that every run has learnt segmentation or depth, so that labels can judge it.

    Raises: RecipeError for runs that learnt only features.
    """
    backbones = [entry for entry in entries if entry.run is not None and not _predicts(entry.run.model)]
    if backbones:
        losses = {entry.text: entry.run.result.get("best_feature_loss") for entry in backbones if entry.run is not None}
        texts = [f"{text}: " + ("none" if loss is None else f"{loss:.4g}") for text, loss in losses.items()]
        raise RecipeError(
            f"Cannot judge {backbones[0].text} by labels: it learnt features only (least feature loss of "
            f"{', '.join(texts)})",
            fix="Leave such runs out. To judge what they learnt, train the task from each with train-student --init "
            f"{backbones[0].text}, and compare those runs.",
        )


def _predicts(model: RunModel) -> bool:
    """Return True for a model with a head of classes or numbers that has learnt."""
    return bool(model.judged_heads) or (bool(model.class_names) and SEGMENTATION not in model.untrained)


def check_same_data(runs: Sequence[Entry], split: Split) -> None:
    """Check that all runs were validated on `split`. Raises: MismatchError for other data."""
    digest = split.digest()
    for run in runs:
        recorded = "" if run.run is None else run.run.model.validated_on
        if run.run is not None and recorded not in ("", digest):
            where = f"{split.data}, split {split.split!r}"
            check_classes(run.run.model, split.classes, where)
            raise MismatchError(
                f"{where}, has other samples (digest {digest[:12]}) than {run.text} was validated on (digest "
                f"{recorded[:12]}: {run.settings.get('val')}){_named(run, split)}",
                fix="Give --data the place where that data set is now. To judge on this one on purpose, name its "
                "split with --split",
            )


def _named(run: Entry, split: Split) -> str:
    """Describe the samples that a split has more or fewer than a run's validation. Empty if unknown."""
    samples = None if run.run is None or run.fold is not None else RunSamples.read(run.run.folder)
    if samples is None or samples.validation is None:
        return ""
    return f": {Changes(**name_changes(samples.class_names, samples.validation.ids, split)).describe()}"


def validated_split(run: Entry, data: str, split: str) -> Split:
    """Open the split that a run was validated on. `data` and `split` are from its recipe.

    Raises: DataError if it cannot be opened, for example because its path is relative to another folder.
    """
    try:
        return open_split(data, split)
    except DataError as error:
        raise error.within(
            f"val = {data!r} in {run.text}/recipe.toml",
            fix="Name the data with --data, or run this where the run was trained.",
        ) from error


def unnamed_classes(count: int) -> ClassList:
    """Return `count` classes with the names "class 0", "class 1" and so on, for a model without class names."""
    return ClassList(tuple(f"class {number}" for number in range(count)))


def check_classes(description: RunModel, classes: ClassList, where: str) -> None:
    """Check that a model and the data have the same classes, if both have classes. `where` names the data in the error.

    Raises: MismatchError for different classes.
    """
    if len(classes) and description.class_names:
        description.check_classes(classes.names, where)


def find_runs(texts: Sequence[str | Path], which: str = "best") -> list[Entry]:
    """Find the runs and models that paths name: runs, RUN@WEIGHTS, SPEC@FILE, and folders with runs below them.

    Each run or model is returned once, in the order of `texts`. `which` says which weights of the runs to use: `best`,
    `last`, `best-ema` or `last-ema`.

    Raises: RecipeError for a path without runs, or a run that does not have these weights.
    """
    entries: dict[tuple[Path, str | None] | str, Entry] = {}
    for text in map(str, texts):
        if split_spec(text) is not None:
            entries.setdefault(text, Entry(text, None))
            continue
        for run in _runs_below(Path(text)):
            run.weights(which)
            entries.setdefault((run.folder.resolve(), run.which), Entry(str(run), run, with_defaults(run.recipe or {})))
    named = any(entry.run is not None and entry.run.which is not None for entry in entries.values())
    return [_apart(entry, which) if named else entry for entry in entries.values()]


def _apart(entry: Entry, which: str) -> Entry:
    """Return the entry with its weights as a setting, so that other weights of a recipe form their own row."""
    if entry.run is None:
        return entry
    named = entry.run.which
    settings = {**entry.settings, "weights": named or which}
    if named is not None and "name" in settings:
        settings["name"] = f"{settings['name']} ({named})"
    return replace(entry, settings=settings)


def _runs_below(folder: Path) -> Iterator[Run]:
    if not folder.exists() or is_run(folder):
        yield Run.open(folder)
        return
    empty = True
    for where, names, _ in os.walk(folder):
        # A store has thousands of folders, and no run in any of them. A run that a fix moved away is hidden.
        visible = (name for name in names if not name.startswith("."))
        names[:] = sorted(name for name in visible if not (Path(where) / name / "zarr.json").exists())
        if is_run(Path(where)):
            names.clear()
            empty = False
            yield Run.open(where)
    if empty:
        nothing = f"has no {MODEL}, nor has any folder below it" if folder.is_dir() else "is a file"
        raise RecipeError(
            f"No run found: {folder} {nothing}",
            fix="Give the --out of a training (train-teacher or train-student), or a folder of several.",
        )
