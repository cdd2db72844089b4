"""`kdcache sweep`: the shipped recipes, small and whole, with everything that the people they are for end with."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from matplotlib.figure import Figure
from PIL import Image

from kdcache.metrics.figures import save_figure
from kdcache.store import open_cache
from kdcache.store.format.flags import unpack_flags
from kdcache.sweep import Job
from kdcache_cli import torchrun
from kdcache_cli.verbs import sweep

RUNS = {
    "camvid-segformer": ["B0", "KD(KL) w=1.0", "KD(KL) w=0.5", "KD(AT)", "KD(SP)"],
    "voc-compare": ["Without KD (Baseline)", "Response-Based", "Feature-Based"],
    "voc-deeplab-mobilenet": ["no_distill", "response_distill", "feature_distill"],
}


QUICK = ("teacher.iterations=2", "student.iterations=2", "student.val-every=2", "data.path=scenes:48x64,train=16,val=4")
EPOCHS = ("teacher.iterations=2", "student.epochs=2", "student.val-every=1", "student.keep-every=1e")
"""Far fewer steps than `--smoke` has: these tests look at what comes out, not at how good it is."""


def streams(train: int, kinds: dict[str, str]) -> list[str]:
    """The changes that give the streams of a recipe few samples."""
    scenes = f"scenes:48x64,train={train},val=4"
    return [f'stream.{name}.data="{scenes},seed={seed}{kind}"' for seed, (name, kind) in enumerate(kinds.items())]


def quick(*changes: str, pictures: int = 1) -> list[str]:
    """The flags of changes and of small sizes. With 0 `pictures`, no image is drawn and no gradient is measured."""
    sizes = (
        "teacher.size=48x64",
        "teacher.val-every=2",
        "student.log-every=1",
        f"student.gradients-every={pictures}",
        f"show.num={pictures}",
    )
    return [word for change in (*sizes, *changes) for word in ("--set", change)]


@pytest.fixture
def drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of one kind are copies of the first one: drawing takes most of the time of a small sweep."""
    drawn: dict[tuple[str, int], bytes] = {}

    def save(figure: Figure, path: Path, *options: Any) -> list[Path]:
        kind = (re.split("[^a-z-]", path.name)[0], len(figure.axes))
        if kind not in drawn:
            save_figure(figure, path, *options)
            drawn[kind] = path.read_bytes()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(drawn[kind])
        return [path]

    for module in ("analysis.gallery", "analysis.visualise", "teacher.audit.figures"):
        monkeypatch.setattr(f"kdcache.{module}.save_figure", save)


@pytest.mark.usefixtures("drawn_once")
@pytest.mark.parametrize(
    "name", [name if name == "voc-compare" else pytest.param(name, marks=pytest.mark.slow) for name in RUNS]
)
def test_a_recipe_leaves_all_that_its_user_would_have(name: str, cli, tmp_path: Path) -> None:
    out = tmp_path / "out"
    small = quick(*(EPOCHS if name == "voc-deeplab-mobilenet" else QUICK))
    ended = cli("sweep", name, "--smoke", "--out", out, *small)
    assert ended.code == 0, ended.err
    found = json.loads((out / "comparison.json").read_text(encoding="utf-8"))
    rows = [row["name"] for row in found["rows"]]
    assert rows == [*RUNS[name], "teacher"]
    assert [row["name"] for row in found["rows"] if row["baseline"]] == RUNS[name][:1]
    for row in found["rows"]:
        assert row["cost"]["parameters"] > 0
        assert row["cost"]["latency"]["mean_ms"] > 0
    for table in ("comparison.md", "comparison.csv", "details.md", "kd_comparison_results.txt"):
        text = (out / table).read_text(encoding="utf-8")
        assert all(row in text for row in rows), table
        assert ("Smoke run on procedural scenes" in text) == (not table.endswith(".csv")), table
    page = (out / "report.html").read_text(encoding="utf-8")
    assert found["classes"][0]["name"] in page
    assert re.search(r'<p class="banner" role="note">Smoke run on procedural scenes', page)
    assert "<h1>Smoke run: " in page
    _check_pictures(out / "pictures", len(RUNS[name]))
    if name == "camvid-segformer":
        assert all(len(row["runs"]) == 2 for row in found["rows"])
        assert len(re.findall(r"^\| fold \d/2, seed 0 \| \d+ \|", (out / "details.md").read_text(), re.M)) == 12
    if name == "voc-deeplab-mobilenet":
        assert len(list((out / "runs" / "response_distill" / "checkpoints").iterdir())) == 2
    if name == "voc-compare":
        _check_that_nothing_is_done_twice(name, out, cli)


