"""A pool of threads for compiled CPU kernels that release the GIL.

A kernel is serial: `kernel(first, last, *arguments)` runs the tasks first, ..., last - 1, and no two tasks write to the
same place, so the result does not depend on the threads. `run` cuts the tasks into chunks, which the calling thread and
the pool take one after the other. It replaces numba's threading layers: omp kills forked children, and workqueue aborts
on concurrent calls. A chunk costs some 15 microseconds of Python and a wake-up some 50, so a chunk must take a tenth of
a millisecond or more. Shorter calls run only in the calling thread.
"""

import itertools
import math
import os
import queue
import threading
from collections.abc import Callable
from typing import Any

import torch

CHUNK_NANOSECONDS = 100_000
CHUNKS_PER_THREAD = 4
"""Enough for threads to even out when the machine gives one of them less time."""


def run(kernel: Callable[..., Any], num_tasks: int, *arguments: Any, nanoseconds: float = math.inf) -> None:
    """Run the tasks 0 to num_tasks - 1 on as many threads as torch uses, and return when all are done.

    Args:
        kernel: called as kernel(first, last, *arguments) for ranges of tasks, from several threads at once. Its result
            is dropped.
        num_tasks: the number of tasks. 0 does nothing.
        arguments: further arguments of the kernel.
        nanoseconds: the estimated time of all tasks on one thread, which decides how many ranges there are.
    Raises: the first error of a call, after the running calls have ended. Later errors are dropped.
    """
    if num_tasks == 0:
        return
    if nanoseconds < 2 * CHUNK_NANOSECONDS:  # one chunk, whatever the number of threads
        kernel(0, num_tasks, *arguments)
        return
    threads = min(torch.get_num_threads(), num_tasks)
    chunks = int(min(num_tasks, threads * CHUNKS_PER_THREAD, max(1, nanoseconds / CHUNK_NANOSECONDS)))
    if threads == 1 or chunks == 1:
        kernel(0, num_tasks, *arguments)
        return
    edges = [chunk * num_tasks // chunks for chunk in range(chunks + 1)]
    _Job(kernel, edges, arguments).run(min(threads, chunks) - 1)


class _Job:
    """One call of `run`: chunks that any thread may take."""

    def __init__(self, kernel: Callable[..., Any], edges: list[int], arguments: tuple[Any, ...]) -> None:
        self.kernel = kernel
        self.edges = edges
        self.arguments = arguments
        self.taken = itertools.count()
        self.error: BaseException | None = None
        self.lock = threading.Lock()
        self.running = 1  # threads inside `work`; the calling one from the start
        self.idle = threading.Condition(self.lock)

    def run(self, helpers: int) -> None:
        _POOL.submit(self, helpers)
        self.work()
        with self.idle:
            self.running -= 1
            self.idle.wait_for(lambda: self.running == 0)
        if self.error is not None:
            raise self.error

    def help(self) -> None:
        """Join in, unless the job was done before this thread woke up."""
        with self.lock:
            if self.running == 0:
                return
            self.running += 1
        self.work()
        with self.idle:
            self.running -= 1
            self.idle.notify_all()

    def work(self) -> None:
        chunks = len(self.edges) - 1
        while self.error is None and (chunk := next(self.taken)) < chunks:
            try:
                self.kernel(self.edges[chunk], self.edges[chunk + 1], *self.arguments)
            except BaseException as error:
                self.error = error


class _Pool:
    """Threads that wait for jobs, as many as were ever needed at once by one job."""

    def __init__(self) -> None:
        self.jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self.lock = threading.Lock()
        self.size = 0

    def submit(self, job: _Job, helpers: int) -> None:
        with self.lock:
            for index in range(self.size, helpers):
                threading.Thread(target=self._serve, name=f"kdcache-kernel-{index}", daemon=True).start()
            self.size = max(self.size, helpers)
        for _ in range(helpers):
            self.jobs.put(job)

    def _serve(self) -> None:
        while True:
            self.jobs.get().help()


_POOL = _Pool()


def _renew() -> None:
    """Replace the pool after a fork, which takes no threads along, but perhaps a lock that one held."""
    global _POOL
    _POOL = _Pool()


if hasattr(os, "register_at_fork"):  # Windows has neither it nor forks
    os.register_at_fork(after_in_child=_renew)
