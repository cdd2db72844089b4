"""A data set in the style of another one, as a data set of layout `folder`.

    OUT/images/<split>/<id>.png     restyled, of the source image's size
    OUT/labels/<split>/<id>.png     links to the source's labels; class ids where the source's numbers are others
    OUT/depth/<split>/<id>.npy      likewise; depth.toml has the unit of depth that is linked
    OUT/classes.txt                 the source's names and colours
    OUT/restyled/<split>.csv        which target image gave each image its style
    OUT/restyled.json               from which data by which rule: what is there is kept only when these are equal

An interrupted restyling is never taken for a small data set, and goes on at the file where it ended. The target image
of a sample is a function of the seed, the sample's id and the target's list of samples: no order and no thread changes
it.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from kdcache.data.conversion.folder_writer import FolderWriter, save_png
from kdcache.data.layout import open_split
from kdcache.data.prefetch import prefetch
from kdcache.data.rendering.augment import id_hash
from kdcache.data.restyling.transfer import fourier_transfer, match_histograms, replaced_frequencies
from kdcache.data.sample import Pixels, Split
from kdcache.errors import DataError, RecipeError
from kdcache.files import check_own_folder, read_object, write_whole

Method = Literal["fda", "histogram"]
Progress = Callable[[int, int], None]

SETTINGS, PAIRS = "restyled.json", "restyled"


@dataclass(frozen=True)
class Style:
    """How images are restyled.

    Args:
        method: `fda`, Fourier domain adaptation, or `histogram`, histogram matching per channel.
        beta: of `fda`, the reach of the replaced frequencies as a part of the shorter side: 0.01 (the default of the
            authors' code), 0.05 or 0.09 in the paper.
        seed: decides which target image goes with which sample.

    Raises: RecipeError for another method, or a beta outside (0, 0.5].
    """

    method: Method = "fda"
    beta: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise RecipeError(
                "--method is fda or histogram", received=repr(self.method), remedy="for instance --method fda"
            )
        if not 0 < self.beta <= 0.5:
            raise RecipeError(
                "--beta is a part of the image's shorter side, above 0 and at most 0.5",
                received=f"{self.beta:g}",
                remedy="use 0.01, 0.05 or 0.09, as the paper does",
            )


@dataclass(frozen=True)
class Restyled:
    """The result of a restyling: images `written` now, images `kept` from before.

    Attributes:
        linked: labels that are links to the source's. copied: labels that are files of their own.
        notes: sentences on what may not be meant.
    """

    written: int
    kept: int
    linked: int
    copied: int
    notes: tuple[str, ...] = ()


def restyle(
    source: str | os.PathLike[str],
    like: str | os.PathLike[str],
    out: str | os.PathLike[str],
    style: Style | None = None,
    *,
    split: str = "train",
    like_split: str = "train",
    resize: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Restyled:
    """Write a split of `source` in the style of images of `like`. Interrupted, the same call goes on.

    Args:
        source, like: data sets, as for `open_split`. Labels and depth of `source` go along; of `like` images alone
            count.
        out: a new folder, or one that other splits of the same restyling are in.
        style: default `fda` with the authors' settings.
        resize: whether `fda` may resize a target's image to the size of the source's; `histogram` takes any sizes.
        threads: working threads; by default one per core, at most 8.
        progress: called with (images done, images).
    Raises: DataError for data that cannot be read, and without `resize` for images of two sizes; RecipeError for a
        folder that holds something else.
    """
    style = style or Style()
    work = _Work(open_split(source, split), open_split(like, like_split), Path(out), style, resize)
    work.prepare()
    threads = min(os.cpu_count() or 1, 8) if threads is None else threads
    total, written = len(work.source), 0
    for done, new in enumerate(prefetch(work.write, range(total), threads=threads, ahead=2 * threads + 1), 1):
        written += new
        if progress is not None:
            progress(done, total)
    work.folder.publish()
    labels = [path for index in range(total) if (path := work.folder.label_file(index)) is not None]
    linked = sum(path.is_symlink() for path in labels)
    return Restyled(written, total - written, linked, len(labels) - linked, work.notes())


@dataclass(frozen=True)
class _Work:
    source: Split
    target: Split
    out: Path
    style: Style
    resize: bool

    @property
    def folder(self) -> FolderWriter:
        return FolderWriter(self.source, self.out)

    def prepare(self) -> None:
        """Refuse what cannot be done, and write everything but samples. Raises: RecipeError, DataError."""
        rule = "a restyled data set is written into a new or empty folder, or one that it was written into before"
        check_own_folder(self.out, SETTINGS, rule)
        self._check_settings(settings := self._settings())
        if len(self.source):
            self._pair(0)  # before anything is written
        (self.out / PAIRS).mkdir(parents=True, exist_ok=True)
        write_whole(self.out / SETTINGS, json.dumps(settings, indent=1) + "\n")
        self.folder.write_beginning()
        pairs = io.StringIO()
        rows = ((sample, self.target.ids[self.partner(i)]) for i, sample in enumerate(self.source.ids))
        csv.writer(pairs, lineterminator="\n").writerows([("image", "target"), *rows])
        write_whole(self.out / PAIRS / f"{self.source.split}.csv", pairs.getvalue())

    def write(self, index: int) -> bool:
        """Write what a sample lacks, its image last; returns whether that was one."""
        self.folder.write_label(index)
        self.folder.write_depth(index)
        path = self.folder.image_file(index)
        if path.exists():
            return False
        save_png(self._restyled(index), path)
        return True

    def partner(self, index: int) -> int:
        """The number of the target image that gives a sample its style."""
        rng = np.random.default_rng((self.style.seed, id_hash(self.source.ids[index])))
        return int(rng.integers(len(self.target)))

    def notes(self) -> tuple[str, ...]:
        """What the settings make of these images, where that may not be meant."""
        size = self.source.image(0).shape[:2]
        if self.style.method != "fda" or replaced_frequencies((size[0], size[1]), self.style.beta):
            return ()
        return (
            f"--beta {self.style.beta:g} of {size[0]} x {size[1]} pixels is less than one frequency: the mean colour "
            f"alone is the target's; from --beta {1 / min(size):.2g} on there is more",
        )

    def _restyled(self, index: int) -> Pixels:
        image, other = self._pair(index)
        if self.style.method == "histogram":
            return match_histograms(image, other)
        return fourier_transfer(image, other, self.style.beta)

    def _pair(self, index: int) -> tuple[Pixels, Pixels]:
        """A sample's image, and the one that gives it its style. Raises: DataError for two sizes that may not be."""
        partner = self.partner(index)
        image, other = self.source.image(index), self.target.image(partner)
        if self.style.method == "fda" and image.shape != other.shape and not self.resize:
            (height, width), (rows, columns) = image.shape[:2], other.shape[:2]
            raise DataError(
                "fda replaces the frequencies of an image by those of one of the same size",
                received=f"{self.source.ids[index]} of {height}x{width} and {self.target.ids[partner]} of "
                f"{rows}x{columns} (height x width)",
                remedy="add --resize, which shows the target's images at the size of the source's; or use --method "
                "histogram, which takes any sizes",
            )
        return image, other

    def _settings(self) -> dict[str, Any]:
        """Everything that images depend on, beside the source's own, as JSON."""
        style = asdict(self.style)
        if self.style.method != "fda":
            del style["beta"]
        target = {"data": self.target.data, "split": self.target.split, "samples": self.target.digest()}
        classes = list(self.source.classes.names)
        return {"source": self.source.data, "like": target, "style": style, "classes": classes}

    def _check_settings(self, settings: dict[str, Any]) -> None:
        before = read_object(self.out / SETTINGS)
        changed = [name for name, value in settings.items() if before and before.get(name) != value]
        if changed:
            raise RecipeError(
                "a folder holds one restyling of one data set",
                received=f"{self.out}, which was written with another {' and '.join(changed)}: "
                + "; ".join(f"{name} {json.dumps(before.get(name))}" for name in changed),
                remedy="give another folder with --out, or remove that one",
            )
