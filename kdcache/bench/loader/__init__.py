"""Measuring how samples are read and loaded: our readers and loaders beside others, in one run.

turns.py     contestants take turns; time, CPU time
readers.py   ways to read records of a store
streams.py   ways to load whole samples
feeding.py   what a training step costs more than on a batch from memory
report.py    settings, tables, JSON
run.py       measure(Settings(...)): all of it

It may know stores and loaders; `kdcache.bench.kernels` may not.
"""

from kdcache.bench.loader.readers import READERS
from kdcache.bench.loader.report import Measured, Report, Settings, Table
from kdcache.bench.loader.run import measure
from kdcache.bench.loader.streams import LOADERS

__all__ = ["LOADERS", "READERS", "Measured", "Report", "Settings", "Table", "measure"]
