"""Recipes of sweeps: TOML files whose tables hold flags of the verbs.

    title = "..."                  one line
    about = "..."                  what it repeats, what to expect
    seeds = [0, 1]                 of every arm; default [0]

    [data]                         layout, split, val-split; folds = 2 cross-validates over the split, held-out = "0/5"
                                   leaves a fifth of it out of all trainings, which are validated on it; folds-by =
                                   "^(.+)_" keeps whole sequences in a fold
    [teacher]                      flags of train-teacher, or spec = "torchvision:fcn_resnet50@default"
    [store]                        flags of build-teacher-cache
    [student]                      flags of train-student that all arms share
    [[arm]]                        a name and flags of its own; a list of values makes an arm of each
    [show]                         num: best and worst images of each arm
    [smoke]                        the same tables, whose keys replace those above with --smoke, those of [[smoke.arm]]
                                   in the arm of that name

In a name, {kl-weight} stands for the flag's value. The value "@NAME" of a flag is the run of that arm with the same
fold and seed, which is trained before. "" leaves a flag out.
"""

import difflib
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import resources
from itertools import product
from pathlib import Path
from typing import Any

from kdcache.errors import RecipeError

Flags = Mapping[str, Any]
"""Flags of a verb without their dashes; a list is a choice, but for `term` and `stream`, lists of tables."""

TABLES = ("data", "teacher", "store", "student", "show")
_TOP = {"title", "about", "seeds", "arm", "smoke", *TABLES}
_KEYS = {"data": {"layout", "path", "split", "val-split", "folds", "held-out", "folds-by"}, "show": {"num"}}
_REPEATED = ("term", "stream")
SMOKE_TITLE = "Smoke run: "


@dataclass(frozen=True)
class Arm:
    """One way to train the student."""

    name: str
    flags: Flags


