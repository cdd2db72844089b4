"""Predictions for images that are in no data set: labels and overlays as PNGs."""

import glob
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kdcache.data import ClassList, Window, prefetch, render
from kdcache.data.classes import write_classes
from kdcache.data.files import IMAGE_SUFFIXES, read_image
from kdcache.errors import DataError, ModelError, RecipeError
from kdcache.files import replacing
from kdcache.metrics.evaluate import Progress
from kdcache.metrics.figures import Array, colour_ids, palette_png, png_bytes
from kdcache.models import SegmentationModel

LABELS, OVERLAYS = "labels", "overlays"
_WILD = frozenset("*?[")


@dataclass(frozen=True)
class Input:
    """An image, and the name of what is written for it: a path without suffix, below --out."""

    path: Path
    name: str


@dataclass(frozen=True)
class _Picture:
    input: Input
    whole: Array  # uint8 (H, W, 3), upright
    small: Array  # uint8 (H, W, 3), at the size that the model sees


def find_images(paths: Sequence[str]) -> list[Input]:
    """Images out of paths of files, folders and patterns such as `photos/*.jpg`.

    A folder stands for all images below it, which keep their places in it.

    Raises: DataError for a path that is nowhere, a folder or pattern without images, another kind of file, or two
        images whose results would have one name.
    """
    images: dict[str, Input] = {}
    for text in paths:
        for image in _matches(text):
            other = images.setdefault(image.name, image)
            if other.path.resolve() != image.path.resolve():
                raise DataError(
                    "images have names of their own, for their results are named after them",
                    received=f"{other.path} and {image.path}, both {image.name}.png",
                    remedy="give a folder that both are below, which keeps their places, or rename one",
                )
    return list(images.values())


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
    opacity: float = 0.5,
    threads: int = 2,
    progress: Progress | None = None,
) -> Array:
    """Write `labels/NAME.png` and `overlays/NAME.png`, of every image's own size, and `classes.txt`.

    Images are resized to `size` and logits upsampled, as in an evaluation. A label's pixels are the class ids; its
    palette shows their colours.

    Args:
        out: a folder that is not there yet, or empty.
        opacity: opacity of the classes' colours over the image, 0 to 1.
        progress: called with (images done, images).
    Returns: pixels per class, int64 (C,).
    Raises: RecipeError for such a folder or opacity, DataError for an image that cannot be read.
    """
    if not 0 <= opacity <= 1:
        raise RecipeError("--opacity is 0 to 1", received=f"{opacity:g}", remedy="for instance --opacity 0.5")
    out = Path(out)
    _prepare(out, classes)
    model = model.to(device).eval()
    counts = np.zeros(len(classes), np.int64)
    done = 0
    pictures = prefetch(
        lambda index: _load(images[index], size), range(len(images)), threads=threads, ahead=2 * batch_size
    )
    with ThreadPoolExecutor(max(1, threads)) as writers:
        while batch := list(islice(pictures, batch_size)):
            pixels = torch.from_numpy(np.stack([picture.small for picture in batch])).to(device)
            logits_BChw = model(model.normalise(pixels)).logits.float()
            if not bool(torch.isfinite(logits_BChw).all()):
                _refuse_logits(model, batch)
            ids = [
                argmax_at(model, logits_Chw, picture.whole.shape[:2]).cpu().numpy()
                for logits_Chw, picture in zip(logits_BChw, batch, strict=True)
            ]
            writing = [
                writers.submit(_write, out, picture, ids_HW, classes, opacity)
                for picture, ids_HW in zip(batch, ids, strict=True)
            ]
            for ids_HW, written in zip(ids, writing, strict=True):
                written.result()
                counts += np.bincount(ids_HW.reshape(-1), minlength=len(classes))
            done += len(batch)
            if progress is not None:
                progress(done, len(images))
    return counts


def argmax_at(model: SegmentationModel, logits_Chw: Tensor, size: tuple[int, int]) -> Tensor:
    """The class of every pixel, uint8 (H, W), of logits upsampled to `size`.

    Class by class: a photograph of 12 megapixels takes 0.1 GB, not 1 GB for 20 classes.
    """
    best_HW = model.upsample(logits_Chw[None, :1], size)[0, 0]
    argmax_HW = torch.zeros(best_HW.shape, dtype=torch.uint8, device=best_HW.device)
    for number in range(1, len(logits_Chw)):
        logit_HW = model.upsample(logits_Chw[None, number : number + 1], size)[0, 0]
        argmax_HW.masked_fill_(logit_HW > best_HW, number)
        best_HW = torch.maximum(best_HW, logit_HW)
    return argmax_HW


def overlay(pixels_HW3: Array, ids_HW: Array, classes: ClassList, opacity: float) -> Array:
    """The image under the colours of its classes, uint8 (H, W, 3)."""
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
                f"an image ends with one of {', '.join(IMAGE_SUFFIXES)}",
                received=text,
                remedy="convert it, or rename it when it is an image",
            )
        images = [Input(path, path.stem)]
    elif _WILD & set(text):
        inside = sorted(Path(p) for p in glob.glob(text, recursive=True))
        images = [Input(p, p.stem) for p in inside if p.is_file() and p.suffix.lower() in IMAGE_SUFFIXES]
    else:
        raise DataError("images are files, folders or patterns", received=f"{text} is nowhere", remedy="check the path")
    if not images:
        raise DataError(
            "a folder or pattern has images",
            received=f"none of {', '.join(IMAGE_SUFFIXES)} in {text}",
            remedy="check the path",
        )
    return images


def _prepare(out: Path, classes: ClassList) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RecipeError(
            "predictions are written into a new or empty folder",
            received=f"{out} " + ("holds something" if out.is_dir() else "is a file"),
            remedy="give another folder with --out",
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError("--out is a folder that can be made", received=f"{error}", remedy="give another") from error
    write_classes(out, classes)


def _refuse_logits(model: SegmentationModel, batch: Sequence[_Picture]) -> NoReturn:
    raise ModelError(
        "a model's logits are finite",
        received=f"NaN or infinite ones from {model.spec} in {', '.join(str(p.input.path) for p in batch[:4])}",
        remedy="use weights from before the training diverged",
    )


def _load(image: Input, size: tuple[int, int]) -> _Picture:
    whole_HW3 = read_image(image.path)
    small_HW3, _ = render(whole_HW3, None, Window.full(*whole_HW3.shape[:2]), flip=False, size=size)
    return _Picture(image, whole_HW3, small_HW3)


def _write(out: Path, picture: _Picture, ids_HW: Array, classes: ClassList, opacity: float) -> None:
    shown = Image.fromarray(overlay(picture.whole, ids_HW, classes, opacity))
    for folder, content in ((LABELS, palette_png(ids_HW, classes.colours)), (OVERLAYS, png_bytes(shown))):
        path = out / folder / f"{picture.input.name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            partial.write_bytes(content)
