"""Metrics of a model on labelled images: segmentation by mmsegmentation's convention, depth by KITTI's.

    confusion.py     one confusion matrix over a whole set, and the metrics that follow from it
    depth.py         errors of depth maps: rmse, abs_rel, silog, delta
    chance.py        whether a model has learnt anything
    evaluators.py    how each task is evaluated: the table of tasks
    predictions.py   a model's answers to every task, at the labels' size
    sliding.py       how a model sees images of another shape, and in windows
    evaluate.py      a model on a labelled split
    data_sets.py     a model on several data sets, side by side
    calibration.py   calibration, and what a confidence threshold keeps
    tables.py        metrics as rows of a table
    figures.py       figures, and labels in their colours
    depth_figures.py depth and its errors in colours
    cost.py          parameters, arithmetic, time per image
    timing.py        time without the garbage collector's, and the processor

This room imports no caches, no runs and no trainings.
"""

from kdcache.metrics.chance import at_chance
from kdcache.metrics.confusion import ConfusionMatrix, Metrics
from kdcache.metrics.data_sets import OnDataSet
from kdcache.metrics.depth import DEPTH_METRICS, DepthErrors, DepthMetrics, DepthRange
from kdcache.metrics.evaluate import TaskMetrics, evaluate_model, evaluate_tasks, metrics_markdown
from kdcache.metrics.predictions import Inference
from kdcache.metrics.sliding import Framing
from kdcache.metrics.tables import class_rows, iou_listing, markdown_table, percent

__all__ = [
    "DEPTH_METRICS",
    "ConfusionMatrix",
    "DepthErrors",
    "DepthMetrics",
    "DepthRange",
    "Framing",
    "Inference",
    "Metrics",
    "OnDataSet",
    "TaskMetrics",
    "at_chance",
    "class_rows",
    "evaluate_model",
    "evaluate_tasks",
    "iou_listing",
    "markdown_table",
    "metrics_markdown",
    "percent",
]
