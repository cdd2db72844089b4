"""Where a teacher comes from, and how it is run.

load.py          a run, SPEC@FILE, SPEC@default; class maps
provenance.py    what a run says of its training
ensemble.py      ensembles, augmentation at test time, a teacher per fold
forward.py       one way to run it
fingerprint.py   what identifies it
"""
