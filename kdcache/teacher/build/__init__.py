"""The teacher's one pass over a data set, into a cache.

options.py         the choices of a build
cost_estimate.py   the cost of a build, before it
disk.py            the speed of the disk, and the bottleneck of a build
trial_store.py     the small cache on which the cost is measured
probe.py           the teacher on a few first views
manifest.py        the manifest, before the first shard
fidelity.py        the loss of storing
render.py          views of samples, rendered
statistics.py      small maps next to the targets
shard_queue.py     records into whole shards
reuse.py           targets copied from an earlier cache
build.py           the pass
ray_engine.py      the pass on a Ray cluster
copy_fidelity.py   the loss of a copy
"""
