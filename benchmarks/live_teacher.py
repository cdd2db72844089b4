"""A step with the teacher in the loop, for comparisons with one from a store: same loss, same pixels, same order."""

from dataclasses import replace

from kdcache.distill import SEGMENTATION, Batch, Target
from kdcache.models import SegmentationModel
from kdcache.teacher.load.forward import Precision, place, teach
from kdcache.train.step.eager import EagerStep
from kdcache_kernels import pack


class LiveStep(EagerStep):
    """An eager step's own parts, with a teacher that is run on the very pixels that the student gets.

    Args:
        eager: the step it is made of.
        teacher: put on the same device.
    """

    def __init__(self, eager: EagerStep, teacher: SegmentationModel, precision: Precision = "float32") -> None:
        self.__dict__.update(eager.__dict__)
        place(teacher, eager.device)
        self._teacher, self._precision = teacher, precision

    def to_device(self, batch: Batch) -> Batch:
        """The batch on the device, with the teacher's logits of all classes as its target."""
        batch = super().to_device(batch)
        logits, _ = teach(self._teacher, batch.pixels, (), self._precision, self.device)
        values, _, _ = pack(logits, logits.shape[1])
        return replace(batch, targets={SEGMENTATION: Target(values)}, window=None, flip=None)
