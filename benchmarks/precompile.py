"""Compile the loss kernels of a GPU ahead, which need not be there, and write them as one archive.

Without --shapes these are all kernels that `bench-kernels` and `bench-kernels --check` launch. A training of your own
is named as there. Sizes make no variant beyond their divisibility by 16.

    python benchmarks/precompile.py --arch sm_90 --out kernels-sm90.tar.xz
    python benchmarks/precompile.py --arch sm_90 --shapes 8x19x768x768/4 --case trained,warp --out kernels-sm90.tar.xz

Use it on the other machine: tar -xf kernels-sm90.tar.xz -C / && export TRITON_CACHE_DIR=/tmp/kdcache-kernels

Triton looks kernels up by a digest of itself, so an archive serves the Triton that wrote it: the same version and
Python. It names its files by absolute paths, so the folder is the same on both machines (--folder names another).
What the folder holds already is not compiled again. A kernel takes up to a minute and 1.5 GB.
"""

import argparse
import multiprocessing
import os
import signal
import sys
import tarfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
import triton
from triton.runtime.cache import triton_key

from kdcache.bench.kernels import DTYPES, EVERY, KINDS, CheckSettings, Settings, parse_names, parse_shapes
from kdcache.bench.kernels.accuracy import launch
from kdcache.bench.kernels.inputs import make_inputs
from kdcache.bench.kernels.losses import loss_of
from kdcache.bench.kernels.shapes import Case

FOLDER, KEY = "/tmp/kdcache-kernels", "triton-key"
META = torch.device("meta")
LONGEST = ("tiles_kernel", "cells_kernel", "pixels_kernel", "prepare_kernel")
"""Kernels that take longest come first, so that no process ends with one of them while the others wait."""
PROCESS_BYTES = 1.5e9


class Variant(NamedTuple):
    """A kernel as one call launches it; `key` is Triton's, of its arguments and options."""

    call: int
    kernel: str
    key: str


calls: list[Callable[[], object]] = []
"""In the processes: calls that together launch all that is compiled."""


def start(arch: str, shapes: str, kinds: str, dtypes: str) -> None:
    """Turn this process into one whose Triton compiles, and whose losses take tensors without values."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends it
    from kdcache_kernels.gpu.offline import compile_instead, gpu_target, launch_from_meta_tensors

    torch.set_num_threads(1)
    compile_instead(gpu_target(arch))
    launch_from_meta_tensors()
    if not shapes:
        calls.extend(partial(launch, point, META) for point in CheckSettings(META, every=EVERY).points())
    calls.extend(partial(launch_case, case) for case in settings_of(shapes, kinds, dtypes).cases())


def settings_of(shapes: str, kinds: str, dtypes: str) -> Settings:
    """Return the cases of `bench-kernels` that flags name. Raises: RecipeError."""
    names = tuple(KINDS) if kinds == "all" else parse_names(kinds, "--case", KINDS)
    return Settings(META, parse_shapes(shapes or "cuda"), parse_names(dtypes, "--dtype", DTYPES), kinds=names)


def launch_case(case: Case) -> None:
    """Launch what kdcache launches in a case of the benchmark."""
    inputs = make_inputs(case, META)
    torch.autograd.grad(loss_of(case).ours(case, inputs, "auto"), inputs.student)


def list_variants() -> list[Variant]:
    """Return the variants of all calls, each with the first call that launches it; compile nothing."""
    variants: dict[tuple[str, str], Variant] = {}
    at = 0

    def record(*, key: str, fn: object, **_: object) -> bool:
        name = fn.jit_function.fn.__name__  # type: ignore[attr-defined]
        variants.setdefault((name, key), Variant(at, name, key))
        return True  # passes the compiler by

    triton.knobs.runtime.jit_cache_hook = record
    for at, call in enumerate(calls):  # noqa: B007  # record reads it
        call()
    order = {name: place for place, name in enumerate(LONGEST)}
    return sorted(variants.values(), key=lambda variant: order.get(variant.kernel, len(order)))


def compile_variant(variant: Variant) -> bool:
    """Compile a variant, or find it in the folder; return True if it was compiled."""

    def others(*, key: str, fn: object, **_: object) -> bool:
        return (fn.jit_function.fn.__name__, key) != variant[1:]  # type: ignore[attr-defined]

    anew: list[bool] = []
    triton.knobs.runtime.jit_cache_hook = others
    triton.knobs.compilation.listener = lambda *, cache_hit, **_: anew.append(not cache_hit)
    calls[variant.call]()
    (compiled,) = anew
    return compiled


def compile_all(*request: str) -> None:
    """Compile in as many processes as cores and memory allow. What an interruption leaves is valid."""
    processes = max(1, min(os.cpu_count() or 1, int(psutil.virtual_memory().available / PROCESS_BYTES)))
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, context, initializer=start, initargs=request)
    try:
        variants = pool.submit(list_variants).result()
        anew = 0
        for done, future in enumerate(as_completed([pool.submit(compile_variant, each) for each in variants]), 1):
            anew += future.result()
            print(f"\r{done} of {len(variants)} variants, {anew} compiled", end="", flush=True)
    finally:
        print()
        pool.shutdown(wait=False, cancel_futures=True)
        for child in multiprocessing.active_children():
            child.terminate()


def this_gpu() -> str | None:
    """Return the architecture of this machine's GPU; None without one."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    amd = getattr(properties, "gcnArchName", "").partition(":")[0] if torch.version.hip else ""
    return amd or f"sm_{properties.major}{properties.minor}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--arch", default=this_gpu(), help="sm_90 (H100, H200), sm_80, gfx942 ...; default this machine's"
    )
    parser.add_argument("--shapes", default="", help="BxCxHxW/STRIDE at label size, or presets")
    parser.add_argument("--case", default="all", help="as in bench-kernels")
    parser.add_argument("--dtype", default="bf16", help="of the logits: fp32, fp16, bf16")
    parser.add_argument("--folder", type=Path, default=Path(FOLDER), help="of the kernels, on both machines")
    parser.add_argument("--out", type=Path, help="the archive; default none, to use the folder here")
    arguments = parser.parse_args()
    if arguments.arch is None:
        sys.exit("Missing --arch: no GPU on this machine. Fix: name one, for example --arch sm_90.")
    settings_of(arguments.shapes, arguments.case, arguments.dtype)  # wrong input ends here, before the processes
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    key = folder / KEY
    if key.exists() and key.read_text() != triton_key():
        sys.exit(f"Another Triton filled {folder}. Fix: delete the folder, or name another one with --folder.")
    key.write_text(triton_key())
    # Triton reads these when it is imported, in the processes. Between source and machine code lies ten times as much.
    os.environ |= {"TRITON_CACHE_DIR": str(folder), "TRITON_STORE_BINARY_ONLY": "1", "OMP_NUM_THREADS": "1"}
    os.environ.pop("TRITON_INTERPRET", None)
    compile_all(arguments.arch, arguments.shapes, arguments.case, arguments.dtype)
    if arguments.out:
        with tarfile.open(arguments.out, "w:xz") as archive:
            archive.add(folder)
        print(f"wrote {arguments.out}: {arguments.out.stat().st_size / 2**20:.1f} MiB. Use it on the other machine:")
        print(f"tar -xf {arguments.out.name} -C / && export TRITON_CACHE_DIR={folder}")


if __name__ == "__main__":
    main()
