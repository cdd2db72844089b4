"""The result of a check of one split."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from kdcache.data.checks.depth_report import DepthReport
from kdcache.data.layouts.file_split import describe_some, saved_as_png
from kdcache.tasks import IGNORE_INDEX


@dataclass
class SplitReport:
    """The contents and defects of one split, as `data check` found them.

    Attributes:
        split: the split's name.
        images: number of samples.
        labelled: number of samples with a segmentation label.
        class_pixels: number of pixels of each class id, over all readable labels.
        void_pixels: number of void pixels, over all readable labels.
        sizes: "HxW" -> number of images with this size after EXIF rotation.
        label_kinds: kind of label file, such as "8-bit palette" -> number of readable files.
        ids: sample id -> the class ids in its label, including void. Filled only for data with two classes.
        out_of_range: sample id -> {id without a class, as text -> number of pixels}.
        without_label: ids of samples without a segmentation label, which is not a defect.
        without_image: label files without an image, or with an unsuitable file type.
        clashes: image files with the id of another image, or lines of a list that repeat an id.
        missing: files that do not exist, although a list or another file of the sample needs them.
        unreadable: sample id -> why its image or label could not be read, and the fix.
        mismatched: sample id -> both sizes in words, if label and image differ in size.
        palettes: sample id -> how the colours in its label's palette contradict the class colours, in words.
        digest: SHA-256 (hex) of class names, ids and file contents, or None if not all files could be read.
        depth: the report about depth labels.
    """

    split: str
    images: int = 0
    labelled: int = 0
    class_pixels: list[int] = field(default_factory=list)
    void_pixels: int = 0
    sizes: dict[str, int] = field(default_factory=dict)
    label_kinds: dict[str, int] = field(default_factory=dict)
    ids: dict[str, tuple[int, ...]] = field(default_factory=dict)
    out_of_range: dict[str, dict[str, int]] = field(default_factory=dict)
    without_label: list[str] = field(default_factory=list)
    without_image: list[str] = field(default_factory=list)
    clashes: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)
    mismatched: dict[str, str] = field(default_factory=dict)
    palettes: dict[str, str] = field(default_factory=dict)
    digest: str | None = None
    depth: DepthReport = field(default_factory=DepthReport)

    def shares(self) -> tuple[list[float], float]:
        """Return each class's share of the pixels of all labels, in the order of ids, and the share of void.

        Shares are 0 to 1, and add up to 1 in total. Without label pixels, all are 0.
        """
        total = max(sum(self.class_pixels) + self.void_pixels, 1)
        return [count / total for count in self.class_pixels], self.void_pixels / total

    def problems(self) -> list[str]:
        """Return one sentence for each kind of defect, with the number of cases, examples and a fix."""
        naming = "call each after its image, as the others are, with .png, or remove it: an image has one label"
        kinds = (
            (self.clashes, "images share their id with another image", "rename or remove one of each"),
            (self.without_image, "labels belong to no image", saved_as_png(self.without_image) or naming),
            (self.missing, "files are missing", "restore them"),
            (
                list(self.unreadable),
                "samples cannot be read",
                f"the first: {next(iter(self.unreadable.values()), '')}",
            ),
            (
                list(self.mismatched),
                "labels have another size than their image",
                "resize the labels (nearest), or the images that images= names",
            ),
            (
                list(self.out_of_range),
                f"labels have ids that are no class ({self._stray_ids()})",
                self._stray_remedy(),
            ),
        )
        return [
            f"{self.split}: {len(names)} {defect}: {describe_some(names)}. {remedy[:1].upper()}{remedy[1:]}"
            for names, defect, remedy in kinds
            if names
        ] + self.depth.problems(self.split)

    def _stray_remedy(self) -> str:
        count = len(self.class_pixels)
        strays = {int(number) for ids in self.out_of_range.values() for number in ids}
        if strays == {count} and self.class_pixels[:1] == [0]:
            return "no pixel has 0, so they seem to count from 1: add the line `void: 0` to classes.txt, or subtract 1"
        if strays == {count}:
            return (
                f"where 0 means unlabelled and classes count from 1, add the line `void: 0` to classes.txt; where "
                f"{count} is void, add `void: {count}`; else complete the class list"
            )
        return f"complete the class list, or write {IGNORE_INDEX} (or the line `void: NUMBER` of classes.txt) for void"

    def _stray_ids(self, most: int = 6) -> str:
        """Describe ids without a class in words: "12 in 5 files, 250 pixels"."""
        files: Counter[int] = Counter()
        pixels: Counter[int] = Counter()
        for ids in self.out_of_range.values():
            files.update(map(int, ids))
            pixels.update({int(number): count for number, count in ids.items()})
        stray = [f"{n} in {files[n]} {'file' if files[n] == 1 else 'files'}, {pixels[n]} pixels" for n in sorted(files)]
        return "; ".join(stray[:most]) + (f"; and {len(stray) - most} more ids" if len(stray) > most else "")
