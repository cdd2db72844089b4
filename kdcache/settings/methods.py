"""Loss terms from text: `--term cosine,weight=0.1`, `--method kl+at`, and a table `[[term]]` of a recipe."""

from collections.abc import Mapping
from typing import Any

from kdcache.errors import RecipeError, suggest
from kdcache.settings.term import TERMS, LossTerm
from kdcache.settings.terms import KINDS, METHODS


def parse_term(value: Any) -> LossTerm:
    """Return the loss term of a text such as 'cosine,weight=0.1', or of a table `[[term]]` of a recipe.

    A LossTerm is returned unchanged. Raises: RecipeError for anything else.
    """
    if isinstance(value, LossTerm):
        return value
    if isinstance(value, str):
        kind, *options = value.split(",")
        pairs: list[tuple[str, Any]] = [("kind", kind), *map(_option, options)]
    else:
        pairs = [(key, part) for key, part in value.items() if part is not None] if isinstance(value, Mapping) else []
    named = {str(key).replace("-", "_"): part for key, part in pairs}
    if len(named) < len(pairs):
        raise RecipeError(
            f"A term has an option twice: {', '.join(str(key) for key, _ in pairs)}",
            fix="Leave one of them out. A dash and an underscore are the same.",
        )
    cls = _class_of(named.pop("kind", None), value)
    for option in named:
        if option not in cls.options():
            raise RecipeError(
                f"Unknown option {option!r} of {cls.kind}",
                fix=f"{suggest(option, cls.options(), 'Leave it out.')} The options are {', '.join(cls.options())}.",
            )
    return cls(**named, given=frozenset(named))


def loss_term(kind: str, **options: Any) -> LossTerm:
    """Return the loss term of a `kind` with its `options`: `loss_term("cosine", weight=0.1)`.

    Raises: RecipeError for an unknown kind or an invalid option.
    """
    return parse_term({"kind": kind, **options})


def parse_method(text: str) -> tuple[LossTerm, ...]:
    """Return the loss terms of a method in `text`: two for 'kl+at', () for 'none'. Raises: RecipeError if invalid."""
    kinds = [part.strip() for part in text.split("+")]
    if kinds == ["none"]:
        return ()
    names = ("none", *METHODS)
    for kind in kinds:
        if kind not in names:
            raise RecipeError(
                f"Unknown loss term {kind!r} in --method {text!r}",
                fix=suggest(kind, names, f"Use none, or a sum of {', '.join(METHODS)}, for example kl+at"),
            )
    if len(set(kinds)) < len(kinds) or "none" in kinds:
        raise RecipeError(
            f"Cannot combine the terms of --method {text!r}: one is there twice, or next to none",
            fix="Name each term once. Write several terms of a kind, with different taps, as [[term]] in a recipe.",
        )
    return tuple(TERMS[kind]() for kind in kinds)


def auto_method(*, parted: bool) -> str:
    """Return the method that `--method auto` stands for: `kl` if `parted` is True, else `dist`.

    `parted` is True if batches have pasted pixels (`--mix`) or are processed in parts (`--accumulate`).
    """
    return "kl" if parted else "dist"


def _class_of(kind: Any, value: Any) -> type[LossTerm]:
    """Return the class of a kind. Raises: RecipeError with the nearest name for an unknown one."""
    if not isinstance(kind, str):
        raise RecipeError(f"Missing kind of a loss term: {value}", fix=f"Add kind, one of {', '.join(KINDS)}.")
    if kind in KINDS:
        return TERMS[kind]
    fused = kind in TERMS
    raise RecipeError(
        f"Cannot use {kind} as a --term: it has its own flags" if fused else f"Unknown loss term {kind!r}",
        fix=f"Use --{kind}-weight" if fused else suggest(kind, KINDS, f"Choose one of {', '.join(KINDS)}."),
    )


def _option(text: str) -> tuple[str, Any]:
    key, _, value = text.partition("=")
    try:
        return key.strip(), int(value) if value.strip().isdecimal() else float(value)
    except ValueError:
        return key.strip(), value.strip()
