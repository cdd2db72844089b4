"""The training and validation data of the settings.

source.py      the data of every stream
samples.py     the samples of one stream, from a store or a data folder
fresh.py       whether data that are named with a cache still are what it was built from
classes.py     classes that the streams share
validation.py  what a training is validated on
"""

from kdcache.training.sources.classes import share_classes
from kdcache.training.sources.samples import open_dataset
from kdcache.training.sources.source import Source, check_pasting, open_sources, taught_tasks
from kdcache.training.sources.validation import (
    check_validation,
    judged_by_its_own,
    open_validation,
    read_samples,
    shared_with_judge,
)

__all__ = [
    "Source",
    "check_pasting",
    "check_validation",
    "judged_by_its_own",
    "open_dataset",
    "open_sources",
    "open_validation",
    "read_samples",
    "share_classes",
    "shared_with_judge",
    "taught_tasks",
]
