"""`kdcache.predict`: classes and depth of images outside any data set."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge

from kdcache.analysis.predict import FILES, PredictOptions, find_images, predict_images
from kdcache.data import ClassList
from kdcache.errors import RecipeError
from kdcache.metrics import Framing
from kdcache.progress import progress_bar, progress_of
from kdcache.run_folder import Run
from kdcache.settings.parse import Count
from kdcache.settings.shared import ImageSettings, JudgeSettings, MachineSettings
from kdcache.settings.validate import read
from kdcache.tasks import SEGMENTATION
from kdcache.verbs.open_model import open_model
from kdcache.verbs.places import use_machine


@dataclass(frozen=True)
class Predicted:
    """The result of `kdcache.predict`.

    Attributes:
        images: number of images.
        pixels: class name -> number of pixels, the most frequent class first. Empty without a segmentation head.
        folders: paths of the folders that were written.
    """

    images: int
    pixels: dict[str, int]
    folders: tuple[Path, ...]


def predict(
    model: str | Path | Run,
    images: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    depth_format: str | None = None,
    weights: str = JudgeSettings.weights,
    size: Any = None,
    fit: str = ImageSettings.fit,
    window: Any = None,
    stride: Any = None,
    classes: str | Path | None = None,
    batch_size: Count = 4,
    threads: Annotated[int, Ge(0)] = MachineSettings.threads,
    device: str = MachineSettings.device,
    progress: bool = True,
) -> Predicted:
    """Write a model's predictions for images without labels, as `kdcache predict` does.

    >>> import kdcache
    >>> predicted = kdcache.predict("runs/student", "streets/images/val", "predicted", progress=False)
    >>> predicted.images
    4

    Args:
        model: a run, or SPEC@FILE.
        images: image files, folders (with their subfolders) or patterns such as "photos/*.jpg".
        out: a new or empty folder, for the subfolders labels, overlays and depth.
        depth_format: "png" (16 bits, with its unit in depth.toml) or "npy" (float32). Default: "png".
        weights: which weights of a run: "best", "last", "best-ema" or "last-ema".
        size: (H, W) to which images are resized, or a text such as "288x384". Default: the run's size, or with `window`
            each image's own size.
        fit: how images of another shape are fitted into `size`: "squash", "crop", "pad", or "auto" for the model's own
            way.
        window: (H, W) of a window that slides over the image, whose logits are averaged. None predicts the image at
            once.
        stride: (H, W) from one window to the next. Default: two thirds of `window`.
        classes: folder with a classes.txt, which names the classes of SPEC@FILE. None takes the names that the file
            records, else "class 0" and so on. A run has its own names.
        batch_size: number of images per forward pass.
        threads: number of CPU threads. 0 keeps torch's own choice.
        device: "auto", "cpu" or "cuda".
        progress: show a progress bar, or lines without a terminal.
    Raises: KDCacheError, the base class of all errors of kdcache.
    """
    values = {"fit": fit, "window": window, "stride": stride, "size": size}
    framed = read(ImageSettings, values), read(JudgeSettings, values)
    Framing.of(*framed)  # what is wrong is refused before the model is read
    where = use_machine(threads, device)
    options = PredictOptions(depth_format or "png")
    inputs = find_images([str(images)] if isinstance(images, str | Path) else [str(image) for image in images])
    opened, description = open_model(model, size, weights, classes, window)
    heads = opened.learnt_heads
    if depth_format is not None and not any(FILES[task].formatted for task in FILES if task in heads):
        raise RecipeError(
            f"Cannot use --depth-format: {model} has no depth head, only {', '.join(heads)}",
            fix="Leave it out, or give a model that predicts depth, such as one trained as MODEL+depth.",
        )
    named = ClassList(description.class_names, description.class_colours)
    with progress_bar(progress) as bar:
        pixels_C = predict_images(
            opened,
            named,
            inputs,
            out,
            description.size,
            device=where,
            batch_size=batch_size,
            options=options,
            framing=Framing.of(*framed, description.fit),
            progress=progress_of(bar, "predicting"),
        )
    order = sorted(range(len(named)), key=lambda number: -pixels_C[number])
    pixels = {named.names[number]: int(pixels_C[number]) for number in order} if SEGMENTATION in heads else {}
    folders = [folder for task, files in FILES.items() if task in heads for folder in files.folders]
    return Predicted(len(inputs), pixels, tuple(Path(out) / folder for folder in folders))
