"""The table of the engines of builds and sweeps: this machine, or a Ray cluster."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

from annotated_types import Ge

from kdcache.errors import RecipeError
from kdcache.settings.parse import Count
from kdcache.settings.setting import Entry, entries, setting

_engine = partial(setting, panel="Several machines")


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """Settings for what runs a build or a sweep: this machine or a Ray cluster. Each field is a flag.

    All fields except `engine` need `--engine ray`.
    """

    engine: Literal["local", "ray"] = _engine("local", "local: this machine. ray: actors or jobs on a Ray cluster.")
    actors: Count | None = _engine(None, "Number of actors with --engine ray (default: as many as fit).", ranged=True)
    num_gpus: Annotated[float, Ge(0)] = _engine(
        0.0, "GPUs for each actor or job with --engine ray, e.g. 0.5.", ranged=True
    )
    address: str | None = _engine(
        None,
        "Address of a Ray cluster (default: RAY_ADDRESS, else one on this machine).",
    )

    @property
    def is_ray(self) -> bool:
        """True if Ray runs the work. Raises: RecipeError if settings for Ray are given without `--engine ray`."""
        table: dict[str, Entry] = entries(EngineSettings)
        mine = {entry.flag: getattr(self, name) for name, entry in table.items() if name != "engine"}
        if self.engine == "local" and any(mine.values()):
            raise RecipeError(
                f"Cannot use {', '.join(f'{flag} {value}' for flag, value in mine.items() if value)} without --engine "
                "ray",
                fix="Add --engine ray, or leave them out.",
            )
        return self.engine == "ray"
