"""The teacher's one pass: where it comes from, what it writes, and checks against it.

    load/    a teacher from a run, a file or a function
    build/   its pass over a data set, into a cache
    audit/   checks of caches against their teacher, and against labels

A teacher runs once. Everything after the build reads the cache.
"""

from kdcache.teacher.audit.verify import Agreement, compare_teacher, score_cache
from kdcache.teacher.build.build import BuildResult, build_cache
from kdcache.teacher.build.copy_fidelity import copied_fidelity
from kdcache.teacher.build.manifest import plan_manifest
from kdcache.teacher.build.options import BuildOptions
from kdcache.teacher.build.probe import TeacherProbe
from kdcache.teacher.build.reuse import options_of
from kdcache.teacher.load.ensemble import check_cross_fit, load_like, load_teachers
from kdcache.teacher.load.fingerprint import fingerprint
from kdcache.teacher.load.load import Teacher, load_teacher

__all__ = [
    "Agreement",
    "BuildOptions",
    "BuildResult",
    "Teacher",
    "TeacherProbe",
    "build_cache",
    "check_cross_fit",
    "compare_teacher",
    "copied_fidelity",
    "fingerprint",
    "load_like",
    "load_teacher",
    "load_teachers",
    "options_of",
    "plan_manifest",
    "score_cache",
]
