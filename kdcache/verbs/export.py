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
    """Write a model to a file for deployment, and check that file, as `kdcache export` does.

    >>> import kdcache
    >>> exported = kdcache.export("runs/student", "student.safetensors")
    >>> exported.path.name
    'student.safetensors'

    Args:
        model: a run, or SPEC@FILE.
        out: the new file: .safetensors, .onnx, .pt2, or .pt for Ultralytics.
        format: "safetensors", "onnx", "torch.export" or "ultralytics". Default: by the suffix of `out`.
        raw: return logits at the native stride, without the resize to the image's size.
        weights: which weights of a run: "best", "last", "best-ema" or "last-ema".
        size: (H, W) of the images for the check, or a text such as "288x384". Default: the run's.
        classes: folder with a classes.txt, which names the classes of SPEC@FILE. None takes the names that the file
            records, else "class 0" and so on. A run has its own names.
        tolerance: largest accepted difference from the model, divided by the model's largest logit.
    Raises: KDCacheError, the base class of all errors of kdcache.
    """
    opened, description = open_model(model, size, weights, classes)
    return export_model(opened, description, out, format=format, raw=raw, tolerance=tolerance)
