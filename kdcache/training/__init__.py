"""Training: one trainer for teachers and students.

    config.py        the settings (= the flags, = recipe.toml), and which do not go together
    checks.py        whether they go together with the data and the processes
    streams.py       the settings of each of several sources
    term_setting.py  terms of the loss in the model of settings; the balance of tasks
    api.py           from settings to a run
    criterion.py     the loss that the settings describe
    class_trust.py   a weight per class of the teacher, by how far it beats a plain run
    leakage.py       whether the teacher has seen the fold or the labels that a run goes without
    pseudo_labels.py  how many pixels of a teacher a threshold keeps
    trainer.py       the loop
    numeric_labels.py  whether labels of numbers, such as depth, fit the range of a head
    feature_validation.py  the feature loss of held-out records
    distributed.py   the processes of torchrun, and what they agree on
    interrupt.py     requests to stop a training
    sources/         the training and validation data of the settings
    input/           from samples to batches on the device
    step/            one optimizer step: eager, compiled, graphed, in parts, in several processes
    run/             the folder of a run: checkpoints, logs, lock

Teachers and students train in the same way: training from a store differs by its loss and its samples alone.
"""

from kdcache.training.api import train
from kdcache.training.config import TrainConfig, make_config, read_config
from kdcache.training.distributed import pick_device
from kdcache.training.input.cache_dataset import CacheDataset
from kdcache.training.input.dataset import LabelledDataset
from kdcache.training.input.loader import sample_loader
from kdcache.training.interrupt import Interrupted
from kdcache.training.run.metrics_log import Observer

__all__ = [
    "CacheDataset",
    "Interrupted",
    "LabelledDataset",
    "Observer",
    "TrainConfig",
    "make_config",
    "pick_device",
    "read_config",
    "sample_loader",
    "train",
]
