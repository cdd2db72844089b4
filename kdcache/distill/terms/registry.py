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
    """Make the module that computes a loss term, on the CPU. Projections are drawn from torch's global generator.

    Args:
        spec: the term's kind and options.
        targets: an open cache, or `LabelTargets`.
        setup: further attributes of `TermSetup`, such as `student_taps`.
    Raises: RecipeError if the cache lacks an array that the term reads (the message has the build flag), if a tap is
        unknown, if the student lacks the term's head, if a term of features or depth would get labels as targets, or if
        `moments` are missing for `standardise=channels`.
    """
    setup["student_heads"] = setup.get("student_heads") or {SEGMENTATION: CategoricalHead(targets.num_classes)}
    spec.check_student(setup["student_heads"])
    spec = spec.resolved(targets.manifest, list(setup.get("student_taps", ())))
    return term_modules()[spec.kind].of(spec, TermSetup(targets, spec.arrays(targets.manifest), **setup))


@cache
def term_modules() -> dict[str, type[Term]]:
    """Return the class that computes each kind of loss term, as a dict such as `cosine` -> `Cosine`."""
    for file in walk_packages([str(Path(__file__).parent)], f"{__package__}."):
        import_module(file.name)
    return {module.kind: module for module in _subclasses(Term) if "kind" in vars(module)}


def _subclasses(cls: type[Term]) -> Iterator[type[Term]]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _subclasses(sub)


def with_companions(modules: Sequence[Term]) -> list[Term]:
    """Return the given terms in order, each followed by the terms that it needs.

    A term's `companions` method returns these, such as the loss that trains its discriminator.
    """
    return [each for module in modules for each in (module, *module.companions())]
