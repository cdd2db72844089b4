"""A connection to a Ray cluster, for builds and sweeps on several machines."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from kdcache.errors import RecipeError


def import_ray() -> Any:
    """Import Ray, with its usage reports turned off, and return the module.

    Raises: RecipeError if it is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        return import_module("ray")
    except ImportError:
        raise RecipeError(
            "Cannot import ray, which --engine ray needs",
            fix="Leave --engine out on one machine. To install Ray, in a clone of kdcache: pip install '.[ray]'",
        ) from None


@contextmanager
def cluster(address: str | None) -> Iterator[Any]:
    """Connect to a Ray cluster in a with block, and yield the module `ray`.

    Without an address, an existing cluster of this machine is used. If there is none, a new one starts, and ends with
    the block.

    Args:
        address: the cluster's address, such as "10.0.0.1:6379" or "ray://10.0.0.1:10001". None and "auto" take the
            environment variable RAY_ADDRESS, if it is set. "auto" never starts a cluster.

    Raises:
        RecipeError: Ray is not installed, or there is no cluster at the address.
    """
    ray = import_ray()
    if ray.is_initialized():
        yield ray
        return
    if address in (None, "auto"):
        address = os.environ.get("RAY_ADDRESS") or address
    if address is not None:
        _check_address(address)
    try:
        ray.init(
            address=address,
            include_dashboard=False if address is None else None,
            log_to_driver=False,
            logging_level="ERROR",
        )
    except (ConnectionError, ValueError) as error:
        raise _no_cluster(address or "the last cluster that ray start began", error) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _check_address(address: str) -> None:
    """Check that a process listens at HOST:PORT, because Ray itself would wait for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdecimal():  # "auto", "local"
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise _no_cluster(address, error) from error


def _no_cluster(address: str, error: Exception) -> RecipeError:
    reason = str(error.__cause__ or error).strip().splitlines()[-1]  # a traceback's last line
    return RecipeError(
        f"No Ray cluster at {address}: {reason.partition('. ')[0]}",
        fix="Start one with ray start --head, which prints its address. If it asks for a token, set "
        "RAY_AUTH_MODE=token, and the token as in Ray's documentation. To use only this machine, leave out --address "
        "and RAY_ADDRESS.",
    )
