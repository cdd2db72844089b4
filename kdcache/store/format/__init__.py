"""The contents of a cache.

manifest.py          the cache's description
manifest_models.py   its parts: data set, view, heads, features
teacher_models.py    the teacher's fingerprint
schema.py            arrays, chunks
flags.py             a flag per sample, as text of the manifest
eight_bits.py        features as bytes with scales, and the loss
codec.py             compression, and rounding before it
shard.py             direct reads of records from shards
layout.py            the array layouts that direct reads support
damage.py            errors for damaged files
"""
