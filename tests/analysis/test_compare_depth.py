"""Runs of several tasks side by side: a best and a verdict for each task, a dash where a run has none."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_model

from kdcache.analysis.compare import CompareOptions, compare
from kdcache.analysis.comparison import Comparison
from kdcache.analysis.per_image import RMSE
from kdcache.analysis.report import ReportOptions, make_report
from kdcache.analysis.report.scores import scores
from kdcache.analysis.report.sections import streams
from kdcache.analysis.report.summary import headline
from kdcache.analysis.runs import find_runs
from kdcache.analysis.statistics import Blocks, Spread, resample
from kdcache.analysis.stored_evaluations import EvalSettings
from kdcache.analysis.tables import BOLD, difference_table, legend, score_table, to_csv, to_markdown, to_text
from kdcache.analysis.visualise import Drawing, score_run
from kdcache.data import open_split
from kdcache.errors import DataError
from kdcache.metrics import Inference, evaluate_tasks
from kdcache.metrics.evaluators import EVALUATORS
from kdcache.models import build_model
from kdcache.models.run import load_run
from kdcache.run_folder import RunModel
from kdcache.settings.shared import DepthSettings
from kdcache.tasks import DEPTH

DATA = "scenes:40x56,train=2,val=5,depth=exact"
SIZE = (24, 40)


def write_run(folder: Path, spec: str, method: str, seed: int, untrained: tuple[str, ...] = ()) -> None:
    """A run of random weights, as a training leaves it, with lines on depth and on tasks in its log."""
    torch.manual_seed(seed + 10 * (method == "none"))
    model, classes = build_model(spec, 7), open_split(DATA, "val").classes
    if "+depth" in spec:
        with torch.no_grad():
            model.depth_head[-1].weight.mul_(30)
    description = RunModel(
        spec=spec,
        class_names=classes.names,
        class_colours=classes.colours,
        size=SIZE,
        mean=model.mean,
        std=model.std,
        heads=model.regressions,
        untrained=untrained,
    )
    folder.mkdir(parents=True)
    (folder / "model.json").write_text(description.model_dump_json())
    settings = {"verb": "train-student", "model": spec, "val": DATA, "method": method, "seed": seed}
    (folder / "recipe.toml").write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items()))
    save_model(model, folder / "best.safetensors")
    tasks = {"segmentation": {"loss": 1.0, "weight": 0.5}, "depth": {"loss": 0.5, "weight": 0.5}}
    norms = {task: {"norm": 1.0, "ratio": 1.0} for task in tasks}
    lines = [
        {"kind": "train", "step": 1, "loss": 2.0, "ce": 1.0, "tasks": tasks},
        {"kind": "gradients", "step": 1, "ce": 1.0, "tasks": norms},
        {"kind": "validation", "step": 1, "miou": 0.1, "depth_rmse": 20.0},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds of a taught and of a plain network of both tasks, and one of segmentation alone."""
    root = tmp_path_factory.mktemp("runs")
    for method in ("kl", "none"):
        for seed in (0, 1):
            write_run(root / f"{method}-{seed}", "kdcache:tiny+depth", method, seed)
    write_run(root / "plain", "kdcache:tiny", "none", 0)
    return root


QUICK = CompareOptions(repeats=0)


@pytest.fixture(scope="module")
def compared(runs: Path) -> Comparison:
    return compare([runs], options=QUICK)


def test_every_task_has_the_scores_of_an_evaluation(runs: Path, compared: Comparison) -> None:
    assert compared.tasks == ("segmentation", "depth")
    for row in compared.rows:
        for score in row.runs:
            model, description = load_run(score.run)
            assert score.tasks == evaluate_tasks(model, open_split(DATA, "val"), Inference(description.size))
    again = compare([runs], options=QUICK)
    assert all(score.reused for row in again.rows for score in row.runs)
    assert again.to_json()["rows"][0]["depth"] == compared.to_json()["rows"][0]["depth"]


def test_of_depth_the_least_is_best_and_who_has_none_has_a_dash(compared: Comparison) -> None:
    header, rows = score_table(compared)
    column = header.index("rmse m")
    shown = {cells[0]: cells[column] for cells in rows}
    least = min((row for row in compared.rows if DEPTH in row.scores), key=lambda row: row.spread(DEPTH).mean)
    best = [name for name, cell in shown.items() if cell.startswith(BOLD[0])]
    assert len(best) == 1
    assert least.name in best[0]
    plain = next(row for row in compared.rows if DEPTH not in row.scores)
    assert shown[plain.name] == "-" or shown[f"{plain.name} (baseline)"] == "-"
    assert "-" in [cells[header.index("δ1 %")] for cells in rows]


