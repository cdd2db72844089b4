"""The Triton kernels compiled for a GPU, without one: registers, spills, shared memory, instructions by class.

Launches are the package's own, on meta tensors (`kdcache_kernels.gpu.offline`).

Counts are static, of the whole kernel and of its innermost loops; what a spill costs depends on where it is. Writes
benchmarks/results/sass-sm90.json in about three minutes, most of it for tiles. Machine code depends on Triton's
version: a name tells the files of two versions apart.

    python benchmarks/sass.py
    python benchmarks/sass.py --name triton-3.8   # writes sass-sm90-triton-3.8.json
    python benchmarks/sass.py --compile-only   # every kernel once and with other settings; a test runs this
    python benchmarks/sass.py --brief --capability 75 120 gfx942   # every kernel once; a test runs this
"""

import argparse
import importlib
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)  # read when Triton is imported

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import kdcache_kernels.gpu
from common import RESULTS, header, write
from kdcache_kernels import LossProblem, PackedTarget
from kdcache_kernels.gpu import argmax, counts, loss, topk
from kdcache_kernels.gpu.offline import compile_instead, gpu_target
from kdcache_kernels.gpu.on_cells import relations
from kdcache_kernels.on_cells.problem import RelationProblem
from kdcache_kernels.problem import Counted
from kdcache_kernels.topk import index_dtype
from listing import HARMLESS, before_wait, count, read_listing

CAPABILITIES = ("90",)
BATCH, CLASSES, KEPT, LABELS = 16, 21, 8, 512
CELLS = {"stride 1": 512, "stride 2": 256, "stride 4": 128, "stride 8": 64, "any ratio": 100}
"""Logits along an axis of LABELS pixels; the last is for tiles alone."""


Call = tuple[str, Callable[[], object]]
"""What it is, and what launches kernels."""


