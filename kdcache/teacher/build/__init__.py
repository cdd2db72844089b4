"""The teacher's one pass over a data set, into a cache.

options.py         the choices of a build
cost_estimate.py   what they will cost, before it
disk.py            how fast the disk is, and what the build waits for
trial_store.py     the small cache that this is measured on
probe.py           the teacher on a few first views
manifest.py        the manifest, before the first shard
fidelity.py        what storing loses
render.py          views of samples, rendered
statistics.py      small maps next to the targets
shard_queue.py     records into whole shards
reuse.py           what an earlier cache holds already
build.py           the pass
ray_engine.py      the pass on a Ray cluster
copy_fidelity.py   what a copy loses
"""
