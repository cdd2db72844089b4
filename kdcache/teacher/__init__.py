"""The teacher's one pass: where it comes from, what it will write, the build, and checks against it.

    source.py            a run, SPEC@FILE, SPEC@default; class maps
    training.py          what a run says of its training
    several.py           ensembles, augmentation at test time, a teacher per fold
    forward.py           one way to run it
    fingerprint.py       what identifies it

    options.py           the choices of a build
    estimate.py          what they will cost, before it
    estimate_trial.py    the small store that this is measured on
    asking.py            the teacher on a few first views
    plan.py              the manifest, before the first shard
    fidelity.py          what storing loses
    records.py           views of samples, rendered
    statistics.py        small maps beside the targets
    shards.py            records into whole shards
    reuse.py             what an earlier store says already
    build.py             the pass
    copied.py            what a copy loses

    check.py             scores from the store; the store against the teacher
    whole.py             whole images of a store
    audit.py             how good the teacher is where, and how sure
    audit_gradient.py    what keeping fewer classes would do to the gradient
    audit_pictures.py    the audit as pictures
    pseudo.py            pseudo labels as PNG files

What a teacher says is asked for once; everything after the build reads the store.
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
