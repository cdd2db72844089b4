"""From a recipe to jobs: the commands of a sweep, with the results and dependencies of each.

OUT/teachers/teacher[-fold0]       one per fold, or none if the recipe names an existing teacher; others by name
OUT/stores/store[-fold0].zarr      their targets; STREAM.zarr and STREAM-NAME.zarr of a stream's data
OUT/audits/STORE/report.json       the audit of a cache's teacher against the labels of its data
OUT/runs/ARM[-fold0][-seed1]       the students
OUT/comparison.md .csv .json       the table; kd_comparison_results.txt is its short form
OUT/pictures/                      best and worst images, confusion, curves; all arms side by side
OUT/report.html                    all of it on one page
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdcache.data import check_folds_by, parse_fold
from kdcache.errors import RecipeError
from kdcache.run_folder import RESULT, WEIGHTS
from kdcache.settings.methods import auto_method, parse_method, parse_term
from kdcache.settings.shared import ImageSettings
from kdcache.settings.streams import parse_stream, term_line, to_line
from kdcache.settings.term import no_effect, untaken
from kdcache.settings.terms import CrossEntropy
from kdcache.settings.training import Data
from kdcache.sweep.curve import CURVE, has_curve
from kdcache.sweep.recipe import AUDIT, STORE, TEACHER, Arm, Flags, Recipe, check_names, filled, named_flag, unknown

TEACHERS, RUNS = "teachers", "runs"
"""Folders of a sweep."""
COMPARISON = "comparison"
"""The job that writes the table."""
Known = Mapping[str, set[str]]
"""Verb -> names of its flags, without dashes."""
_TRAINING = {"name", "data", "split", "val-split", "val-fold", "fold", "folds-by", "seed", "out", "resume", "recipe"}
OWN = {
    "train-teacher": _TRAINING,
    "train-student": _TRAINING | {"cache", "val"},
    "build-teacher-cache": {"data", "split", "out", "teacher"},
}
"""The flags that a sweep sets itself, by verb."""
_OF_LABELS = ("name", "data", "split", "class_map")
"""Keys of a stream that a teacher's training copies, because they determine the labels."""


@dataclass(frozen=True)
class Job:
    """One command of a sweep.

    Attributes:
        name: name of the job.
        words: the command without `kdcache`: a verb and its flags.
        done: a JSON file that exists when the job is done, or None for a job that always runs again.
        needs: names of the jobs that must be done before.
    """

    name: str
    words: tuple[str, ...]
    done: Path | None
    needs: tuple[str, ...] = ()

    @property
    def next_words(self) -> tuple[str, ...]:
        """The command to run now. It has --resume only if the run already exists."""
        begun = self.done is None or self.done.parent.exists()
        return self.words if begun else tuple(word for word in self.words if word != "--resume")


@dataclass(frozen=True)
class Sweep:
    """A planned sweep: a recipe with its data, its folder and its jobs.

    Attributes:
        recipe: the recipe.
        out: the sweep's folder.
        jobs: all jobs. Each job comes after the jobs that it needs.
        runs: name of each arm -> its run folders.
        data: the validation data, and without streams also the training data.
        sources: name of each stream -> its data set.
    """

    recipe: Recipe
    out: Path
    jobs: tuple[Job, ...]
    runs: Mapping[str, tuple[Path, ...]]
    data: str = ""
    sources: Mapping[str, str] = field(default_factory=dict)


def plan_sweep(
    recipe: Recipe, data: str | None, out: Path, known: Known, sources: Mapping[str, str] | None = None
) -> Sweep:
    """Plan all jobs of a recipe.

    Args:
        recipe: the recipe.
        data: folder or spec of the data set. Default: `path` in the recipe, or with streams its `val`.
        out: the sweep's folder.
        known: verb -> names of its flags, without dashes, that recipes may set.
        sources: name of a stream -> data set, to replace the recipe's own.
    Raises: RecipeError for an unknown flag, a flag that the sweep sets itself, an unknown cache or teacher, arms that
        need each other, or missing data.
    """
    of_streams = data_of_streams(recipe, sources or {})
    data = data or recipe.data.get("path") or _validation(recipe, of_streams)
    if data is None:
        layout = recipe.data.get("layout")
        raise RecipeError(
            f"Missing --data for {recipe.name}" + (f", which is made for the layout {layout}" if layout else ""),
            fix="Add --data DIR, or try it with --smoke first.",
        )
    _check(recipe, known)
    return _Planner(recipe, data, of_streams, out).plan()


