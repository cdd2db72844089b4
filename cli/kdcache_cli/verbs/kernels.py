"""`kdcache kernels ...`: compiling the Triton kernels ahead of their use."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from kdcache.errors import RecipeError
from kdcache_cli.console import ERRORS, OUT, bytes_text, progress_bar
from kdcache_cli.measuring import parse_kept, parse_temperatures

if TYPE_CHECKING:
    from kdcache.bench.kernels import Case

app = typer.Typer(no_args_is_help=True, help="Compile the loss kernels of a GPU ahead.", rich_markup_mode="rich")
_Option = typer.Option


@app.command()
def compile(
    arch: Annotated[
        str | None,
        _Option("--arch", help="GPU to compile for: sm_90 (H100, H200), sm_80, gfx942 ... (default: this machine's)."),
    ] = None,
    out: Annotated[
        Path | None, _Option("--out", help="Folder of the compiled kernels (default: the one that Triton reads here).")
    ] = None,
    check: Annotated[
        bool | None,
        _Option(
            "--check/--no-check",
            help="Whether to compile all that [bold]bench-kernels --check[/] needs (default: without --shapes).",
            show_default=False,
        ),
    ] = None,
    shapes: Annotated[
        str, _Option("--shapes", help="BxCxHxW/STRIDE at label size, as a training has them, or presets.")
    ] = "",
    case: Annotated[
        str, _Option("--case", help="plain, trained, warp, gate, dist, as in bench-kernels; or all.")
    ] = "all",
    dtype: Annotated[str, _Option("--dtype", help="Dtypes of the logits: fp32, fp16, bf16.")] = "bf16",
    temperature: Annotated[str, _Option("--temperature", help="One or several, comma-separated.")] = "2",
    top_k: Annotated[
        str, _Option("--top-k", help="Classes in the target: auto (all up to 32, else 8), all, or numbers.")
    ] = "auto",
    processes: Annotated[
        int, _Option("--processes", min=1, help="Variants that are compiled at a time, 1.5 GB each.")
    ] = max(1, os.cpu_count() or 1),
) -> None:
    """Compile the Triton kernels into a folder, without a GPU: a first training or check then compiles nothing.

    Without --shapes: everything that the accuracy check and the shapes of [bold]bench-kernels[/] need. Sizes beyond
    their divisibility by 16 make no variant, so one training's folder serves others of its kind.

    A folder serves the Triton that made it, to the version and the Python: compile where the same is installed. For a
    machine with Python 3.12 and Triton 3.6 that is a virtual environment:

    [dim]python3.12 -m venv v36 && v36/bin/pip install torch==2.11 triton==3.6.0 . && v36/bin/kdcache kernels compile \
--arch sm_90 --out kernels-sm90[/]

    Carry the folder there, run [bold]kdcache kernels adopt kernels-sm90[/] once, and set TRITON_CACHE_DIR to it.
    Ctrl-C keeps what was compiled; the same command goes on.
    """
    from kdcache.bench.kernels import EVERY, META, CheckSettings, Request, compile_ahead

    arch = _architecture(arch)
    folder = _default_folder() if out is None else out
    everything = not shapes
    request = Request(
        arch,
        folder,
        CheckSettings(META, every=EVERY) if (everything if check is None else check) else None,
        _cases(shapes or "cuda", case, dtype, temperature, top_k),
    )
    with progress_bar() as bar:
        task = bar.add_task("starting", total=None, note="")
        done = compile_ahead(
            request, processes, lambda what, n, of: bar.update(task, description=what, completed=n, total=of)
        )
    OUT.print(
        f"{done.variants} variants for {escape(arch)}: [bold]{done.anew} compiled[/], "
        f"{done.variants - done.anew} were there; {bytes_text(done.folder_bytes)} in {escape(str(folder))}",
        highlight=False,
    )
    if out is not None:
        ERRORS.print(f"set TRITON_CACHE_DIR={out.resolve()}; where it is carried to, kdcache kernels adopt it first")


@app.command()
def adopt(
    folder: Annotated[
        Path, typer.Argument(help="What [bold]kdcache kernels compile --out[/] wrote on another machine.")
    ],
) -> None:
    """Make a folder of compiled kernels usable where it was carried to.

    Triton's entries name their files by absolute paths: they are written anew. A folder that another Triton made is
    refused, for Triton would compile everything again without a word.
    """
    from kdcache.bench.kernels.cache_folder import adopt as adopt_folder

    count = adopt_folder(folder)
    OUT.print(f"{count} compiled kernels; set TRITON_CACHE_DIR={escape(str(folder.resolve()))}", highlight=False)


def _default_folder() -> Path:
    """Where Triton keeps its cache."""
    return Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")


def _architecture(name: str | None) -> str:
    """The GPU to compile for. Raises: RecipeError for one that is unknown, or where none is named nor here."""
    import difflib

    import torch

    from kdcache.bench.kernels.cache_folder import ARCHITECTURES

    if name is None and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        amd = getattr(properties, "gcnArchName", "").partition(":")[0] if torch.version.hip else ""
        return amd or f"sm_{properties.major}{properties.minor}"
    if name in ARCHITECTURES:
        return str(name)
    near = difflib.get_close_matches(name or "", ARCHITECTURES, n=1)
    raise RecipeError(
        f"--arch is one of {', '.join(ARCHITECTURES)}",
        received="none, and there is no GPU here" if name is None else repr(name),
        remedy=f"did you mean {near[0]}?" if near else "for instance --arch sm_90, of an H100 or H200",
    )


def _cases(shapes: str, case: str, dtype: str, temperature: str, top_k: str) -> "tuple[Case, ...]":
    import torch

    from kdcache.bench.kernels import DTYPES, KINDS, Settings, parse_names, parse_shapes

    settings = Settings(
        device=torch.device("meta"),
        shapes=parse_shapes(shapes),
        dtypes=parse_names(dtype, "--dtype", DTYPES),
        temperatures=parse_temperatures(temperature),
        kept=parse_kept(top_k),
        kinds=tuple(KINDS) if case == "all" else parse_names(case, "--case", KINDS),
    )
    return tuple(settings.cases())
