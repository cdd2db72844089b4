"""The choices of a build, and its views."""

from dataclasses import dataclass, field, replace

import torch

from kdcache.data import Fit
from kdcache.errors import RecipeError
from kdcache.settings.building import BuildSettings
from kdcache.store.format.manifest_models import LEAST_ZOOM, MOST_SIDE, MOST_VIEWS, MOST_ZOOM, Drawn, View


@dataclass(frozen=True)
class BuildOptions(BuildSettings):
    """The options of a build: which views are rendered, and what is stored.

    >>> import kdcache
    >>> options = kdcache.BuildOptions(size=(48, 64), views=2)
    >>> options.size, options.views
    ((48, 64), 2)

    Attributes:
        size: (H, W) of the views in pixels. With `crop`, (H, W) to which the whole image is resized at zoom 1.
        fit: how images of another shape are fitted into `size`: `squash`, `crop` or `pad` with grey.
        heads: names of the teacher's heads to store. () stores all heads that were trained.
        features_only: store only features, without a head.
        top_k: number of classes to keep for each pixel. None measures how many are needed.
        raw_logits: also store every pixel's largest logit.
        features: names of the taps to store.
        feature_dtype: data type of stored features, `fp16` or `uint8`. Taps with fewer than 16 cells are always fp16.
        statistics: small maps to store, such as `at:TAP` or `similarity:TAP`.
        pixels: `stored` puts images and labels into the cache, `source` leaves them in the data set.
        codec: how arrays are compressed: `default`, `small` (smaller, rounds logits) or `none`.
        shard_records: number of records in a shard file.
        views: number of views per sample: the whole image, and views - 1 random crops. With `crop`, all are crops.
        crop: (H, W) of the views, which are cut out of the image after it is resized to zoom times `size`. None makes
            no such crops.
        view_seed: random seed of the crops.
        view_scale: range of the crops' zoom. A zoom below 1 surrounds the image with grey. None is (1.0, 2.0), or (1.0,
            1.0) with depth in metres.
        view_flip: whether half of the crops are mirrored.
        depth_zoom: what happens to metres of depth in a zoomed view: `divide`, or `keep`. `none` forbids zooming if
            there is depth in metres.
        teacher_size: (H, W) of the same views as rendered for the teacher. None is the views' own size.
        teacher_grid: `own` stores logits on the teacher's own grid. `view` averages probabilities onto the coarser grid
            that the teacher would have at the views' size.
        precision: floating-point precision of the teacher's forward pass: `float32`, `bf16` or `fp16`.
        batch_size: number of images per forward pass.
        render_threads: number of threads that decode and resize images.
        fidelity: whether to measure the error of the stored logits and features, for the manifest.
        device: the device of the teacher.
    """

    size: tuple[int, int]
    fit: Fit = "squash"
    fidelity: bool = True
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


ZOOM = (1.0, 2.0)
"""The default range of the zoom of drawn views."""


def with_zoom(options: BuildOptions, *, metres: bool) -> BuildOptions:
    """Return the options, with the default range of the zoom if `options.view_scale` is None.

    `metres` is True if the cache has depth in metres, as labels or as a head. The default is (1.0, 2.0), but (1.0, 1.0)
    if there are metres and `depth_zoom` is "none".

    Raises: RecipeError if there are metres, `depth_zoom` is "none", and the given `view_scale` makes views zoom. Also
        if there are no metres and `depth_zoom` is "divide" or "keep".
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
    """Return the manifest's entry that says how views are drawn and rendered.

    Raises: RecipeError for invalid sizes or numbers of views.
    """
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
