"""The modules that compute the terms of a loss, found by their kind."""

from collections.abc import Iterator, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages
from typing import Any

from kdcache.distill.terms.base import Term, TermSetup, TermTargets
from kdcache.heads import CategoricalHead
from kdcache.settings.term import LossTerm
from kdcache.tasks import SEGMENTATION


def make_term(spec: LossTerm, *, targets: TermTargets, **setup: Any) -> Term:
    """Make the module of a term, on the CPU.

    Projections are drawn from torch's global generator. `setup` are attributes of `TermSetup`.

    Raises: RecipeError for a cache that lacks what the term reads, naming the build flag, for unknown taps, for a term
        of features or of depth with labels in the teacher's place, for one that standardises without `moments`, and for
        one with a head that the student lacks or has of another kind.
    """
    setup["student_heads"] = setup.get("student_heads") or {SEGMENTATION: CategoricalHead(targets.num_classes)}
    spec.check_student(setup["student_heads"])
    spec = spec.resolved(targets.manifest, list(setup.get("student_taps", ())))
    return term_modules()[spec.kind].of(spec, TermSetup(targets, spec.arrays(targets.manifest), **setup))


@cache
def term_modules() -> dict[str, type[Term]]:
    """Return the module of each kind, from all files of this folder."""
    for file in walk_packages([str(Path(__file__).parent)], f"{__package__}."):
        import_module(file.name)
    return {module.kind: module for module in _subclasses(Term) if "kind" in vars(module)}


def _subclasses(cls: type[Term]) -> Iterator[type[Term]]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _subclasses(sub)


def with_companions(modules: Sequence[Term]) -> list[Term]:
    """Return the terms, each followed by its companions."""
    return [each for module in modules for each in (module, *module.companions())]
