"""Open the model that a verb uses: a run, or SPEC@FILE."""

from pathlib import Path

from kdcache.analysis.runs import unnamed_classes
from kdcache.data.classes import read_classes
from kdcache.errors import RecipeError
from kdcache.models import SegmentationModel, not_logits
from kdcache.models import run as runs
from kdcache.progress import warn
from kdcache.run_folder import Run, RunModel
from kdcache.settings import entries
from kdcache.settings.shared import ImageSettings, JudgeSettings
from kdcache.settings.validate import read_value


def open_model(
    model: str | Path | Run,
    size: object,
    weights: str,
    classes: str | Path | None,
    window: object = None,
) -> tuple[SegmentationModel, RunModel]:
    """Return a model and its description. Warn if its weights are incomplete or its outputs are not logits.

    Args:
        model: a run, its folder, `RUN@WEIGHTS`, or `SPEC@FILE`: a model spec with a file of weights.
        size: (H, W) of the pixels that the model sees, or a text such as "288x384". None takes the size that the run or
            the exported file records.
        weights: which weights of a run, such as "best".
        classes: a folder with classes.txt, only for `SPEC@FILE`. None takes the names that the run or the exported file
            records, else "class 0" and so on.
        window: (H, W) of a sliding window, or its text. Without `size`, it is the size of `SPEC@FILE`. Runs ignore it.
    Raises: RecipeError without a model or a size, or for `classes` of a run. ModelError for weights that do not fit.
        MismatchError for classes that differ from the file's.
    """
    text = str(model)
    run_weights = read_value(entries(JudgeSettings)["weights"], weights)
    named = None if classes is None else read_classes(Path(classes))
    alone = runs.split_spec(text) is not None
    if named is not None and not alone:
        raise RecipeError(f"Cannot give classes to the run {text}: it has its own", fix="Leave --classes out.")
    asked = read_value(entries(ImageSettings)["size"], (window if alone else None) if size is None else size)
    opened, description = runs.open_model(text, named or unnamed_classes, asked, run_weights)
    if named is not None:
        description.check_classes(named.names, str(classes))
    for note in () if opened.load_report is None else opened.load_report.notes:
        warn(note)
    if (finding := not_logits(opened, description.size)) is not None:
        warn(f"{text} {finding.text}: {finding.fix}")
    return opened, description
