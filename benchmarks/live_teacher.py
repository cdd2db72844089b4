"""A training step with a live teacher, to compare with a step from a cache: same loss, pixels and order.

Put the script and the teacher before `train-student`, and that training has a live teacher:

    python benchmarks/live_teacher.py runs/teacher train-student --cache camvid.zarr ...
"""

import sys
from dataclasses import replace
from typing import Any

from torch.nn import functional as F

from kdcache.data import ClassList
from kdcache.distill import SEGMENTATION, Streams, Target
from kdcache.models import SegmentationModel
from kdcache.run_folder import Run
from kdcache.settings.term import MAXIMUM
from kdcache.teacher import load_teacher
from kdcache.teacher.load.forward import Precision, place, teach
from kdcache.training import api
from kdcache.training.step.eager import EagerStep
from kdcache_kernels import pack


class LiveStep(EagerStep):
    """An eager step with a teacher that runs on the same pixels as the student.

    Args:
        eager: the step to which the teacher is added.
        teacher: the teacher, which moves to the same device.
        size: (H, W) of the teacher's input. None takes the student's. Pixels are resized to it bilinearly, and
            probabilities are averaged to the grid of the student's size.
    """

    def __init__(
        self,
        eager: EagerStep,
        teacher: SegmentationModel,
        precision: Precision = "float32",
        size: tuple[int, int] | None = None,
    ) -> None:
        self.__dict__.update(eager.__dict__)
        place(teacher, eager.device)
        self._teacher, self._precision, self._size = teacher, precision, size

    def to_device(self, batch: Streams) -> Streams:
        """Return the batch on the device, with the teacher's logits of all classes as its target."""
        (rows,) = super().to_device(batch)
        assert rows.pixels is not None
        pixels, grid = rows.pixels, None
        if self._size not in (None, tuple(pixels.shape[1:3])):
            stride = self._teacher.stride
            grid = pixels.shape[1] // stride, pixels.shape[2] // stride
            resized = F.interpolate(pixels.permute(0, 3, 1, 2).float(), self._size, mode="bilinear")
            pixels = resized.round().to(pixels.dtype).permute(0, 2, 3, 1)
        logits = teach(self._teacher, pixels, (), self._precision, self.device, grid).logits
        values, _, _ = pack(logits, logits.shape[1])
        arrays = {
            path: logits.amax(1).to(array.dtype) if path == MAXIMUM else array for path, array in rows.arrays.items()
        }
        return (replace(rows, targets={SEGMENTATION: Target(values)}, arrays=arrays, window=None, flip=None),)


def main() -> None:
    """Run the command line with a live teacher in every step. The first argument names the teacher."""
    origin, make = sys.argv.pop(1), api.make_trainer

    def make_live(*arguments: Any, **options: Any) -> Any:
        trainer = make(*arguments, **options)
        described = Run.open(origin).model
        teacher = load_teacher(origin, ClassList(described.class_names, described.class_colours))
        trainer.use(LiveStep(trainer.eager, teacher.model, size=described.size))
        return trainer

    api.make_trainer = make_live
    from kdcache_cli.app import main as command_line

    command_line()


if __name__ == "__main__":
    main()
