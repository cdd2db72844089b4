"""Predictions for images outside any data set: labels, overlays and depth as files."""

import glob
import io
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import ClassVar, NoReturn

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kdcache.data import ClassList, Window, prefetch, render
from kdcache.data.classes import write_classes
from kdcache.data.files import IMAGE_SUFFIXES, read_image
from kdcache.data.layouts.depth import DEPTH_FILE
from kdcache.errors import DataError, ModelError, RecipeError
from kdcache.files import replacing, write_whole
from kdcache.heads import RegressionHead
from kdcache.metrics.depth_figures import DepthMap, bar_end
from kdcache.metrics.evaluate import Progress
from kdcache.metrics.figures import Array, colour_ids, palette_png, png_bytes
from kdcache.metrics.predictions import answer_of
from kdcache.metrics.sliding import Framing, at_image, slide
from kdcache.models import SegmentationModel
from kdcache.tasks import DEPTH, METRES, SEGMENTATION

LABELS, OVERLAYS = "labels", "overlays"
OPACITY = 0.5
"""Opacity of the colours of classes over an image."""
DEPTHS, DEPTH_COLOURS = "depth", "depth_colours"
DEPTH_FORMATS = ("png", "npy")
_LARGEST = 2**16 - 1
_WILD = frozenset("*?[")


@dataclass(frozen=True)
class Input:
    """An image file, and the name of its result files: a path below the output folder, without suffix."""

    path: Path
    name: str


@dataclass(frozen=True)
class _Picture:
    input: Input
    whole: Array  # uint8 (H, W, 3), upright
    small: Array  # uint8 (H, W, 3), at the size that the model sees, or that it is cut into windows at
    view: Window  # what that shows, in pixels of the image

    @property
    def size(self) -> tuple[int, int]:
        return self.whole.shape[0], self.whole.shape[1]


def find_images(paths: Sequence[str]) -> list[Input]:
    """Return the images that paths name: files, folders with all images below them, or patterns like `photos/*.jpg`.

    An image's result is named after its file. For an image of a folder, the name also has its subfolders. An image that
    is named twice is returned once.

    Raises: DataError for a missing path, a folder or pattern without images, or a file that is not an image. It is also
        raised if the results of two images would have the same name.
    """
    images: dict[str, Input] = {}
    if not paths:
        raise DataError("Nothing to predict: no image was given", fix="Give files, folders or patterns.")
    for text in paths:
        for image in _matches(text):
            earlier = images.setdefault(image.name, image)
            if earlier.path.resolve() != image.path.resolve():
                raise DataError(
                    f"Cannot name two results {image.name}.png: {earlier.path} and {image.path}",
                    fix="Give a folder that holds both, which keeps their places, or rename one.",
                )
    return list(images.values())


@dataclass(frozen=True)
class PredictOptions:
    """The format of predicted depth.

    Attributes:
        depth_format: "png" (16 bits, in the unit that `depth.toml` names) or "npy" (float32).
    Raises: RecipeError for another format.
    """

    depth_format: str = "png"

    def __post_init__(self) -> None:
        if self.depth_format not in DEPTH_FORMATS:
            raise RecipeError(
                f"Invalid value of --depth-format: {self.depth_format!r}",
                fix=f"Choose one of: {', '.join(DEPTH_FORMATS)}",
            )


