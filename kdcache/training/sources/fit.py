"""How the images of a training are fitted into its pixels: one way for all of its streams."""

from collections.abc import Callable, Sequence

from kdcache.data import Fit, Split, choose_fit
from kdcache.data.rendering.fit import MOST_SQUASHED, squashed
from kdcache.errors import RecipeError
from kdcache.store import Cache
from kdcache.training.config import TrainConfig
from kdcache.training.streams import Stream


def shared_fit(
    config: TrainConfig,
    opened: Sequence[tuple[Stream[TrainConfig], Cache | None, Split | None]],
    size: tuple[int, int] | None,
    note: Callable[[str], None],
) -> Fit:
    """The fit of a training: that of its stores, else that of the settings, else by the shapes of its images.

    Args:
        opened: every stream with its store, or its data set.
        size: (H, W) of the pixels; None for the stores' views'.
        note: is called with the reason where images are padded by default.
    Raises: RecipeError where stores differ, where the settings differ, and for a size of another shape than padded
        or cropped views have.
    """
    stores = {cache.manifest.view.fit: cache for _, cache, _ in opened if cache is not None}
    if not stores and config.fit != "auto":
        return config.fit
    if not stores:
        return _by_shapes([split for _, _, split in opened if split is not None], size, note)
    (fit, cache), *others = stores.items()
    if others:
        raise RecipeError(
            "the images of all stores of a training are fitted into their views in one way",
            received=", ".join(f"{cache.place} ({fit})" for fit, cache in stores.items()),
            remedy=f"build the others again with --fit {fit}",
        )
    if config.fit not in ("auto", fit):
        raise RecipeError(
            "a training fits images as its store's views are, of which the targets are",
            received=f"--fit {config.fit} for {cache.place}, built with --fit {fit}",
            remedy=f"leave --fit out, or build a store with --fit {config.fit}",
        )
    if fit != "squash" and size is not None and squashed(cache.view_size, size) > MOST_SQUASHED:
        height, width = cache.view_size
        raise RecipeError(
            "pixels of a training have the shape of its store's views where these are cropped or padded",
            received=f"--size {size[0]}x{size[1]} for views of {height}x{width} with --fit {fit}",
            remedy=f"use --size {height}x{width}, or build a store of that shape",
        )
    return fit


def _by_shapes(splits: Sequence[Split], size: tuple[int, int] | None, note: Callable[[str], None]) -> Fit:
    """The fit of data sets for which none is named: padded where any of them has images of another shape."""
    for split in splits:
        if size is None:  # which is refused later, by the rule of its own
            break
        fit, reason = choose_fit(split, size)
        if reason is not None:
            note(reason)
            return fit
    return "squash"
