"""`kdcache bench-kernels`: how fast, how small and how exact the loss is, here."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from kdcache.progress import progress_bar
from kdcache.settings.removed import FLAGS, removal
from kdcache.settings.shared import MachineSettings
from kdcache_cli.console import OUT, figure_table
from kdcache_cli.measuring import MISSING, GrowingResult, JsonFile, check_json, contestants, line, stages
from kdcache_cli.settings import shared_flags

if TYPE_CHECKING:  # the verb imports what it needs: --help must not wait for torch
    import torch

    from kdcache.bench.kernels import Ceilings, Judged, Measured, Row, Settings, Spread

_Option = typer.Option
MISSES_SHOWN = 10


def bench_kernels(
    check: Annotated[
        bool, _Option("--check", help="Check the accuracy against float64 instead; 1 when a bound is missed.")
    ] = False,
    device: shared_flags.Device = MachineSettings.device,
    shapes: Annotated[
        str | None,
        _Option("--shapes", help="BxCxHxW/STRIDE at label size, or presets, comma-separated (default: the device's)."),
    ] = None,
    dtype: Annotated[
        str | None,
        _Option("--dtype", help="Dtypes of the logits (default: fp32, on CUDA bf16, with --check all)."),
    ] = None,
    case: Annotated[
        str,
        _Option(
            "--case",
            help="What a step computes: plain, trained, warp, gate, dist, dist-warp or all.",
        ),
    ] = "plain",
    against: Annotated[
        str,
        _Option("--against", help="eager, compile, compile-max-autotune, chunked (image by image), liger; or none."),
    ] = "eager,compile,liger",
    repeats: Annotated[
        int | None, _Option("--repeats", help="Samples of each, at least 3 (default: 15; 100 on CUDA).")
    ] = None,
    memory: Annotated[bool, _Option(help="Measure peak memory; on a CPU in a fresh process each.")] = True,
    threads: shared_flags.Threads = MachineSettings.threads,
    json_file: JsonFile = None,
) -> None:
    """Measure time and memory of the loss kernels on this machine, and check their results.

    Measures forward and backward of cross-entropy plus KL, or of the term dist. Other implementations are timed
    in turn, on the same tensors. Each row is printed and written to --json at once, so Ctrl-C keeps the finished rows.
    On a GPU, the first figure is the device time of a CUDA graph. [bold]host ms[/] is the CPU time to issue a step.

    [dim]kdcache bench-kernels --shapes camvid --against eager,compile --json kernels-cpu.json[/]
    """
    import torch

    from kdcache.bench.kernels import DTYPES, KINDS, RIVALS, Settings, parse_names, parse_shapes
    from kdcache.bench.timing import check_repeats
    from kdcache.training import pick_device

    _check_removed("--case", case)
    _check_removed("--shapes", shapes or "")
    if threads:
        torch.set_num_threads(threads)
    where = pick_device(device)
    cuda = where.type == "cuda"
    check_json(json_file)
    if repeats is not None:
        check_repeats(repeats)
    if check:
        raise typer.Exit(1 if _check(where, dtype, json_file) else 0)
    settings = Settings(
        device=where,
        shapes=parse_shapes(shapes or where.type),
        dtypes=parse_names(dtype or ("bf16" if cuda else "fp32"), "--dtype", DTYPES),
        kinds=tuple(KINDS) if case == "all" else parse_names(case, "--case", KINDS),
        against=() if against == "none" else parse_names(against, "--against", RIVALS),
        repeats=repeats,
        weigh=memory,
    )
    _measure(settings, json_file)


def _check_removed(flag: str, names: str) -> None:
    """Check that a flag's values are not removed ones. Raises: RecipeError with the replacement."""
    for name in names.split(","):
        if gone := removal(f"bench-kernels {flag} {name.strip().lower()}", FLAGS):
            raise gone


def _measure(settings: "Settings", json_file: Path | None) -> None:
    """Measure all cases. Print and write each result as it comes."""
    from kdcache.bench.kernels import measure, measure_ceilings

    result = GrowingResult(json_file, "kernels", of=len(list(settings.cases())))
    with result.kept_when_interrupted(), stages() as note:
        ceilings = measure_ceilings(settings, note)
        result.write(ceilings=ceilings and ceilings.to_json())
        for row in measure(settings, ceilings, note):
            _print_row(row, settings.device.type == "cuda")
            result.add(row.to_json())
        if ceilings is not None:
            line(_ceilings(ceilings))
    result.end()


