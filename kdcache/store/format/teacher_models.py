"""The part of a manifest that identifies its teacher."""

import math
import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from kdcache.display import bare
from kdcache.store.format.manifest_models import MOST_SIDE, Count, Digest, Part, Size, part_differences, short, unlike

Share = Annotated[float, Field(gt=0, le=1)]
Spread = Annotated[float, Field(gt=0)]
Logit = Annotated[float, Field(allow_inf_nan=True)]
"""A class may be ruled out by -inf."""
_OF_A_HEAD = re.compile(r", ([A-Za-z0-9_+]+)=")
"""What separated the teachers of several heads in a spec."""


class Member(Part):
    """One of several teachers, with the weight `share`. Shares sum to 1."""

    spec: str
    weights: str
    mean: tuple[float, float, float]
    std: tuple[Spread, Spread, Spread]
    share: Share


class Training(Part):
    """The training of a teacher that is a run on a data set.

    Attributes:
        ids_digest: digest of its samples and classes, as `Dataset` has for the cache.
        fold: (i, K) if it left out fold i of K, else None.
        folds_by: pattern of the sequences that its folds keep together, or None for folds by id.
        labels: the samples with labels in its training, as `pack_flags` text in the order of the digest's ids. None in
            caches and runs from before it was recorded.
    """

    ids_digest: str
    fold: tuple[Count, Count] | None = None
    folds_by: str | None = None
    labels: Annotated[str, Field(pattern=r"^[A-Za-z0-9+/]+={0,2}$")] | None = None

    @model_validator(mode="after")
    def _fold_is_one_of_them(self) -> "Training":
        if self.fold is not None and not self.fold[0] < self.fold[1] >= 2:
            raise ValueError(f"there is no fold {self.fold[0]} of {self.fold[1]}")
        if self.fold is None and self.folds_by is not None:
            raise ValueError(f"folds_by is {short(self.folds_by)!r} without a fold")
        return self

    def left_out(self, fold: int, folds: int, by: str | None = None) -> bool:
        """Return whether it left out all samples of fold `fold` of `folds`. By id, a K-th consists of whole 2K-ths."""
        if self.fold is None or self.folds_by != by:
            return False
        if by is not None:
            return self.fold == (fold, folds)
        return folds % self.fold[1] == 0 and fold % self.fold[1] == self.fold[0]


class Augmented(Part):
    """Test-time augmentation: the teacher's prediction is the mean over these renderings of a view."""

    flip: bool
    scales: Annotated[tuple[Annotated[float, Field(gt=0, le=1024)], ...], Field(min_length=1)]


class Processor(Part):
    """What a teacher expects of its images, in addition to mean and std.

    Attributes:
        multiple: both sides are multiples of it. fixed_size: (H, W), if it accepts no other size.
        native_size: (H, W) of its training, if known.
        pads: whether its training images were padded to that size.
        channels: the order of colours that its first layer reads.
        positions: whether it has position embeddings, so features of a mirrored image are not mirrored features.
        revision: the hub commit of its files, or None for a folder.
    """

    multiple: Annotated[int, Field(ge=1, le=MOST_SIDE)] = 1
    fixed_size: Size | None = None
    native_size: Size | None = None
    pads: bool = False
    channels: Literal["rgb", "bgr"] = "rgb"
    positions: bool = False
    revision: Annotated[str, Field(max_length=200)] | None = None


class Fingerprint(Part):
    """The identity of a teacher. `probe` (raw logits on two fixed images, pooled) catches changed code.

    Attributes:
        members: models of an ensemble with averaged probabilities. `weights` is then the digest of all together.
        folds: number of folds. Each member predicted the samples of the fold that it had not seen. None: they averaged.
        folds_by: pattern of the sequences that these folds keep together, or None for folds by id.
        trainings: what each member or the one teacher learnt from, one entry per data set. None stands for an
            unknown one. Empty in caches from before it was recorded. Not part of the teacher's identity.
        parents: digests of the seals of the caches that its students learnt from, such as the previous round of
            self-training. Not part of the identity.
        probe_size: (H, W) of the two fixed images. None is 96x128.
        processor: what it expects of its images. Compared only if both have it, because older caches do not.
    """

    spec: str
    weights: str
    precision: str
    mean: tuple[float, float, float]
    std: tuple[Spread, Spread, Spread]
    class_map: tuple[int, ...] | None = None
    members: Annotated[tuple[Member, ...], Field(max_length=255)] = ()
    tta: Augmented | None = None
    folds: Annotated[int, Field(ge=2, le=255)] | None = None
    folds_by: str | None = None
    trainings: Annotated[tuple[Training | None, ...], Field(max_length=65535)] = ()
    parents: Annotated[tuple[Digest, ...], Field(max_length=65535)] = ()
    probe: tuple[Logit, ...]
    probe_size: Size | None = None
    processor: Processor | None = None

    @property
    def per_head(self) -> tuple[str, ...]:
        """The heads with their separate teacher, in caches of earlier versions."""
        return tuple(_OF_A_HEAD.findall(self.spec))

    @model_validator(mode="after")
    def _one_member_per_fold(self) -> "Fingerprint":
        if self.folds is not None and self.folds != len(self.members):
            raise ValueError(f"{self.folds} folds of {len(self.members)} members")
        if self.folds is None and self.folds_by is not None:
            raise ValueError(f"folds_by is {short(self.folds_by)!r} without folds")
        return self

    @model_validator(mode="after")
    def _a_training_per_teacher(self) -> "Fingerprint":
        if self.trainings and len(self.trainings) < max(1, len(self.members)):
            raise ValueError(f"{len(self.trainings)} trainings of {max(1, len(self.members))} teachers")
        return self

    def differences(self, other: "Fingerprint") -> list[str]:
        """Describe what differs. The probe may differ by 1 % of its largest value, because hardware rounds.

        A model's file is compared by its name, because older caches include its folder.
        """
        one, another = self.without_folders(), other.without_folders()
        differences = [
            f"{name}: {unlike(getattr(one, name), getattr(another, name))}"
            for name in (
                "spec",
                "weights",
                "precision",
                "mean",
                "std",
                "class_map",
                "members",
                "tta",
                "folds",
                "folds_by",
            )
            if getattr(one, name) != getattr(another, name)
        ]
        if self.processor is not None and other.processor is not None:
            differences += part_differences("processor", self.processor, other.processor)
            if (first := self.processor.revision) not in (None, other.processor.revision):
                differences[-1] += f" (,revision={first} after the teacher takes the first)"
        scale = max((abs(value) for value in self.probe if math.isfinite(value)), default=0.0)
        far = len(self.probe) != len(other.probe) or any(
            repr(a) != repr(b) and not abs(a - b) <= 0.01 * scale + 1e-4  # NaN is no less than anything
            for a, b in zip(self.probe, other.probe, strict=True)
        )
        if far:
            differences.append("probe: other logits on the two fixed images")
        return differences

    def without_folders(self) -> "Fingerprint":
        """Return the teacher without local folders, which caches of earlier versions include."""
        members = tuple(member.model_copy(update={"spec": bare(member.spec)}) for member in self.members)
        return self.model_copy(update={"spec": bare(self.spec), "members": members})
