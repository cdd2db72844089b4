"""Where the files of a cache are.

base.py           what every place answers
durable.py        writes that survive a power cut
local.py          a folder on a disk
object_store.py   a prefix of a bucket: requests, retries
mirror.py         copies of its shards on this disk
open.py           from an address to its place
"""
