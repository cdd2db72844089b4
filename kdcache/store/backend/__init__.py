"""The locations of a cache's files.

base.py           the interface of all locations
durable.py        writes that survive a power cut
local.py          a folder on a disk
object_store.py   a prefix of a bucket: requests, retries
mirror.py         copies of its shards on this disk
open.py           from a path or address to the location
"""
