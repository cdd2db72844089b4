"""The contents of a cache.

manifest.py          who made it, from what, how
manifest_models.py   the parts of that: data set, view, heads, features
teacher_models.py    the teacher's fingerprint
schema.py            arrays, chunks
flags.py             a flag per sample, as text of the manifest
eight_bits.py        features as bytes with scales, and what that loses
codec.py             how they are compressed, and what is rounded before
shard.py             records straight from shards, at the decoder's speed
layout.py            which arrays that can be done with
damage.py            errors for files that are not what was written
"""
