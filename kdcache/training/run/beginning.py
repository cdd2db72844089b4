"""The model that a training begins with: random, with weights of a file, or with the weights of another run."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from kdcache.errors import MismatchError, ModelError
from kdcache.models import SegmentationModel, build_model, not_logits
from kdcache.models.class_names import compare_names
from kdcache.models.weights import load_weights, read_state_dict
from kdcache.run_folder import Run, is_run, named_weights
from kdcache.training.config import TrainConfig
from kdcache.training.run.folder import untrained_heads


def begin_model(config: TrainConfig, classes: int, tasks: Sequence[str]) -> SegmentationModel:
    """Build the model of a training, with its initial weights.

    Random weights are drawn from torch's global generator.

    Args:
        config: the training's settings.
        classes: the number of classes of the data.
        tasks: the tasks, `segmentation` or `depth`, that the training learns.
    Raises: ModelError for weights that do not fit, for a model that these data cannot train, and for `--val` with a
        model without heads. RecipeError if `--init` names a run without weights.
    """
    run = None if config.run.init is None else _run_of(config.run.init)
    init = config.run.init if run is None else str(run.weights())
    model = build_model(config.run.model, classes, weights=init if run is None else None, strict_head=False)
    if run is not None:
        _start_from(model, run, config)
    _check_learns(config, model, classes)
    model.untrained = untrained_heads(model, tasks, init)
    return model


def model_notes(config: TrainConfig, model: SegmentationModel, names: Sequence[str]) -> Iterator[str]:
    """Yield notes for the user about the initial weights and the model.

    For example, that some weights stay at random, or that the model seems to return no logits. `names` are the classes
    of the training.
    """
    report = model.load_report
    if report is not None:
        yield from report.notes
        if not report.reinitialised:
            try:
                note = compare_names(f"--init {config.run.init}", report.class_names, names)
            except MismatchError as error:
                note = f"{error.rule}: the head begins with other classes than it learns"
            if note is not None:
                yield note
    if report is not None and report.reinitialised:
        yield f"--init leaves at random: {', '.join(report.reinitialised)}"
    if report is not None and report.unused_auxiliary:
        yield f"--init does not use auxiliary heads: {', '.join(report.unused_auxiliary)}"
    if (finding := not_logits(model)) is not None and finding.certain:
        yield f"{config.run.model} {finding.text}. It learns badly and cannot teach: {finding.fix}"


def _run_of(init: str) -> Run | None:
    """Return the run that `--init` names, or None if it names a file of weights."""
    return Run.open(init) if named_weights(init) is not None or is_run(Path(init)) else None


def _start_from(model: SegmentationModel, run: Run, config: TrainConfig) -> None:
    """Load a run's weights without its heads. Raises: ModelError that names the tensors that do not fit."""
    state = read_state_dict(run.weights())
    try:
        report = load_weights(model, state, strict_head=False)
    except ModelError as error:
        raise ModelError(
            f"Cannot start {config.run.model} from {config.run.init}, a run of {run.model.spec}: {error.problem}",
            fix=f"Use --model {run.model.spec}, or a model that holds this network whole as one of its modules.",
        ) from error
    model.load_report = replace(report, class_names=run.model.class_names)
    model.mean, model.std = run.model.mean, run.model.std


def _check_learns(config: TrainConfig, model: SegmentationModel, classes: int) -> None:
    """Check that a model without heads learns features, and is not validated by labels. Raises: ModelError."""
    features = any(term.reads_taps for stream in config.streams for term in stream.config.active)
    if not model.head_kinds and not features:
        problem = f"Nothing to learn: {config.run.model} has no head for these data"
        advice = _head_for(config.run.model, classes)
        cached = any(stream.config.data.cache is not None for stream in config.streams)
        if config.run.verb == "train-teacher" or not cached:  # there are no features to learn
            raise ModelError(problem, fix=f"{advice[0].upper()}{advice[1:]}")
        raise ModelError(
            f"{problem}, and no term of --method {config.loss.method} compares features",
            fix=f"Add a term of features, --method cosine. Or {advice}",
        )
    if not model.head_kinds and config.data.val is not None:
        raise ModelError(
            f"Cannot validate {config.run.model} on the labels of --val {config.data.val}: it has no head and learns "
            "features only",
            fix="Validate on the feature loss instead: --val-share 0.02",
        )


def _head_for(spec: str, classes: int) -> str:
    """Return advice on how to add a head to a model without one."""
    if not classes:
        return f"add a head of depth, --model {spec}+depth. Or name classes in a classes.txt in the data folder."
    library, _, name = spec.partition(":")
    decoder = f"smp:unet-tu-{name.partition(',')[0]}" if library == "timm" else "smp:unet-resnet18"
    return f"choose a model with classes: --model {decoder}"