class Compiled(NamedTuple):
    """A kernel as one call launches it."""

    name: str
    variant: str
    kernel: Any


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return a tensor of this shape without memory: compiling needs only shapes and dtypes."""
    return torch.empty(shape, dtype=dtype, device="meta")


def packed_target(cells: int, num_classes: int = CLASSES, k: int = KEPT) -> PackedTarget:
    """Return a stored target without memory, with `cells` cells along each axis.

    It is top-k if `k` is below `num_classes`.
    """
    values = empty(BATCH, k, cells, cells, dtype=torch.float16)
    indices = tail = None
    if k < num_classes:
        indices = empty(BATCH, k, cells, cells, dtype=index_dtype(num_classes))
        tail = empty(BATCH, cells, cells, dtype=torch.float16)
    return PackedTarget(values, indices, tail, num_classes, (LABELS, LABELS))


def problem(cells: int, dtype: torch.dtype, **changes: Any) -> LossProblem:
    """Return a loss problem with CE and KL at T = 2 and a dense target. `changes` replace its fields."""
    arguments: dict[str, Any] = {
        "student": empty(BATCH, CLASSES, cells, cells, dtype=dtype),
        "labels": empty(BATCH, LABELS, LABELS, dtype=torch.uint8),
        "target": packed_target(cells, k=CLASSES),
        "size": (LABELS, LABELS),
        "use_ce": True,
        "ce_weight": empty(),
        "kl_weight": empty(),
        "ce_denominator": None,
        "kl_denominator": None,
        "temperature": 2.0,
        "class_weight": None,
        "ignore_index": 255,
        "window": None,
        "flip": None,
        "pixel_weight": None,
        "distill_void": True,
        "align_corners": False,
        "need_gradient": True,
    }
    return LossProblem(**{**arguments, **changes})


def relation_call(cells: int, dtype: torch.dtype, moved: bool = False) -> Call:
    """Return a call of the relation loss, for a dense target of 128 cells and a student of `cells` cells per axis.

    `moved` shows it through a window, mirrored, and weighed by a gate and a mask.
    """
    options: dict[str, Any] = dict.fromkeys(("window", "flip", "pixel_weight", "counted", "count", "moments"))
    if moved:
        options |= {"window": empty(BATCH, 4, dtype=torch.float64), "flip": empty(BATCH, dtype=torch.bool)}
        options |= {"pixel_weight": empty(BATCH, LABELS, LABELS)}
        options |= {"counted": empty(BATCH, LABELS, LABELS, dtype=torch.bool)}
        options |= {"moments": empty(6, CLASSES, dtype=torch.float64), "count": empty()}
    options |= {
        "student": empty(BATCH, CLASSES, cells, cells, dtype=dtype),
        "teacher": empty(BATCH, CLASSES, 128, 128, dtype=torch.float16),
        "view_size": (LABELS, LABELS),
        "size": (LABELS, LABELS),
        "need_gradient": True,
        "temperature": 1.0,
        "beta": 1.0,
        "gamma": 1.0,
    }
    name = f"{'any window' if moved else 'cell by cell'}, {str(dtype).removeprefix('torch.')}"
    return name, partial(relations.relation_loss, RelationProblem(**options))


def main_calls(*dtypes: torch.dtype) -> Iterator[Call]:
    """Yield calls that together launch every kernel, for students (and gradients) of each dtype."""
    for dtype in dtypes:
        name = str(dtype).removeprefix("torch.")
        for geometry, cells in CELLS.items():
            yield f"{geometry}, {name}", partial(loss.distill_loss, problem(cells, dtype))
        logits = empty(BATCH, CLASSES, 128, 128, dtype=dtype)
        yield relation_call(128, dtype)
        yield relation_call(100, dtype, moved=True)
        yield name, partial(loss.scale_gradient, logits, empty(), empty(), dtype)
        yield f"k = {KEPT}, {name}", partial(topk.pack, logits, KEPT)
        yield f"dense, {name}", partial(topk.pack, logits, CLASSES)
    target = packed_target(128)
    yield f"k = {KEPT}", partial(topk.densify, target.values, target.indices, target.tail, CLASSES)
    yield f"k = {KEPT}", partial(argmax.argmax_confidence, target, (LABELS, LABELS), None, None)
    yield "whole views", count_call(None)


def count_call(window: torch.Tensor | None) -> Callable[[], object]:
    """Return a call that counts the denominators of the losses."""
    labels, size = empty(BATCH, LABELS, LABELS, dtype=torch.uint8), (LABELS, LABELS)
    counted = Counted(labels, empty(CLASSES), CLASSES, 255, False, size, size, window, None, BATCH)
    return partial(counts.count, counted, labels.device)


def other_calls() -> Iterator[Call]:
    """Yield further settings of the loss, each in few of its variants. float16 logits get a float32 gradient."""
    window, flip = empty(BATCH, 4, dtype=torch.float64), empty(BATCH, dtype=torch.bool)
    gate = empty(BATCH, LABELS, LABELS, dtype=torch.bool)
    changes: dict[str, dict[str, Any]] = {
        "everything": {
            "window": window,
            "flip": flip,
            "pixel_weight": gate,
            "ce_pixel_weight": gate.float(),
            "class_weight": empty(CLASSES),
            "label_smoothing": 0.1,
            "temperature": 1.0,
            "ce_denominator": empty(),
            "kl_denominator": empty(),
        },
        "CE": {"target": None, "need_gradient": False, "labels": empty(BATCH, LABELS, LABELS, dtype=torch.int64)},
        "KL": {"use_ce": False, "labels": None, "temperature": 2.5, "distill_void": False},
        "focal": {"focal_gamma": 2.0, "ce_pixel_weight": gate, "pixel_weight": gate.float()},
    }
    for geometry, name in (
        ("stride 4", "everything"),
        ("stride 1", "everything"),
        ("any ratio", "focal"),
        ("stride 8", "KL"),
        ("stride 4", "CE"),
    ):
        launched = problem(CELLS[geometry], torch.float16, **changes[name])
        yield f"{geometry}, {name}", partial(loss.distill_loss, launched)
    yield "windows", count_call(window)
    many = packed_target(128, 300)
    yield "300 classes", partial(topk.pack, empty(BATCH, 300, 128, 128), KEPT)
    yield "300 classes", partial(topk.densify, many.values, many.indices, many.tail, 300)
    yield "300 classes, window", partial(argmax.argmax_confidence, many, (LABELS, LABELS), window, flip)


def brief_calls() -> Iterator[Call]:
    """Yield the fewest calls that launch every kernel, tiles once."""
    fp16, target = torch.float16, packed_target(128)
    yield "stride 4", partial(loss.distill_loss, problem(128, fp16, target=target))
    yield "stride 1", partial(loss.distill_loss, problem(LABELS, fp16, target=packed_target(LABELS)))
    logits = empty(BATCH, CLASSES, 128, 128, dtype=fp16)
    yield "any", partial(loss.scale_gradient, logits, empty(), empty(), fp16)
    yield "any", partial(topk.pack, logits, KEPT)
    yield "any", partial(argmax.argmax_confidence, target, (LABELS, LABELS), None, None)
    yield "any", count_call(None)
    yield relation_call(100, fp16, moved=True)


def compile_all(target: GPUTarget, calls: Iterator[Call]) -> list[Compiled]:
    """Compile the kernels that the calls launch for a target, each variant once."""
    compiled: dict[str, Compiled] = {}
    kernels = compile_instead(target)
    for variant, call in calls:
        call()
        for name, kernel in kernels:
            compiled.setdefault(kernel.hash, Compiled(name, variant, kernel))
        kernels.clear()
    return list(compiled.values())


def kernels_of_the_package() -> set[str]:
    """Return the names of all functions that are launched. They end with `_kernel`."""
    launched = set()
    for module in pkgutil.walk_packages(kdcache_kernels.gpu.__path__, "kdcache_kernels.gpu."):
        members = vars(importlib.import_module(module.name)).values()
        names = {member.fn.__name__ for member in members if isinstance(member, JITFunction)}
        launched |= {name for name in names if name.endswith("_kernel")}
    return launched


def find_tool(name: str) -> Path:
    """Return the path of a CUDA tool: in Triton's wheel, NVIDIA's wheels or a toolkit."""
    packages = Path(sysconfig.get_paths()["purelib"])
    candidates = [
        Path(triton.__file__).parent / "backends/nvidia/bin" / name,
        *sorted(packages.glob(f"nvidia/**/bin/{name}")),
        Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / name,
    ]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    if on_path := shutil.which(name):
        return Path(on_path)
    places = "\n".join(f"  {candidate}" for candidate in candidates)
    sys.exit(
        f"{name} is missing: it reads the machine code. It was looked for on the PATH and in\n{places}\n"
        "Install a CUDA toolkit and set CUDA_HOME, or run with --compile-only, which does without."
    )


def describe(compiled: Compiled, cuobjdump: Path, nvdisasm: Path) -> dict[str, Any]:
    """Return the numbers of a compiled kernel."""
    usage = _read_machine_code(compiled, cuobjdump, "--dump-resource-usage")
    opcodes, loops = read_listing(_read_machine_code(compiled, nvdisasm, "-c"))
    used = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage)
    assert used is not None, usage
    return {
        "kernel": compiled.name,
        "variant": compiled.variant,
        "warps": compiled.kernel.metadata.num_warps,
        "registers": int(used[1]),
        "spilled_bytes": int(used[2]),  # the stack: the kernels have no arrays to put there
        "shared_bytes": compiled.kernel.metadata.shared,
        "before_wait": before_wait(opcodes) if compiled.kernel.metadata.launch_pdl else None,
        "instructions": count(opcodes),
        "innermost_loops": [count(opcodes[first : last + 1]) for first, last in loops],
    }


def _read_machine_code(compiled: Compiled, tool: Path, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.kernel.asm["cubin"])
        file.flush()
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout


def check_waits(compiled: list[Compiled]) -> int:
    """Count the kernels that may start before the previous one has ended. Exit if one could touch memory too early."""
    dependent = [launched for launched in compiled if launched.kernel.metadata.launch_pdl]
    tool = find_tool("nvdisasm")
    for launched in dependent:
        early = before_wait(read_listing(_read_machine_code(launched, tool, "-c"))[0])
        if not set(early) <= HARMLESS:
            sys.exit(f"{launched.name} ({launched.variant}) does not wait first: {', '.join(early)} come before.")
    return len(dependent)


def main() -> None:
    """Compile the kernels for each GPU capability, and write the contents of the machine code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", nargs="+", default=list(CAPABILITIES), help="80 is sm_80; or gfx942")
    parser.add_argument(
        "--compile-only", action="store_true", help="compile every kernel with several settings and write nothing"
    )
    parser.add_argument("--brief", action="store_true", help="compile every kernel once and write nothing")
    parser.add_argument("--name", default="", help="what follows the capability in the file's name")
    arguments = parser.parse_args()
    writes = not (arguments.compile_only or arguments.brief)
    tools = [find_tool("cuobjdump"), find_tool("nvdisasm")] if writes else []
    for capability in arguments.capability:
        target = gpu_target(capability)
        compiled = compile_all(target, main_calls(torch.bfloat16, torch.float32) if writes else brief_calls())
        if missing := kernels_of_the_package() - {kernel.name for kernel in compiled}:
            sys.exit(f"No call of this script launches {', '.join(sorted(missing))}; add one.")
        if not writes:
            compiled += [] if arguments.brief else compile_all(target, other_calls())
            name = capability if capability.startswith("gfx") else f"sm_{capability}"
            print(f"{name}: compiled {len(compiled)} variants of {len({c.name for c in compiled})} kernels")
            if target.backend == "cuda":
                print(f"{name}: {check_waits(compiled)} wait first")
            continue
        result = header("registers and instructions of the Triton kernels")
        result |= {
            "capability": int(capability),
            "triton": triton.__version__,
            "B": BATCH,
            "C": CLASSES,
            "temperature": 2.0,
        }
        result["kernels"] = [describe(kernel, tools[0], tools[1]) for kernel in compiled]
        for row in result["kernels"]:
            print(f"sm_{capability} {row['kernel']:16} {row['variant']:22}", *_short(row))
        name = f"sass-sm{capability}-{arguments.name}" if arguments.name else f"sass-sm{capability}"
        write(RESULTS / f"{name}.json", result)


def _short(row: dict[str, Any]) -> list[str]:
    return [
        f"{row['registers']} registers, {row['spilled_bytes']} B spilled, {row['instructions']['total']} instructions"
    ]


if __name__ == "__main__":
    main()
