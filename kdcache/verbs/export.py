"""`kdcache.export`: a trained model as a file to deploy."""

from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge

from kdcache.models.export import TOLERANCE, Exported, export_model
from kdcache.run_folder import Run
from kdcache.settings.shared import JudgeSettings
from kdcache.verbs.open_model import open_model


def export(
    model: str | Path | Run,
    out: str | Path,
    *,
    format: str | None = None,
    raw: bool = False,
    weights: str = JudgeSettings.weights,
    size: Any = None,
    classes: str | Path | None = None,
    tolerance: Annotated[float, Ge(0)] = TOLERANCE,
) -> Exported:
    """Write a model for deployment and check it, as `kdcache export` does.

    >>> import kdcache
    >>> exported = kdcache.export("runs/student", "student.safetensors")
    >>> exported.path.name
    'student.safetensors'

    Args:
        model: a run, or SPEC@FILE.
        out: new file: .safetensors, .onnx, .pt2, or .pt for Ultralytics.
        format: safetensors, onnx, torch.export or ultralytics. Default: by the suffix of `out`.
        raw: logits at the native stride, without the resize to the image's size.
        weights: which of a run's weights: best, last, best-ema or last-ema.
        size: (H, W) for the check, or a text such as "288x384". Default: the run's.
        classes: folder with classes.txt, the class names of SPEC@FILE.
        tolerance: largest difference from the model, relative to its largest logit.
    Raises: KDCacheError of every kind.
    """
    opened, description = open_model(model, size, weights, classes)
    return export_model(opened, description, out, format=format, raw=raw, tolerance=tolerance)