def data_of_streams(recipe: Recipe, sources: Mapping[str, str]) -> dict[str, str]:
    """Return stream name -> folder or spec of its data set, for the streams that all arms share.

    `sources` maps names of streams to data sets that replace the recipe's own.

    Raises: RecipeError for a stream without data, or for an unknown stream in `sources`.
    """
    names = [str(table["name"]) for table in recipe.stream]
    check_names("stream in --data NAME=DIR", sources, names)
    data = {str(table["name"]): str(table.get("data", "")) for table in recipe.stream} | dict(sources)
    if missing := [name for name in names if not data[name]]:
        have = [f"{name} has {folder}" for name, folder in data.items() if folder]
        raise RecipeError(
            f"Missing data for {' and '.join(missing)} of {recipe.name}" + "".join(f", {text}" for text in have),
            fix=f"Add {' '.join(f'--data {name}=DIR' for name in missing)}, or try it with --smoke first.",
        )
    return data


def _validation(recipe: Recipe, data: Mapping[str, str]) -> str | None:
    """Return the validation data of a recipe with streams: its `val`, or the first stream's data."""
    if not data:
        return None
    text = str(recipe.data.get("val", f"{{{next(iter(data))}}}"))
    for name in re.findall(r"{([^}]*)}", text):
        check_names("stream in val of [data]", [name], data)
        text = text.replace(f"{{{name}}}", data[name])
    return text


def words(flags: Flags) -> Iterator[str]:
    """Yield the words of flags as typed on the command line. `flags` maps names, without dashes, to values.

    True becomes --FLAG, False becomes --no-FLAG, a list repeats the flag, and "" leaves the flag out.
    """
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
    """Return `text` as a folder name that is valid on every operating system.

    Characters other than letters, digits and _.=+ become "-".
    """
    return re.sub(r"[^A-Za-z0-9_.=+]+", "-", text).strip("-.") or "arm"


def taken(flags: Flags) -> set[str]:
    """Return the names of the training settings that an arm's loss terms use, such as `temperature`.

    If the arm has several streams, these are the settings used in at least one of them.

    `flags` has the arm's flags, including the flags that all arms share.
    """
    found = set[str]()
    for table in flags.get("stream") or [{}]:
        settings = {key.replace("-", "_"): value for key, value in {**flags, **table}.items()}
        method = settings.get("method", "auto")
        if method == "auto":
            parted = settings.get("mix", "") != "" or settings.get("accumulate", 1) != 1
            method = auto_method(parted=parted) if "cache" in settings or not table else "none"
        weights = {"ce": settings.get("ce_weight", 1.0), "kl": settings.get("kl_weight", 1.0)}
        terms = [CrossEntropy(), *parse_method(method), *map(parse_term, settings.get("term", ()))]
        found |= {name for term in terms if term.active and weights.get(term.kind) != 0 for name in term.takes}
    return found