@torch.inference_mode()
def predict_images(
    model: SegmentationModel,
    classes: ClassList,
    images: Sequence[Input],
    out: str | Path,
    size: tuple[int, int],
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 4,
    options: PredictOptions | None = None,
    framing: Framing | None = None,
    threads: int = 2,
    progress: Progress | None = None,
) -> Array:
    """Write a model's predictions for images, each at the image's own size. Return pixels per class, int64 (C,).

    Segmentation gives `labels/NAME.png`, `overlays/NAME.png` and `classes.txt`. Depth gives `depth/NAME.png` (or
    `.npy`), `depth_colours/NAME.png` with a bar in metres and, for PNGs, `depth.toml`. With the same images in a folder
    `images` next to them, these form a data folder. A label's pixels are class ids, and its palette shows their
    colours.

    Args:
        model: the model. It moves to `device`.
        classes: names and colours of its classes.
        images: the images and the names of their results.
        out: a new or empty folder.
        size: (H, W) of the model's input, in pixels.
        device: such as "cpu" or "cuda".
        batch_size: images per forward pass.
        options: the format of depth. None takes the default.
        framing: how an image is fitted to `size`, or cut into windows. None squashes the image to `size`.
        threads: threads that read and write files.
        progress: called with (images done, images in total).
    Raises: RecipeError for a folder with content, or depth that a PNG cannot hold. DataError for an unreadable image.
    ModelError if no head has learnt, or if outputs are NaN or infinite.
    """
    out, options, framing = Path(out), options or PredictOptions(), framing or Framing()
    if not model.learnt_heads:
        raise ModelError(
            f"Cannot predict with {model.spec}: it has features only, and none of its heads has learnt",
            fix="Train the task from it first, with train-student --init RUN. For its features, export it.",
        )
    files = {task: FILES[task](model, classes, options) for task in FILES if task in model.learnt_heads}
    _prepare(out, list(files.values()))
    model = model.to(device).eval()
    counts = np.zeros(len(classes), np.int64)
    done = 0
    pictures = prefetch(
        lambda index: _load(images[index], size, framing), range(len(images)), threads=threads, ahead=2 * batch_size
    )
    with ThreadPoolExecutor(max(1, threads)) as writers:
        while batch := list(islice(pictures, batch_size)):
            outputs = _outputs(model, batch, size, framing, device, batch_size)
            if not all(bool(torch.isfinite(head).all()) for heads in outputs for head in heads.values()):
                _refuse_outputs(model, batch)
            answers = [
                {
                    task: files_of.answer(model, heads[task], picture, size).cpu().numpy()
                    for task, files_of in files.items()
                    if task in heads
                }
                for heads, picture in zip(outputs, batch, strict=True)
            ]
            writing = [
                writers.submit(_write, out, files, picture, answer)
                for picture, answer in zip(batch, answers, strict=True)
            ]
            for answer, written in zip(answers, writing, strict=True):
                written.result()
                if SEGMENTATION in answer:
                    counts += np.bincount(answer[SEGMENTATION].reshape(-1), minlength=len(classes))
            done += len(batch)
            if progress is not None:
                progress(done, len(images))
    return counts


def units_per_metre(head: RegressionHead) -> int:
    """Return the units per metre of a 16-bit depth PNG: 1000 if the head's largest depth fits, else 256 as in KITTI.

    Raises: RecipeError if the depth is not in metres, has no limit, or does not fit with 256 either.
    """
    fitting = [units for units in (1000, 256) if head.max_depth is not None and head.max_depth * units <= _LARGEST]
    if head.unit != METRES or not fitting:
        raise RecipeError(
            f"Cannot write depth in {head.unit}, at most {head.max_depth}, as PNG: 16 bits hold {_LARGEST / 256:.0f} m",
            fix="Use --depth-format npy",
        )
    return fitting[0]


def _outputs(
    model: SegmentationModel,
    batch: Sequence[_Picture],
    size: tuple[int, int],
    framing: Framing,
    device: torch.device | str,
    batch_size: int,
) -> list[dict[str, Tensor]]:
    """Return the outputs of the heads that have learnt, (C, h, w) float32 by name, of each image."""
    names = tuple(model.learnt_heads)
    if framing.slides:
        whole = [torch.from_numpy(picture.small).to(device) for picture in batch]
        return [
            slide(model, pixels, framing, size, names, batch_size=batch_size, name=str(picture.input.path))
            for pixels, picture in zip(whole, batch, strict=True)
        ]
    pixels = torch.from_numpy(np.stack([picture.small for picture in batch])).to(device)
    heads = model(model.normalise(pixels)).heads
    return [{name: heads[name][place].float() for name in names} for place in range(len(batch))]


