"""Where a teacher comes from: a run folder, `SPEC@FILE` or `SPEC@default`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kdcache.data import ClassList
from kdcache.errors import MismatchError, ModelError
from kdcache.heads import SEGMENTATION
from kdcache.models import (
    ClassMapped,
    EnsembleModel,
    SegmentationModel,
    build_model,
    count_sources,
    is_function,
    read_class_map,
)
from kdcache.models.run import described, load_run, split_spec
from kdcache.run_folder import Run
from kdcache.store.format.manifest_models import Training
from kdcache.teacher.load.provenance import trainings_of

RGB = tuple[float, float, float]


@dataclass(frozen=True)
class Teacher:
    """A model in eval mode that predicts the data set's classes.

    Attributes:
        origin: what the user gave.
        size: (H, W) it was trained at, when known.
        class_map: data class of each of its own classes (-1 dropped), when it was mapped.
        notes: what a user should know, such as auxiliary heads that were left out.
        folds: how many folds the members of an ensemble divide among them; None when their probabilities are averaged.
        folds_by: the pattern of the sequences that these folds keep whole; None for folds by id.
        trainings: of each member, or of the one model, on each of its streams, as far as it is a run that records them;
            empty when not looked up.
        parents: seals of the stores that it learnt from, as far as it is a run that records them.
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

    def model_for(self, fold: int | None) -> SegmentationModel:
        """The model that predicts the samples of a fold; with None the whole, of which the fingerprint is."""
        if fold is None or not isinstance(self.model, EnsembleModel):
            return self.model
        return self.model.member(fold)


def load_teacher(
    origin: str,
    classes: ClassList,
    *,
    class_map: str | Path | None = None,
    mean: RGB | None = None,
    std: RGB | None = None,
    trust: bool = False,
    classified: bool = True,
) -> Teacher:
    """Load a teacher for a data set.

    Args:
        origin: a run folder, `RUN@best-ema` and the like, `SPEC@FILE` (weights trained elsewhere) or
            `SPEC@default` (the library's own, downloaded now).
        classes: of the data set, which those of a run or of an exported file are.
        class_map: file with the data class that each teacher class becomes; probabilities are summed.
        mean, std: of RGB in 0..1; default the model's own.
        classified: whether its head of classes is used, which must be the data's.
        trust: of a run, whether a function that it names may be imported and called (see `load_run`).
    Raises: ModelError, MismatchError, RecipeError naming what does not fit.
    """
    size, names, notes = None, None, list[str]()
    trainings: tuple[Training | None, ...] = (None,)
    parents: tuple[str, ...] = ()
    if (weighted := split_spec(origin)) is not None:
        spec, weights = weighted
        if (description := described(spec, weights)) is not None:
            size, names = description.size, description.class_names
        count = None  # that of the weights, which must be whole
        if is_function(spec):
            count = (len(classes) or None) if class_map is None else count_sources(class_map)
        model = build_model(spec, count, weights=weights, mean=mean, std=std, strict_head=True)
        model.untrained = () if description is None else description.untrained
        report = model.load_report
        if report is not None and report.unused_auxiliary:
            notes.append(f"auxiliary heads left out: {', '.join(report.unused_auxiliary)}")
    else:
        run = Run.open(origin)
        model, run_model = load_run(run, trust=trust)
        size, names, trainings = run_model.size, run_model.class_names, trainings_of(run)
        parents = run_model.stores
        model.mean, model.std = mean or model.mean, std or model.std
    if model.untrained:
        notes.append(f"{origin} learnt nothing of {', '.join(model.untrained)}: left out")
    mapped = None
    if class_map is not None:
        table = read_class_map(class_map, model.num_classes, classes.names)
        model, mapped = ClassMapped(model, table), tuple(int(c) for c in table.tolist())
    elif SEGMENTATION in model.learnt_heads and classified:
        _check_classes(origin, model.num_classes, names, classes)
    return Teacher(model.eval(), origin, size, mapped, tuple(notes), trainings=trainings, parents=parents)


def _check_classes(origin: str, count: int, names: Sequence[str] | None, classes: ClassList) -> None:
    if count != len(classes):
        raise ModelError(
            "a teacher has as many classes as the data set",
            received=f"{origin} has {count}, the data set has {len(classes)}",
            remedy="give --class-map FILE, which has for each teacher class the class of the data that it becomes"
            if classes.names
            else "write the teacher's class names into a classes.txt in the data folder, one a line, in their order",
        )
    if names is not None and tuple(names) != classes.names:
        raise MismatchError(
            "a teacher's classes are the data set's, in the same order",
            received=f"{', '.join(names)} against {', '.join(classes.names)}",
            remedy="give --class-map FILE to say which is which, or correct classes.txt",
        )
