"""Training: one trainer for teachers and students.

config.py      the settings (= the flags, = recipe.toml)
dataset.py     samples from a data set or a store, through drawn windows
loader.py      the order of draws, and who draws ahead
ring.py        threads that draw into buffers used again
schedule.py    optimizers and learning rates
step.py        one optimizer step, eager or compiled
graph.py       the same as a CUDA graph
trainer.py     the loop
checkpoint.py  full state, replaced whole
log.py         metrics.jsonl, environment, observers
start.py       from settings to a run
"""

from kdcache.train.config import TrainConfig, make_config, read_config
from kdcache.train.dataset import CacheDataset, LabelledDataset, Sample
from kdcache.train.log import Observer
from kdcache.train.start import pick_device, train
from kdcache.train.trainer import Interrupted

__all__ = [
    "CacheDataset",
    "Interrupted",
    "LabelledDataset",
    "Observer",
    "Sample",
    "TrainConfig",
    "make_config",
    "pick_device",
    "read_config",
    "train",
]
