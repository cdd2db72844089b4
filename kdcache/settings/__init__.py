"""Settings: each one's name, type, default, help and panel, once; free of torch and of pydantic.

    setting.py     the entries of a table
    validate.py    the one validator of values and names
    term.py        a term of the loss, and what every kind says of itself
    terms.py       the terms of the loss, each kind once
    methods.py     loss terms and methods that are written as text: cosine,weight=0.1, kl+at
    parse.py       values that are written as text: 288x384, 0.5:2.0, 50GiB
    shared.py      tables that several verbs share: data, the machine, copies of a remote cache
    training.py    the tables of a training, by their owner
    streams.py     a training from several sources: their tables and rows
    building.py    the tables of a build
    engine.py      the table of the engines of builds and sweeps
    removed.py     what earlier versions had, and what takes its place

A table is a dataclass whose fields are `name: type = setting(default, help)`. The flags of the verbs, the
keys of recipes and the models that check them (`kdcache.training.TrainConfig`) are made from the tables.
"""

from kdcache.settings.setting import Entry, Setting, Spelling, entries, names, setting
from kdcache.settings.validate import read, read_value, read_values

__all__ = ["Entry", "Setting", "Spelling", "entries", "names", "read", "read_value", "read_values", "setting"]
