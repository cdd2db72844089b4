"""Removed names of earlier versions and their replacements. A removed name fails with its replacement."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kdcache.errors import RecipeError


@dataclass(frozen=True)
class Removed:
    """A flag, verb or value of an earlier version that no longer exists.

    Attributes:
        fix: what the user can do instead, in the imperative.
        unused: the value, or a tuple of values, of a removed setting that an old recipe.toml may still have, because it
            has no effect. None allows no value.
    """

    fix: str
    unused: Any = None


VERBS: Mapping[str, Removed] = {
    "visualise": Removed("Use kdcache report RUN ... --draw DIR."),
    "extend": Removed("Use kdcache build-teacher-cache --from OLD --data DATA --teacher TEACHER --out NEW."),
    "self-train": Removed("Use kdcache sweep self-train --data source=DATA --data target=DATA --out DIR."),
    "data restyle": Removed("In a clone of kdcache, use python examples/restyle.py DATA --like DATA --out DIR."),
    "evaluate of pseudo labels": Removed("Use kdcache inspect CACHE --teacher-report. It judges them over thresholds."),
    "bench-loader": Removed("In a clone of kdcache, use python benchmarks/loader.py --cache CACHE."),
    "kernels": Removed("In a clone of kdcache, use python benchmarks/precompile.py --arch ARCH --out ARCHIVE."),
}
"""Removed verbs: the words after `kdcache` -> the replacement."""

_PLAIN_PYTORCH = "Use --case dist: dist alone has its own kernel. To time dkd or cwd, use train-student --method dkd."
FLAGS: Mapping[str, Removed] = {
    "bench-kernels --layout": Removed("Leave it out. The logits are contiguous (nchw)."),
    "bench-kernels --temperature": Removed("Leave it out. The temperature is 2. --check takes 0.05 to 100."),
    "bench-kernels --top-k": Removed("Leave it out. Targets keep all classes up to 32, else 8, as caches do."),
    "bench-kernels --impl": Removed(
        "Leave it out. --device chooses it. In Python, use kdcache.bench.kernels.Settings(impl=...)."
    ),
    "bench-kernels --shapes memory": Removed("Use --shapes 4x21x512x512/4."),
    "bench-kernels --case mix": Removed("Use --case trained. A pasted target is a second call of the loss."),
    **{f"bench-kernels --case {name}": Removed(_PLAIN_PYTORCH) for name in ("dkd", "cwd", "dkd-warp", "cwd-warp")},
}
"""Flags, or values of flags, that one verb no longer has and other verbs may have."""

SETTINGS: Mapping[str, Removed] = {
    "download": Removed("Fetch VOC with torchvision: torchvision.datasets.VOCSegmentation(DIR, download=True)."),
    "ids": Removed("Use --samples N. In Python, kdcache.store.CopyChanges(samples=[...]) takes numbers of samples."),
    "pictures": Removed("Use --draw DIR, which draws the pictures and names them on the page."),
    "momentum": Removed("Leave it out. sgd has a momentum of 0.9.", unused=0.9),
    "power": Removed("Leave it out. poly has an exponent of 0.9.", unused=0.9),
    "ignore": Removed("Leave it out. Compare only the runs that belong into one table."),
    "worst": Removed("Leave it out. The report has the 10 images where the teacher loses most."),
    "opacity": Removed("Leave it out. Overlays have an opacity of 0.5."),
    "collapse": Removed("Leave it out. A training notes a teacher that knows few classes.", unused=("note", "refuse")),
}
"""Flags that no verb has any more, and their keywords and keys of recipes. Names have underscores."""

KEYS: Mapping[str, Removed] = {
    "rounds": Removed(
        "Write each round as a cache and an arm, as the recipe self-train does. Write audit = true into [store]."
    ),
}
"""Removed keys of a sweep's recipe that are not flags."""

TEACHERS: Mapping[str, Removed] = {
    "--teacher HEAD=TEACHER": Removed(
        "Build a cache of each teacher: --teacher A --out a.zarr, then --like a.zarr --teacher B --out b.zarr. Train "
        "from both: train-student --cache a.zarr --cache NAME=b.zarr."
    ),
}
"""Removed forms of --teacher."""

STATISTICS: Mapping[str, Removed] = {
    "confidence": Removed("Leave it out. Gates and terms compute it from the stored logits, as --gate confidence:0.7."),
    "entropy": Removed("Leave it out. Compute it from the stored logits."),
    "agreement": Removed("Leave it out. Build one cache for each teacher and compare their logits."),
}
"""Removed values of --statistics."""


def removal(name: str, *tables: Mapping[str, Removed]) -> RecipeError | None:
    """Return the error for a removed name, which says what replaces it, or None for any other name.

    Args:
        name: a flag such as `--opacity`, or another key of the tables, such as `evaluate of pseudo labels`.
        tables: the tables of this module to search: removed name -> replacement.
    """
    key = name.removeprefix("--").replace("-", "_")
    for table in tables:
        row = table.get(name) or table.get(key)
        if row is not None:
            return RecipeError(f"{name} was removed", fix=row.fix)
    return None


def without_removed(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe of an earlier version without settings that no longer exist, if their values have no effect.

    Removed settings with other values stay in it. `Removed.unused` has the values without effect.
    """
    return {k: v for k, v in recipe.items() if k not in SETTINGS or not _is_unused(v, SETTINGS[k].unused)}


def _is_unused(value: Any, unused: Any) -> bool:
    return value is None or value in (unused if isinstance(unused, tuple) else (unused,))
