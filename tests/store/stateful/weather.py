"""Faults of an object store, drawn for each request.

What befalls a request follows from the seed, its method, its key and how often it was asked before. So a life repeats
from its seed, whatever order the threads of a training ask in. Wrong bytes are others in every answer: bytes that two
fetches agree on are what the server has, for all that a reader can know.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from random import Random
from typing import Any
from unittest import mock

from s3 import Fault, ObjectStore, Request

from kdcache.store.backend import object_store

RATES = (0.03, 0.1, 0.3)
STUCK = (0.0, 0.0, 0.02)
"""Shares of the requests, and of the keys for which every request fails."""
BURST = 2  # requests in a row of one key that have the same fault
READS = ("noise", "several", "stump", "cut", "long", "500", "503", "reset", "slow")
OTHERS = ("500", "503", "reset", "lost", "slow")
STEADY = ("500", "503", "reset", "noise")  # no slow one: each costs the time limit
READ_TIMEOUT_S, SLOW_S = 0.4, 0.7
RETRY_S = 0.5
_BACKOFF: Any = {"init_backoff": timedelta(milliseconds=1), "max_backoff": timedelta(milliseconds=10), "base": 2}


class Weather:
    """What befalls each request of one command.

    Args:
        below: the prefix of the keys, which is another one in each life.
        tally: counts each kind.
    """

    def __init__(self, seed: int, below: str, tally: Counter[str]) -> None:
        random = Random(seed)
        self._seed, self._below, self._tally = seed, below, tally
        self._rate, self._stuck = random.choice(RATES), random.choice(STUCK)
        self._asked: Counter[Request] = Counter()

    def __call__(self, request: Request) -> Fault | None:
        self._asked[request] += 1
        number = self._asked[request]
        name = f"{self._seed} {request.method} {request.key.removeprefix(self._below)}"
        always, now = Random(name), Random(f"{name} {number // BURST}")
        if always.random() < self._stuck:
            kind = always.choice(STEADY if request.method == "GET" else STEADY[:3])
        elif now.random() < self._rate:
            kind = now.choice(READS if request.method == "GET" else OTHERS)
        else:
            return None
        self._tally[f"s3 {kind}"] += 1
        wrong = 5 if kind == "several" else 1
        return Fault("noise" if kind == "several" else kind, times=number, wrong=wrong, seconds=SLOW_S)


@contextmanager
def patient() -> Iterator[None]:
    """Ask again after a moment instead of a second, for as long as otherwise."""
    retries = {**object_store.RETRIES, "backoff": _BACKOFF}
    with mock.patch.multiple(object_store, RETRIES=retries, PAUSE_SECONDS=0.001):
        yield


@contextmanager
def bad_weather(server: ObjectStore, weather: Weather) -> Iterator[None]:
    """Let requests fail, and have clients give up soon."""
    retries = {"max_retries": 3, "retry_timeout": timedelta(seconds=RETRY_S), "backoff": _BACKOFF}
    client = {**object_store.CLIENT, "read_timeout": f"{READ_TIMEOUT_S}s"}
    with mock.patch.multiple(object_store, RETRIES=retries, CLIENT=client):
        server.draw = weather
        try:
            yield
        finally:
            server.draw = None


@contextmanager
def calm(server: ObjectStore) -> Iterator[None]:
    """Hold the faults for a look at what is true; clients made inside are patient."""
    drawing, server.draw = server.draw, None
    retries = {"max_retries": 8, "retry_timeout": timedelta(seconds=60), "backoff": _BACKOFF}
    client = {**object_store.CLIENT, "read_timeout": "60s"}
    try:
        with mock.patch.multiple(object_store, RETRIES=retries, CLIENT=client):
            yield
    finally:
        server.draw = drawing
