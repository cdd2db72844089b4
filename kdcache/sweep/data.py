"""Check that the data of a recipe suit its jobs, by names only, without pixels."""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from kdcache.data import Split, open_split
from kdcache.errors import DataError, MismatchError, RecipeError
from kdcache.files import read_ids
from kdcache.settings.parse import all_listed, count_of
from kdcache.settings.shared import ImageSettings
from kdcache.settings.streams import parse_stream
from kdcache.settings.training import Data
from kdcache.sweep.plan import Sweep
from kdcache.tasks import DEPTH


def check_data(sweep: Sweep) -> None:
    """Check before any training that the data of all streams of a sweep have the same classes as the validation data.

    Streams with a class map are not compared. Limits of samples and labels are checked, too.

    Raises: MismatchError if classes differ; DataError for a stream without the labels that its loss needs, or with data
        that cannot be opened; RecipeError for a limit above the number of samples.
    """
    recipe = sweep.recipe
    _check_limits(sweep)
    splits: dict[str, Split] = {}
    tables = {str(table["name"]): parse_stream(table) for table in recipe.stream}
    for name, table in tables.items():
        of_data = str(table.get("split", recipe.data.get("split", ImageSettings.split)))
        try:
            splits[name] = open_split(sweep.sources[name], of_data)
        except DataError as error:
            raise error.within(f"stream {name}") from error
        _check_labels(name, table, splits[name])
    unmapped = {name: split for name, split in splits.items() if "class_map" not in tables[name]}
    if not unmapped:
        return
    first = next(iter(unmapped))
    for name, split in unmapped.items():
        if split.classes.names != splits[first].classes.names:
            raise _other_classes(name, split, first, splits[first])
    judge = open_split(sweep.data, str(recipe.data.get("val-split", Data.val_split)))
    if judge.classes.names != splits[first].classes.names:
        raise MismatchError(
            f"{judge.data}, the data to judge on, has other classes ({_names(judge)}) than the stream {first} "
            f"({_names(splits[first])})",
            fix="Give --data DIR with those classes, or another val in [data].",
        )


def _check_limits(sweep: Sweep) -> None:
    """Raise RecipeError for a limit or list of labels that does not suit the data, in a training without streams."""
    flags = ("--limit-samples", "--limit-labels", "--labels-from")
    trainings = [job for job in sweep.jobs if job.words[0].startswith("train-") and "--stream" not in job.words]
    limited = [(job, given) for job in trainings
               if (given := {flag: value for flag, value in pairwise(job.words) if flag in flags})]  # fmt: skip
    ids = open_split(sweep.data, str(sweep.recipe.data.get("split", ImageSettings.split))).ids if limited else ()
    for job, given in limited:
        numbers = {flag: float(value) for flag, value in given.items() if flag != "--labels-from"}
        listed = Path(given["--labels-from"]) if "--labels-from" in given else None
        try:
            Data(limit_labels=numbers.get("--limit-labels"), labels_from=listed)
            for flag, limit in numbers.items():
                count_of(flag, limit, len(ids))
            if listed is not None and len(read_ids(listed, ids)) == len(ids):
                raise all_listed(listed, len(ids))
        except RecipeError as error:
            raise error.within(f"job {job.name}") from error


def _check_labels(name: str, table: Mapping[str, Any], split: Split) -> None:
    """Raise DataError if a stream's data do not have the labels of a task that the stream learns."""
    labels = str(table.get("labels", "all"))
    tasks = set() if labels in ("all", "none") else set(labels.split("+"))
    terms = [term for term in table.get("term", ()) if isinstance(term, Mapping)]
    if any(str(t.get("kind")).startswith("depth-") and t.get("reference", "labels") == "labels" for t in terms):
        tasks.add(DEPTH)
    if lacking := sorted(tasks - set(split.tasks)):
        raise DataError(
            f"Cannot learn {' or '.join(lacking)} in the stream {name}: none of the {len(split)} samples of "
            f"{split.data}, split {split.split!r}, has such a label"
            + (f", only of {' and '.join(split.tasks)}" if split.tasks else ""),
            fix=f"Give other data with --data {name}=DIR. To show what is there: kdcache data check DIR",
        )


def _other_classes(name: str, split: Split, first: str, first_split: Split) -> MismatchError:
    """Return the error for a stream whose classes differ from the first stream's classes."""
    fix = f"Give it a class map, a line `<id> <class>` for each of its classes: --set stream.{name}.class-map=FILE"
    if not split.classes.names:
        fix = f"Write the classes of {first}, one a line, into classes.txt where the data of {name} begin."
    return MismatchError(
        f"The stream {name} ({split.data}) has other classes, or another order, than {first}: "
        f"{_names(split)} against {_names(first_split)}",
        fix=fix,
    )


def _names(split: Split) -> str:
    return ", ".join(split.classes.names) or "no classes"
