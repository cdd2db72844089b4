"""The audit of stored features: how many channels say something, how strong they are, and their main directions.

Moments are summed over positions of the first view of at most 256 samples, in float64.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from kdcache.store import Cache, evenly_spread
from kdcache.teacher.audit.first_views import Progress, whole_records
from kdcache.teacher.build.render import Array

RECORDS = 256
_DEAD = 1e-6
"""Standard deviation, as a part of the largest one, below which a channel is the same everywhere."""


@dataclass(frozen=True, eq=False)
class FeatureAudit:
    """One tap.

    Attributes:
        records: those that were read.
        mean_norm: mean length of the vector at a position.
        constant: channels that hardly vary.
        effective: effective number of dimensions, (sum v)^2 / sum v^2 of the covariance's eigenvalues v.
        mean, directions: (c,) mean, and (3, c) the eigenvectors of the largest eigenvalues, for pictures.
        spread: (3,) standard deviations along them.
    """

    tap: str
    channels: int
    size: tuple[int, int]
    records: int
    mean_norm: float
    constant: int
    effective: float
    mean: Array
    directions: Array
    spread: Array

    def to_json(self) -> dict[str, Any]:
        """The figures, without the vectors."""
        return {name: value for name, value in asdict(self).items() if not isinstance(value, np.ndarray)}

    def picture(self, features_chw: Array) -> Array:
        """The three main directions of a record as red, green and blue: uint8 (h, w, 3); a mean is grey."""
        centred = features_chw.astype(np.float64) - self.mean[:, None, None]
        shares = np.tensordot(self.directions, centred, 1) / np.maximum(self.spread, 1e-12)[:, None, None]
        rgb = np.zeros((3, *centred.shape[1:]))
        rgb[: len(shares)] = shares
        picture: Array = np.clip(np.rint(127.5 + 127.5 * rgb / 2.5), 0, 255).astype(np.uint8)
        return picture.transpose(1, 2, 0)


def audit_features(cache: Cache, tap: str, progress: Progress | None = None) -> FeatureAudit:
    """Measure a tap.

    Args:
        progress: called with (records done, records).
    Raises: CorruptError as `Cache.read`.
    Memory: O(c^2).
    """
    declared = cache.manifest.features[tap]
    numbers = whole_records(cache)
    numbers = [numbers[place] for place in evenly_spread(len(numbers), RECORDS)]
    c, positions, norms = declared.channels, 0, 0.0
    total, products = np.zeros(c), np.zeros((c, c))
    for done, number in enumerate(numbers, 1):
        vectors = read_tap(cache, tap, number).reshape(c, -1).astype(np.float64)
        positions += vectors.shape[1]
        norms += float(np.linalg.norm(vectors, axis=0).sum())
        total += vectors.sum(1)
        products += vectors @ vectors.T
        if progress is not None:
            progress(done, len(numbers))
    mean = total / positions
    covariance = products / positions - np.outer(mean, mean)
    values, vectors = np.linalg.eigh(covariance)
    values = np.clip(values, 0, None)
    deviations = np.sqrt(np.clip(np.diag(covariance), 0, None))
    return FeatureAudit(
        tap=tap,
        channels=c,
        size=declared.size,
        records=len(numbers),
        mean_norm=norms / positions,
        constant=int((deviations <= _DEAD * max(deviations.max(), 1e-30)).sum()),
        effective=float(values.sum() ** 2 / max(float(np.square(values).sum()), 1e-300)),
        mean=mean,
        directions=vectors[:, ::-1][:, :3].T,
        spread=np.sqrt(values[::-1][:3]),
    )


def read_tap(cache: Cache, tap: str, record: int) -> Array:
    """Features of a record, float16 (c, h, w)."""
    return cache.read(record, [f"features/{tap}"])[f"features/{tap}"]
