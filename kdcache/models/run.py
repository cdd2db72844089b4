"""A trained model: in its run folder (`model.json`, weights `best` and `last`), or as SPEC@FILE or SPEC@default."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from kdcache.errors import ModelError, RecipeError
from kdcache.files import replacing, write_whole
from kdcache.models.added_heads import split_auxiliary
from kdcache.models.class_map import ClassMapped, count_sources, read_class_map
from kdcache.models.class_names import compare_names, known_names
from kdcache.models.foreign.hub_spec import is_checkpoint, is_hub
from kdcache.models.logits import as_logits, one_logit_note
from kdcache.models.native import SegmentationModel
from kdcache.models.registry import build_model, is_function, is_shipped
from kdcache.models.trust import check_present, check_trusted, trusting
from kdcache.models.weights import load_weights, read_metadata, read_state_dict, save_weights
from kdcache.run_folder import MODEL, WEIGHTS, Run, RunModel, named_weights, same_spec, split_outputs, weights_path

# The first @ after a spec's last part, which is a name: either path may have one of its own.
_SPEC_WITH_WEIGHTS = re.compile(r"((?:.*?:)?[^@:/]+)@(.+)")


class Classes(Protocol):
    """An object with `names` and `colours` of classes in the order of the class ids, such as a `ClassList`."""

    @property
    def names(self) -> tuple[str, ...]:
        """The class names, in the order of the class ids."""

    @property
    def colours(self) -> tuple[tuple[int, int, int], ...]:
        """The colour (red, green, blue) of each class, 0 to 255, in the order of the class ids."""


def write_run_model(run: Path, description: RunModel) -> None:
    """Write `description` as a run's model.json. An interruption leaves either the old or the new file."""
    write_whole(run / MODEL, description.model_dump_json(indent=1) + "\n")


def write_weights(run: Path, which: str, model: SegmentationModel) -> None:
    """Write a weights file of a run, without heads that are used in training only.

    `which` is `best`, `last`, `best-ema` or `last-ema`. An interruption leaves either the old or the new file.
    """
    with replacing(weights_path(run, which)) as partial:
        save_weights(model.deployed, partial)


def load_run(run: str | Path | Run, which: str = "best", *, trust: bool = False) -> tuple[SegmentationModel, RunModel]:
    """Load the trained model of a run, in eval mode, on the CPU.

    >>> import kdcache
    >>> model, description = kdcache.load_run("runs/student", "last")
    >>> model.num_classes == len(description.class_names)
    True

    Args:
        run: the run folder, `RUN@WEIGHTS`, or an open run.
        which: `best` (the best in validation, or the last without validation) or `last`. A run with an EMA also has
            `best-ema` and `last-ema`. The weights in `RUN@WEIGHTS` have priority.
        trust: True allows the import of a function that the run names as its model (see `kdcache.models.trust`).
    Returns: the model, and the content of the run's model.json.

    Raises:
        RecipeError: the run does not have these weights.
        ModelError: the weights do not fit, or the run names a function and `trust` is False.
    """
    run = run if isinstance(run, Run) else Run.open(run)
    description, path = run.model, run.weights(which)
    check_present(description.spec, str(run.folder / MODEL))
    with trusting(trust):
        check_trusted(description.spec, str(run.folder / MODEL))
    model = build_model(description.spec, len(description.class_names), mean=description.mean, std=description.std)
    if model.regressions != description.heads:
        raise ModelError(
            f"{description.spec} builds the heads {model.regressions or 'none'}, and {run.folder / MODEL} has "
            f"{description.heads or 'none'}",
            fix="Use the version of the model that was trained.",
        )
    load_weights(model, read_state_dict(path), strict_head=True)
    if run.outputs is not None:
        model = as_logits(model, run.outputs)
        description = description.model_copy(update={"spec": model.spec})
    model.untrained = description.untrained
    return model.eval(), description


def split_spec(text: str) -> tuple[str, str] | None:
    """Split `SPEC@FILE` into (SPEC, FILE), or return None for a run folder. FILE may be `default`.

    The ending `,outputs=KIND` becomes a part of SPEC. A spec of a hub model or a checkpoint needs no `@FILE`: it gives
    (SPEC, `default`).

    Raises: ModelError for another spec without `@FILE`, and for a spec with an auxiliary head.
    """
    text, outputs = split_outputs(text)
    if named_weights(text) is not None:
        return None
    if is_checkpoint(text) or (is_hub(text) and "@" not in text):
        return text if outputs is None else f"{text},outputs={outputs}", "default"
    weighted = _SPEC_WITH_WEIGHTS.fullmatch(text)
    if weighted and not (Path(text) / MODEL).is_file():
        base, auxiliary = split_auxiliary(weighted[1])
        if auxiliary is not None:
            raise ModelError(
                f"Cannot use the auxiliary head of {text}: it answers in training alone",
                fix=f"Write {base}@{weighted[2]}",
            )
        return weighted[1] if outputs is None else f"{weighted[1]},outputs={outputs}", weighted[2]
    if ":" in text and not Path(text).exists():
        raise ModelError(
            f"Missing weights of {text!r}",
            fix=f"Give {text}@FILE, a run folder, or a model whose library publishes weights as @default (downloaded).",
        )
    return None


