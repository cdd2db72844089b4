"""Judging models: metrics by mmsegmentation's convention, comparisons, pictures, pages, benchmarks of the loss.

    metrics.py           one confusion matrix over a whole set, and what follows from it
    chance.py            whether they are those of a model that has learnt nothing
    run.py               a model on a labelled split
    per_image.py         the score of each image, and which are shown
    confidence.py        calibration, and what a threshold keeps
    cost.py              parameters, arithmetic, time per image
    memory.py            running out of it, however it is said
    timing.py            time without garbage collection
    machine.py           the processor, for figures
    predict.py           images that are in no data set

    runs.py              run folders, their settings and models
    evaluation.py        evaluations that are kept beside the weights
    groups.py            rows: runs that differ in seed and fold alone
    spread.py            means, and whether two rows differ by more than noise
    comparison.py        what a comparison says, as data
    compare.py           making it
    compare_tables.py    as Markdown, CSV and text
    tables.py            metrics as rows of a table
    banner.py            what stands above figures that are no result

    curves.py            how a training went
    pictures.py          figures, and labels in their colours
    score_pictures.py    one model's scores
    gallery.py           the best and the worst images
    visualise.py         all of them, as a folder
    report/              the page
    bench/               the loss kernels beside their rivals

It knows no stores and no trainings: a run is a folder of files.
"""

from kdcache.evaluate.chance import at_chance
from kdcache.evaluate.metrics import ConfusionMatrix, Metrics
from kdcache.evaluate.run import evaluate_model
from kdcache.evaluate.tables import class_rows, comparison_rows, markdown_table, metrics_markdown, percent

__all__ = [
    "ConfusionMatrix",
    "Metrics",
    "at_chance",
    "class_rows",
    "comparison_rows",
    "evaluate_model",
    "markdown_table",
    "metrics_markdown",
    "percent",
]