def argmax_at(
    model: SegmentationModel,
    logits_Chw: Tensor,
    size: tuple[int, int],
    view: Window | None = None,
    seen: tuple[int, int] | None = None,
) -> Tensor:
    """Return the class of every pixel, uint8 (H, W), from logits upsampled to `size`.

    Classes are upsampled one by one: a photograph of 12 megapixels takes 0.1 GB instead of 1 GB for 20 classes.

    Args:
        model: the model, which says how its head resizes.
        logits_Chw: its logits for one image.
        size: (H, W) of the result.
        view: the part of the image that the model saw, in pixels of the image. None is the whole image. Pixels outside
            it get the class at its edge.
        seen: (H, W) of the model's input. Needed with `view`.
    """
    best_HW = at_image(model, logits_Chw[:1], size, view, seen)[0]
    argmax_HW = torch.zeros(best_HW.shape, dtype=torch.uint8, device=best_HW.device)
    for number in range(1, len(logits_Chw)):
        logit_HW = at_image(model, logits_Chw[number : number + 1], size, view, seen)[0]
        argmax_HW.masked_fill_(logit_HW > best_HW, number)
        best_HW = torch.maximum(best_HW, logit_HW)
    return argmax_HW


def overlay(pixels_HW3: Array, ids_HW: Array, classes: ClassList, opacity: float) -> Array:
    """Blend the colours of classes over an image. Return uint8 (H, W, 3).

    Args:
        pixels_HW3: the image, uint8 (H, W, 3).
        ids_HW: class ids, uint8 (H, W). Ids without a class, such as void, are light grey.
        classes: the colours of the classes.
        opacity: from 0 (image only) to 1 (classes only).
    """
    colours_HW3 = colour_ids(ids_HW, classes.colours).astype(np.float32)
    mixed = (1 - opacity) * pixels_HW3.astype(np.float32) + opacity * colours_HW3
    return np.clip(np.rint(mixed), 0, 255).astype(np.uint8)


def _matches(text: str) -> list[Input]:
    path = Path(text)
    if path.is_dir():
        inside = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix.lower() in IMAGE_SUFFIXES)
        images = [Input(p, p.relative_to(path).with_suffix("").as_posix()) for p in inside]
    elif path.is_file():
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            raise DataError(
                f"Not an image by its suffix: {text}",
                fix=f"Convert it, or rename it if it is an image, to one of: {', '.join(IMAGE_SUFFIXES)}",
            )
        images = [Input(path, path.stem)]
    elif _WILD & set(text):
        inside = sorted(Path(p) for p in glob.glob(text, recursive=True))
        images = [Input(p, p.stem) for p in inside if p.is_file() and p.suffix.lower() in IMAGE_SUFFIXES]
    else:
        raise DataError(f"Image not found: {text}", fix="Check the path, or give a folder or a pattern of images.")
    if not images:
        raise DataError(f"No images ({', '.join(IMAGE_SUFFIXES)}) in {text}", fix="Check the path.")
    return images


