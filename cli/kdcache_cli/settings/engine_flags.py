"""Flags of a build on several machines: its engine, and the actors of that."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from kdcache.errors import RecipeError

if TYPE_CHECKING:
    from kdcache.teacher.build.ray_engine import RayEngine

_PANEL = "Several machines"
Engine = Annotated[
    Literal["local", "ray"],
    typer.Option(
        "--engine",
        rich_help_panel=_PANEL,
        help="local: this process, beside others like it. ray: actors of a Ray cluster, which this process leads.",
    ),
]
Actors = Annotated[
    int | None,
    typer.Option(
        "--actors", min=1, rich_help_panel=_PANEL, help="Actors of --engine ray (default: as many as have room)."
    ),
]
NumGpus = Annotated[
    float, typer.Option("--num-gpus", min=0, rich_help_panel=_PANEL, help="GPUs of each actor, also a part of one.")
]
Address = Annotated[
    str | None,
    typer.Option(
        "--address",
        rich_help_panel=_PANEL,
        help="Address of a running Ray cluster (default: RAY_ADDRESS, or a cluster of this machine alone).",
    ),
]
SweepEngine = Annotated[
    Literal["local", "ray"],
    typer.Option(
        "--engine",
        rich_help_panel=_PANEL,
        help="local: processes of this machine. ray: --parallel jobs at a time on a Ray cluster.",
    ),
]
JobGpus = Annotated[
    float, typer.Option("--num-gpus", min=0, rich_help_panel=_PANEL, help="GPUs of each job, also a part of one.")
]
ORDER = ("engine", "actors", "num_gpus", "address")


def engine_of(
    engine: str, parts: Callable[[], Any], actors: int | None, num_gpus: float, address: str | None, worker: str | None
) -> "RayEngine | None":
    """The engine that the flags name, None for this process alone.

    Raises: RecipeError for flags of another engine.
    """
    if engine == "local":
        check_local({"--actors": actors, "--num-gpus": num_gpus, "--address": address})
        return None
    if worker is not None:
        raise RecipeError(
            "--engine ray hands out shards itself",
            received=f"--worker {worker}",
            remedy="leave it out; --actors says how many work",
        )
    from kdcache.teacher.build.ray_engine import RayEngine

    return RayEngine(parts, actors, num_gpus, address)


def check_local(flags: Mapping[str, object]) -> None:
    """No flag of Ray has a value. Raises: RecipeError."""
    if given := [f"{flag} {value}" for flag, value in flags.items() if value]:
        raise RecipeError(
            f"{', '.join(flags)} are those of --engine ray",
            entry="flags of engine ray",
            received=", ".join(given),
            remedy="add --engine ray, or leave them out",
        )
