"""Load a teacher: a run folder, `SPEC@FILE` or `SPEC@default`, or a module in memory."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from kdcache.data import ClassList, Fit, Split
from kdcache.data.changes import class_changes
from kdcache.display import facts_table, line, size_text
from kdcache.errors import MismatchError, ModelError
from kdcache.models import (
    ClassMapped,
    EnsembleModel,
    SegmentationModel,
    WrappedModel,
    build_model,
    count_sources,
    is_function,
    read_class_map,
    trusting,
)
from kdcache.models.class_names import class_map_text, compare_names
from kdcache.models.logits import as_logits, one_logit_note
from kdcache.models.run import described, load_run, split_spec
from kdcache.run_folder import Run
from kdcache.store.format.teacher_models import Training
from kdcache.tasks import SEGMENTATION
from kdcache.teacher.load.provenance import trainings_of

RGB = tuple[float, float, float]
_SHOWN = 64
"""Classes of a class map that an error proposes."""


@dataclass(frozen=True)
class Teacher:
    """A model in eval mode that predicts the data set's classes.

    Attributes:
        model: the model.
        origin: where it came from, as the user gave it.
        size: (H, W) of its training images, or None if unknown.
        class_map: for each class of the original model, the class of the data set that it becomes, -1 if it is dropped.
            None if no class map was used.
        notes: texts that the user should see, such as auxiliary heads that were left out.
        folds: number of folds. Ensemble member i then predicts the samples of fold i. None averages the members.
        folds_by: regular expression whose match in a sample id names the sample's sequence. A sequence is never divided
            between folds. None divides samples by a hash of their ids.
        trainings: what it was trained on, one entry per data set. None stands for an unknown one.
        parents: digests of the seals of the caches that it was distilled from.
        fit: how images of another shape were fitted into `size` in its training: `squash`, `crop` or `pad`.
    """

    model: SegmentationModel
    origin: str
    size: tuple[int, int] | None = None
    class_map: tuple[int, ...] | None = None
    notes: tuple[str, ...] = field(default=())
    folds: int | None = None
    folds_by: str | None = None
    trainings: tuple[Training | None, ...] = ()
    parents: tuple[str, ...] = ()
    fit: Fit = "squash"

    def __repr__(self) -> str:
        return line("Teacher", self._facts)

    def _repr_html_(self) -> str:
        return facts_table("Teacher", self._facts)

    @property
    def _facts(self) -> dict[str, object]:
        return {
            "origin": self.origin,
            "network": type(self.model).__name__,
            "parameters": f"{sum(weights.numel() for weights in self.model.parameters()):,}",
            "trained at": size_text(self.size) if self.size else None,
            "classes mapped": len(self.class_map) if self.class_map else None,
            "folds": self.folds,
            "notes": "; ".join(self.notes) or None,
        }

    def model_for(self, fold: int | None) -> SegmentationModel:
        """Return the ensemble member that predicts the samples of fold number `fold`.

        Return the whole model if `fold` is None, or if the model is not an ensemble.
        """
        if fold is None or not isinstance(self.model, EnsembleModel):
            return self.model
        return self.model.member(fold)


def load_teacher(
    origin: str | Path | nn.Module,
    classes: ClassList | Split | Sequence[str],
    *,
    class_map: str | Path | None = None,
    mean: RGB | None = None,
    std: RGB | None = None,
    heads: Mapping[str, Any] | None = None,
    align_corners: bool | None = None,
    trust: bool = False,
    classified: bool = True,
    outputs: str | None = None,
) -> Teacher:
    """Load a teacher for a data set.

    >>> import kdcache
    >>> split = kdcache.open_split("streets", "train")
    >>> teacher = kdcache.load_teacher("runs/teacher", split)
    >>> teacher.size
    (48, 64)

    A cache identifies its teacher by a digest of the weights, and by its outputs for two fixed images.

    Args:
        origin: a run folder, `RUN@best-ema` for other weights of the run, `SPEC@FILE` for weights trained elsewhere, or
            `SPEC@default` for weights that the library downloads. A module is also possible: it takes normalised RGB
            (B, 3, H, W), returns logits (B, C, h, w), and is put into eval mode.
        classes: the classes of the data set, or the data set. A run must have the same classes.
        class_map: file that names the data class for each class of the teacher. Probabilities of merged classes are
            summed. None if the classes are the same.
        mean: RGB mean of the normalisation, for pixels from 0 to 1. Default: the model's own.
        std: RGB standard deviation of the normalisation, for pixels from 0 to 1. Default: the model's own.
        heads: for a module that returns a mapping of several heads: name -> kind, such as {"segmentation":
            "categorical", "depth": {"kind": "regression", "max_depth": 10.0}}. Default: the module's attribute
            `kdcache_heads`.
        align_corners: whether a module's last resize aligns corners. Default: the module's attribute of that name, or
            False.
        trust: whether a function that a run names as its model may be imported and called.
        classified: True if the segmentation head is used. Its classes must then fit the data set.
        outputs: what the model returns: "logits", "probabilities" or "sigmoid". Default: logits.
    Raises: ModelError for a model or weights that do not fit; MismatchError for other classes than the data set's;
        RecipeError for a run that cannot be read.
    """
    classes = classes.classes if isinstance(classes, Split) else classes
    classes = classes if isinstance(classes, ClassList) else ClassList(tuple(classes))
    if isinstance(origin, nn.Module):
        loaded = _of_module(origin, heads, align_corners)
    elif heads is not None or align_corners is not None:
        raise ModelError(
            f"Cannot use heads or align_corners with {origin}: only a module that the program holds takes them",
            fix="Leave them out: a run or a spec has its own.",
        )
    elif (weighted := split_spec(str(origin))) is not None:
        with trusting(trust):
            loaded = _of_spec(str(origin), *weighted, len(classes), class_map)
    else:
        loaded = _of_run(str(origin), trust=trust)
    model = as_logits(loaded.model, outputs, len(classes) if class_map is None else count_sources(class_map))
    if classified and (note := one_logit_note(loaded.origin, model, classes.names if class_map is None else "01")):
        loaded.notes.append(note)
    mapped = None
    model.mean, model.std = mean or model.mean, std or model.std
    if model.untrained:
        loaded.notes.append(f"{loaded.origin} learnt nothing of {', '.join(model.untrained)}: left out")
    if class_map is not None:
        table = read_class_map(class_map, model.num_classes, classes.names)
        model, mapped = ClassMapped(model, table), tuple(int(c) for c in table.tolist())
    elif SEGMENTATION in model.learnt_heads and classified:
        _check_classes(loaded, model.num_classes, classes)
    return Teacher(
        model.eval(),
        loaded.origin,
        loaded.size,
        mapped,
        tuple(loaded.notes),
        trainings=loaded.trainings,
        parents=loaded.parents,
        fit=loaded.fit,
    )


@dataclass
class _Loaded:
    """A loaded model, with fields as in `Teacher`."""

    model: SegmentationModel
    origin: str
    size: tuple[int, int] | None = None
    class_names: tuple[str, ...] | None = None
    notes: list[str] = field(default_factory=list)
    trainings: tuple[Training | None, ...] = (None,)
    parents: tuple[str, ...] = ()
    fit: Fit = "squash"


def _of_run(origin: str, *, trust: bool) -> _Loaded:
    run = Run.open(origin)
    model, about = load_run(run, trust=trust)
    loaded = _Loaded(model, origin, about.size, about.class_names, trainings=trainings_of(run), parents=about.stores)
    loaded.fit = about.fit
    return loaded


def _of_spec(origin: str, spec: str, weights: str, classes: int, class_map: str | Path | None) -> _Loaded:
    """Load the model of `SPEC@FILE`. A user's function gets its number of classes from `classes` or `class_map`."""
    about, count = described(spec, weights), None
    if is_function(spec):
        count = (classes or None) if class_map is None else count_sources(class_map)
    if about is not None and not about.class_names:
        count = 0
    model = build_model(spec, count, weights=weights, strict_head=True)
    model.untrained = () if about is None else about.untrained
    loaded = _Loaded(model, origin, model.fixed_size or model.processor.native_size)
    if about is not None:
        loaded.size, loaded.class_names, loaded.fit = about.size, about.class_names, about.fit
    report = model.load_report
    assert report is not None
    loaded.notes += report.notes
    if report.unused_auxiliary:
        loaded.notes.append(f"auxiliary heads left out: {', '.join(report.unused_auxiliary)}")
    return loaded