@pytest.mark.slow
@pytest.mark.usefixtures("drawn_once")
def test_few_labels_have_a_teacher_for_each_number_and_a_curve_on_the_page(cli, tmp_path: Path) -> None:
    out = tmp_path / "out"
    few = quick(*QUICK, "student.limit-labels=[2,6]", pictures=0)
    ended = cli("sweep", "few-labels", "--smoke", "--out", out, *few)
    assert ended.code == 0, ended.err
    assert {path.name for path in (out / "teachers").iterdir()} == {"teacher-2", "teacher-6"}
    for count in (2, 6):
        (training,) = open_cache(out / "stores" / f"store-{count}.zarr").manifest.teacher.trainings
        assert training is not None
        assert unpack_flags(training.labels or "", 16, out).sum() == count
    rows = json.loads((out / "comparison.json").read_text(encoding="utf-8"))["rows"]
    assert [row["difference"]["baseline"] for row in rows if row["name"].startswith("distilled")] == [
        f"labels only, limit-labels {count}" for count in (2, 6)
    ]
    assert 'class="curve" src="data:image/png;base64,' in (out / "report.html").read_text(encoding="utf-8")


def _check_that_nothing_is_done_twice(name: str, out: Path, cli) -> None:
    before = {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("*.safetensors")}
    again = cli("sweep", name, "--smoke", "--out", out, *quick(*QUICK, "show.num=0"))
    assert again.code == 0, again.err
    assert {path: path.stat().st_mtime_ns for path in before} == before


def _check_pictures(pictures: Path, runs: int) -> None:
    """What the document lists: ranks and scores in the names, panels, distribution, metrics, curves."""
    folders = [path for path in pictures.iterdir() if path.is_dir() and path.name != "side_by_side"]
    assert len(folders) == runs
    for folder in folders:
        for file in ("iou_distribution.png", "confusion.png", "curves.png", "evaluation_metrics.txt"):
            assert (folder / file).stat().st_size > 0
        for kind, names in (("success", "successful_cases"), ("failure", "failure_cases")):
            drawn = sorted((folder / names).iterdir())
            assert re.fullmatch(rf"{kind}_rank1_.+_iou\d\.\d{{4}}\.png", drawn[0].name)
            with Image.open(drawn[0]) as image:
                assert min(image.size) > 300
    side = [path.name.partition("_")[0] for path in (pictures / "side_by_side").iterdir()]
    assert sorted(side) == ["failure", "success", "success"]


def test_without_a_recipe_they_are_listed(cli) -> None:
    ended = cli("sweep")
    assert ended.code == 0
    assert all(name in ended.out for name in RUNS)


