"""Where the files of a store are.

local.py   a folder on a disk
open.py    from an address to its place
"""
