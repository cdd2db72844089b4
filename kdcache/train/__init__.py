"""Training: one trainer for teachers and students.

    config.py        the settings (= the flags, = recipe.toml), and which do not go together
    ranges.py        what they may be, in words
    start.py         from settings to a run
    folder.py        the folder of a run, before its first step
    lock.py          one training at a time per folder
    sources.py       what is drawn from, and what validates
    part.py          fewer samples, fewer labels, without a fold
    trust.py         how far the teacher is trusted, class by class
    held_out.py      whether that is measured on what the teacher has not seen
    objective.py     the loss that the settings ask for

    sample.py        memory that one sample is drawn into, and how samples become a batch
    dataset.py       samples through drawn windows, from a data set
    cached.py        the same from a store
    records.py       decoded records that stay, in memory or on a GPU
    resident.py      whether they do
    mix.py           CutMix, ClassMix
    order.py         which record a draw takes
    loader.py        draws by number, and who draws ahead
    ring.py          buffers used again, and threads that draw into them
    ahead.py         shards of a remote store, fetched before they are needed
    feed.py          the way of a batch to the device

    trainer.py       the loop
    schedule.py      optimizers and learning rates
    step.py          one optimizer step, operation by operation
    ways.py          the ways to run it: eager, compiled, graphed
    graph.py         as a CUDA graph
    accumulate.py    from parts of a batch
    distributed.py   the processes of torchrun, and what they agree on
    parallel.py      the step of one of several processes
    stop.py          asking a training to stop
    watch.py         losses that are not finite, terms that do nothing
    state.py         what a run leaves and goes on from
    checkpoint.py    full state, replaced whole
    memory.py        running out of it, and what would have fitted
    log.py           metrics.jsonl, environment, observers
    loggers.py       TensorBoard, W&B, Trackio
    bench/           readers, loaders and steps side by side

Teachers and students go the same way: what is learnt from a store differs by its loss and its samples alone.
"""

from kdcache.train.cached import CacheDataset
from kdcache.train.config import TrainConfig, make_config, read_config
from kdcache.train.dataset import LabelledDataset
from kdcache.train.distributed import pick_device
from kdcache.train.loader import sample_loader
from kdcache.train.log import Observer
from kdcache.train.start import train
from kdcache.train.stop import Interrupted

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
