"""The choices of a build, and its views."""

from dataclasses import dataclass, field, replace

import torch

from kdcache.data import Fit
from kdcache.errors import RecipeError
from kdcache.settings.building import BuildSettings
from kdcache.store.format.manifest_models import LEAST_ZOOM, MOST_SIDE, MOST_VIEWS, MOST_ZOOM, Drawn, View


@dataclass(frozen=True)
class BuildOptions(BuildSettings):
    """Choices of a build: the build settings, completed for this machine.

    >>> import kdcache
    >>> options = kdcache.BuildOptions(size=(48, 64), views=2)
    >>> options.size, options.views
    ((48, 64), 2)

    Attributes:
        size: (H, W) of the views, or with `crop` of the whole image at zoom 1.
        fit: how images of another shape are fitted into it.
        heads: the teacher's heads to store. () is all that it has learnt.
        features_only: store only features, no head.
        top_k: number of classes to keep. None measures how many are needed.
        feature_dtype: dtype of stored features. Summaries and maps under 16 cells are always float16.
        statistics: `at:TAP`, `similarity:TAP`. raw_logits: keep every pixel's largest logit.
        views: how many of each sample: the whole image, and views - 1 drawn ones. With `crop` all are drawn.
        crop: (H, W) of the views, cut out of the image at zoom times `size`.
        view_scale: range of the zoom of drawn views. Below 1 shows the image amid grey. None is `ZOOM`, and 1 with
            depth in metres. view_flip: mirror half of them.
        depth_zoom: effect of a zoom on depth labels.
        teacher_size: (H, W) of the same windows for the teacher. Default: the views'.
        teacher_grid: `own` keeps the grid of the teacher's logits. `view` averages probabilities to the grid that the
            views themselves, without augmentation, would have.
        fidelity: measure what storing loses, for the manifest only.
        device: the teacher's device.
    """

    size: tuple[int, int]
    fit: Fit = "squash"
    fidelity: bool = True
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


ZOOM = (1.0, 2.0)
"""The range of the zoom of drawn views, where nothing else is said."""


def with_zoom(options: BuildOptions, *, metres: bool) -> BuildOptions:
    """Return the options with the zoom of the views filled in.

    `metres` says whether the cache has depth in metres, labels or a head, which a zoom contradicts.

    Raises: RecipeError for zoomed views without a rule for metres, and for `depth_zoom` without metres.
    """
    if options.depth_zoom != "none" and not metres:
        raise RecipeError(
            f"Cannot use --depth-zoom {options.depth_zoom}: there are no labels of depth and no stored head in metres",
            fix="Leave it out.",
        )
    still = metres and options.depth_zoom == "none"
    scale = options.view_scale or ((1.0, 1.0) if still else ZOOM)
    drawn = options.views > 1 or options.crop is not None
    if still and drawn and tuple(scale) != (1.0, 1.0):
        raise RecipeError(
            f"Cannot zoom with --view-scale {scale[0]:g}:{scale[1]:g}: the cache has depth in metres",
            fix="Leave --view-scale out, or say what becomes of the metres: --depth-zoom divide, or keep",
            rule="A zoomed view looks nearer than it is.",
        )
    return replace(options, view_scale=scale)


def view_of(options: BuildOptions) -> View:
    """Return how views are drawn and rendered. Raises RecipeError."""
    low, high = options.view_scale or ZOOM
    if not 1 <= options.views <= MOST_VIEWS or options.view_seed < 0 or not LEAST_ZOOM <= low <= high <= MOST_ZOOM:
        raise RecipeError(
            f"Invalid views: --views {options.views} --view-scale {low:g}:{high:g} --view-seed {options.view_seed}",
            fix=f"Use 1 to {MOST_VIEWS} views and a range from {LEAST_ZOOM:g} to {MOST_ZOOM}, for example --views 4 "
            "--view-scale 1:2",
        )
    crop = options.crop
    for size in (options.size, crop, options.teacher_size):
        if size is not None and not 1 <= min(size) <= max(size) <= MOST_SIDE:
            raise RecipeError(
                f"Cannot use images of {size[0]}x{size[1]}: a side has 1 to {MOST_SIDE} pixels",
                fix="Give another size.",
            )
    if crop is not None and any(c > high * side for c, side in zip(crop, options.size, strict=True)):
        raise RecipeError(
            f"Crops of {crop[0]}x{crop[1]} do not fit into images of {options.size[0]}x{options.size[1]} times "
            f"{high:g}",
            fix="Give a smaller --crop, or a larger --size or --view-scale",
        )
    drawn = Drawn(seed=options.view_seed, scale=(low, high), flip=options.view_flip)
    return View(
        kind="full" if crop is None else "crop",
        size=options.size if crop is None else crop,
        image_size=None if crop is None else options.size,
        teacher_size=options.teacher_size,
        views_per_sample=options.views,
        drawn=drawn if options.views > 1 or crop is not None else None,
        pixels=options.pixels,
        fit=options.fit,
    )
