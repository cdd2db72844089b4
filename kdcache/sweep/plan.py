"""From a recipe to jobs: the commands of a sweep, what each of them makes and what it needs.

OUT/teachers/teacher[-fold0]       one per fold, or none when the recipe names a teacher that exists
OUT/stores/store[-fold0].zarr      their targets
OUT/runs/ARM[-fold0][-seed1]       the students
OUT/comparison.md .csv .json       the table; kd_comparison_results.txt is its short form
OUT/pictures/                      best and worst images, confusion, curves; all arms side by side
OUT/report.html                    all of it on one page
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdcache.data import check_folds_by, parse_fold
from kdcache.errors import RecipeError
from kdcache.run_folder import RESULT
from kdcache.settings.shared import ImageSettings
from kdcache.settings.streams import term_line, to_line
from kdcache.settings.training import TrainSettings
from kdcache.sweep.recipe import Arm, Flags, Recipe, check_names

Known = Mapping[str, set[str]]
"""Verb -> names of its flags, without dashes."""
_TRAINING = {"name", "data", "split", "val-split", "val-fold", "fold", "folds-by", "seed", "out", "resume", "recipe"}
OWN = {
    "train-teacher": _TRAINING,
    "train-student": _TRAINING | {"cache", "val"},
    "build-teacher-cache": {"data", "split", "out", "teacher"},
}
"""Flags that a sweep gives by itself."""


@dataclass(frozen=True)
class Job:
    """A command of kdcache.

    Attributes:
        words: a verb and its flags.
        done: a JSON file that is there when it has been done; None for what is always done again.
        needs: names of jobs that come before it.
    """

    name: str
    words: tuple[str, ...]
    done: Path | None
    needs: tuple[str, ...] = ()

    @property
    def next_words(self) -> tuple[str, ...]:
        """The command to run now: a run is resumed only where there is one."""
        begun = self.done is None or self.done.parent.exists()
        return self.words if begun else tuple(word for word in self.words if word != "--resume")


@dataclass(frozen=True)
class Sweep:
    """A recipe with its data and folder.

    Attributes:
        jobs: in an order in which none comes before what it needs.
        runs: arm -> its runs' folders.
    """

    recipe: Recipe
    out: Path
    jobs: tuple[Job, ...]
    runs: Mapping[str, tuple[Path, ...]]


def plan_sweep(recipe: Recipe, data: str | None, out: Path, known: Known) -> Sweep:
    """Plan all jobs of a recipe.

    Args:
        data: the data folder; default the recipe's own `path`.
        known: the flags that recipes may name.
    Raises: RecipeError for flags that do not exist or are the sweep's own, for arms that need each other, and without
        data.
    """
    data = data or recipe.data.get("path")
    if data is None:
        layout = recipe.data.get("layout")
        raise RecipeError(
            "a sweep runs on a data folder",
            received=f"no --data for {recipe.name}" + (f", which is made for the layout {layout}" if layout else ""),
            remedy="add --data DIR, or try it with --smoke first",
        )
    _check(recipe, known)
    return _Planner(recipe, data, out).plan()


def words(flags: Flags) -> Iterator[str]:
    """Yield flags as one types them; what is false is `--no-flag`, a table a repeated one; "" leaves a flag out."""
    for key, value in flags.items():
        if value == "":
            continue
        if isinstance(value, bool):
            yield f"--{key}" if value else f"--no-{key}"
        elif isinstance(value, list):
            for entry in value:
                line = to_line if key == "stream" else term_line
                yield from (f"--{key}", line(entry) if isinstance(entry, dict) else str(entry))
        else:
            yield from (f"--{key}", str(value))


def folder_name(text: str) -> str:
    """A name that is a folder's on every system: letters, digits, dots, dashes and the like."""
    return re.sub(r"[^A-Za-z0-9_.=+]+", "-", text).strip("-.") or "arm"


