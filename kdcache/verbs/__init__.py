"""The verbs of the command line as functions: their settings are its flags, from the same tables.

keywords.py           settings as keywords: a function's signature, and how values are checked
build.py              `build_cache`: a teacher's pass into a store
train.py              `train`: a training into a run folder
evaluate.py           `evaluate`: metrics of a model on labelled data
compare.py            `compare`: runs side by side

`kdcache.build_cache`, `kdcache.train`, `kdcache.evaluate` and `kdcache.compare` are these.
"""

from kdcache.verbs.build import build_cache
from kdcache.verbs.compare import compare
from kdcache.verbs.evaluate import evaluate
from kdcache.verbs.train import train

__all__ = ["build_cache", "compare", "evaluate", "train"]