def test_a_dry_run_shows_commands_and_makes_nothing(cli, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ended = cli("sweep", "camvid-segformer", "--data", "CamVid", "--out", out, "--seeds", "0,1", "--dry-run")
    assert ended.code == 0
    assert ended.out.count("kdcache train-student") == 20
    assert "--iterations 40000" in ended.out
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("voc-compar", "--smoke", "--out", "OUT"), "Did you mean voc-compare"),
        (("voc-compare", "--out", "OUT"), "--data"),
        (("voc-compare", "--smoke"), "--out"),
        (("voc-compare", "--smoke", "--out", "OUT", "--set", "student.itertions=1"), "Did you mean iterations"),
        (("voc-compare", "--smoke", "--out", "OUT", "--set", "nonsense"), "TABLE.KEY=VALUE"),
        (("voc-compare", "--smoke", "--out", "OUT", "--seeds", "a"), "--seeds"),
        (("voc-compare", "--data", "a", "--data", "b", "--out", "OUT"), "Leave one of them out"),
        (("safetrip-hydranet", "--data", "surface=a", "--out", "OUT"), "--data polygon=DIR --data kitti=DIR"),
        (
            ("safetrip-hydranet", "--smoke", "--data", "kitti=scenes:48x64", "--out", "OUT"),
            "learn depth in the stream kitti",
        ),
        (("safetrip-hydranet", "--smoke", "--set", "stream.kiti.share=1", "--out", "OUT"), "Did you mean kitti"),
        (("voc-compare", "--data", "NOWHERE", "--out", "OUT"), "NOWHERE"),
    ],
)
def test_what_is_wrong_is_said(words: tuple[str, ...], named: str, cli, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    ended = cli("sweep", *words)
    assert ended.code == 2
    assert named in ended.err
    assert "Traceback" not in ended.err


@pytest.mark.parametrize("rank", [0, 1])
def test_processes_of_torchrun_are_refused(rank: int, cli, tmp_path: Path, monkeypatch) -> None:
    for name, value in {"RANK": rank, "WORLD_SIZE": 2, "TORCHELASTIC_RUN_ID": "1"}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torchrun, "GRACE_S", 0)
    ended = cli("sweep", "voc-compare", "--smoke", "--out", tmp_path / "out")
    assert ended.code == 2
    assert ("--parallel N" in ended.err) == (rank == 0)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("drawn_once")
def test_the_cure_weighs_classes_by_trust_and_names_every_combination(cli, tmp_path: Path) -> None:
    ended = cli("sweep", "camvid-segformer-cure", "--smoke", "--out", tmp_path / "out", *quick(*QUICK, pictures=0))
    assert ended.code == 0, ended.err
    assert "trust in the teacher: sky" in ended.err
    found = json.loads((tmp_path / "out" / "comparison.json").read_text(encoding="utf-8"))
    rows = [row["name"] for row in found["rows"]]
    assert len(rows) == 11
    assert {"B0", "KL w=0.1 T=4.0", "KL, trusted by class, w=0.5 T=1.0", "teacher"} <= set(rows)
    assert found["split"] == "val"