def test_table_and_page_mark_the_smallest_errors_and_the_largest_delta(compared: Comparison) -> None:
    """Of three rows, each the best by another metric."""
    values = {"rmse": (3.0, 1.25, 2.0), "abs_rel": (0.2, 0.3, 0.125), "delta1": (0.75, 0.25, 0.5)}
    judged = next(row for row in compared.rows if DEPTH in row.scores)
    rows = []
    for place in range(3):
        own = {name: Spread.of([of_row[place]]) for name, of_row in values.items()}
        rows.append(replace(judged, name=f"row {place}", scores=judged.scores | {DEPTH: own}))
    three = replace(compared, rows=tuple(rows))
    header, cells = score_table(three)
    marked = {name: [row[0] for row in cells if row[header.index(name)].startswith("**")] for name in header}
    assert (marked["rmse m"], marked["abs rel"], marked["δ1 %"]) == (["row 1"], ["row 2"], ["row 0"])
    bold = re.findall(r"<td[^>]*><strong>\s*(?:<span[^>]*>)?\s*([\d.]+)", str(scores(three)))
    assert [float(text) for text in bold] == [75, 1.25, 0.125]  # by rows
    assert three.to_json()["best_depth_rmse"] == 1.25


def test_the_distance_in_depth_is_that_of_the_pairs(compared: Comparison) -> None:
    taught = next(row for row in compared.rows if row.differs.get("method") == "kl")
    gap = taught.differences(DEPTH)[0]
    assert gap is not None
    assert gap.paired
    baseline = next(row for row in compared.rows if row.name == gap.baseline)
    pairs = [
        one.value(DEPTH) - two.value(DEPTH) for one in taught.runs for two in baseline.runs if one.seed == two.seed
    ]
    assert gap.mean == pytest.approx(np.mean(pairs))
    assert gap.resampled is not None
    assert gap.resampled.low < gap.mean < gap.resampled.high
    assert gap.comparisons == 1
    assert taught.difference is not None
    _, cells = difference_table(compared, "depth")
    assert [row[2] for row in cells] == [f"{gap.mean:+.3f}"]


def test_the_bootstrap_over_images_is_that_of_the_mean_of_rmse() -> None:
    """The draws are written out here, one image at a time."""
    generator = np.random.default_rng(0)
    ids = tuple("abcdef")
    ours, theirs = (
        [EVALUATORS[DEPTH].images(ids, generator.uniform(1, 5, (6, 8))) for _ in range(2)],
        [EVALUATORS[DEPTH].images(ids, generator.uniform(2, 6, (6, 8))) for _ in range(3)],
    )
    drawn = resample(ours, theirs, Blocks.of({name: name for name in ids}, "images"))
    own = np.mean([one.values[:, 0] for one in ours], 0) - np.mean([one.values[:, 0] for one in theirs], 0)
    means = [own[np.random.default_rng(seed).integers(0, 6, 6)].mean() for seed in range(4000)]
    low, high = np.quantile(means, (0.025, 0.975))
    assert drawn.low == pytest.approx(low, abs=0.08)
    assert drawn.high == pytest.approx(high, abs=0.08)


def test_files_have_every_task(compared: Comparison) -> None:
    assert "## Distance to the baseline in depth, metres of rmse" in to_markdown(compared)
    rows = list(csv.DictReader(io.StringIO(to_csv(compared))))
    shown = [row["depth_rmse_mean"] for row in rows]
    assert shown.count("") == 1
    assert "Depth RMSE (m)" in to_text(compared)
    content = json.loads(json.dumps(compared.to_json(), allow_nan=False))
    assert content["best_depth_rmse"] == min(float(value) for value in shown if value)
    assert {run["miou"] is None for row in content["rows"] for run in row["runs"]} == {False}


def test_one_range_for_all(runs: Path, compared: Comparison) -> None:
    assert compared.depth_range == "0.001 to 80 m"
    judging = EvalSettings(depth=DepthSettings(max_depth=20))
    near = compare([runs], options=CompareOptions(judging, repeats=0))
    assert near.depth_range == "0.001 to 20 m"
    with pytest.raises(DataError, match="Cannot use --min-depth"):
        compare([runs / "plain"], options=CompareOptions(judging, repeats=0))


