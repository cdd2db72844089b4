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
"""The text before the second and further heads in a spec of several teachers, in earlier versions."""


class Member(Part):
    """One model of an ensemble.

    Attributes:
        spec: the model spec, without local folders.
        weights: digest of the weights.
        mean: RGB mean of its normalisation, for pixels from 0 to 1.
        std: RGB standard deviation of its normalisation, for pixels from 0 to 1.
        share: weight of this model's probabilities in the ensemble. All shares sum to 1.
    """

    spec: str
    weights: str
    mean: tuple[float, float, float]
    std: tuple[Spread, Spread, Spread]
    share: Share


class Training(Part):
    """The description of one data set that a teacher was trained on.

    Attributes:
        ids_digest: digest of the sample ids and class names of the training split.
        fold: (i, K) if the training left out fold i of K, otherwise None.
        folds_by: regular expression whose match in a sample id names the sample's sequence. A sequence is never divided
            between folds. None divides samples by a hash of their ids.
        labels: which samples of that split had labels in the training, as text of `pack_flags`. None if unknown.
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
        """Return True if the training left out all samples of fold number `fold` of `folds` folds.

        `by` is the regular expression that names sequences, or None for folds by a hash of each id. If `by` differs
        from the field `folds_by`, the result is False. Folds count from 0. Folds by hash are nested: fold 1 of
        2 is folds 1 and 3 of 4. A training that left out fold 1 of 2 thus also left out fold 3 of 4.
        """
        if self.fold is None or self.folds_by != by:
            return False
        if by is not None:
            return self.fold == (fold, folds)
        return folds % self.fold[1] == 0 and fold % self.fold[1] == self.fold[0]


class Augmented(Part):
    """Test-time augmentation: the teacher's prediction is the mean over several renderings of a view.

    Attributes:
        flip: True if mirrored renderings are included.
        scales: the factors by which the view is resized.
    """

    flip: bool
    scales: Annotated[tuple[Annotated[float, Field(gt=0, le=1024)], ...], Field(min_length=1)]


class Processor(Part):
    """The input that a teacher expects, in addition to the mean and std of its normalisation.

    Attributes:
        multiple: height and width must be multiples of this number of pixels.
        fixed_size: the only accepted (H, W), or None.
        native_size: (H, W) of the teacher's training images, or None if unknown.
        pads: True if these training images were padded to `native_size`.
        channels: order of the colour channels.
        positions: True if the teacher has position embeddings. Features of a mirrored image are then not the mirrored
            features.
        revision: commit of the teacher's files on the Hugging Face Hub, or None for a local folder.
    """

    multiple: Annotated[int, Field(ge=1, le=MOST_SIDE)] = 1
    fixed_size: Size | None = None
    native_size: Size | None = None
    pads: bool = False
    channels: Literal["rgb", "bgr"] = "rgb"
    positions: bool = False
    revision: Annotated[str, Field(max_length=200)] | None = None


class Fingerprint(Part):
    """The identity of a teacher: a digest of its weights, and its output for two fixed images.

    Attributes:
        spec: the model spec.
        weights: digest of the weights. For an ensemble, the digest of all members together.
        precision: floating-point precision of the forward pass.
        mean: RGB mean of its normalisation, for pixels from 0 to 1.
        std: RGB standard deviation of its normalisation, for pixels from 0 to 1.
        class_map: for each class of the teacher, the class of the data set that it becomes, -1 if it is dropped. None
            if no class map was used.
        members: the models of an ensemble. Empty for a single model.
        tta: test-time augmentation, or None.
        folds: number of folds. Member i then predicted the samples of fold i, which it was not trained on. With None,
            the members' probabilities were averaged.
        folds_by: regular expression whose match in a sample id names the sample's sequence. A sequence is never divided
            between folds. None divides samples by a hash of their ids.
        trainings: what the teacher or each member was trained on, one entry per data set. None stands for an unknown
            data set. `differences` ignores this field.
        parents: digests of the seals of the caches that the teacher itself was distilled from. `differences` ignores
            this field.
        probe: pooled outputs for two fixed images, which reveal changed code with unchanged weights.
        probe_size: (H, W) of the two fixed images. None is 96x128.
        processor: the expected input, or None if unknown. `differences` compares it only if both fingerprints have it.
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
        """The names of the heads that each have a separate teacher, as in caches of earlier versions. Usually empty."""
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
        """Return one text for each difference between this teacher and `other`. Empty if they are the same teacher.

        Outputs for the fixed images may differ by 1 % of the largest value, because hardware rounds differently.
        Folders in specs are ignored.
        """
        bare_self, bare_other = self.without_folders(), other.without_folders()
        differences = [
            f"{name}: {unlike(getattr(bare_self, name), getattr(bare_other, name))}"
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
            if getattr(bare_self, name) != getattr(bare_other, name)
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
        """Return the fingerprint with local folders removed from all specs.

        Caches of earlier versions have specs with folders.
        """
        members = tuple(member.model_copy(update={"spec": bare(member.spec)}) for member in self.members)
        return self.model_copy(update={"spec": bare(self.spec), "members": members})
