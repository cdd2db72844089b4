"""Rows of a comparison: runs that differ only in seed and fold form one row, named by its distinguishing settings.

The `--name` of a run appears in every table. Runs with the same name may also differ in what depends on the fold: the
teacher, and so the cache.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kdcache.analysis.runs import Entry
from kdcache.settings.methods import parse_method, parse_term
from kdcache.settings.streams import to_line
from kdcache.settings.term import LossTerm

REPEATED = ("seed", "fold", "val-fold")
"""What runs of one row differ in."""
OF_A_FOLD = ("cache", "trust-against")
"""What named runs of one row differ in besides."""
MACHINE = (
    "cache-bytes",
    "cache-dir",
    "device",
    "gradients-every",
    "impl",
    "log-every",
    "resident",
    "step",
    "threads",
    "workers",
)
"""Settings of a run that do not decide what it learns."""
CONTROL = "control: labels in the teacher's place"
"""The name, alone or after others, of a row that learnt from labels by the terms of a teacher."""
_NAMING = (
    *("model", "method", "teacher", "term", "kl-weight", "temperature", "ce-weight", "gate", "class-trust"),
    "class-weights",
)
"""Settings that name rows, the first ones first; then all others by the alphabet, and what holds paths."""
_LAST = ("init", "cache", "data", "split", "val", "val-split", "verb")
_OF_A_TEACHER = ("kl-weight", "temperature")
"""Settings that a run without KL has and does not use: no part of its name."""
_BARE = ("model", "method", "verb")
"""Settings whose values need no name beside them."""


@dataclass(frozen=True)
class Group:
    """The runs of a row, before they are evaluated.

    Attributes:
        name: the row's name.
        runs: its runs, which differ only in seed and fold.
        differs: the settings that distinguish the row from other rows, by flag. None for a setting that it does not
            have.
        teacher: whether this is the teacher's row, which is outside the ranking.
    """

    name: str
    runs: tuple[Entry, ...]
    differs: Mapping[str, Any]
    teacher: bool = False

    @property
    def settings(self) -> Mapping[str, Any]:
        """The recipe of the row's first run, by flag. Empty if the run has no recipe."""
        return self.runs[0].settings

    @property
    def model(self) -> str:
        """The spec of the row's model. If its runs have no recipe, it is the row's name."""
        return str(self.settings.get("model", self.name))

    @property
    def taught(self) -> bool:
        """True if the row's students learnt by more than cross-entropy and depth terms on labels.

        Such a row cannot be a baseline. It is also True if the recipe is unknown.
        """
        return not self.settings or any(map(_is_taught, stream_settings(self.settings)))

    @property
    def distilled(self) -> bool:
        """True if any stream of the row's training learnt from a teacher's targets, or if the recipe is unknown."""
        return not self.settings or any(map(_is_distilled, stream_settings(self.settings)))

    @property
    def terms(self) -> list[tuple[Any, ...]]:
        """The tuple (model,), then for each stream (method, extra loss terms). Equal lists mean the same loss."""
        return [
            (self.settings.get("model"),),
            *((stream.get("method"), stream.get("term")) for stream in stream_settings(self.settings)),
        ]

    @property
    def control(self) -> bool:
        """True for a control: its loss had labels in the teacher's place."""
        return is_control(self.settings)

    def unlikeness(self, other: "Group") -> float:
        """Return how many of the settings in `differs` have another value in the row `other` than in this row.

        If both rows have streams, all settings of streams together add at most 1: the fraction of them that differ. If
        only one row has streams, each setting counts alone.
        """
        streams = [*(self.settings.get("stream") or ()), *(other.settings.get("stream") or ())]
        both = bool(self.settings.get("stream")) and bool(other.settings.get("stream"))
        of_streams = {key for key in self.differs if both and all(key in stream for stream in streams)}
        return sum(
            _unlike_streams(value, other.differs[key]) if key == "stream" else other.differs[key] != value
            for key, value in self.differs.items()
            if key not in of_streams
        )


