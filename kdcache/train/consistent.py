"""Settings of a training that do not go together."""

from typing import TYPE_CHECKING

from kdcache.data import parse_fold
from kdcache.distill import parse_gate
from kdcache.distill.terms import parse_method
from kdcache.distill.terms.spec import compares_features
from kdcache.errors import RecipeError
from kdcache.train.mix import Mix

if TYPE_CHECKING:
    from kdcache.train.config import TrainConfig


def check_consistent(config: "TrainConfig") -> None:
    """Raises: RecipeError with the flags that contradict each other."""
    _check_data(config)
    _check_loss(config)
    _check_teaching(config)
    _check_whole_batch(config)


def check_flip(config: "TrainConfig") -> None:
    """Pixels are mirrored where nothing is said; stored features only for who asks.

    Features of a mirrored image are not the mirrored features, of transformers least of all.

    Args:
        config: whose augment is chosen.
    Raises: RecipeError for stored features that would be mirrored unasked.
    """
    stored = [term.kind for term in config.terms if compares_features(term)]
    if config.flip is None and config.augment == "warp" and stored and config.cache is not None:
        raise RecipeError(
            "a mirrored image's features are not the mirrored features of the image, which is all that warp can make",
            received=f"{', '.join(stored)} with --augment warp and nothing about --flip",
            remedy="use --no-flip; or --flip, for a convolutional teacher that hardly minds; or replay stored --views",
        )


def check_replays(config: "TrainConfig") -> None:
    """Raises: RecipeError for a number of views where no view is replayed; the augmentation is chosen."""
    if config.limit_views is not None and config.augment != "replay":
        raise RecipeError(
            "--limit-views says how many of the stored views are replayed",
            received=f"--limit-views {config.limit_views} with --augment {config.augment}: whole images alone",
            remedy="leave it out, or use --augment replay with a store of several --views",
        )


def check_processes(config: "TrainConfig", processes: int) -> None:
    """Raises: RecipeError for what several processes cannot compute as one would."""
    quantiles = [term.kind for term in config.terms if term.quantile is not None]
    if processes > 1 and quantiles:
        raise RecipeError(
            "several processes train as one would, and a quantile is one of a whole batch",
            received=f"{', '.join(quantiles)} by quantile with {processes} processes, each of which sees its own part",
            remedy="give a threshold instead, or use one process",
        )


def _check_data(config: "TrainConfig") -> None:
    low, high = config.scale
    if low > high:
        raise RecipeError(
            "--scale runs from small to large", received=f"{low}:{high}", remedy=f"use --scale {high}:{low}"
        )
    for fold in (config.fold, config.val_fold):
        if fold is not None:
            parse_fold(fold)
    if config.val_fold is not None and config.val is None:
        raise RecipeError(
            "--val-fold is a part of the validation data",
            received=f"--val-fold {config.val_fold} without --val",
            remedy="add --val DATA, or leave it out",
        )
    if config.schedule == "plateau" and config.val is None:
        raise RecipeError(
            "--schedule plateau follows the validations",
            received="--schedule plateau without --val",
            remedy="add --val DATA, or use --schedule poly",
        )
    if config.iterations is not None and config.epochs is not None:
        raise RecipeError(
            "a training's length is given once",
            received=f"--iterations {config.iterations} and --epochs {config.epochs}",
            remedy="leave one of them out",
        )
    if config.cache is None and config.data is None:
        raise RecipeError("there must be something to train on", received="no --cache and no --data", remedy="give one")
    if config.cache is None and config.teaches:
        raise RecipeError(
            f"method {config.method} learns from a store",
            received="no --cache",
            remedy="give --cache STORE, or use --method none",
        )


def _check_loss(config: "TrainConfig") -> None:
    parse_gate(config.gate)
    kl = parse_method(config.method).kl and config.kl_weight > 0
    if config.ce_weight == 0 and not kl and all(term.weight == 0 for term in config.terms):
        raise RecipeError(
            "something must weigh more than 0",
            received="every loss weight is 0: nothing would be learnt",
            remedy="raise --ce-weight, --kl-weight or the weight of a --term",
        )


def _check_teaching(config: "TrainConfig") -> None:
    weighing = {
        "--gate": config.gate if config.gate != "none" else None,
        "--class-trust": config.class_trust,
        "--class-balance": config.class_balance if config.class_balance != "none" else None,
        "--distill-schedule": config.distill_schedule if config.distill_schedule != "constant" else None,
    }
    given = [f"{flag} {value}" for flag, value in weighing.items() if value is not None]
    if given and not config.teaches:
        raise RecipeError(
            f"{', '.join(weighing)} weigh what a teacher says",
            received=f"{', '.join(given)} with --method {config.method}, which listens to none",
            remedy="leave them out, or choose another --method",
        )
    if (config.class_trust == "auto") != (config.trust_against is not None):
        raise RecipeError(
            "--class-trust auto compares the teacher with a plain run",
            received=f"--class-trust {config.class_trust or 'left out'} and --trust-against "
            f"{config.trust_against or 'left out'}",
            remedy="give both: --class-trust auto --trust-against RUN, of a train-student --method none --fold 0/5",
        )


def _check_whole_batch(config: "TrainConfig") -> None:
    if config.accumulate > 1 and config.whole_batch:
        raise RecipeError(
            "--accumulate sees a part of a batch at a time",
            received=f"--accumulate {config.accumulate} with {', '.join(config.whole_batch)}, which compares all of it",
            remedy="leave one of them out; --method kl can",
        )
    if config.mix is None:
        return
    Mix(config.mix)
    if config.terms:
        raise RecipeError(
            "--mix pastes pixels, labels and logits",
            received=f"--mix {config.mix} with {', '.join(term.kind for term in config.terms)}, which cannot follow",
            remedy="leave one of them out; --method kl can",
        )
