"""Offline knowledge distillation for semantic segmentation.

Run the teacher once over a data set, keep its outputs in a cache, and train students from that cache.

    kdcache.build_cache("camvid", "runs/teacher", "camvid.zarr")
    run = kdcache.train("runs/student", model="kdcache:tiny", cache="camvid.zarr", val="camvid")
    kdcache.compare(["runs/none", "runs/student"])

    cache = kdcache.open_cache("camvid.zarr")
    dataset = kdcache.CacheDataset(cache)                        # pixels, labels and targets, for any DataLoader
    criterion = kdcache.DistillLoss(cache, temperature=2.0)      # criterion(outputs, batch).loss

Names are imported when they are first used, so that `import kdcache` is quick and loads no torch.
"""

from importlib import import_module
from inspect import isfunction
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdcache.data import from_dataset as from_dataset
    from kdcache.data import open_split as open_split
    from kdcache.data import traced as traced
    from kdcache.distill import Batch as Batch
    from kdcache.distill import DistillLoss as DistillLoss
    from kdcache.distill import Target as Target
    from kdcache.errors import KDCacheError as KDCacheError
    from kdcache.metrics import evaluate_model as evaluate_model
    from kdcache.models import build_model as build_model
    from kdcache.models.run import load_run as load_run
    from kdcache.store import Records as Records
    from kdcache.store import open_cache as open_cache
    from kdcache.store import open_caches as open_caches
    from kdcache.teacher import BuildOptions as BuildOptions
    from kdcache.teacher import load_teacher as load_teacher
    from kdcache.training import CacheDataset as CacheDataset
    from kdcache.training import LabelledDataset as LabelledDataset
    from kdcache.verbs.build import build_cache as build_cache
    from kdcache.verbs.compare import compare as compare
    from kdcache.verbs.copy import copy as copy
    from kdcache.verbs.evaluate import evaluate as evaluate
    from kdcache.verbs.export import export as export
    from kdcache.verbs.inspect import audit as audit
    from kdcache.verbs.inspect import card as card
    from kdcache.verbs.inspect import inspect as inspect
    from kdcache.verbs.plan import plan as plan
    from kdcache.verbs.predict import predict as predict
    from kdcache.verbs.pseudo_labels import export_pseudo_labels as export_pseudo_labels
    from kdcache.verbs.report import report as report
    from kdcache.verbs.train import train as train
    from kdcache.verbs.verify import verify as verify

HOMES = {
    "Batch": "kdcache.distill",
    "BuildOptions": "kdcache.teacher",
    "CacheDataset": "kdcache.training",
    "DistillLoss": "kdcache.distill",
    "KDCacheError": "kdcache.errors",
    "LabelledDataset": "kdcache.training",
    "Records": "kdcache.store",
    "Target": "kdcache.distill",
    "audit": "kdcache.verbs.inspect",
    "build_cache": "kdcache.verbs.build",
    "build_model": "kdcache.models",
    "card": "kdcache.verbs.inspect",
    "compare": "kdcache.verbs.compare",
    "copy": "kdcache.verbs.copy",
    "evaluate": "kdcache.verbs.evaluate",
    "evaluate_model": "kdcache.metrics",
    "export": "kdcache.verbs.export",
    "export_pseudo_labels": "kdcache.verbs.pseudo_labels",
    "from_dataset": "kdcache.data",
    "inspect": "kdcache.verbs.inspect",
    "load_run": "kdcache.models.run",
    "load_teacher": "kdcache.teacher",
    "open_cache": "kdcache.store",
    "open_caches": "kdcache.store",
    "open_split": "kdcache.data",
    "plan": "kdcache.verbs.plan",
    "predict": "kdcache.verbs.predict",
    "report": "kdcache.verbs.report",
    "traced": "kdcache.data",
    "train": "kdcache.verbs.train",
    "verify": "kdcache.verbs.verify",
}

__all__ = list(HOMES)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module 'kdcache' has no attribute {name!r}")
    found = getattr(import_module(HOMES[name]), name)
    if isfunction(found):
        from kdcache.calls import called_from_python

        found = called_from_python(found, name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted(["__doc__", "__version__", *__all__])