def open_model(
    text: str,
    classes: Classes | Callable[[int], Classes],
    size: tuple[int, int] | None = None,
    which: str = "best",
    *,
    class_map: str | Path | None = None,
    trust: bool = False,
) -> tuple[SegmentationModel, RunModel]:
    """Load a trained model from a run or a weights file, in eval mode, on the CPU.

    Notes for the user about the file are in `model.load_report.notes`.

    Args:
        text: a run folder, `RUN@best-ema`, `SPEC@FILE`, or `SPEC@default` for the library's published weights.
        classes: the data's classes. Without data, a function that returns classes for a given number. A run and an
            exported file keep their own, except with a class map.
        size: height and width in pixels of the images in use. None takes the size of the run or the exported file.
        which: the weights of a run: `best`, `last`, `best-ema` or `last-ema`.
        class_map: a file that maps the model's classes to the data's (see `read_class_map`). None if they are the same.
        trust: True allows the import of a function that the run names as its model.
    Returns: the model, and a description as in a run's model.json.

    Raises:
        RecipeError: the run or its weights are missing, or the size is unknown.
        ModelError: the weights or the class map do not fit.
        MismatchError: the data has the classes in another order.
    """
    parts = split_spec(text)
    run: Run | None = None
    if parts is None:
        run = Run.open(text)
        description: RunModel | None = run.model
    else:
        description = described(*parts)
    used_size = size if description is None else size or description.size
    if used_size is None:
        raise RecipeError(
            f"Missing the size of images for {text}, which is no run", fix="Add --size HxW, for example --size 288x384"
        )
    if run is not None:
        model, _ = load_run(run, which, trust=trust)
    else:
        assert parts is not None
        # The number that a map or a missing list goes by is that of the weights.
        count = None if callable(classes) or class_map is not None else len(classes.names)
        if count is None and is_function(parts[0]):  # its weights cannot be counted before it is built
            mapped = None if class_map is None else count_sources(class_map)
            count = mapped if description is None else len(description.class_names)
        if description is not None and not description.class_names:
            count = 0
        model = build_model(parts[0], count, weights=parts[1], strict_head=True).eval()
    report = model.load_report
    if class_map is None and description is not None:
        names, colours = description.class_names, description.class_colours
    else:
        if callable(classes) and model.num_classes == 1:  # without data, one logit is that of two classes
            model = as_logits(model, None, 2)
        class_list = classes(model.num_classes) if callable(classes) else classes
        names, colours = class_list.names, class_list.colours
    if report is not None and description is None:
        compared = None
        if callable(classes):
            names = known_names(report.class_names, names)
        elif class_map is None:
            compared = compare_names(text, report.class_names, names)
        logit = one_logit_note(text, model, names if class_map is None else "01")
        report = replace(report, notes=(*report.notes, *filter(None, (compared, logit))))
    model.untrained = () if description is None else description.untrained
    if class_map is not None:
        model = ClassMapped(model, read_class_map(class_map, model.num_classes, names)).eval()
    model.load_report = report
    return model, RunModel(
        spec=model.spec,
        class_names=names,
        class_colours=colours,
        size=used_size,
        fit="squash" if description is None else description.fit,
        mean=model.mean,
        std=model.std,
        trained_on="" if description is None else description.trained_on,
        heads=model.regressions,
        untrained=model.untrained,
    )


def describe_weights(weights: str | Path) -> RunModel | None:
    """Return the description of a weights file's model, from its run or its header. None if it has neither.

    Raises:
        ModelError: the file is missing or damaged.
        RecipeError: the run's model.json is damaged.
    """
    path = Path(weights)
    if path.stem in WEIGHTS and (path.parent / MODEL).is_file():
        return Run.open(path.parent).model
    return RunModel.from_metadata(read_metadata(path), path)


def described(spec: str, weights: str) -> RunModel | None:
    """Return the model's description, such as spec, classes and size, from the header of a file of weights.

    kdcache writes this header when it exports a model. The result is None for other files.

    Args:
        spec: the model spec.
        weights: the file, or `default`, for which the result is None.
    Raises: ModelError if the file is missing or damaged, or belongs to another model.
    """
    if weights == "default":
        return None
    description = RunModel.from_metadata(read_metadata(weights), Path(weights))
    named = (spec, split_outputs(spec)[0])
    if description is not None and not any(same_spec(description.spec, name) for name in named):
        raise ModelError(
            f"Cannot use {spec} with {weights}: that file is of {description.spec}",
            fix=f"Give {description.spec}@{weights}"
            if is_shipped(description.spec)
            else "Give the model that they belong to as SPEC@FILE. Code that a weights file names is not suggested: "
            "read that code before you name it.",
        )
    return description
