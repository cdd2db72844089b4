"""Training: one trainer for teachers and students.

    config.py        the settings (= the flags, = recipe.toml), and which do not go together
    ranges.py        what they may be, in words
    sources.py       what is drawn from, and what validates
    api.py           from settings to a run
    criterion.py     the loss that the settings ask for
    class_trust.py   how far the teacher is trusted, class by class
    held_out.py      whether that is measured on what the teacher has not seen
    trainer.py       the loop
    distributed.py   the processes of torchrun, and what they agree on
    interrupt.py     asking a training to stop
    input/           from samples to batches on the device
    step/            one optimizer step: eager, compiled, graphed, in parts, in several processes
    run/             the folder of a run: checkpoints, logs, lock

Teachers and students go the same way: what is learnt from a store differs by its loss and its samples alone.
"""

from kdcache.train.api import train
from kdcache.train.config import TrainConfig, make_config, read_config
from kdcache.train.distributed import pick_device
from kdcache.train.input.cache_dataset import CacheDataset
from kdcache.train.input.dataset import LabelledDataset
from kdcache.train.input.loader import sample_loader
from kdcache.train.interrupt import Interrupted
from kdcache.train.run.metrics_log import Observer

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
