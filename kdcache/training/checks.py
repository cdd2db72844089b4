"""Check settings against each other once the data, their augmentation and the number of processes are known."""

from collections.abc import Iterator, Mapping, Sequence

from kdcache.errors import RecipeError
from kdcache.models.added_heads import split_auxiliary
from kdcache.settings.parse import warmup_steps
from kdcache.settings.term import untaken
from kdcache.settings.terms import Adversarial, Auxiliary, PseudoLabels
from kdcache.store import Cache
from kdcache.store.format.teacher_models import Processor
from kdcache.training.config import TrainConfig
from kdcache.training.streams import flag_of


def check_flip(config: TrainConfig, processor: Processor | None = None) -> None:
    """Check whether `--augment warp` may mirror features from a cache.

    Mirrored features are only roughly the features of a mirrored image. So, unlike for pixels, the user must allow it
    with `--flip`. If the teacher has position embeddings, features must never be mirrored.

    Args:
        config: settings whose `augment` is not `auto`.
        processor: how the cache's teacher prepares images. None if unknown.
    Raises: RecipeError if stored features would be mirrored, but may not be. `--no-flip` avoids the error.
    """
    stored = [term.kind for term in config.terms if term.reads_taps]
    augmentation = config.augmentation
    if augmentation.augment != "warp" or not stored or config.data.cache is None:
        return
    if augmentation.flip is not False and processor is not None and processor.positions:
        raise RecipeError(
            f"Cannot mirror stored features ({', '.join(stored)}): the teacher has position embeddings, and --augment "
            "warp mirrors half of the images",
            fix="Add --no-flip, or replay stored views: they hold features of mirrored images.",
        )
    if augmentation.flip is None:
        raise RecipeError(
            f"Cannot mirror stored features ({', '.join(stored)}) without asking you: mirrored features are not those "
            "of the mirrored image, and --augment warp mirrors half of the images",
            fix="Add --no-flip. Or add --flip, for a convolutional teacher that hardly minds. Or replay stored "
            "--views.",
        )


def check_whole_views(config: TrainConfig) -> None:
    """Raise RecipeError if a loss term needs whole views, but `--augment warp` cuts windows out of them.

    The `augment` setting must not be `auto`.
    """
    kinds = [term.kind for term in config.terms if term.active and term.whole_view]
    if config.augmentation.augment == "warp" and kinds and config.data.cache is not None:
        raise RecipeError(
            f"Cannot move what {' and '.join(kinds)} compares with a drawn window: the cache has it of whole views, "
            "and --augment warp draws windows",
            fix="Use --augment replay, best with a cache of several --views.",
        )


def check_replays(config: TrainConfig) -> None:
    """Raise RecipeError if `--limit-views` is given without `--augment replay`. Only a replay shows several views.

    The `augment` setting must not be `auto`.
    """
    augment = config.augmentation.augment
    if config.data.limit_views is not None and augment != "replay":
        raise RecipeError(
            f"Cannot use --limit-views {config.data.limit_views} with --augment {augment}: it shows whole images alone",
            fix="Leave it out, or use --augment replay with a cache of several --views.",
        )


def check_supervised(config: TrainConfig) -> None:
    """Raise RecipeError if no stream learns from labels or from a teacher.

    With the other loss terms only, a model with a constant output could have the smallest loss.
    """
    if not config.supervised:
        loss = config.loss
        raise RecipeError(
            "Nothing to learn: "
            + (
                f"--method {loss.method} with --labels {config.data.labels} and --ce-weight {loss.ce_weight:g}"
                if not config.data.stream
                else f"no stream of {', '.join(stream.name for stream in config.streams)} has labels or a teacher"
            ),
            fix="Add a stream with labels, or a --method that has a teacher.",
        )


def check_processes(config: TrainConfig, processes: int) -> None:
    """Raise RecipeError if several processes train with a term for pseudo labels whose option `quantile` is set.

    A quantile needs the whole batch, but each process has only a part of it. `config` has the terms of the training,
    and `processes` is the number of processes.
    """
    quantiles = [term.kind for term in config.terms if isinstance(term, PseudoLabels) and term.quantile is not None]
    if processes > 1 and quantiles:
        raise RecipeError(
            f"Cannot take {', '.join(quantiles)} by quantile with {processes} processes: each sees its own part of a "
            "batch",
            fix="Give a threshold instead, or use one process.",
        )


