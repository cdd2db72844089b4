"""Terms of the loss as a setting, the text of a flag or a table of a recipe; and the balance of their tasks."""

from collections.abc import Iterable, Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator

from kdcache.distill import Balance, FixedBalance, UncertaintyBalance
from kdcache.distill.balance import Form
from kdcache.distill.terms import TermSpec
from kdcache.distill.terms.spec import labels_itself, of_depth
from kdcache.errors import RecipeError
from kdcache.heads import DEPTH, SEGMENTATION, TASKS
from kdcache.models.added_heads import split_auxiliary
from kdcache.settings.parse import task_weights

EVEN = 0.5
"""The weight of a task where none is given."""
_FORMS: dict[str, Form] = {SEGMENTATION: "classes", DEPTH: "absolute"}


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


def with_auxiliary(terms: tuple[TermSpec, ...], model: str, ce_weight: float) -> tuple[TermSpec, ...]:
    """The terms, and `auxiliary` beside cross-entropy where the spec of the model adds that head and none is listed."""
    listed = any(term.kind == "auxiliary" for term in terms)
    if listed or ce_weight == 0 or split_auxiliary(model)[1] is None:
        return terms
    return (*terms, TermSpec("auxiliary"))


def check_consistency(terms: Iterable[TermSpec], *, ema: float | None, jitter: float | str, mix: str | None) -> None:
    """Check that the strong view of consistency is one, and that what labels the weak one is there.

    Args:
        jitter: that is drawn; 0 is none.
    Raises: RecipeError.
    """
    for term in terms:
        if term.kind != "consistency" or term.weight == 0:
            continue
        if term.by == "ema" and ema is None:
            raise RecipeError(
                "consistency,by=ema learns from the moving average of the weights",
                received="consistency,by=ema without --ema",
                remedy="add --ema 0.99; or use by=student, which keeps no average",
            )
        if jitter == 0 and (mix is None or not labels_itself(term)):
            raise RecipeError(
                "consistency compares a weak view with a strong one, which has jitter",
                received="consistency without jitter (--jitter 0, or --augment none): both views are the same pixels",
                remedy="add --jitter randaugment:2,9, or leave --jitter out; not with --augment none",
            )


def learnt_tasks(terms: Iterable[TermSpec], fused: bool) -> tuple[str, ...]:
    """The tasks of which a part of the loss weighs more than 0.

    Args:
        fused: whether cross-entropy or KL does.
    """
    learnt = {DEPTH if of_depth(term) else SEGMENTATION for term in terms if term.weight != 0}
    return tuple(task for task in TASKS if task in learnt or (fused and task == SEGMENTATION))


def check_balance(balance: str, weights: Sequence[str], tasks: Sequence[str]) -> None:
    """Check a balance that is not the default.

    Args:
        weights: TASK=X.
        tasks: those that are learnt.
    Raises: RecipeError for fewer than two tasks, for weights beside learnt ones, and where all weights are 0.
    """
    received = [f"--task-weight {text}" for text in weights]
    if balance == "uncertainty":
        received.insert(0, "--balance uncertainty")
    if len(tasks) < 2:
        raise RecipeError(
            "a balance is one of two tasks",
            received=f"{', '.join(received)}, and {' '.join(tasks) or 'nothing'} alone is learnt",
            remedy="leave it out; or learn both, for instance --model MODEL+depth with --term depth-silog",
        )
    if weights and balance == "uncertainty":
        raise RecipeError(
            "the balance `uncertainty` learns the weights of the tasks",
            received=", ".join(received),
            remedy="leave one of them out",
        )
    if not any(_fixed(weights, tasks).values()):
        raise RecipeError(
            "a task weighs more than 0",
            received=f"{', '.join(received)}: nothing would be learnt",
            remedy="raise one of them",
        )


def make_balance(balance: str, weights: Sequence[str], tasks: Sequence[str]) -> Balance | None:
    """The balance of the tasks of a training; None for one task, whose loss is the whole.

    Args:
        weights: TASK=X, of `fixed`.
    """
    if len(tasks) < 2:
        return None
    if balance == "fixed":
        return FixedBalance(_fixed(weights, tasks))
    return UncertaintyBalance({task: _FORMS[task] for task in tasks})


def _fixed(weights: Sequence[str], tasks: Sequence[str]) -> dict[str, float]:
    return {task: task_weights(tuple(weights)).get(task, EVEN) for task in tasks}