def _of_module(module: nn.Module, heads: Mapping[str, Any] | None, align_corners: bool | None) -> _Loaded:
    model = _in_memory(module, heads, align_corners)
    return _Loaded(model, model.spec)


def _in_memory(module: nn.Module, heads: Mapping[str, Any] | None, align_corners: bool | None) -> SegmentationModel:
    """Return a module as a model. Raises: ModelError if its outputs are not what it declares."""
    if isinstance(module, SegmentationModel):
        model = module
    else:
        model = WrappedModel(f"memory:{type(module).__name__}", module, None, heads)
    if align_corners is not None:
        model.align_corners = align_corners
    return model


def _check_classes(loaded: _Loaded, count: int, classes: ClassList) -> None:
    """Compare the number and names of a teacher's classes with the data set's, and note names that differ.

    Raises: ModelError, MismatchError.
    """
    report = loaded.model.load_report
    theirs = loaded.class_names or (() if report is None else report.class_names)
    if count != len(classes):
        fix = "Write the teacher's class names into a classes.txt in the data folder, one a line, in their order."
        if classes.names:
            fix = "Give --class-map FILE, which has for each teacher class the class of the data that it becomes"
            if len(theirs) == count <= _SHOWN:
                fix += f", for example {class_map_text(theirs, classes.names)}"
        raise ModelError(
            f"{loaded.origin} has {count} classes, but the data set has {len(classes)}"
            + (f": {class_changes(theirs, classes.names)}" if theirs and classes.names else ""),
            fix=fix,
        )
    if (note := compare_names(loaded.origin, theirs, classes.names)) is not None:
        loaded.notes.append(note)
    if loaded.class_names is not None and loaded.class_names != classes.names:
        raise MismatchError(
            f"The teacher's classes, or their order, are not the data set's: {', '.join(loaded.class_names)} against "
            f"{', '.join(classes.names)}",
            fix="Correct classes.txt, or give --class-map FILE with what each class becomes, such as "
            + class_map_text(theirs, classes.names, classes.names),
        )