def check_adversaries(config: TrainConfig) -> None:
    """Raise RecipeError if it is unclear which other stream an `adversarial` term imitates.

    The term must name that stream (`against`), unless there are exactly two streams.
    """
    names = [stream.name for stream in config.streams]
    for stream in config.streams:
        others = [name for name in names if name != stream.name]
        for term in stream.config.terms:
            if isinstance(term, Adversarial) and (term.against not in others if term.against else len(others) != 1):
                raise RecipeError(
                    f"The adversarial term of the stream {stream.name or '(none)'} has "
                    + (f"against={term.against}" if term.against else "no `against`")
                    + f", beside {', '.join(others) or 'no other stream'}",
                    fix=f"Add against={others[0]} to the term."
                    if others
                    else "Give the labelled images, and those without labels with this term, as a --stream each.",
                )


def check_auxiliary(config: TrainConfig) -> None:
    """Raise RecipeError if the model has an auxiliary head, but no stream trains it."""
    weighed = [stream.config.terms for stream in config.streams if stream.weight > 0]
    learnt = any(isinstance(term, Auxiliary) and term.active for terms in weighed for term in terms)
    if split_auxiliary(config.run.model)[1] is not None and not learnt:
        raise RecipeError(
            f"Cannot train the auxiliary head of --model {config.run.model}: --ce-weight is 0, or auxiliary,weight=0, "
            "throughout",
            fix=f"Use --model {split_auxiliary(config.run.model)[0]}, or add --term auxiliary",
        )


def idle_settings(config: TrainConfig, cache: Cache | None) -> dict[str, str]:
    """Return the settings of a stream that have no effect: name -> the reason.

    Settings of loss terms are left out, because `make_config` checks them.

    Args:
        config: the stream's settings, whose `augment` is not `auto`.
        cache: the stream's open cache. None for a data folder.
    """
    views = 1 if cache is None else cache.manifest.view.views_per_sample
    reads_data = cache is None or config.data.data is not None or not cache.pixels_stored
    rules = (
        ("val-split", config.data.val is not None, "there is no --val"),
        ("split", reads_data, "the cache holds its pixels"),
        (
            "scale flip",
            config.augmentation.augment == "warp",
            f"--augment {config.augmentation.augment} draws no window",
        ),
        ("jitter", config.augmentation.augment != "none", "--augment none changes no pixel"),
        ("depth-zoom", config.compares_metres, "no depth in metres is learnt"),
        ("cache-dir cache-bytes", cache is not None and cache.place.remote, "only a remote cache is copied"),
        (
            "limit-views",
            config.data.limit_views is None or config.data.limit_views < views,
            f"a sample has views: {views}",
        ),
        ("distill-on", config.reads_targets, "no target is read"),
        ("class-weights label-smoothing focal-gamma", config.data.labels != "none", "--labels none leaves out labels"),
        ("shuffle", cache is not None, "images in files are read in any order"),
    )
    return {name.replace("-", "_"): reason for names, taken, reason in rules if not taken for name in names.split()}


def idle_everywhere(config: TrainConfig, idle: Sequence[dict[str, str]]) -> dict[str, str]:
    """Return the settings that have no effect in any stream or loss term: name -> the reason.

    `idle` has the result of `idle_settings` for each stream.
    """
    shared = {name: reason for name, reason in idle[0].items() if all(name in settings for settings in idle)}
    return shared | dict.fromkeys(untaken(config.settings, config.taken), "no term of the loss takes it")


def idle_notes(config: TrainConfig, idle: Mapping[str, str]) -> Iterator[str]:
    """Yield notes about settings without effect: one for each flag that the user typed, and one for a copied recipe.

    The last note lists the settings without effect that come from another run's recipe. `idle` is the name of a setting
    -> the reason why it has no effect.
    """
    for name, reason in idle.items():
        if name in config.given:
            yield f"--{flag_of(name)} has no effect: {reason}"
    if copied := [flag_of(name) for name in sorted(idle) if name in config.copied]:
        yield f"The recipe has settings without effect here. The new run leaves them out: {', '.join(copied)}"


def warmup_notes(config: TrainConfig) -> Iterator[str]:
    """Yield a note for the user for each warm-up that is longer than the training.

    Warm-ups are of the learning rate and of the weight of the teacher's terms. `config.optimizer.iterations` must be
    set.
    """
    assert config.optimizer.iterations is not None, "resolve the settings first"
    for flag, steps, what in (
        (
            f"--warmup {config.optimizer.warmup}",
            config.optimizer.warmup if config.optimizer.schedule != "plateau" else 0,
            "the learning rate",
        ),
        (
            f"--distill-schedule {config.loss.distill_schedule}",
            warmup_steps(config.loss.distill_schedule),
            "the weight of the teacher's terms",
        ),
    ):
        if steps > config.optimizer.iterations:
            yield (
                f"{flag} is longer than the training of {config.optimizer.iterations} iterations: {what} gets to "
                f"{100 * config.optimizer.iterations / steps:.0f} % of its value. Train longer, or warm up for fewer"
            )
