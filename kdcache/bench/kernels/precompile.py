"""Compiling the Triton kernels ahead, for a GPU that need not be there, into a folder that Triton reads as its cache.

What has to be compiled is what the accuracy check and the cases of the benchmark launch: their own code runs on meta
tensors (`kdcache_kernels.gpu.offline`), first to list the variants of all kernels, then, one variant at a time and in
several processes, to compile them. Triton finds a variant by a digest of the kernel's source, its arguments, the GPU,
and of Triton itself, compiler library included: a folder serves the version and Python that made it (`cache_folder`).

A process that is killed leaves its variant out and the others whole, for Triton moves files into place.
"""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from kdcache.bench.kernels.accuracy import CheckSettings, launch
from kdcache.bench.kernels.cache_folder import folder_bytes, write_note
from kdcache.bench.kernels.inputs import make_inputs
from kdcache.bench.kernels.losses import loss_of
from kdcache.bench.kernels.shapes import Case
from kdcache.errors import RecipeError

Progress = Callable[[str, int, int | None], None]
"""Called with what is done, how much of it is done, and of how much, where that is known."""
META = torch.device("meta")
LONGEST = ("tiles_kernel", "cells_kernel", "pixels_kernel", "prepare_kernel")
"""Kernels that take longest come first, so that no process ends with one of them while the others wait."""


@dataclass(frozen=True)
class Request:
    """What to compile.

    Attributes:
        arch: of the GPU, for instance sm_90; see `cache_folder.ARCHITECTURES`.
        folder: becomes, or is, a cache of Triton's.
        check: the accuracy check's points, and the dtypes in it; None leaves it out.
        cases: of the benchmark.
    """

    arch: str
    folder: Path
    check: CheckSettings | None = None
    cases: tuple[Case, ...] = ()

    def calls(self) -> list[Callable[[], object]]:
        """Calls that launch it all."""
        points = [] if self.check is None else [partial(launch, point, META) for point in self.check.points()]
        ceilings = [_launch_ceilings] if self.cases else []
        return [*points, *ceilings, *(partial(_launch_case, case) for case in self.cases)]


class Variant(NamedTuple):
    """A kernel as one call launches it: `key` is Triton's, of its arguments and options."""

    call: int
    kernel: str
    key: str


@dataclass(frozen=True)
class Compiled:
    """What was done.

    Attributes:
        variants: how many there are.
        anew: how many were compiled; the others were in the folder.
        folder_bytes: size of the folder.
    """

    variants: int
    anew: int
    folder_bytes: int


def compile_ahead(request: Request, processes: int, progress: Progress = lambda *_: None) -> Compiled:
    """Compile all variants of a request that the folder does not hold yet.

    Raises: RecipeError when a process ends, for instance for want of memory. What an interruption leaves is valid.
    """
    request.folder.mkdir(parents=True, exist_ok=True)
    write_note(request.folder, request.arch)
    with _workers(request, processes) as pool:
        try:
            progress("listing variants", 0, None)
            variants = pool.submit(_list_variants).result()
            anew = 0
            progress("compiling", 0, len(variants))
            for done, future in enumerate(as_completed(_submit(pool, variants)), start=1):
                anew += future.result()
                progress("compiling", done, len(variants))
        except BrokenProcessPool as error:
            raise RecipeError(
                "every process compiles to its end",
                received=f"{error}; a process may take 1.5 GB",
                remedy="run it again with fewer --processes; what was compiled is kept",
            ) from error
    return Compiled(len(variants), anew, folder_bytes(request.folder))


def _submit(pool: ProcessPoolExecutor, variants: list[Variant]) -> Iterator[Future[bool]]:
    order = {name: place for place, name in enumerate(LONGEST)}
    longest_first = sorted(variants, key=lambda variant: order.get(variant.kernel, len(order)))
    return iter([pool.submit(_compile, variant) for variant in longest_first])


@contextmanager
def _workers(request: Request, processes: int) -> Iterator[ProcessPoolExecutor]:
    """Processes whose Triton compiles and whose public functions take meta tensors; gone at the end, whatever it is."""
    before = dict(os.environ)
    # Read when Triton is imported: the processes have it from here on.
    os.environ["TRITON_CACHE_DIR"] = str(request.folder.resolve())
    os.environ["TRITON_STORE_BINARY_ONLY"] = "1"  # what is between source and machine code is ten times as large
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.pop("TRITON_INTERPRET", None)
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _start, (request,))
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in multiprocessing.active_children():  # a variant can take a minute, which nobody waits for
            child.terminate()
        os.environ.clear()
        os.environ.update(before)


# In the processes

_calls: list[Callable[[], object]] = []


def _start(request: Request) -> None:
    """Turn this process into one that compiles."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends it
    from kdcache_kernels.gpu.offline import compile_instead, gpu_target, launch_from_meta_tensors

    torch.set_num_threads(1)
    compile_instead(gpu_target(request.arch))
    launch_from_meta_tensors()
    _calls.extend(request.calls())


def _list_variants() -> list[Variant]:
    """The variants of all calls, each with the first call that launches it; nothing is compiled."""
    import triton

    variants: dict[tuple[str, str], Variant] = {}
    at = 0

    def record(*, key: str, fn: object, **_: object) -> bool:
        name = fn.jit_function.fn.__name__  # type: ignore[attr-defined]
        variants.setdefault((name, str(key)), Variant(at, name, str(key)))
        return True  # passes the compiler by

    triton.knobs.runtime.jit_cache_hook = record
    for at, call in enumerate(_calls):  # noqa: B007  # record reads it
        call()
    return list(variants.values())


def _compile(variant: Variant) -> bool:
    """Compile a variant, or find it; return whether it was compiled."""
    import triton

    def others(*, key: str, fn: object, **_: object) -> bool:
        return (fn.jit_function.fn.__name__, str(key)) != variant[1:]  # type: ignore[attr-defined]

    anew: list[bool] = []
    triton.knobs.runtime.jit_cache_hook = others
    triton.knobs.compilation.listener = lambda *, cache_hit, **_: anew.append(not cache_hit)
    _calls[variant.call]()
    assert len(anew) == 1, f"{variant.kernel} was compiled {len(anew)} times"
    return anew[0]


def _launch_case(case: Case) -> None:
    """What ours launches in a case of the benchmark."""
    inputs = make_inputs(case, META)
    loss = loss_of(case).ours(case, inputs, "auto")
    torch.autograd.grad(loss, inputs.student)


def _launch_ceilings() -> None:
    from kdcache.bench.kernels.exp_loop import BLOCK, WARPS, exp2_loop

    exp2_loop[(1,)](torch.empty(BLOCK, device=META), 1024, BLOCK=BLOCK, num_warps=WARPS)
