"""Where a teacher comes from, and how it is run.

load.py          a run, SPEC@FILE, SPEC@default; class maps
provenance.py    the training of a teacher that is a run
ensemble.py      ensembles, augmentation at test time, a teacher per fold
forward.py       one way to run it
fingerprint.py   what identifies it
"""
