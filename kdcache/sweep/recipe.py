"""Recipes of sweeps: TOML files whose tables hold flags of the verbs.

    title = "..."                  one line
    about = "..."                  what it repeats, what to expect
    seeds = [0, 1]                 of every arm; default [0]

    [data]                         layout, split, val-split; folds = 2 cross-validates over the split, held-out = "0/5"
                                   leaves a fifth of it out of all trainings, which are validated on it; folds-by =
                                   "^(.+)_" keeps whole sequences in a fold; val = "{NAME} + depth:{NAME}" is judged on
                                   data of streams
    [teacher]                      flags of train-teacher, or spec = "torchvision:fcn_resnet50@default"; stream =
                                   ["NAME"] lets it learn from the labels of those streams
    [teachers.NAME]                another one, by its difference to [teacher], such as seed = 1
    [store]                        flags of build-teacher-cache; audit = true compares the teacher of every cache with
                                   the labels of its data
    [stores.NAME]                  another one, by its difference to [store]; teacher = ["@teacher", "@NAME"], a
                                   teacher or the run of an arm (of the same seed); "@NAME@last-ema" are its weights
    [[stream]]                     a stream of the students' batches: name, data and the keys of --stream
    [student]                      flags of train-student that all arms share
    [[arm]]                        a name and flags of its own; a list of values makes an arm of each
    [show]                         num: best and worst images of each arm; baseline: the arm to measure against; curve =
                                   "target.limit-samples" draws scores over that key, of a stream or of the arm
    [smoke]                        the same tables, whose keys replace those above with --smoke, those of [[smoke.arm]]
                                   and [[smoke.stream]] in the one of that name

In a name, {kl-weight} stands for the flag's value. The value "@NAME" of a flag is the run of that arm with the same
fold and seed, which is trained before. "" leaves a flag out. An arm's model = "+aux" is that of [student], with a head.

In [teacher] and [store] the value "{limit-labels}" is the arm's own: arms with other values have other teachers and
caches.

A stream's `cache` is "@store", or "@NAME" of [stores.NAME]: a cache of that stream's data. A list of them is joined, as
["@store", "depth=@NAME"]. An arm changes a stream by
its name, `stream.kitti.share = [0.25, 0.5]` ({kitti.share} in its own), and leaves it out by `stream.kitti = false`.
"""

import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import resources
from itertools import product
from pathlib import Path
from typing import Any

from kdcache.bounded import parse_toml, read_text
from kdcache.errors import RecipeError, suggest
from kdcache.settings.removed import KEYS, SETTINGS, removal
from kdcache.settings.streams import parse_stream

Flags = Mapping[str, Any]
"""Flag, without dashes -> value. A list is a choice of values, except for `term` and `stream`."""

TABLES = ("data", "teacher", "teachers", "store", "stores", "student", "show")
_NAMED = ("arm", "stream")
"""Lists of tables with a name."""
_TOP = {"title", "about", "seeds", "smoke", *_NAMED, *TABLES}
_KEYS = {
    "data": {"layout", "path", "split", "val-split", "val", "folds", "held-out", "folds-by"},
    "show": {"num", "baseline", "curve"},
}
_REPEATED = ("term", "stream")
TEACHER, STORE = "teacher", "store"
"""The names of the teacher and of the cache that every recipe has."""
AUDIT = "audit"
"""The key of [store] that is not a flag of build-teacher-cache."""
SMOKE_TITLE = "Smoke run: "


@dataclass(frozen=True)
class Arm:
    """One way to train the student in a sweep.

    Attributes:
        name: name of the arm.
        flags: flag of train-student, without dashes -> value.
    """

    name: str
    flags: Flags