class _Planner:
    def __init__(self, recipe: Recipe, data: str, out: Path) -> None:
        self._recipe, self._data, self._out = recipe, data, out
        self._split = str(recipe.data.get("split", ImageSettings.split))
        self._val_split = str(recipe.data.get("val-split", TrainSettings.val_split))
        self._folds: list[int | None] = [None] if recipe.folds is None else list(range(recipe.folds))
        self._jobs: list[Job] = []
        self._runs: dict[str, tuple[Path, ...]] = {arm.name: () for arm in recipe.arms}
        self._under_way: list[str] = []

    def plan(self) -> Sweep:
        for fold in self._folds:
            if "spec" not in self._recipe.teacher:
                self._teacher(fold)
            self._store(fold)
        for arm in self._recipe.arms:
            for fold in self._folds:
                for seed in self._recipe.seeds:
                    self._run(arm, fold, seed)
        self._show()
        return Sweep(self._recipe, self._out, tuple(self._jobs), self._runs)

    def _add(self, job: Job) -> str:
        self._jobs.append(job)
        return job.name

    def _teacher(self, fold: int | None) -> None:
        run = self._teacher_run(fold)
        flags = {**self._recipe.teacher, **self._judged(fold), "data": self._data, "split": self._split, "out": run}
        command = ("train-teacher", *words(flags), "--resume")
        self._add(Job(f"teacher{_of(fold)}", command, run / RESULT))

    def _store(self, fold: int | None) -> None:
        place = self._place(fold)
        trained = "spec" not in self._recipe.teacher
        teacher = self._teacher_run(fold) if trained else self._recipe.teacher["spec"]
        flags = {**self._recipe.store, "teacher": teacher, "data": self._data, "split": self._split, "out": place}
        needs = (f"teacher{_of(fold)}",) if trained else ()
        command = ("build-teacher-cache", *words(flags))
        self._add(Job(f"store{_of(fold)}", command, place / "complete.json", needs))

    def _run(self, arm: Arm, fold: int | None, seed: int) -> Path:
        """Add the run of an arm, after the runs that its flags name with '@'; returns its folder."""
        run = self._out / "runs" / (folder_name(arm.name) + _of(fold, "-") + (f"-seed{seed}" if seed else ""))
        name = f"{arm.name}{_of(fold)}" + (f", seed {seed}" if len(self._recipe.seeds) > 1 else "")
        if run in self._runs[arm.name]:
            return run
        if name in self._under_way:
            raise RecipeError(
                "arms that name each other's runs have an order",
                received=" needs ".join(map(repr, [*self._under_way, name])),
                remedy="take one of the '@' values out",
            )
        self._under_way.append(name)
        flags, needs = {**self._recipe.student, **arm.flags}, [f"store{_of(fold)}"]
        for key, value in flags.items():
            if isinstance(value, str) and value.startswith("@"):
                other = self._recipe.arm(value[1:])
                flags[key] = self._run(other, fold, seed)
                needs += [job.name for job in self._jobs if job.done == flags[key] / RESULT]
        self._under_way.pop()
        flags |= {
            "name": arm.name,
            **self._judged(fold),
            "cache": self._place(fold),
            "val": self._data,
            "seed": seed,
            "out": run,
        }
        self._add(Job(name, ("train-student", *words(flags), "--resume"), run / RESULT, tuple(needs)))
        self._runs[arm.name] += (run,)
        return run

    def _show(self) -> None:
        """Add table, pictures (of each arm's first run) and page; those of a smoke run are marked as such."""
        out, folds = self._out, self._recipe.folds
        trained = [job.name for job in self._jobs if job.words[0] == "train-student"]
        where: dict[str, Any] = {"data": self._data, "split": self._val_split if folds is None else self._split}
        where |= {"smoke": True} if self._recipe.smoke else {}
        spec = self._recipe.teacher.get("spec")
        tables = {"markdown": "comparison.md", "csv": "comparison.csv", "json": "comparison.json"}
        files = {key: out / name for key, name in (tables | {"text": "kd_comparison_results.txt"}).items()}
        judged = {**where, "teacher": spec or out / "teachers"} | ({"own-fold": True} if folds else {})
        runs = [str(run) for arm in self._recipe.arms for run in self._runs[arm.name]]
        compare = ("compare", *runs, *words({**judged, **files}))
        shown = [str(self._runs[arm.name][0]) for arm in self._recipe.arms]
        drawn = {**where, "teacher": spec or self._teacher_run(self._folds[0]), "out": out / "pictures"}
        drawn |= {"num": self._recipe.show.get("num", 10)}
        drawn |= {"fold": f"0/{folds}", "folds-by": self._recipe.data.get("folds-by", "")} if folds else {}
        compared = self._add(Job("comparison", compare, None, tuple(trained)))
        pictures = self._add(Job("pictures", ("visualise", *shown, *words(drawn)), None, (compared,)))
        page = {**judged, "pictures": out / "pictures", "title": self._recipe.title, "out": out / "report.html"}
        self._add(Job("report", ("report", *runs, *words(page)), None, (pictures,)))

    def _judged(self, fold: int | None) -> dict[str, Any]:
        """Flags for what validates a training: a fold, the part that the recipe holds out, or the other split."""
        part = self._recipe.data.get("held-out") if fold is None else f"{fold}/{self._recipe.folds}"
        if part is None:
            return {"val-split": self._val_split}
        by = self._recipe.data.get("folds-by", "")
        return {"fold": part, "val-split": self._split, "val-fold": part, "folds-by": by}

    def _teacher_run(self, fold: int | None) -> Path:
        return self._out / "teachers" / f"teacher{_of(fold, '-')}"

    def _place(self, fold: int | None) -> Path:
        return self._out / "stores" / f"store{_of(fold, '-')}.zarr"


def _of(fold: int | None, before: str = ", ") -> str:
    if fold is None:
        return ""
    return f"{before}fold{'' if before == '-' else ' '}{fold}"


def _check(recipe: Recipe, flags_of_verbs: Known) -> None:
    folds = recipe.folds
    if folds is not None and (not isinstance(folds, int) or folds < 2):
        raise RecipeError("folds of a recipe are 2 or more", received=repr(folds), remedy="leave it out for none")
    held_out = recipe.data.get("held-out")
    if held_out is not None:
        if folds is not None:
            raise RecipeError(
                "a recipe has folds or a part held out", received="both", remedy="leave out folds, or held-out"
            )
        parse_fold(str(held_out))
    if folds_by := recipe.data.get("folds-by"):  # "" leaves it out
        check_folds_by(str(folds_by), folds=any((folds, held_out)))
    teacher = {key: value for key, value in recipe.teacher.items() if key != "spec"}
    for table, verb, flags in (
        ("[teacher]", "train-teacher", teacher),
        ("[store]", "build-teacher-cache", recipe.store),
        ("[student]", "train-student", recipe.student),
        *((f"the arm {arm.name!r}", "train-student", arm.flags) for arm in recipe.arms),
    ):
        check_names(f"keys of {table} are flags of {verb}, and", flags, flags_of_verbs[verb] - OWN[verb])