def stream_settings(settings: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return one dict of all settings, name -> value, for each stream of a recipe.

    `settings` are the recipe's, with those of its streams as a list in "stream". A setting that a stream does not have
    comes from the whole training. A recipe without streams gives one dict.
    """
    streams: Sequence[Mapping[str, Any]] = settings.get("stream") or ({},)
    return [{**settings, **stream} for stream in streams]


def is_control(settings: Mapping[str, Any]) -> bool:
    """Return whether labels replaced the teacher in a recipe, in all streams whose loss needs a teacher.

    `settings` is the recipe: flag without its dashes -> value.
    """
    if not settings.get("stream"):
        return settings.get("teacher") == "labels"
    taught = [stream for stream in stream_settings(settings) if _is_taught(stream)]
    return bool(taught) and all(stream.get("teacher") == "labels" for stream in taught)


def _is_taught(settings: Mapping[str, Any]) -> bool:
    """Return whether there is a term besides cross-entropy and those that compare depth with labels."""
    return any(term.reads_teacher or not term.numeric for term in _terms(settings))


def _is_distilled(settings: Mapping[str, Any]) -> bool:
    """Return whether there is a term that reads the targets of a teacher, with no labels in its place."""
    return settings.get("teacher") != "labels" and any(term.reads_teacher for term in _terms(settings))


def _terms(settings: Mapping[str, Any]) -> list[LossTerm]:
    """Return all terms except cross-entropy."""
    return [*parse_method(str(settings.get("method", "none"))), *map(parse_term, settings.get("term") or ())]


def _unlike_streams(our_streams: Any, their_streams: Any) -> float:
    """Return the share of settings that differ between the streams of two rows, or 1 for other streams."""
    ours, theirs = ({table.get("name"): table for table in streams or ()} for streams in (our_streams, their_streams))
    if ours.keys() != theirs.keys() or not ours:
        return float(our_streams != their_streams)
    keys = {(name, key) for tables in (ours, theirs) for name, table in tables.items() for key in table}
    differing = sum(bool(ours[name].get(key) != theirs[name].get(key)) for name, key in keys)
    return differing / len(keys)


def group_runs(runs: Sequence[Entry]) -> tuple[list[Group], list[str]]:
    """Group runs into rows: runs whose recipes differ only in seed and fold share a row.

    If two runs of a row have the same seed and fold, every run of this row becomes a separate row. Return the
    rows in the order of their first runs, and warnings, one sentence each.
    """
    left_out = {*REPEATED, *MACHINE}
    rows: dict[str, list[Entry]] = {}
    for run in runs:
        apart = left_out | set(OF_A_FOLD if "name" in run.settings else ())
        settings = {key: value for key, value in run.settings.items() if key not in apart}
        rows.setdefault(json.dumps(settings, sort_keys=True) if settings else run.text, []).append(run)
    notes: list[str] = []
    parts = [part for members in rows.values() for part in _without_twins(members, notes)]
    heads = [members[0] for members in parts]
    differing = _differing([run.settings for run in heads if run.settings], left_out | {"name"})
    keys = _naming_keys([run.settings for run in heads if run.settings], differing)
    names = _names(parts, keys)
    more = [key for key in differing if key not in keys and key not in ("verb", "data")]
    if more:
        notes.append(f"The rows also differ in {', '.join(more)}.")
    groups = [
        Group(name, tuple(members), {key: members[0].settings.get(key) for key in differing})
        for name, members in zip(names, parts, strict=True)
    ]
    return groups, notes


def _without_twins(members: list[Entry], notes: list[str]) -> list[list[Entry]]:
    """Return the runs as one row if they differ in seed and fold, else one row per run, as nothing was repeated."""
    twins = [key for key, count in Counter(run.key for run in members).items() if count > 1]
    if not twins:
        return [members]
    seed, fold = twins[0]
    what = f"seed {seed}" + ("" if fold is None else f" without fold {fold}")
    names = ", ".join(run.text for run in members if run.key == twins[0])
    notes.append(f"{names} have the same settings and {what}, so each of these runs is a row.")
    return [[run] for run in members]


def _differing(recipes: Sequence[Mapping[str, Any]], left_out: set[str]) -> list[str]:
    keys = sorted({key for recipe in recipes for key in recipe} - left_out, key=_order)
    return [key for key in keys if len({json.dumps(recipe.get(key), sort_keys=True) for recipe in recipes}) > 1]


def _order(key: str) -> tuple[int, int, str]:
    if key in _NAMING:
        return 0, _NAMING.index(key), key
    return (2, _LAST.index(key), key) if key in _LAST else (1, 0, key)


def _naming_keys(recipes: Sequence[Mapping[str, Any]], differing: Sequence[str]) -> list[str]:
    """Return the first of these settings that separate all rows: each is taken that separates two more of them."""
    naming: list[str] = []
    apart = 1
    for key in differing:
        now = len({json.dumps([recipe.get(name) for name in (*naming, key)], sort_keys=True) for recipe in recipes})
        if now > apart:
            naming.append(key)
            apart = now
    return naming


def _names(parts: Sequence[Sequence[Entry]], keys: Sequence[str]) -> list[str]:
    """Return names of rows by their settings, or by their folders (with the path, if needed) if these repeat."""
    names = []
    for members in parts:
        settings = members[0].settings
        idle = _OF_A_TEACHER if settings.get("method") == "none" else ()
        words = [_words(key, settings.get(key)) for key in keys if key not in (*idle, "teacher")] if settings else []
        parts_of_name = [str(settings["name"])] if settings.get("name") else words
        names.append(", ".join([*parts_of_name, CONTROL] if is_control(settings) else parts_of_name) or members[0].name)
    for source in ("name", "text"):
        counts = Counter(names)
        names = [
            name if counts[name] == 1 else str(getattr(members[0], source))
            for name, members in zip(names, parts, strict=True)
        ]
    return names


def _words(key: str, value: Any) -> str:
    if value is None or value == []:
        return f"no {key}"
    if key == "stream":
        return "streams " + " + ".join(map(to_line, value))
    if key == "term":
        return " + ".join(",".join([str(term["kind"]), *_options(term)]) for term in value)
    if isinstance(value, list):
        value = " + ".join(map(str, value))
    return str(value) if key in _BARE else f"{key} {str(value).lower() if isinstance(value, bool) else value}"


def _options(term: Mapping[str, Any]) -> list[str]:
    return [f"{key}={value}" for key, value in term.items() if key != "kind"]
