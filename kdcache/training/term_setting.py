"""Terms of the loss as a setting, and the balance of their tasks."""

from collections.abc import Iterable, Sequence

from kdcache.distill import Balance, FixedBalance, UncertaintyBalance
from kdcache.distill.balance import Form
from kdcache.errors import RecipeError
from kdcache.models.added_heads import split_auxiliary
from kdcache.settings.parse import task_weights
from kdcache.settings.term import LossTerm
from kdcache.settings.terms import Auxiliary, Consistency
from kdcache.tasks import DEPTH, SEGMENTATION
from kdcache.training.input.mix import Mix

EVEN = 0.5
"""The weight of a task where none is given."""
_FORMS: dict[str, Form] = {SEGMENTATION: "classes", DEPTH: "absolute"}


def with_auxiliary(terms: tuple[LossTerm, ...], model: str, ce_weight: float) -> tuple[LossTerm, ...]:
    """Return the loss terms, with `auxiliary` added if the model has an auxiliary head and learns by cross-entropy.

    Args:
        terms: the loss terms of the settings.
        model: the model's spec, such as `kdcache:base+aux`.
        ce_weight: the weight of cross-entropy. With 0, nothing is added.
    """
    listed = any(isinstance(term, Auxiliary) for term in terms)
    if listed or ce_weight == 0 or split_auxiliary(model)[1] is None:
        return terms
    return (*terms, Auxiliary())


def check_consistency(terms: Iterable[LossTerm], *, ema: float | None, jitter: float | str, mix: str | None) -> None:
    """Raise RecipeError if a `consistency` term cannot work.

    It needs two different views, and with `by=ema` the moving average of the weights.

    Args:
        terms: the loss terms of the settings.
        ema: the decay of the moving average, or None without it.
        jitter: the colour jitter. 0 makes both views equal.
        mix: the value of `--mix`, or None.
    """
    for term in terms:
        if not isinstance(term, Consistency) or not term.active:
            continue
        if term.by == "ema" and ema is None:
            raise RecipeError(
                "Cannot use consistency,by=ema without --ema",
                fix="Add --ema 0.99, or use by=student, which keeps no average.",
            )
        if jitter == 0 and (mix is None or not term.labels_itself):
            raise RecipeError(
                "Cannot use consistency without jitter (--jitter 0, or --augment none): both views are the same pixels",
                fix="Add --jitter randaugment:2,9, or leave --jitter out. Do not use --augment none.",
            )


def check_whole_batch(terms: Sequence[LossTerm], accumulate: int, mix: str | None) -> None:
    """Raise RecipeError if a loss term does not work with `--accumulate` or `--mix`.

    Args:
        terms: the loss terms of the settings.
        accumulate: number of parts of a batch. Above 1, no term may compare the whole batch.
        mix: the value of `--mix`. None pastes nothing. Otherwise each term that learns from the teacher must be able to
            handle pasted pixels.
    """
    whole_batch_terms = [term.kind for term in terms if term.whole_batch]
    if accumulate > 1 and whole_batch_terms:
        raise RecipeError(
            f"Cannot use --accumulate {accumulate} with {', '.join(whole_batch_terms)}: it compares the whole batch",
            fix="Leave one of them out. --method kl can accumulate.",
        )
    if mix is None:
        return
    Mix(mix)
    taught = [term.kind for term in terms if term.reads_teacher and not term.follows_mix]
    if taught:
        raise RecipeError(
            f"Cannot use --mix {mix} with {', '.join(taught)}: it cannot follow pasted pixels",
            fix="Leave one of them out. --method kl can follow.",
        )


def check_balance(balance: str, weights: Sequence[str], tasks: Sequence[str]) -> None:
    """Check the settings for balancing two tasks.

    Args:
        balance: `fixed` or `uncertainty`.
        weights: texts TASK=X, such as `depth=0.5`.
        tasks: the tasks that the training learns.
    Raises: RecipeError for fewer than two tasks, weights with `uncertainty`, and weights that are all 0.
    """
    asked = [f"--task-weight {text}" for text in weights]
    if balance == "uncertainty":
        asked.insert(0, "--balance uncertainty")
    if len(tasks) < 2:
        raise RecipeError(
            f"Cannot use {', '.join(asked)}: {' '.join(tasks) or 'nothing'} alone is learnt, and a balance is one "
            "of two tasks",
            fix="Leave it out. Or learn both, for example --model MODEL+depth with --term depth-silog",
        )
    if weights and balance == "uncertainty":
        raise RecipeError(
            f"Cannot use {' and '.join(asked)} together: the balance `uncertainty` learns the weights of the tasks",
            fix="Leave one of them out.",
        )
    if not any(_fixed(weights, tasks).values()):
        raise RecipeError(f"Nothing to learn: {', '.join(asked)}", fix="Raise one of them.")


def make_balance(balance: str, weights: Sequence[str], tasks: Sequence[str]) -> Balance | None:
    """Return the balance of the tasks' losses, or None if there is only one task.

    Args:
        balance: `fixed` or `uncertainty`.
        weights: texts TASK=X, such as `depth=0.5`, for `fixed`. A task without one has the weight 0.5.
        tasks: the tasks that the training learns.
    """
    if len(tasks) < 2:
        return None
    if balance == "fixed":
        return FixedBalance(_fixed(weights, tasks))
    return UncertaintyBalance({task: _FORMS[task] for task in tasks})


def _fixed(weights: Sequence[str], tasks: Sequence[str]) -> dict[str, float]:
    return {task: task_weights(tuple(weights)).get(task, EVEN) for task in tasks}


def check_val_share(share: float | None, val: str | None, streams: bool, method: str, *, reads_taps: bool) -> None:
    """Check that `--val-share` can validate the training.

    Args:
        share: the share of samples to hold out, or None without `--val-share`.
        val: the validation data, which must be None with a share.
        streams: True if the training has streams.
        method: the training's method, for messages.
        reads_taps: True if the training learns features.
    Raises: RecipeError if the training also has other validation data or streams, or learns no features.
    """
    if share is None:
        return
    if val is not None or streams:
        raise RecipeError(
            f"Cannot use --val-share {share:g} with {'--stream' if val is None else f'--val {val}'}: it "
            "validates on the features of one cache",
            fix="Leave one of them out.",
        )
    if not reads_taps:
        raise RecipeError(
            f"--val-share {share:g} has no feature loss to validate on: --method {method} has no term of features",
            fix="Add one, for example --term cosine, or validate on labels with --val DATA.",
        )
