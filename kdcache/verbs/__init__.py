"""The verbs of the command line as functions: their settings are its flags, from the same tables.

Each verb is one function in the file of its name. The command line calls it and prints what it returns.

build.py          `build_cache`: a teacher's pass into a cache
build_parts.py    what a build consists of: its data set, its teacher, its options
train.py          `train`: a training into a run folder
evaluate.py       `evaluate`: metrics of a model on labelled data
compare.py        `compare`: runs side by side
report.py         `report`: the same as a page
plan.py           `plan`: what a build will cost
inspect.py        `inspect`, `card`, `audit`: what a cache is, and how good its teacher is
verify.py         `verify`: every byte of a cache, its data set and its teacher
copy.py           `copy`: a cache into another place, codec or part
export.py         `export`: a model as a file to deploy
predict.py        `predict`: classes and depth of images of no data set
pseudo_labels.py  `export_pseudo_labels`: confident predictions as label files
keywords.py       settings as keywords: a function's signature, and how values are checked
open_model.py     the model that a verb uses: a run, or SPEC@FILE
places.py         where the cache of a verb is, and the machine that it runs on
"""

from kdcache.verbs.build import build_cache
from kdcache.verbs.compare import compare
from kdcache.verbs.copy import copy
from kdcache.verbs.evaluate import evaluate
from kdcache.verbs.export import export
from kdcache.verbs.inspect import audit, card, inspect
from kdcache.verbs.plan import plan
from kdcache.verbs.predict import predict
from kdcache.verbs.pseudo_labels import export_pseudo_labels
from kdcache.verbs.report import report
from kdcache.verbs.train import train
from kdcache.verbs.verify import verify

__all__ = [
    "audit",
    "build_cache",
    "card",
    "compare",
    "copy",
    "evaluate",
    "export",
    "export_pseudo_labels",
    "inspect",
    "plan",
    "predict",
    "report",
    "train",
    "verify",
]