def test_models_with_other_maxima_are_judged_by_the_widest_range(tmp_path: Path) -> None:
    """Each by its own would count other pixels, so that the model of the shortest range looked best."""
    for seed, top in enumerate((10, 40)):
        write_run(tmp_path / f"{top}", f"kdcache:tiny+depth,max={top}", "none", seed)
    compared = compare([tmp_path], options=QUICK)
    assert compared.depth_range == "0.001 to 40 m"
    metrics = [score.tasks.depth for row in compared.rows for score in row.runs]
    split, settings = open_split(DATA, "val"), DepthSettings(max_depth=40)
    expected = [
        evaluate_tasks(load_run(tmp_path / name)[0], split, Inference(SIZE), depth=settings).depth
        for name in ("10", "40")
    ]
    assert metrics == expected
    assert len({one.pixels for one in metrics if one is not None}) == 1


def test_segmentation_alone_has_the_tables_that_it_had(runs: Path) -> None:
    alone = compare([runs / "plain"], options=QUICK)
    assert "rmse" not in to_markdown(alone) + to_csv(alone) + to_text(alone)
    assert "depth" not in json.dumps(alone.to_json()["rows"])


@pytest.mark.parametrize("names", [("kl-0",), ("kl-0", "kl-1", "none-0", "none-1", "plain")])
def test_the_page_shows_every_task(runs: Path, names: tuple[str, ...], tmp_path: Path) -> None:
    options = ReportOptions(QUICK, samples=1)
    comparison = make_report([runs / name for name in names], None, None, tmp_path / "page.html", options)
    page = (tmp_path / "page.html").read_text()
    for text in ("rmse m", "Validation rmse of depth", "Gradient norm of the task depth", "Weight of the task depth"):
        assert text in page
    if len(names) > 1:
        assert any(sentence.startswith("Depth: the best row") for sentence in headline(comparison)[2])


def test_runs_of_depth_alone_have_a_best_and_a_verdict_and_no_word_of_classes(tmp_path: Path) -> None:
    for method in ("kl", "none"):
        for seed in (0, 1, 2):
            write_run(tmp_path / f"{method}-{seed}", "kdcache:tiny+depth", method, seed, ("segmentation",))
    alone = compare([tmp_path], options=QUICK)
    assert alone.tasks == ("depth",)
    assert not any("learnt nothing" in note for note in alone.notes)
    header, rows = score_table(alone)
    assert "mIoU %" not in header
    assert sum(cells[header.index("rmse m")].startswith(BOLD[0]) for cells in rows) == 1
    taught = next(row for row in alone.rows if row.differs.get("method") == "kl")
    assert taught.difference is None
    assert taught.differences(DEPTH)[0] is not None
    assert taught.differences(DEPTH)[0].verdict in ("above noise", "within noise")
    assert any(taught.differences(DEPTH)[0].verdict in cells for cells in rows)
    words = " ".join(legend(alone))
    assert "metres of rmse to" in words
    assert not any(term in words for term in ("confusion", "mIoU", "void"))
    assert "IoU" not in to_markdown(alone)


def test_a_head_of_which_a_run_learnt_nothing_is_not_judged(tmp_path: Path) -> None:
    write_run(tmp_path / "metres", "kdcache:tiny+depth", "none", 0, ("segmentation",))
    write_run(tmp_path / "classes", "kdcache:tiny+depth", "none", 0, ("depth",))
    split = open_split(DATA, "val")
    metres, classes = (load_run(tmp_path / name)[0] for name in ("metres", "classes"))
    assert evaluate_tasks(metres, split, Inference(SIZE)).segmentation is None
    assert evaluate_tasks(classes, split, Inference(SIZE)).depth is None
    with pytest.raises(DataError, match="depth in metres"):
        evaluate_tasks(classes, split, Inference(SIZE), depth=DepthSettings(max_depth=10))
    with pytest.raises(DataError) as error:
        evaluate_tasks(metres, open_split("scenes:40x56,train=2,val=5", "val"), Inference(SIZE))
    assert "learnt nothing of segmentation" in error.value.problem


