"""Compile the loss kernels for a GPU in advance, on a machine without it, and write them as one archive.

Without --shapes these are all kernels that `benchmarks/gpu.sh` measures and checks. A training of your own is named as
in `bench-kernels`. Sizes make no variant beyond their divisibility by 16.

    python benchmarks/precompile.py --arch sm_90 --out kernels-sm90.tar.xz
    python benchmarks/precompile.py --arch sm_90 --shapes 8x19x768x768/4 --case trained,warp --out kernels-sm90.tar.xz

On the other machine, from a clone of the same commit:

    export TRITON_CACHE_DIR=$(python benchmarks/precompile.py --use kernels-sm90.tar.xz)

Triton looks kernels up by a digest of itself and of their sources, so an archive serves the Triton that wrote it: the
same version and Python. --use fails if anything differs. Triton names files by absolute paths, so the folder has the
same place on both machines (--folder names another).
What the folder holds already is not compiled again. A kernel takes up to a minute and 1.5 GB.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import signal
import sys
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
import triton
from triton.runtime.cache import triton_key

from kdcache.bench.kernels import DTYPES, EVERY, KINDS, CheckSettings, Settings, parse_names, parse_shapes
from kdcache.bench.kernels.accuracy import launch
from kdcache.bench.kernels.inputs import make_inputs
from kdcache.bench.kernels.losses import loss_of
from kdcache.bench.kernels.shapes import Case
from kdcache_kernels.sources import digest_of

FOLDER, VERSIONS = "/tmp/kdcache-kernels", "versions.json"
ALIKE = ("Triton", "Python", "Triton's files")
"""The versions that a folder shares with what is added to it."""
TUNED, REGISTERS = "voc,ade,cityscapes,16x11x288x384/4", (128, 152, 168)
"""Shapes at which `gpu_checks.py rows` times cells, and the limits of their registers."""
META = torch.device("meta")
LONGEST = ("tiles_kernel", "cells_kernel", "pixels_kernel", "prepare_kernel")
"""Kernels that take longest come first, so that no process ends with one of them while the others wait."""
PROCESS_BYTES = 1.5e9


class Variant(NamedTuple):
    """A kernel as one call launches it. `key` is Triton's key of its arguments and options."""

    call: int
    kernel: str
    key: str


calls: list[Callable[[], object]] = []
"""In the processes: calls that together launch all that is compiled."""


def start(arch: str, shapes: str, kinds: str, dtypes: str) -> None:
    """Set this process up so that Triton only compiles, and losses take tensors without values."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends it
    from kdcache_kernels.gpu.offline import compile_instead, gpu_target, launch_from_meta_tensors

    torch.set_num_threads(1)
    compile_instead(gpu_target(arch))
    launch_from_meta_tensors()
    calls.extend(partial(launch_case, case) for case in settings_of(shapes, kinds, dtypes).cases())
    if not shapes:
        calls.extend(partial(launch, point, META) for point in CheckSettings(META, every=EVERY).points())
        tuned = settings_of(TUNED, "plain", "bf16").cases()
        calls.extend(partial(launch_case, case, limit) for case in tuned for limit in REGISTERS)


def settings_of(shapes: str, kinds: str, dtypes: str) -> Settings:
    """Return the cases of `bench-kernels` that these flags select. Raises: RecipeError."""
    names = tuple(KINDS) if kinds == "all" else parse_names(kinds, "--case", KINDS)
    return Settings(META, parse_shapes(shapes or f"cuda,{TUNED}"), parse_names(dtypes, "--dtype", DTYPES), kinds=names)


def launch_case(case: Case, registers: int | None = None) -> None:
    """Launch the kernels that kdcache launches in a case of the benchmark."""
    inputs = make_inputs(case, META)
    with tiled(registers=registers):
        torch.autograd.grad(loss_of(case).ours(case, inputs, "auto"), inputs.student)


@contextlib.contextmanager
def tiled(*, rows: int | None = None, registers: int | None = None) -> Iterator[None]:
    """Launch the kernels of cells with other rows per program and another limit of registers, in a with block."""
    from kdcache_kernels.gpu import cells

    choose, limit = cells.choose_tiling, cells.REGISTERS

    def choose_rows(problem: Any) -> Any:
        return choose(problem)._replace(rows=min(rows or 1, problem.student.shape[2] + 1))

    if rows is not None:
        cells.choose_tiling = choose_rows
    if registers is not None:
        cells.REGISTERS = registers
    try:
        yield
    finally:
        cells.choose_tiling, cells.REGISTERS = choose, limit


def list_variants() -> list[Variant]:
    """Return the variants of all calls, each with the first call that launches it. Nothing is compiled."""
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
    """Compile a variant unless the folder has it. Return whether it was compiled."""

    def others(*, key: str, fn: object, **_: object) -> bool:
        return (fn.jit_function.fn.__name__, key) != variant[1:]  # type: ignore[attr-defined]

    anew: list[bool] = []
    triton.knobs.runtime.jit_cache_hook = others
    triton.knobs.compilation.listener = lambda *, cache_hit, **_: anew.append(not cache_hit)
    calls[variant.call]()
    (compiled,) = anew
    return compiled


def compile_all(*request: str) -> None:
    """Compile in as many processes as cores and memory allow. The results of an interrupted call are valid."""
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


def versions(arch: str | None) -> dict[str, str]:
    """Return the versions for which an archive is valid, by name. `arch` None leaves out the GPU's architecture."""
    return {
        "Triton": triton.__version__,
        "Python": ".".join(platform.python_version_tuple()[:2]),
        "Triton's files": triton_key()[:24],
        "kernel sources": digest_of("gpu/**/*.py")[:12],
        **({"architecture": arch} if arch else {}),
    }