def _check(device: "torch.device", dtype: str | None, json_file: Path | None) -> int:
    """Check the accuracy of the kernels, print the result, and return how many points missed a bound."""
    from kdcache.bench.kernels import DTYPES, EVERY, CheckSettings, check, parse_names, resolved, summary

    dtypes = parse_names(dtype or ",".join(DTYPES), "--dtype", DTYPES)
    settings = CheckSettings(device=device, dtypes=dtypes, every=EVERY)
    name, total = resolved(settings.impl, device), len(list(settings.points()))
    result = GrowingResult(json_file, "kernel accuracy", of=total)
    result.write(impl=name)
    judged: list[Judged] = []
    with result.kept_when_interrupted(), progress_bar() as bar:
        task = bar.add_task("checking", total=total, note="")
        for point in check(settings):
            judged.append(point)
            result.add(point.to_json())
            missed = sum(not point_result.passed for point_result in judged)
            bar.update(task, completed=len(judged), note=f"{missed} missed a bound" if missed else "")
    rows = summary(judged)
    _print_accuracy(f"{name} on {device.type}", judged, rows)
    result.end(summary=rows)
    return missed


def _print_accuracy(name: str, judged: "Sequence[Judged]", rows: list[dict[str, Any]]) -> None:
    """Print a table by dtype, the verdict, and the points that missed a bound, worst first."""
    from kdcache.bench.kernels import GRADIENT_BOUND

    missed = [result for result in judged if not result.passed]
    table = figure_table("", "points", "missed", "loss error / bound", "gradient error", "its bound from")
    for row in rows:
        errors = f"{row['loss_share']:.2f}", f"{row['gradient_error']:.1e}", f"{GRADIENT_BOUND[row['dtype']]:.0e}"
        table.add_row(row["dtype"], str(row["points"]), str(row["missed"]), *errors)
    OUT.print(table)
    OUT.print(f"{escape(name)}: {len(judged)} points, [bold]{len(missed)} missed a bound[/]", highlight=False)
    for worst in sorted(missed, key=lambda point: -max(point.loss_share, point.gradient_share))[:MISSES_SHOWN]:
        line(f"  {_miss(worst)}")


def _print_row(row: "Row", cuda: bool) -> None:
    """Print the result of one case: a line for kdcache's loss and for each rival, then remarks."""
    device = ["graph ms", "x graph"] if cuda else []
    times = [f"{'event' if cuda else 'best'} ms", "median", "p20 to p80", "x best", "x median"]
    host = ["host ms"] if cuda else []
    table = contestants(*device, *times, *host, "peak MiB", "x peak", title=str(row.case))
    for contestant in (row.ours, *row.rivals):
        if contestant.time is not None:
            style = "bold" if contestant is row.ours else None
            table.add_row(*_cells(row, contestant, contestant.time, cuda), style=style)
    OUT.print(table)
    if row.ours.floors:
        shares = ", ".join(f"{floor} {100 * share:.0f} %" for floor, share in row.ours.floors.items())
        bound, share = max(row.ours.floors.items(), key=lambda item: item[1])
        line(f"  roofline: {100 * share:.0f} % of its bound, {bound} ({shares})")
    for contestant in (row.ours, *row.rivals):
        bound = "the GPU waits for the CPU: event times are the CPU's" if contestant.host_bound else ""
        for text in filter(None, (bound, contestant.problem)):
            line(f"  {contestant.title}: {text}")
    OUT.print()


def _cells(row: "Row", contestant: "Measured", time: "Spread", cuda: bool) -> list[str]:
    ratios = row.ratios(contestant)
    cells = [_number(time.best), _number(time.p50), f"{_number(time.p20)} to {_number(time.p80)}"]
    cells += [_times(ratios["best"]), _times(ratios["median"])]
    if cuda:
        graph, host = contestant.graph, contestant.host
        graph_ms, host_ms = (None if spread is None else spread.p50 for spread in (graph, host))
        cells = [_number(graph_ms), _times(ratios["graph"]), *cells, _number(host_ms)]
    return [contestant.title, *cells, _number(contestant.peak_mib), _times(ratios["memory"])]


def _ceilings(ceilings: "Ceilings") -> str:
    return (
        f"ceilings: copy {ceilings.copy_bytes / 1e12:.2f} TB/s, {ceilings.exps / 1e12:.2f} T exp2/s, "
        f"{ceilings.instructions / 1e12:.1f} T instructions/s"
    )


def _miss(result: "Judged") -> str:
    point = " ".join(f"{name}={value}" for name, value in vars(result.point).items())
    return f"{point}: loss {result.loss_error:.1e} of {result.loss_bound:.1e}, gradient {result.gradient_error:.1e}"


def _number(value: float | None) -> str:
    """Return a number as text with three digits. A small number does not become 0."""
    if value is None:
        return MISSING
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _times(value: float | None) -> str:
    return MISSING if value is None else f"{_number(value)}x"
