"""`kdcache.plan`: estimate a build's cost before it."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge
from torch import nn

from kdcache.progress import progress_of_stages, say
from kdcache.settings.building import BuildSettings, TeacherSettings
from kdcache.settings.parse import Count
from kdcache.settings.shared import ImageSettings, MachineSettings
from kdcache.teacher import Teacher
from kdcache.teacher.build import disk as disks
from kdcache.teacher.build.cost_estimate import Estimate, estimate, student_seconds
from kdcache.verbs.build_parts import check_views, plan_build
from kdcache.verbs.keywords import Data, checked, keywords, open_data

TABLES = (ImageSettings, TeacherSettings, BuildSettings, MachineSettings)


@dataclass(frozen=True)
class Planned:
    """The result of `kdcache.plan`: the estimated cost of a build.

    Attributes:
        estimate: bytes, files and seconds of the build, and of builds that differ in one setting.
        free: free bytes at the cache's location, or None for an object store.
        disk: the measured write speed of the disk, or None if it was not measured.
        bound: the bottleneck of the build, or None if the disk was not measured.
        student: model spec of the student whose training was estimated, or None.
        epochs: number of epochs of that training.
        student_seconds: the student's forward and backward time in seconds per image.
    """

    estimate: Estimate
    free: int | None
    disk: disks.DiskRate | None = None
    bound: disks.Bound | None = None
    student: str | None = None
    epochs: int = 0
    student_seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the estimate as JSON values, as `kdcache plan --json` writes them."""
        content = {**self.estimate.to_json(), "free_bytes": self.free}
        if self.disk is not None and self.bound is not None:
            content["disk"] = self.bound.to_json(self.disk)
        if self.student is not None:
            live, cached = self.estimate.training_seconds(self.epochs, self.student_seconds)
            content["training"] = {
                "student": self.student,
                "epochs": self.epochs,
                "student_seconds_per_image": self.student_seconds,
                "live_seconds": live,
                "cached_seconds": cached,
            }
        return content


@keywords(*TABLES)
def plan(
    data: Data,
    teacher: str | Path | nn.Module | Teacher | Sequence[str],
    *,
    out: str | Path = ".",
    split: str | None = None,
    measure_disk: bool = False,
    records: Annotated[int, Ge(8)] = 16,
    student: str | None = None,
    epochs: Count = 100,
    progress: bool = True,
    **settings: Any,
) -> Planned:
    """Estimate the cost of `kdcache.build_cache` in bytes, files and hours, as `kdcache plan` does.

    >>> import kdcache
    >>> planned = kdcache.plan("streets", "runs/teacher", split="train", records=8, progress=False)
    >>> planned.estimate.chosen.bytes > 0
    True

    Call it with the arguments that you will give to `kdcache.build_cache`. It runs the teacher on a few records and
    scales their bytes and seconds to the whole split. Nothing is kept.

    Args:
        data: folder or spec of a data set, or a split.
        teacher: a run folder, SPEC@FILE, a module, or the result of `load_teacher`. Several run folders or specs are an
            ensemble.
        out: the folder or address for the cache. Only its free space is read.
        split: name of the split. Default: train.
        measure_disk: also write at most 2 GB to the disk of `out`, measure its speed, and delete them.
        records: number of records to measure. More make the estimate more precise.
        student: model spec of a student. Its training is then also estimated, with the cache and with a live teacher.
            None estimates no training.
        epochs: length of the student's training, in passes over the images.
        progress: show progress bars, or lines without a terminal.
        settings: the other settings of `kdcache.build_cache`, such as `size`, `views` and `top_k`.
    Returns: the cost. `estimate.chosen.bytes` and `estimate.chosen.seconds` belong to the whole cache. `free` is the
        free space at `out` in bytes.
    Raises: KDCacheError, the base class of all errors of kdcache.
    """
    check_views(settings)
    values = checked(plan, settings, *TABLES)
    if measure_disk:
        disks.check_local(str(out))
    source, loaded, options = plan_build(
        open_data(data, split), teacher, values, None, lambda text: say(text, shown=progress)
    )
    learning = 0.0 if student is None else student_seconds(student, len(source.classes), options)
    with progress_of_stages(progress) as report:
        estimated = estimate(source, loaded, options, records=records, progress=report)
        disk = disks.measure_disk(str(out), progress=report) if measure_disk else None
    bound = None if disk is None else disks.bound_of(estimated, disk, options.render_threads)
    return Planned(estimated, _free_bytes(str(out)), disk, bound, student, epochs, learning)


def _free_bytes(out: str) -> int | None:
    """Return the free bytes of the disk that a path would be on, or None for an address."""
    if "://" in out:
        return None
    path = Path(out).absolute()
    return shutil.disk_usage(next(folder for folder in (path, *path.parents) if folder.is_dir())).free