@dataclass(frozen=True)
class Recipe:
    """The content of a recipe file: the trainings of a sweep, still without their data.

    Flags are mappings from a flag's name, without dashes, to its value.

    Attributes:
        name: name of the recipe.
        title: one line of text.
        about: what the sweep shows.
        data: keys of the table [data]: layout, path, split, val-split, val, folds, held-out, folds-by.
        teacher: flags of train-teacher, or `spec` for an existing teacher.
        store: flags of build-teacher-cache.
        student: flags of train-student that all arms share.
        arms: the arms. If a flag has a list of values, each value has its own arm.
        seeds: the seeds with which each arm is trained.
        show: keys of the table [show]. `num` is how many of the best and worst images of each arm are shown. `baseline`
            names the arm to compare with. `curve` names the setting on the horizontal axis of curve.png, such as
            `limit-labels`.
        teachers: name of each further teacher -> flags that differ from `teacher`.
        stores: name of each further cache -> flags that differ from `store`.
        stream: settings of each stream that the arms share.
        smoke: True for a short trial run (`--smoke`).
    """

    name: str
    title: str
    about: str
    data: Flags
    teacher: Flags
    store: Flags
    student: Flags
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...] = (0,)
    show: Flags = field(default_factory=dict)
    teachers: Mapping[str, Flags] = field(default_factory=dict)
    stores: Mapping[str, Flags] = field(default_factory=dict)
    stream: tuple[Flags, ...] = ()
    smoke: bool = False

    @property
    def folds(self) -> int | None:
        """The number of folds of a cross-validation, or None."""
        return self.data.get("folds")

    def arm(self, name: str) -> Arm:
        """Return the arm with this name. Raises: RecipeError for an unknown name."""
        for arm in self.arms:
            if arm.name == name:
                return arm
        raise unknown("arm in '@NAME'", name, [arm.name for arm in self.arms])


def list_recipes() -> dict[str, str]:
    """Return name -> title of each recipe that kdcache ships."""
    paths = sorted(path for path in _shipped().iterdir() if path.name.endswith(".toml"))
    return {path.name.removesuffix(".toml"): tomllib.loads(path.read_text(encoding="utf-8"))["title"] for path in paths}


def read_recipe(origin: str, *, smoke: bool = False, changes: Iterable[str] = ()) -> Recipe:
    """Read a recipe that kdcache ships, or a TOML file.

    Args:
        origin: name of a shipped recipe, or path of a file.
        smoke: replace keys by those in the recipe's [smoke] table, for a short trial run.
        changes: texts TABLE.KEY=VALUE that change single keys, with VALUE as in TOML. A bare word is a string.
    Raises: RecipeError for a recipe that is missing or malformed, or that has unknown keys.
    """
    content = _load(origin)
    check_names("key of the recipe", content, _TOP)
    shrunk = content.pop("smoke", {})
    check_names("key of [smoke]", shrunk, _TOP - {"smoke", "title", "about"})
    if smoke:
        if not shrunk:
            raise RecipeError(
                f"--smoke needs a [smoke] table in the recipe {origin}", fix="Add one, or leave --smoke out."
            )
        content = _replaced(content, shrunk)
    for change in changes:
        _change(content, change)
    for table in TABLES:
        if not isinstance(content.get(table, {}), dict):
            raise RecipeError(
                f"[{table}] of the recipe is not a table: {content[table]!r}",
                fix=f"Write [{table}] and its keys below it.",
            )
    for table, keys in _KEYS.items():
        check_names(f"key of [{table}]", content.get(table, {}), keys)
    _check_tables(content)
    return Recipe(
        name=Path(origin).stem,
        title=SMOKE_TITLE * smoke + str(content.get("title", Path(origin).stem)),
        about=str(content.get("about", "")),
        arms=tuple(_arms(content)),
        stream=tuple(content.get("stream", ())),
        seeds=_seeds(content.get("seeds", [0])),
        smoke=smoke,
        **{table: content.get(table, {}) for table in TABLES},
    )


def check_names(what: str, names: Iterable[str], allowed: Iterable[str]) -> None:
    """Check that all `names` are among the `allowed` names.

    `what` describes a name for the message, such as "key of [smoke]".

    Raises: RecipeError for the first unknown name.
    """
    options = sorted(allowed)
    for name in names:
        if name not in options:
            if (gone := removal(name, KEYS, SETTINGS)) is not None:
                raise gone
            raise unknown(what, name, options)


def unknown(what: str, name: str, allowed: Iterable[str]) -> RecipeError:
    """Return the error for an unknown name. Its fix proposes the most similar allowed name, or lists all.

    `what` describes the name, such as "key of [smoke]".
    """
    names = list(allowed)
    otherwise = f"Choose one of: {', '.join(names)}" if names else "Leave it out: the recipe has none."
    return RecipeError(f"Unknown {what}: {name!r}", fix=suggest(name, names, otherwise, cutoff=0.5))