class _Planner:
    def __init__(self, recipe: Recipe, data: str, of_streams: Mapping[str, str], out: Path) -> None:
        self._recipe, self._data, self._of_streams, self._out = recipe, data, of_streams, out
        self._split = str(recipe.data.get("split", ImageSettings.split))
        self._val_split = str(recipe.data.get("val-split", Data.val_split))
        self._folds: list[int | None] = [None] if recipe.folds is None else list(range(recipe.folds))
        self._jobs: list[Job] = []
        self._runs: dict[str, tuple[Path, ...]] = {arm.name: () for arm in recipe.arms}
        self._under_way: list[str] = []
        self._audits: dict[Path, None] = {}
        tables = (recipe.teacher, *recipe.teachers.values(), recipe.store, *recipe.stores.values())
        self._of_arm = sorted({key for table in tables for key in map(named_flag, table.values()) if key is not None})
        self._taken = {name for arm in recipe.arms for name in taken({**recipe.student, **arm.flags})}

    def plan(self) -> Sweep:
        if not self._recipe.stream and not self._of_arm:  # streams name the stores that they read, and arms theirs
            for fold in self._folds:
                self._store(STORE, None, fold)
        for arm in self._recipe.arms:
            for fold in self._folds:
                for seed in self._recipe.seeds:
                    self._run(arm, fold, seed)
        self._show()
        return Sweep(self._recipe, self._out, tuple(self._jobs), self._runs, self._data, self._of_streams)

    def _add(self, job: Job) -> str:
        """Add a job unless it is planned already, and return its name."""
        if job.name not in (planned.name for planned in self._jobs):
            self._jobs.append(job)
        return job.name

    def _teacher(self, name: str, fold: int | None, arm_flags: Flags) -> str:
        """Add the training of a teacher, and return the job's name.

        `arm_flags` has the flags of the arm that needs it.
        """
        run = self._teacher_run(fold, name, arm_flags)
        flags = filled({**self._recipe.teacher, **self._recipe.teachers.get(name, {})}, arm_flags)
        flags |= {**self._judged(fold), "out": run}
        streams = [self._table(stream) for stream in flags.pop("stream", ())]
        if streams:
            flags |= {"stream": [{key: table[key] for key in _OF_LABELS if key in table} for table in streams]}
            flags |= {"method": "none", "val": self._data}
        else:
            flags |= {"data": self._data, "split": self._split}
        command = ("train-student" if streams else "train-teacher", *words(flags), "--resume")
        title = " ".join(filter(None, (TEACHER, "" if name == TEACHER else name, self._variant(arm_flags))))
        return self._add(Job(f"{title}{_of(fold)}", command, run / RESULT))

    def _variant(self, arm_flags: Flags) -> str:
        """Return the values of an arm's flags that teachers and caches depend on, as text, or ""."""
        return " ".join(str(arm_flags[key]) for key in self._of_arm if arm_flags.get(key, "") != "")

    def _store(
        self, name: str, stream: str | None, fold: int | None, seed: int = 0, arm_flags: Flags | None = None
    ) -> tuple[Path, str]:
        """Add the build of a cache, from a stream's data or from all data.

        Return the cache's folder and the job's name.
        """
        arm_flags = arm_flags or {}
        flags = filled({**self._recipe.store, **self._recipe.stores.get(name, {})}, arm_flags)
        named, audited = flags.pop(TEACHER, f"@{TEACHER}"), flags.pop(AUDIT, False)
        listed = named if isinstance(named, list) else [named]
        taught = [self._taught(str(teacher), name, fold, seed, arm_flags) for teacher in listed]
        teachers, needs = [text for text, _, _ in taught], [job for _, job, _ in taught if job]
        of_arm = any(of_seed for _, _, of_seed in taught)
        own_seed = seed if of_arm else 0
        place = self._place(fold, name, stream, own_seed, self._variant(arm_flags))
        source = self._table(stream) if stream else {"data": self._data}
        flags |= {"teacher": teachers if len(teachers) > 1 else teachers[0], "data": source["data"]}
        flags |= {"split": source.get("split", self._split), "out": place}
        title = " ".join(filter(None, (STORE, stream, "" if name == STORE else name, self._variant(arm_flags))))
        command = ("build-teacher-cache", *words(flags))
        title += _of(fold) + (f", seed {own_seed}" if own_seed else "")
        job = self._add(Job(title, command, place / "complete.json", tuple(needs)))
        if audited:
            report = self._audit(place, job)
            if not of_arm or seed == self._recipe.seeds[0]:
                self._audits.setdefault(report)
        return place, job

    def _taught(self, named: str, store: str, fold: int | None, seed: int, of_arm: Flags) -> tuple[str, str, bool]:
        """Return a cache's teacher "@NAME": its argument, the name of its job, and whether it depends on the seed."""
        teacher_name, at, suffix = named.removeprefix("@").rpartition("@")
        teacher_name, weights = (
            (teacher_name, f"@{suffix}") if at and suffix in WEIGHTS else (named.removeprefix("@"), "")
        )
        arms = [arm.name for arm in self._recipe.arms]
        if teacher_name in arms:
            run = self._run(self._recipe.arm(teacher_name), fold, seed)
            return f"{run}{weights}", next(job.name for job in self._jobs if job.done == run / RESULT), True
        if teacher_name not in (TEACHER, *self._recipe.teachers):
            raise unknown(f"teacher of [stores.{store}]", teacher_name, [TEACHER, *self._recipe.teachers, *arms])
        if "spec" in self._recipe.teacher:
            return str(self._recipe.teacher["spec"]), "", False
        return (
            f"{self._teacher_run(fold, teacher_name, of_arm)}{weights}",
            self._teacher(teacher_name, fold, of_arm),
            False,
        )

    def _audit(self, store: Path, job: str) -> Path:
        """Add the audit of a cache's teacher against the labels of its data, and return its file."""
        out = self._out / "audits" / store.stem
        command = ("inspect", str(store), "--teacher-report", "--out", str(out))
        self._add(Job(f"audit of {job}", command, out / "report.json", (job,)))
        return out / "report.json"

    def _table(self, stream: str) -> dict[str, Any]:
        """Return the settings of a stream that all arms share, with its data set and split."""
        table = next(dict(parse_stream(table)) for table in self._recipe.stream if table["name"] == stream)
        return {"name": stream, "data": self._of_streams[stream], "split": self._split} | {
            key: value for key, value in table.items() if key not in ("name", "data")
        }

    def _streams(self, arm: Arm, fold: int | None, seed: int) -> tuple[list[dict[str, Any]], list[str]]:
        """Return an arm's streams with their data sets and caches, and the jobs that build these caches."""
        tables, needs = [], []
        for changes in arm.flags.get("stream", ()):
            table = {key: value for key, value in changes.items() if value != ""}
            name, caches = str(table["name"]), table.get("cache", ())
            if name in self._of_streams:
                table = {"name": name, "data": self._of_streams[name], "split": self._split} | {
                    key: value for key, value in table.items() if key not in ("name", "data")
                }
            places: list[str] = []
            for text in caches if isinstance(caches, list) else [caches]:
                named, store = _named_store(str(text))
                if store is None:
                    places.append(str(text))
                    continue
                if store not in (STORE, *self._recipe.stores) or name not in self._of_streams:
                    raise unknown("cache in '@NAME' of a stream", store, [STORE, *self._recipe.stores])
                place, job = self._store(store, name, fold, seed)
                needs.append(job)
                of_store = {**self._recipe.store, **self._recipe.stores.get(store, {})}
                if not places and of_store.get("pixels") != "source":
                    table = {key: value for key, value in table.items() if key not in ("data", "split")}
                places.append(f"{named}{place}")
            tables.append(table | ({"cache": places} if caches else {}))
        return tables, needs

    def _run(self, arm: Arm, fold: int | None, seed: int) -> Path:
        """Add the run of an arm, after the runs that its flags name with '@', and return its folder."""
        run = self._out / RUNS / (folder_name(arm.name) + _of(fold, "-") + (f"-seed{seed}" if seed else ""))
        name = f"{arm.name}{_of(fold)}" + (f", seed {seed}" if len(self._recipe.seeds) > 1 else "")
        if run in self._runs[arm.name]:
            return run
        if name in self._under_way:
            raise RecipeError(
                f"Arms need each other's runs: {' needs '.join(map(repr, [*self._under_way, name]))}",
                fix="Take one of the '@' values out.",
            )
        self._under_way.append(name)
        flags = self._flags(arm)
        if str(flags.get("model", "")).startswith("+"):
            flags["model"] = f"{self._recipe.student.get('model', '')}{flags['model']}"
        streams, needs = self._streams(arm, fold, seed)
        if streams:
            flags["stream"] = streams
        else:
            flags["cache"], job = self._store(STORE, None, fold, arm_flags=flags)
            needs.append(job)
        for key, value in flags.items():
            if isinstance(value, str) and value.startswith("@"):
                needed_arm = self._recipe.arm(value[1:])
                run_of_other = self._run(needed_arm, fold, seed)
                needs += [job.name for job in self._jobs if job.done == run_of_other / RESULT]
                flags[key] = run_of_other / "last.safetensors" if key == "init" else run_of_other
        self._under_way.pop()
        flags |= {
            "name": arm.name,
            **self._judged(fold),
            "val": self._data,
            "seed": seed,
            "out": run,
        }
        self._add(Job(name, ("train-student", *words(flags), "--resume"), run / RESULT, tuple(needs)))
        self._runs[arm.name] += (run,)
        return run

    def _flags(self, arm: Arm) -> dict[str, Any]:
        """Return an arm's flags, without those that only other arms use.

        Raises: RecipeError for a flag that no arm uses.
        """
        flags = {**self._recipe.student, **arm.flags}
        if nobodys := untaken(flags, self._taken):
            raise no_effect(nobodys, f"the arm {arm.name!r}")
        idle = untaken(flags, taken(flags))
        return {key: value for key, value in flags.items() if key.replace("-", "_") not in idle}

    def _show(self) -> None:
        """Add the comparison, and the report page with pictures of each arm's first run."""
        out, folds = self._out, self._recipe.folds
        trained = [job.name for job in self._jobs if job.words[0] == "train-student"]
        where: dict[str, Any] = {"data": self._data, "split": self._val_split if folds is None else self._split}
        where |= {"smoke": True} if self._recipe.smoke else {}
        spec = self._recipe.teacher.get("spec")
        tables = {"markdown": "comparison.md", "csv": "comparison.csv", "json": "comparison.json"}
        files = {key: out / name for key, name in (tables | {"text": "kd_comparison_results.txt"}).items()}
        judged = {**where, "teacher": spec or out / TEACHERS} | ({"own-fold": True} if folds else {})
        judged |= {"baseline": self._recipe.show.get("baseline", "")}
        runs = [str(run) for arm in self._recipe.arms for run in self._runs[arm.name]]
        compare = ("compare", *runs, *words({**judged, **files}))
        compared = self._add(Job(COMPARISON, compare, None, tuple(trained)))
        page = {
            **judged,
            "audit": list(self._audits),
            "draw": out / "pictures",
            "num": self._recipe.show.get("num", ""),
            "figure": out / CURVE if has_curve(self._recipe) else "",
            "title": self._recipe.title,
            "out": out / "report.html",
        }
        self._add(Job("report", ("report", *runs, *words(page)), None, (compared,)))

    def _judged(self, fold: int | None) -> dict[str, Any]:
        """Return the flags for a training's validation: on a fold, on the held-out part, or on another split."""
        part = self._recipe.data.get("held-out") if fold is None else f"{fold}/{self._recipe.folds}"
        if part is None:
            return {"val-split": self._val_split}
        by = self._recipe.data.get("folds-by", "")
        return {"fold": part, "val-split": self._split, "val-fold": part, "folds-by": by}

    def _teacher_run(self, fold: int | None, name: str, arm_flags: Flags) -> Path:
        return self._out / TEACHERS / f"{folder_name(f'{name} {self._variant(arm_flags)}')}{_of(fold, '-')}"

    def _place(self, fold: int | None, name: str, stream: str | None, seed: int, variant: str) -> Path:
        of_stream = [stream, *([name] if name != STORE else [])] if stream else [name]
        of_stream += [variant] if variant else []
        text = folder_name("-".join(map(str, of_stream))) + _of(fold, "-") + (f"-seed{seed}" if seed else "")
        return self._out / "stores" / f"{text}.zarr"


