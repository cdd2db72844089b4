"""Settings and results of the benchmark: tables, JSON."""

from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import torch

from kdcache.bench.loader.readers import READERS
from kdcache.bench.loader.streams import CPU, LOADERS
from kdcache.bench.loader.turns import Pace

MEMORY = "memory"
"""The contestant that steps on a batch from memory."""


@dataclass(frozen=True)
class Settings:
    """The choice of measurements.

    Attributes:
        against: names of READERS and LOADERS.
        records: records that a reader reads per turn, and about as many samples that a loader loads.
        workers: processes of the DataLoader. threads: threads of the ring.
        repeats: turns of each.
        augments: augmentations of the loaders, each measured on its own.
        steps: training steps per contestant, over all turns; 0 for none.
    """

    against: tuple[str, ...] = (*READERS, *LOADERS)
    records: int = 256
    batch_size: int = 16
    workers: int = 2
    threads: int = 2
    repeats: int = 7
    augments: tuple[str, ...] = ("none",)
    student: str = "kdcache:tiny"
    steps: int = 70
    device: torch.device = CPU


@dataclass(frozen=True)
class Measured:
    """One contestant; what could not be measured is None.

    Attributes:
        pace: per sample; in a table of steps per step.
        peak_mib: loaders: growth of the peak resident set, with the workers' share.
        problem: why there are no figures.
    """

    name: str
    title: str
    pace: Pace | None = None
    peak_mib: float | None = None
    problem: str = ""


@dataclass(frozen=True)
class Table:
    """Contestants that took turns.

    Attributes:
        kind: readers, loaders or steps.
        against: contestants that the others are compared with.
        augment: augmentation of the samples.
    """

    kind: str
    against: tuple[str, ...]
    rows: tuple[Measured, ...]
    augment: str = "none"

    def ratios(self, row: Measured) -> dict[str, float | None]:
        """Speed-ups over each of `against` by the median times; of steps, slow-downs. None for unknown ones."""
        ratios: dict[str, float | None] = dict.fromkeys(self.against)
        for other in self.rows:
            if other.name in ratios and other.pace is not None and row.pace is not None:
                faster = other.pace.time.p50 / row.pace.time.p50
                ratios[other.name] = 1 / faster if self.kind == "steps" else faster
        return ratios

    def to_json(self) -> dict[str, Any]:
        """Plain numbers: milliseconds per sample (per step), MiB."""
        rows = []
        for row in self.rows:
            plain = {key: value for key, value in asdict(row).items() if value not in (None, "")}
            if row.pace is not None:
                plain |= {"per_second": row.pace.per_second, "cpu_us": row.pace.cpu_us, "ratio": self.ratios(row)}
            rows.append(plain)
        return {"kind": self.kind, "augment": self.augment, "rows": rows}


@dataclass(frozen=True)
class Report:
    """A whole run.

    Attributes:
        store: what was read: arrays, decoded bytes per record, records.
    """

    store: dict[str, Any]
    settings: Settings
    tables: tuple[Table, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        settings = {**asdict(self.settings), "device": str(self.settings.device)}
        tables = [table.to_json() for table in self.tables]
        return {"store": self.store, "settings": settings, "libraries": _versions(), "tables": tables}


def _versions() -> dict[str, str]:
    """Versions of the libraries that readers compete with, where they are installed."""
    installed = {name: list(metadata.distributions(name=name)) for name in ("tensorstore", "zarr", "zarrs")}
    return {name: distributions[0].version for name, distributions in installed.items() if distributions}