@dataclass(frozen=True)
class Recipe:
    """A sweep before it knows where its data are.

    Attributes:
        source: the text it was read from, before `--smoke` and `--set`.
        data: layout, path, split, val-split, folds, held-out, folds-by. show: num.
        teacher, store, student: flags of their verbs.
        arms: every combination of their values, each once.
        smoke: it was made small by `--smoke`, which its title shows.
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
    smoke: bool = False

    @property
    def folds(self) -> int | None:
        """The number of folds of its cross-validation; None without."""
        return self.data.get("folds")

    def arm(self, name: str) -> Arm:
        """The arm of that name. Raises: RecipeError with the nearest name when there is none."""
        for arm in self.arms:
            if arm.name == name:
                return arm
        raise unknown("'@NAME' is the name of an arm", name, [arm.name for arm in self.arms])


def list_recipes() -> dict[str, str]:
    """Name -> title of the recipes that are shipped."""
    paths = sorted(path for path in _shipped().iterdir() if path.name.endswith(".toml"))
    return {path.name.removesuffix(".toml"): tomllib.loads(path.read_text(encoding="utf-8"))["title"] for path in paths}


def read_recipe(origin: str, *, smoke: bool = False, changes: Iterable[str] = ()) -> Recipe:
    """Read a recipe that is shipped, by its name, or a TOML file.

    Args:
        smoke: replace keys by those of its [smoke]: small, on procedural scenes.
        changes: TABLE.KEY=VALUE, VALUE as in TOML (a bare word is a string).
    Raises: RecipeError for one that is missing, malformed, or has keys that do not exist.
    """
    content = _load(origin)
    check_names("a recipe's keys", content, _TOP)
    shrunk = content.pop("smoke", {})
    check_names("keys of [smoke]", shrunk, _TOP - {"smoke", "title", "about"})
    if smoke:
        if not shrunk:
            raise RecipeError(
                "--smoke needs a [smoke] table in the recipe", received=origin, remedy="add one, or leave --smoke out"
            )
        content = _replaced(content, shrunk)
    for change in changes:
        _change(content, change)
    for table in TABLES:
        if not isinstance(content.get(table, {}), dict):
            raise RecipeError(
                f"[{table}] of a recipe is a table", received=repr(content[table]), remedy="write its keys below it"
            )
    for table, keys in _KEYS.items():
        check_names(f"keys of [{table}]", content.get(table, {}), keys)
    return Recipe(
        name=Path(origin).stem,
        title=SMOKE_TITLE * smoke + str(content.get("title", Path(origin).stem)),
        about=str(content.get("about", "")),
        arms=tuple(_arms(content)),
        seeds=_seeds(content.get("seeds", [0])),
        smoke=smoke,
        **{table: content.get(table, {}) for table in TABLES},
    )


def check_names(what: str, names: Iterable[str], allowed: Iterable[str]) -> None:
    """Check that names are among the allowed ones. Raises: RecipeError for the first other, with the nearest."""
    options = sorted(allowed)
    for name in names:
        if name not in options:
            raise unknown(f"{what} are known ones", name, options)


def unknown(rule: str, name: str, allowed: Iterable[str]) -> RecipeError:
    """The error for an unknown name: its remedy is the nearest allowed ones, or all."""
    near = difflib.get_close_matches(name, list(allowed), n=3, cutoff=0.5)
    remedy = f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(allowed)}"
    return RecipeError(rule, received=repr(name), remedy=remedy)


def _shipped() -> Any:
    return resources.files("kdcache.sweep") / "recipes"


def _load(origin: str) -> dict[str, Any]:
    shipped = _shipped() / f"{origin}.toml"
    path = Path(origin)
    if not path.is_file() and not shipped.is_file():
        names = list_recipes()
        near = difflib.get_close_matches(origin, names, n=3, cutoff=0.4)
        raise RecipeError(
            "a recipe is one that is shipped, or a TOML file",
            received=repr(origin),
            remedy=f"did you mean {' or '.join(near)}?" if near else f"shipped are {', '.join(names)}",
        )
    try:
        return tomllib.loads((path if path.is_file() else shipped).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(
            "a recipe is a TOML file", received=f"{origin}: {error}", remedy="correct that line"
        ) from error


def _replaced(content: dict[str, Any], smoke: dict[str, Any]) -> dict[str, Any]:
    """The content with tables merged key by key, but for the teacher, whose table is replaced as a whole."""
    merged = dict(content)
    for key, value in smoke.items():
        if key == "arm":
            merged[key] = _replaced_arms(content.get(key, []), value)
            continue
        whole = key == "teacher" or not isinstance(value, dict)
        merged[key] = value if whole else {**content.get(key, {}), **value}
    return merged


def _replaced_arms(arms: Any, smoke: Any) -> list[dict[str, Any]]:
    """The arms in their order, each with the keys of the small one of its name."""
    _check_arms(arms)
    _check_arms(smoke)
    small = {str(arm["name"]): arm for arm in smoke}
    check_names("names of [[smoke.arm]]", small, [str(arm["name"]) for arm in arms])
    return [{**arm, **small.get(str(arm["name"]), {})} for arm in arms]


def _change(content: dict[str, Any], text: str) -> None:
    where, equals, value = text.partition("=")
    table, _, key = where.strip().rpartition(".")
    if not equals or not key or (table and table not in TABLES):
        raise RecipeError(
            "--set is TABLE.KEY=VALUE, or seeds=[0, 1]",
            received=repr(text),
            remedy=f"the tables are {', '.join(TABLES)}; for instance --set student.iterations=1000",
        )
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()
    if table:
        content[table] = {**content.get(table, {}), key: parsed}
    else:
        check_names("keys of --set without a table", [key], ["seeds"])
        content[key] = parsed


def _arms(content: dict[str, Any]) -> Iterator[Arm]:
    tables = content.get("arm", [])
    _check_arms(tables)
    seen: set[str] = set()
    for table in tables:
        flags = {key: value for key, value in table.items() if key != "name"}
        shared = {key: value for key, value in content.get("student", {}).items() if key not in flags}
        both = {**shared, **flags}
        axes = {key: value for key, value in both.items() if isinstance(value, list) and key not in _REPEATED}
        for values in product(*axes.values()):
            choice = dict(zip(axes, values, strict=True))
            arm = Arm(_name(str(table["name"]), {**both, **choice}, choice), {**flags, **choice})
            if arm.name in seen:
                raise RecipeError(
                    "arms have names of their own",
                    received=f"{arm.name!r} twice",
                    remedy="put what tells them apart into the name, as {kl-weight}",
                )
            seen.add(arm.name)
            yield arm


def _check_arms(arms: Any) -> None:
    if not isinstance(arms, list) or not arms or not all(isinstance(arm, dict) and "name" in arm for arm in arms):
        raise RecipeError(
            "a recipe has [[arm]] tables with a name", received=repr(arms)[:80], remedy="add [[arm]] and name = ..."
        )


def _name(template: str, flags: Flags, choice: Flags) -> str:
    """The arm's name: values in place of {flag}; choices that the template does not show are added."""
    name = template
    for key, value in flags.items():
        name = name.replace(f"{{{key}}}", str(value))
    hidden = [f"{key} {value}" for key, value in choice.items() if f"{{{key}}}" not in template]
    return ", ".join([name, *hidden])


def _seeds(seeds: Any) -> tuple[int, ...]:
    if not isinstance(seeds, list) or not seeds or not all(isinstance(seed, int) and seed >= 0 for seed in seeds):
        raise RecipeError(
            "seeds are whole numbers from 0", received=f"seeds = {seeds!r}", remedy="for instance seeds = [0, 1, 2]"
        )
    return tuple(dict.fromkeys(seeds))
