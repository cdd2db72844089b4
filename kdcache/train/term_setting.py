"""Terms of the loss as a setting: the text of a flag, or a table of a recipe."""

from typing import Annotated, Any

from pydantic import BeforeValidator

from kdcache.distill.terms import TermSpec


def parse_term(value: Any) -> Any:
    """Parse 'cosine,weight=0.1,teacher_tap=layer4', or a table of a recipe, into a term; other values pass."""
    if isinstance(value, str):
        kind, *options = value.split(",")
        value = {"kind": kind, **dict(map(_option, options))}
    return TermSpec.of(value) if isinstance(value, dict) else value


def _option(text: str) -> tuple[str, Any]:
    key, _, value = text.partition("=")
    try:
        return key.strip(), float(value)
    except ValueError:
        return key.strip(), value.strip()


Terms = Annotated[tuple[TermSpec, ...], BeforeValidator(lambda terms: tuple(map(parse_term, terms)))]