def _prepare(out: Path, files: Sequence["_Files"]) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RecipeError(
            f"Cannot write predictions here: {out} {'holds something' if out.is_dir() else 'is a file'}",
            fix="Give another folder with --out",
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(f"Cannot create the folder of --out: {error}", fix="Give another --out") from error
    for own in files:
        own.describe(out)


def _refuse_outputs(model: SegmentationModel, batch: Sequence[_Picture]) -> NoReturn:
    raise ModelError(
        f"NaN or infinite outputs of {model.spec} for {', '.join(str(p.input.path) for p in batch[:4])}",
        fix="Use weights from before the training diverged.",
    )


def _load(image: Input, size: tuple[int, int], framing: Framing) -> _Picture:
    whole_HW3 = read_image(image.path)
    image_size = whole_HW3.shape[0], whole_HW3.shape[1]
    view = Window.full(*image_size) if framing.slides else framing.view(image_size, size)
    used = framing.scaled(image_size, size) if framing.slides else size
    small_HW3, _ = render(whole_HW3, None, view, flip=False, size=used)
    return _Picture(image, whole_HW3, small_HW3, view)


class _Files(ABC):
    """The files of a task's answers below a folder.

    Attributes:
        folders: where they are.
        formatted: whether `PredictOptions.depth_format` sets their format.
    """

    folders: ClassVar[tuple[str, ...]]
    formatted: ClassVar[bool] = False

    def __init__(self, model: SegmentationModel, classes: ClassList, options: PredictOptions) -> None:
        self.classes = classes

    @abstractmethod
    def answer(self, model: SegmentationModel, output_Chw: Tensor, picture: _Picture, seen: tuple[int, int]) -> Tensor:
        """Return the answer (H, W) at the image's size, from a head's output."""

    @abstractmethod
    def describe(self, out: Path) -> None:
        """Write what a reader of the files must know."""

    @abstractmethod
    def of(self, picture: _Picture, answer_HW: Array) -> Iterator[tuple[str, str, bytes]]:
        """Yield folder, suffix and content of each file of an image."""


class _ClassFiles(_Files):
    folders = (LABELS, OVERLAYS)

    def answer(self, model: SegmentationModel, output_Chw: Tensor, picture: _Picture, seen: tuple[int, int]) -> Tensor:
        return argmax_at(model, output_Chw, picture.size, picture.view, seen)

    def describe(self, out: Path) -> None:
        write_classes(out, self.classes)

    def of(self, picture: _Picture, answer_HW: Array) -> Iterator[tuple[str, str, bytes]]:
        yield LABELS, "png", palette_png(answer_HW, self.classes.colours)
        shown = overlay(picture.whole, answer_HW, self.classes, OPACITY)
        yield OVERLAYS, "png", png_bytes(Image.fromarray(shown))


class _DepthFiles(_Files):
    folders = (DEPTHS, DEPTH_COLOURS)
    formatted = True

    def __init__(self, model: SegmentationModel, classes: ClassList, options: PredictOptions) -> None:
        head, self.suffix = model.regressions[DEPTH], options.depth_format
        self.unit, self.units = head.unit, units_per_metre(head) if self.suffix == "png" else None

    def answer(self, model: SegmentationModel, output_Chw: Tensor, picture: _Picture, seen: tuple[int, int]) -> Tensor:
        return answer_of(model, DEPTH, output_Chw, picture.size, picture.view, seen)

    def describe(self, out: Path) -> None:
        if self.units is not None:
            write_whole(out / DEPTH_FILE, f"units_per_metre = {self.units}\n")

    def of(self, picture: _Picture, answer_HW: Array) -> Iterator[tuple[str, str, bytes]]:
        yield DEPTHS, self.suffix, _npy(answer_HW) if self.units is None else _png(answer_HW, self.units)
        coloured = DepthMap(answer_HW, bar_end([answer_HW]), unit=self.unit).picture()
        yield DEPTH_COLOURS, "png", png_bytes(coloured)


FILES: Mapping[str, type[_Files]] = {SEGMENTATION: _ClassFiles, DEPTH: _DepthFiles}
"""What is written of each task, in the order of `TASKS`."""


def _write(out: Path, files: Mapping[str, _Files], picture: _Picture, answers: Mapping[str, Array]) -> None:
    """Write the files of one image, each whole or not at all."""
    for task, answer_HW in answers.items():
        for folder, suffix, content in files[task].of(picture, answer_HW):
            path = out / folder / f"{picture.input.name}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as partial:
                partial.write_bytes(content)


def _png(depth_HW: Array, units: int) -> bytes:
    """Return a 16-bit PNG. 0 would mean unknown, so the least value is 1."""
    return png_bytes(Image.fromarray(np.clip(np.rint(depth_HW * units), 1, _LARGEST).astype(np.uint16)))


def _npy(depth_HW: Array) -> bytes:
    file = io.BytesIO()
    np.save(file, depth_HW.astype(np.float32), allow_pickle=False)
    return file.getvalue()