def _named_store(cache: str) -> tuple[str, str | None]:
    """Split '@STORE' or 'NAME=@STORE' into ('NAME=', STORE). For a path, STORE is None."""
    match = re.fullmatch(r"((?:[^@=/]+=)?)@(.+)", cache)
    return (match[1], match[2]) if match else ("", None)


def _of(fold: int | None, before: str = ", ") -> str:
    if fold is None:
        return ""
    return f"{before}fold{'' if before == '-' else ' '}{fold}"


def _without(flags: Flags, *keys: str) -> Flags:
    return {key: value for key, value in flags.items() if key not in keys}


def _check(recipe: Recipe, flags_of_verbs: Known) -> None:
    folds = recipe.folds
    if folds is not None and (not isinstance(folds, int) or folds < 2):
        raise RecipeError(f"Invalid folds: {folds!r}", fix="Give 2 or more, or leave it out for none.")
    held_out = recipe.data.get("held-out")
    if held_out is not None:
        if folds is not None:
            raise RecipeError("Use either folds or held-out, not both", fix="Leave out folds, or held-out.")
        parse_fold(str(held_out))
    if folds_by := recipe.data.get("folds-by"):  # "" leaves it out
        check_folds_by(str(folds_by), folds=any((folds, held_out)))
    if recipe.stream and (folds or held_out):
        raise RecipeError(
            "Cannot use folds or held-out with [[stream]]", fix="Leave them out, or give a stream its own fold."
        )
    for table_flags in (recipe.teacher, *recipe.teachers.values(), recipe.store, *recipe.stores.values()):
        of_arm = [name for name in map(named_flag, table_flags.values()) if name is not None]
        check_names("flag of train-student in braces", of_arm, flags_of_verbs["train-student"])
    stores = {
        "[store]": recipe.store,
        **{f"[stores.{name}]": table_flags for name, table_flags in recipe.stores.items()},
    }
    for name, table_flags in stores.items():
        if not isinstance(table_flags.get(AUDIT, False), bool):
            raise RecipeError(
                f"Invalid {AUDIT} of {name}: {table_flags[AUDIT]!r}", fix=f"Write {AUDIT} = true or {AUDIT} = false"
            )
    for table, verb, flags in (
        ("[teacher]", "train-teacher", _without(recipe.teacher, "spec", "stream")),
        *(
            (f"[teachers.{name}]", "train-teacher", _without(table_flags, "seed"))
            for name, table_flags in recipe.teachers.items()
        ),
        *((name, "build-teacher-cache", _without(table_flags, TEACHER, AUDIT)) for name, table_flags in stores.items()),
        ("[student]", "train-student", recipe.student),
        *((f"the arm {arm.name!r}", "train-student", arm.flags) for arm in recipe.arms),
    ):
        check_names(f"flag of {verb} in {table}", flags, flags_of_verbs[verb] - OWN[verb])