def named_flag(value: Any) -> str | None:
    """Return the flag's name if a recipe's value refers to a flag: "{limit-labels}" becomes "limit-labels".

    Returns None for any other value.
    """
    match = re.fullmatch(r"{([a-z-]+)}", value) if isinstance(value, str) else None
    return None if match is None else match[1]


def filled(table: Flags, own: Flags) -> dict[str, Any]:
    """Return `table` with each value such as "{limit-labels}" replaced by that flag's value in `own`.

    `table` and `own` map names of flags, without dashes, to values. `own` has the flags of an arm. A flag that the arm
    does not have becomes "".
    """
    return {key: value if (name := named_flag(value)) is None else own.get(name, "") for key, value in table.items()}


def _shipped() -> Any:
    return resources.files("kdcache.sweep") / "recipes"


def _load(origin: str) -> dict[str, Any]:
    shipped = _shipped() / f"{origin}.toml"
    path = Path(origin)
    if not path.is_file() and not shipped.is_file():
        names = list_recipes()
        raise RecipeError(
            f"Recipe not found: {origin!r}",
            fix=suggest(
                origin, names, f"Give a TOML file, or a recipe that is shipped: {', '.join(names)}", cutoff=0.4
            ),
        )
    try:
        return parse_toml(read_text(path) if path.is_file() else shipped.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(f"Cannot read the recipe {origin}: {error}", fix="Correct that line.") from error


def _replaced(content: dict[str, Any], smoke: dict[str, Any]) -> dict[str, Any]:
    """Return the recipe with the tables of [smoke] merged into it key by key.

    The teacher's table is replaced completely.
    """
    merged = dict(content)
    for key, value in smoke.items():
        if key in _NAMED:
            merged[key] = _replaced_named(key, content.get(key, []), value)
            continue
        replaced = key == "teacher" or not isinstance(value, dict)
        merged[key] = value if replaced else {**content.get(key, {}), **value}
    return merged


def _replaced_named(kind: str, tables: Any, smoke: Any) -> list[dict[str, Any]]:
    """Return the arms or streams in order, each with the keys of the [smoke] table with the same name replaced."""
    _check_named(kind, tables)
    _check_named(kind, smoke)
    small = {str(table["name"]): table for table in smoke}
    check_names(f"name in [[smoke.{kind}]]", small, [str(table["name"]) for table in tables])
    return [{**table, **small.get(str(table["name"]), {})} for table in tables]


def _change(content: dict[str, Any], text: str) -> None:
    where, equals, value = text.partition("=")
    table, _, key = where.strip().rpartition(".")
    first, _, name = table.partition(".")
    nested = first in ("stream", "teachers", "stores")
    if (gone := removal(first, KEYS)) is not None:
        raise gone
    if not equals or not key or (table and first not in (*TABLES, "stream")) or bool(name) != nested:
        raise RecipeError(
            f"Invalid value of --set: {text!r}",
            fix=f"Use TABLE.KEY=VALUE, stream.NAME.KEY=VALUE, or seeds=[0, 1]. The tables are {', '.join(TABLES)}. For "
            "example: --set student.iterations=1000",
        )
    try:
        parsed = parse_toml(f"value = {value}")["value"]
    except ValueError:
        parsed = value.strip()
    if first == "stream":
        content[first] = _replaced_named(first, content.get(first, []), [{"name": name, key: parsed}])
    elif nested:
        tables = content.get(first, {})
        content[first] = {**tables, name: {**tables.get(name, {}), key: parsed}}
    elif table:
        content[table] = {**content.get(table, {}), key: parsed}
    else:
        check_names("key of --set without a table", [key], ["seeds"])
        content[key] = parsed


def _arms(content: dict[str, Any]) -> Iterator[Arm]:
    tables = content.get("arm", [])
    _check_named("arm", tables)
    names: set[str] = set()
    for table in tables:
        arm_flags = {key: value for key, value in table.items() if key not in ("name", "stream")}
        shared = {key: value for key, value in content.get("student", {}).items() if key not in arm_flags}
        both = {**shared, **arm_flags, **_stream_changes(table)}
        axes = {key: value for key, value in both.items() if isinstance(value, list) and not _is_repeated(key)}
        for values in product(*axes.values()):
            choice = dict(zip(axes, values, strict=True))
            flags = {key: value for key, value in {**arm_flags, **choice}.items() if not _of_stream(key)}
            changes = {key: value for key, value in {**both, **choice}.items() if _of_stream(key)}
            if streams := _streams(table, content.get("stream", []), changes):
                flags["stream"] = streams
            arm = Arm(_name(str(table["name"]), {**both, **choice}, choice), flags)
            if arm.name in names:
                raise RecipeError(
                    f"Two arms have the name {arm.name!r}",
                    fix="Put what tells them apart into the name, for example {kl-weight}",
                )
            names.add(arm.name)
            yield arm


def _is_repeated(key: str) -> bool:
    return key.rpartition(".")[2] in _REPEATED


def _of_stream(key: str) -> bool:
    """Return True if a key belongs to a stream, as `kitti.share` does. Flags do not have dots."""
    return "." in key


def _stream_changes(arm: Flags) -> dict[str, Any]:
    """Return an arm's changes to streams, such as `kitti.share` -> 0.5.

    `kitti.` -> False leaves the stream out.
    """
    changes = arm.get("stream", {})
    if isinstance(changes, list):
        return {}
    if not isinstance(changes, dict) or not all(
        change is False or isinstance(change, dict) for change in changes.values()
    ):
        raise RecipeError(
            f"Cannot read the streams of the arm {arm['name']!r}: stream = {changes!r}",
            fix="Write stream.NAME.share = 0.5, or stream.NAME = false to leave it out.",
        )
    flat: dict[str, Any] = {}
    for name, change in changes.items():
        flat |= {f"{name}.": False} if change is False else {f"{name}.{key}": value for key, value in change.items()}
    return flat


def _streams(arm: Flags, shared: list[dict[str, Any]], changes: Flags) -> list[dict[str, Any]]:
    """Return an arm's streams: its own, or the shared ones with the arm's changes.

    Raises: RecipeError for an unknown stream.
    """
    if isinstance(arm.get("stream"), list):
        return list(arm["stream"])
    by_name = {str(table["name"]): dict(table) for table in shared}
    for key, value in changes.items():
        name, _, option = key.rpartition(".")
        check_names(f"stream of the arm {arm['name']!r}", [name], by_name)
        by_name[name][option] = value
    streams = [table for table in by_name.values() if table.pop("", True)]
    return [dict(parse_stream(table)) for table in streams]


def _check_named(kind: str, tables: Any) -> None:
    if not isinstance(tables, list) or not tables or not all(isinstance(t, dict) and "name" in t for t in tables):
        raise RecipeError(
            f"[[{kind}]] of the recipe needs tables with a name, not {repr(tables)[:80]}",
            fix=f"Add [[{kind}]] and name = ...",
        )


def _check_tables(content: dict[str, Any]) -> None:
    """Check the streams, and the tables of further teachers and caches. Raises: RecipeError."""
    if "stream" in content:
        _check_named("stream", content["stream"])
        for table in content["stream"]:
            parse_stream(table)
    names = [str(table["name"]) for table in content.get("stream", [])]
    check_names("stream of [teacher]", content.get(TEACHER, {}).get("stream", []), names)
    for kind, first in (("teachers", TEACHER), ("stores", STORE)):
        for name, table in content.get(kind, {}).items():
            if not isinstance(table, dict) or name == first:
                raise RecipeError(
                    f"Invalid table in the recipe: {kind}.{name} = {table!r}",
                    fix=f"Write the keys in which it differs from [{first}] below [{kind}.another]",
                )


def _name(template: str, flags: Flags, choice: Flags) -> str:
    """Return an arm's name, with values in place of {flag}. Chosen values that the template does not show are added."""
    name = template
    for key, value in flags.items():
        name = name.replace(f"{{{key}}}", str(value))
    hidden = [f"{key} {value}" for key, value in choice.items() if f"{{{key}}}" not in template]
    return ", ".join([name, *hidden])


def _seeds(seeds: Any) -> tuple[int, ...]:
    if not isinstance(seeds, list) or not seeds or not all(isinstance(seed, int) and seed >= 0 for seed in seeds):
        raise RecipeError(
            f"Invalid seeds in the recipe: seeds = {seeds!r}",
            fix="Give whole numbers from 0, for example seeds = [0, 1, 2]",
        )
    return tuple(dict.fromkeys(seeds))
