"""Data: samples and their layouts, procedural scenes, rendering of views, augmentation, checks.

    open_split(data, split) -> Split          samples, ids, classes, image(i), label(i, task); for a folder, VOC, ...
    Sample, Source, Numbered                  a sample, and how its image and labels are read, to make a split yourself
    from_dataset(dataset, classes)            the same for a data set in memory: PyTorch's, Hugging Face's
    classes_by_name(split, classes)           its labels in the classes of a model, joined by name
    render(image, label, window, ...)         the one rendering that teacher pass and training share
    choose_fit, fitted_share, whole_window    squashed, cropped or padded into a size
    RENDERERS, render_depth, zoom_of          the same for labels of numbers, and the zoom of a view
    draw_window, colour_jitter, RandAugment   random changes for the student
    draw_view, id_hash, inside_rectangle      random views of a cache, drawn once
    convert                                   any data set as a folder
    traced                                    the window that your augmentation shows, for a cache's targets
    folds_of, fold_alone, check_folds         parts that a teacher has not seen, by id or by sequence
    shared_sequences                          videos with frames in both training and validation
    prefetch                                  ordered results from a bounded pool of threads
    check, class_weights                      a report on a whole data set, and weights from its counts
    read_contents, short_digests              digests of the samples' contents, equal for equal data sets

Everything wrong with a user's data is a `DataError`. Wrong arguments of a caller are `ValueError`.
"""

from kdcache.data.changes import UNRECORDED, Changes, changed_data
from kdcache.data.checks.check import CheckReport, check, class_weights
from kdcache.data.checks.depth_report import DepthReport
from kdcache.data.checks.split_report import SplitReport
from kdcache.data.contents import Contents, place_key, read_contents, remembered_digests, short_digests
from kdcache.data.conversion.convert import Converted, ConvertedSplit, convert
from kdcache.data.folds import Fold, check_fold_labels, check_folds, fold_alone, parse_fold
from kdcache.data.layout import list_splits, open_split
from kdcache.data.layouts.converted import DataWarning
from kdcache.data.match_classes import classes_by_name
from kdcache.data.memory import from_dataset
from kdcache.data.prefetch import prefetch
from kdcache.data.rendering.augment import (
    Augmentation,
    colour_jitter,
    draw_view,
    draw_window,
    id_hash,
    inside_rectangle,
)
from kdcache.data.rendering.depth import RENDERERS, render_depth, zoom_of
from kdcache.data.rendering.fit import Fit, choose_fit, fitted_share, whole_window
from kdcache.data.rendering.rand_augment import RandAugment
from kdcache.data.rendering.view import OUTSIDE_RGB, Window, pixel_checksum, render
from kdcache.data.sample import ClassList, Numbered, Sample, Source, Split, ids_digest
from kdcache.data.scenes.generate import write_scenes
from kdcache.data.sequences import SharedSequence, check_folds_by, folds_of, shared_sequences
from kdcache.data.tracing import traced
from kdcache.tasks import IGNORE_INDEX

__all__ = [
    "IGNORE_INDEX",
    "OUTSIDE_RGB",
    "RENDERERS",
    "UNRECORDED",
    "Augmentation",
    "Changes",
    "CheckReport",
    "ClassList",
    "Contents",
    "Converted",
    "ConvertedSplit",
    "DataWarning",
    "DepthReport",
    "Fit",
    "Fold",
    "Numbered",
    "RandAugment",
    "Sample",
    "SharedSequence",
    "Source",
    "Split",
    "SplitReport",
    "Window",
    "changed_data",
    "check",
    "check_fold_labels",
    "check_folds",
    "check_folds_by",
    "choose_fit",
    "class_weights",
    "classes_by_name",
    "colour_jitter",
    "convert",
    "draw_view",
    "draw_window",
    "fitted_share",
    "fold_alone",
    "folds_of",
    "from_dataset",
    "id_hash",
    "ids_digest",
    "inside_rectangle",
    "list_splits",
    "open_split",
    "parse_fold",
    "pixel_checksum",
    "place_key",
    "prefetch",
    "read_contents",
    "remembered_digests",
    "render",
    "render_depth",
    "shared_sequences",
    "short_digests",
    "traced",
    "whole_window",
    "write_scenes",
    "zoom_of",
]