def test_pictures_of_depth_alone_are_ranked_by_rmse_and_the_page_shows_them(tmp_path: Path) -> None:
    for method in ("none", "kl"):
        write_run(tmp_path / f"metres-{method}", "kdcache:tiny+depth", method, 0, ("segmentation",))
    write_run(tmp_path / "both", "kdcache:tiny+depth", "dist", 0)
    runs, split = [tmp_path / f"metres-{method}" for method in ("none", "kl")], open_split(DATA, "val")
    folder = tmp_path / "out"
    drawing = ReportOptions(QUICK, samples=0, drawing=Drawing(folder, num=1))
    make_report([*runs, tmp_path / "both"], None, None, tmp_path / "page.html", drawing)
    (entry,) = find_runs([runs[0]])
    shown = score_run(entry, "metres", split, EvalSettings(), lambda *_: None)
    assert shown.heads == ("depth",)
    model, description = load_run(runs[0])
    judged = evaluate_tasks(model, split, Inference(description.size)).depth
    assert judged is not None
    assert judged.images is not None
    assert [image.score(DEPTH) for image in shown.scores.images] == judged.images.values[:, 0].tolist()
    best, worst = min(shown.scores.known(RMSE)), max(shown.scores.known(RMSE))
    own = {path.name.rpartition("_")[2] for path in folder.glob("metres-none/*_cases/*.png")}
    assert own == {f"rmse{best:.4f}.png", f"rmse{worst:.4f}.png"}
    assert (folder / "metres-none" / "rmse_distribution.png").is_file()
    assert not (folder / "metres-none" / "confusion.png").exists()
    assert (folder / "both" / "confusion.png").is_file()
    assert "mIoU" not in (folder / "metres-none" / "evaluation_metrics.txt").read_text()
    assert len(list((folder / "side_by_side").glob("*_rmse*.png"))) == 3
    assert json.loads((folder / "visualise.json").read_text())["runs"]["metres-none"]["heads"] == ["depth"]
    make_report(runs, None, None, tmp_path / "page.html", ReportOptions(QUICK, samples=1))
    page = (tmp_path / "page.html").read_text()
    assert page.count('alt="depth, ground truth of') == 2
    assert "error of depth, " in page
    assert not any(words in page for words in ("mIoU of this image", 'id="mark-wrong"'))


def test_the_page_shows_images_of_either_task_and_says_why_there_are_none(tmp_path: Path) -> None:
    """Of joined data no image has both labels; rows of one task each share no image; --samples 0 wants none."""
    joined = "scenes:40x56,train=2,val=5 + depth:scenes:40x56,train=2,val=5,seed=2,depth=sparse,tasks=depth"
    for name, untrained in (("both", ()), ("metres", ("segmentation",)), ("classes", ("depth",))):
        write_run(tmp_path / name, "kdcache:tiny+depth", "none", 0, untrained)
    pages = {}
    for name, runs, samples in (("both", ["both"], 1), ("apart", ["metres", "classes"], 1), ("none", ["both"], 0)):
        options = ReportOptions(QUICK, samples=samples)
        make_report([tmp_path / run for run in runs], joined, "val", tmp_path / f"{name}.html", options)
        pages[name] = (tmp_path / f"{name}.html").read_text()
    assert re.findall(r'class="rank">([^<]*)<', pages["both"])[:2] == ["best 1", "worst 1"]
    assert re.findall(r'class="rank">([^<]*)<', pages["both"])[-2:] == ["best in depth 1", "worst in depth 1"]
    assert pages["both"].count('alt="depth, ground truth of') == 2
    assert "images with labels of depth" in pages["both"]
    assert "No image is the best or the worst of all rows" in pages["apart"]
    assert 'id="pictures"' not in pages["none"]


def test_the_page_has_share_rows_and_weight_of_each_stream(tmp_path: Path) -> None:
    tables = [{"name": "<b>", "share": 0.25, "weight": 0.5, "data": "a"}, {"name": "far", "cache": "b.zarr"}]
    assert streams({}) == streams({"stream": [], "batch-size": 8}) == []
    expected = [["<b>", "a", "25.00", "2", "0.5"], ["far", "b.zarr", "75.00", "6", "1"]]
    assert streams({"stream": tables, "batch-size": 8}) == expected
    write_run(tmp_path / "run", "kdcache:tiny+depth", "none", 0)
    with (tmp_path / "run" / "recipe.toml").open("a") as recipe:
        recipe.write('batch-size = 8\n[[stream]]\nname = "near"\nshare = 0.25\ndata = "a"\n[[stream]]\nname = "far"\n')
    make_report([tmp_path / "run"], None, None, tmp_path / "page.html", ReportOptions(QUICK, samples=0))
    page = (tmp_path / "page.html").read_text()
    assert "The streams of" in page
    assert "share of the batch" in page
