"""Judging models: metrics by mmsegmentation's convention, evaluation runs, tables."""

from kdcache.evaluate.metrics import ConfusionMatrix, Metrics
from kdcache.evaluate.run import evaluate_model
from kdcache.evaluate.tables import class_rows, comparison_rows, markdown_table, metrics_markdown, percent

__all__ = [
    "ConfusionMatrix",
    "Metrics",
    "class_rows",
    "comparison_rows",
    "evaluate_model",
    "markdown_table",
    "metrics_markdown",
    "percent",
]
