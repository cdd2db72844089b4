"""Samples of a training, and their way to batches on the device.

batch.py              one item, and a batch of them
dataset.py            samples through drawn windows, from a data set
cache_dataset.py      the same from a store
subset.py             fewer samples, fewer labels, without a fold
resident_records.py   decoded records that stay, in memory or on a GPU
residency.py          whether they do
mix.py                CutMix, ClassMix
sampler.py            which record a draw takes
loader.py             draws by number, and who draws ahead
streams.py            the rows of each of several sources
ring_buffer.py        buffers used again, and threads that draw into them
shard_prefetch.py     shards of a remote store, fetched before they are needed
device_prefetch.py    the way of a batch to the device
"""

from kdcache.training.input.mix import Mix, Paste, Pastes

__all__ = ["Mix", "Paste", "Pastes"]