@pytest.mark.slow
@pytest.mark.usefixtures("forked_jobs")
def test_a_sweep_side_by_side_that_fails_says_why_and_goes_on(cli, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text(
        'title = "mine"\n[data]\npath = "scenes:32x48,train=8,val=4"\n'
        '[teacher]\nmodel = "kdcache:base"\nsize = "32x48"\niterations = 2\nbatch-size = 4\n'
        '[student]\nmodel = "kdcache:tiny"\niterations = 2\nbatch-size = 4\n'
        '[[arm]]\nname = "plain"\nmethod = "none"\n[[arm]]\nname = "wide"\nmethod = "kl"\nkl-weight = [0.5, 1.0]\n'
        "[show]\nnum = 1\n",
        encoding="utf-8",
    )
    out = tmp_path / "out"
    ended = cli("sweep", recipe, "--out", out, "--parallel", "2", "--set", "student.init=none.pt")
    assert ended.code == 2
    assert "none.pt" in ended.err
    assert (out / "teachers" / "teacher" / "result.json").is_file()
    refused = cli("sweep", recipe, "--out", out, "--parallel", "2")
    assert refused.code == 2
    assert "Cannot continue the sweep in" in refused.err
    whole = cli("sweep", recipe, "--out", tmp_path / "new", "--parallel", "2")
    assert whole.code == 0, whole.err
    assert (tmp_path / "new" / "report.html").is_file()
    jobs = {log.stem for log in (tmp_path / "new" / "logs").iterdir()}
    students = {"plain", "wide-kl-weight-0.5", "wide-kl-weight-1.0"}
    assert jobs == {"teacher", "store", "comparison", "report", *students}


def test_jobs_side_by_side_take_the_gpus_in_turn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Jobs share the GPUs that the command may use as evenly as they can; a GPU that a job names stays."""
    taken: dict[str, str | None] = {}
    meet = threading.Barrier(3)

    def run(command: list[str], env: dict[str, str], **_: Any) -> subprocess.CompletedProcess[str]:
        taken[command[-1]] = env.get("CUDA_VISIBLE_DEVICES")
        meet.wait(timeout=60)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(sweep.subprocess, "run", run)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    apart = sweep.Apart(SimpleNamespace(out=tmp_path), 3)
    for _ in range(2):
        jobs = [Job(f"job {n}", ("train-student", f"{n}"), None) for n in range(3)]
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(apart, jobs))
        assert sorted(gpu or "" for gpu in taken.values()) in (["3", "3", "5"], ["3", "5", "5"])
    meet = threading.Barrier(1)
    apart(Job("pinned", ("train-student", "--device", "cuda:1"), None))
    assert taken["cuda:1"] == "3,5"
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    sweep.Apart(SimpleNamespace(out=tmp_path), 2)(Job("none", ("train-student", "cpu"), None))
    assert taken["cpu"] is None


@pytest.mark.slow
@pytest.mark.usefixtures("drawn_once")
def test_a_network_of_two_tasks_from_three_streams(cli, tmp_path: Path) -> None:
    """A teacher of two labelled sets, its targets of images with depth, and each way to learn from them."""
    out = tmp_path / "out"
    few = streams(16, {"surface": "", "polygon": "", "kitti": ",depth=sparse,tasks=depth"})
    ended = cli("sweep", "safetrip-hydranet", "--smoke", "--out", out, *quick(*QUICK[:3], *few))
    assert ended.code == 0, ended.err
    rows = [row["name"] for row in json.loads((out / "comparison.json").read_text(encoding="utf-8"))["rows"]]
    assert [*rows[:2], *rows[-4:]] == [
        *("without pseudo labels", "pseudo labels from 0.7", "teacher of mirrored and rescaled images"),
        *("two teachers", "balance learnt (uncertainty)", "teacher"),
    ]
    assert {path.name for path in (out / "stores").iterdir()} >= {"kitti.zarr", "kitti-tta.zarr", "kitti-ensemble.zarr"}
    assert "No pseudo labels from 0.9 in all 16 samples" in " ".join(
        ended.err.split()
    )  # a teacher of two steps is sure of nothing
    lines = (out / "runs" / "pseudo-labels-from-0.7" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    validated = [line for line in map(json.loads, lines) if line["kind"] == "validation"]
    assert all(line["miou"] > 0 and line["depth_rmse"] > 0 for line in validated)
    trained = next(line for line in map(json.loads, lines) if line["kind"] == "train")
    assert {"surface/ce", "polygon/ce", "kitti/pseudo", "kitti/depth-silog"} <= set(trained)
    _check_pictures(out / "pictures", len(rows) - 1)
    assert (out / "report.html").stat().st_size > 0


def rows_of(out: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((out / "comparison.json").read_text(encoding="utf-8"))["rows"]
    return rows


VARIANTS = (
    "source alone",
    "adversarial, {target.limit-samples} target images",
    "adversarial, multi level, {target.limit-samples} target images",
    "adversarial, multi level, source",
    "adversarial, multi level, source, {target.limit-samples} target images",
    "adversarial, multi level, RandAugment of one side",
    "CutMix, {target.limit-samples} target images",
    "CutMix, then without it",
    "CutMix, multi level, RandAugment, {target.limit-samples} target labels",
    "pseudo labels, RandAugment of both sides",
    "pseudo labels after adversarial",
    "pseudo labels after adversarial, RandAugment",
    "pseudo labels alone after CutMix",
    "own pseudo labels from 0.5 after CutMix",
    "own pseudo labels after CutMix, multi level",
    "own soft targets",
    "own soft targets, ClassMix",
)
"""Arms of gta5-cityscapes that repeat settings of other arms, each in another mix."""


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.usefixtures("drawn_once")
def test_from_a_game_to_a_camera(cli, tmp_path: Path) -> None:
    """An arm of every kind, small: the stores of a teacher, a student and rounds, their audits, and the curve."""
    out = tmp_path / "out"
    recipe = (resources.files("kdcache.sweep") / "recipes" / "gta5-cityscapes.toml").read_text(encoding="utf-8")
    for name in VARIANTS:  # tests/sweep plans these also
        recipe, count = re.subn(rf'(?m)^\[\[(?:smoke\.)?arm\]\]\nname = "{re.escape(name)}"\n(?:.+\n)+', "", recipe)
        assert count
    # Students of two steps are sure of no pixel, and a target without one is refused.
    assert "threshold = 0.5 }" in recipe
    recipe = recipe.replace("threshold = 0.5 }", "threshold = 0.15 }")
    (tmp_path / "few-steps.toml").write_text(
        recipe.replace("limit-samples = [48, 32, 16, 8, 4]", "limit-samples = [8, 4]")
    )
    few = streams(8, {"source": ",style=game", "translated": "", "target": ",style=camera"})
    ended = cli("sweep", tmp_path / "few-steps.toml", "--smoke", "--out", out, *quick(*QUICK[:3], *few, pictures=0))
    assert ended.code == 0, ended.err
    rows = [row["name"] for row in rows_of(out)]
    assert len(rows) == 20
    stores = {path.stem for path in (out / "stores").iterdir()}
    kinds = ("", "-adapted", "-mean", "-round-2")
    assert stores == {f"target{name}" for name in kinds}
    models = {row["name"]: row["cost"]["parameters"] for row in rows_of(out)}
    assert models["adversarial, multi level"] == models["adversarial"], "the auxiliary head is gone"
    assert {path.name for path in (out / "audits").iterdir()} == stores
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "What the teacher of each cache gives" in page
    assert len(list((out / "pictures").glob("*/curves.png"))) == len(rows) - 1
    with Image.open(out / "curve.png") as image:
        assert min(image.size) > 300


@pytest.mark.slow
@pytest.mark.usefixtures("drawn_once")
def test_a_kill_in_the_second_round_changes_nothing(cli, fork: Callable[..., Any], tmp_path: Path) -> None:
    """Self-training: every round's store has the store of the round before as its parent, and an audit."""
    scenes = "scenes:48x64,train=8,val=4,style"
    words = ["self-train", "--data", f"source={scenes}=game", "--data", f"target={scenes}=camera,seed=1"]
    sizes = [f"{table}.size=48x64" for table in ("teacher", "store", "student")]
    few = ("teacher.iterations=4", "teacher.val-every=4", "student.iterations=16", "student.val-every=4")
    out = tmp_path / "out"
    words += [*quick(*few, *sizes, pictures=0), "--out", out]
    ended = cli("sweep", *words)
    assert ended.code == 0, ended.err
    runs = [out / f"runs/self-training-round-{number}" for number in (2, 3)]
    whole = [(run / "last-ema.safetensors").read_bytes() for run in runs]
    for folder in (*runs, out / "stores/target-round-3.zarr", out / "audits/target-round-3"):
        shutil.rmtree(folder)
    (out / "report.html").unlink()
    process = fork("sweep", *words)
    while process.poll() is None and not (runs[0] / "checkpoint.pt").exists():
        time.sleep(0.005)
    process.kill()
    process.communicate()
    assert (runs[0] / "checkpoint.pt").exists()
    assert not (runs[0] / "result.json").exists(), "it ended before it was killed"
    ended = cli("sweep", *words)
    assert ended.code == 0, ended.err
    rounds = [f"self-training, round {number}" for number in (1, 2, 3)]
    assert [row["name"] for row in rows_of(out)] == ["source alone", *rounds, "teacher"]
    assert [(run / "last-ema.safetensors").read_bytes() for run in runs] == whole
    names = ("target", "target-round-2", "target-round-3")
    stores = [open_cache(out / "stores" / f"{name}.zarr") for name in names]
    seals = [(store.ledger.completion.digest,) for store in stores]
    assert [store.manifest.teacher.parents for store in stores] == [(), *seals[:2]]
    assert {path.parent.name for path in (out / "audits").glob("*/report.json")} == set(names)
    assert "What the teacher of each cache gives" in (out / "report.html").read_text(encoding="utf-8")
