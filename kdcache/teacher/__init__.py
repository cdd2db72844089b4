"""The teacher's one pass: where it comes from, what it will write, the build, and checks against it.

source.py        a run, SPEC@FILE, SPEC@default; class maps
several.py       ensembles, augmentation at test time, a teacher per fold
forward.py       one way to run it
fingerprint.py   what identifies it
options.py       the choices of a build
asking.py        the teacher on a few first views
plan.py          the manifest, before the first shard
fidelity.py      what storing loses
statistics.py    small maps beside the targets
copied.py        what a copy loses
records.py       views of samples, rendered
shards.py        records into whole shards
reuse.py         what an earlier store says already
build.py         the pass
check.py         scores from the store; the store against the teacher
"""

from kdcache.teacher.build import BuildResult, build_cache
from kdcache.teacher.check import Agreement, compare_teacher, score_cache
from kdcache.teacher.copied import copied_fidelity
from kdcache.teacher.options import BuildOptions
from kdcache.teacher.plan import plan_manifest
from kdcache.teacher.reuse import options_of
from kdcache.teacher.several import check_cross_fit, load_like, load_teachers
from kdcache.teacher.source import Teacher, load_teacher

__all__ = [
    "Agreement",
    "BuildOptions",
    "BuildResult",
    "Teacher",
    "build_cache",
    "check_cross_fit",
    "compare_teacher",
    "copied_fidelity",
    "load_like",
    "load_teacher",
    "load_teachers",
    "options_of",
    "plan_manifest",
    "score_cache",
]