def unlike(made: dict[str, str], here: dict[str, str]) -> str:
    """Describe the first version that differs, or return "" if all are equal."""
    differences = (f"{name} {made.get(name)}, not {value}" for name, value in here.items() if made.get(name) != value)
    return next(differences, "")


def use(path: Path) -> Path:
    """Unpack an archive and return its folder. The process ends if the archive does not fit this machine."""
    if not path.is_file():
        sys.exit(f"Archive not found: {path}. Fix: check the path, or compile without --kernels.")
    with tarfile.open(path) as archive:
        members = archive.getmembers()
        roots = [Path(member.name).parent for member in members if Path(member.name).name == VERSIONS]
        if not roots or not all(Path(member.name).is_relative_to(roots[0]) for member in members):
            sys.exit(f"Not an archive of kernels: {path}. Fix: make it with benchmarks/precompile.py --out {path}.")
        archived = json.load(archive.extractfile(str(roots[0] / VERSIONS)))  # type: ignore[arg-type]
        if difference := unlike(archived, versions(this_gpu())):
            sys.exit(
                f"Cannot use {path}: its kernels are for {difference}. Fix: make it again with the Python, the Triton "
                "and the commit of this machine (benchmarks/precompile.py --out), or leave out --kernels."
            )
        archive.extractall("/", filter="data")
    return Path("/") / roots[0]


def this_gpu() -> str | None:
    """Return the architecture of this machine's GPU, or None if there is none."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    amd = getattr(properties, "gcnArchName", "").partition(":")[0] if torch.version.hip else ""
    return amd or f"sm_{properties.major}{properties.minor}"


def main() -> None:
    """Compile the kernels that the arguments select and write the archive, or unpack one and print its folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--arch", default=this_gpu(), help="sm_90 (H100, H200), sm_80, gfx942 ...; default this machine's"
    )
    parser.add_argument("--shapes", default="", help="BxCxHxW/STRIDE at label size, or presets")
    parser.add_argument("--case", default="all", help="as in bench-kernels")
    parser.add_argument("--dtype", default="bf16", help="of the logits: fp32, fp16, bf16")
    parser.add_argument("--folder", type=Path, default=Path(FOLDER), help="of the kernels, on both machines")
    parser.add_argument("--out", type=Path, help="the archive; default none, to use the folder here")
    parser.add_argument("--use", type=Path, metavar="ARCHIVE", help="unpack an archive, and print its folder")
    arguments = parser.parse_args()
    if arguments.use:
        print(use(arguments.use))
        return
    if arguments.arch is None:
        sys.exit("Missing --arch: no GPU on this machine. Fix: name one, for example --arch sm_90.")
    settings_of(arguments.shapes, arguments.case, arguments.dtype)  # wrong input ends here, before the processes
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    versions_file, here = folder / VERSIONS, versions(arguments.arch)
    if versions_file.exists() and (
        version := unlike(json.loads(versions_file.read_text()), {name: here[name] for name in ALIKE})
    ):
        sys.exit(
            f"Cannot add to {folder}: its kernels are for {version}. Fix: delete the folder, or name another --folder."
        )
    versions_file.write_text(json.dumps(here, indent=1))
    # Triton reads these when it is imported, in the processes. Between source and machine code lies ten times as much.
    os.environ |= {"TRITON_CACHE_DIR": str(folder), "TRITON_STORE_BINARY_ONLY": "1", "OMP_NUM_THREADS": "1"}
    os.environ.pop("TRITON_INTERPRET", None)
    compile_all(arguments.arch, arguments.shapes, arguments.case, arguments.dtype)
    if arguments.out:
        with tarfile.open(arguments.out, "w:xz") as archive:
            archive.add(folder)
        print(f"wrote {arguments.out}: {arguments.out.stat().st_size / 2**20:.1f} MiB. Use it on the other machine:")
        print(f"export TRITON_CACHE_DIR=$(python benchmarks/precompile.py --use {arguments.out.name})")


if __name__ == "__main__":
    main()
