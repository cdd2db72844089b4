"""The loop: what it logs, what it keeps, when it refuses to go on."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F
from torch.utils.data import default_collate

from kdcache.data import class_weights, open_split, write_scenes
from kdcache.errors import DataError, MismatchError, ModelError, RecipeError
from kdcache.metrics import evaluate_model
from kdcache.models import SegmentationModel, build_model, trusting
from kdcache.models.run import load_run
from kdcache.store import Cache, open_cache
from kdcache.teacher import BuildOptions, build_cache, load_teacher
from kdcache.training import CacheDataset, Observer, make_config, pick_device, train
from kdcache.training.input.loader import Draws
from kdcache.training.run.metrics_log import Score
from kdcache.training.trainer import Trainer

Read = Callable[..., list[dict[str, Any]]]


def go(settings: dict[str, Any], run: Path, **options: Any) -> dict[str, Any]:
    return train(make_config(**settings), run, **options)


def first_step(settings: dict[str, Any], cache: Cache) -> tuple[SegmentationModel, torch.Tensor, Any]:
    """Model, low-resolution logits and batch of the first step, put together anew."""
    torch.manual_seed(settings.get("seed", 0))
    model = build_model(settings["model"], cache.num_classes)
    draws = Draws(CacheDataset(cache), settings.get("seed", 0))
    batch = default_collate([draws[number] for number in range(settings["batch_size"])])
    return model, model.train()(model.normalise(batch.pixels)).logits, batch


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["model"]


# --- what a run leaves -------------------------------------------------------------------------------------


def test_gradient_norms_are_those_of_the_weighted_terms(
    student: dict[str, Any], cache: Cache, tmp_path: Path, read_metrics: Read
) -> None:
    settings = student | {"ce_weight": 0.7, "kl_weight": 0.4, "temperature": 3.0, "iterations": 3, "gradients_every": 2}
    go(settings, tmp_path / "run")
    rows = read_metrics(tmp_path / "run", "gradients")
    assert [row["step"] for row in rows] == [1, 3]
    model, logits, batch = first_step(settings, cache)
    z = F.interpolate(logits, (32, 48), mode="bilinear")
    ce = 0.7 * F.cross_entropy(z, batch.label.long(), ignore_index=255)
    kl = torch.zeros(())
    counted = 0
    for one, values, window, flip in zip(z, batch.target.values, batch.window, batch.flip, strict=True):
        y0, x0, y1, x1 = window.tolist()
        y = y0 + (torch.arange(32) + 0.5) * (y1 - y0) / 32
        x = x0 + (torch.arange(48) + 0.5) * (x1 - x0) / 48
        x = x.flip(0) if flip else x
        grid = torch.stack([(2 * x / 48 - 1).expand(32, 48), (2 * y / 32 - 1)[:, None].expand(32, 48)], -1)[None]
        t = F.grid_sample(values[None].float(), grid, padding_mode="border", align_corners=False)[0]
        inside = ((x >= 0) & (x <= 48))[None] & ((y >= 0) & (y <= 32))[:, None]
        pixel = F.kl_div((one / 3).log_softmax(0), (t / 3).log_softmax(0), reduction="none", log_target=True).sum(0)
        kl, counted = kl + pixel[inside].sum(), counted + int(inside.sum())
    expected = {}
    for name, term in (("ce", ce), ("kl", 0.4 * 9 * kl / counted)):
        gradients = torch.autograd.grad(term, list(model.parameters()), retain_graph=True)
        expected[name] = float(torch.cat([g.flatten() for g in gradients]).double().norm())
    assert {name: rows[0][name] for name in ("ce", "kl")} == pytest.approx(expected, rel=2e-4)
    logged = read_metrics(tmp_path / "run", "train")[0]
    assert logged["ce"] == pytest.approx(ce.item() / 0.7, rel=1e-4)
    assert logged["kl"] == pytest.approx((9 * kl / counted).item(), rel=1e-4)
    assert logged["loss"] == pytest.approx((ce + 0.4 * 9 * kl / counted).item(), rel=1e-4)


def test_gradient_norms_change_nothing(student: dict[str, Any], tmp_path: Path) -> None:
    for every in (0, 1):
        go(student | {"gradients_every": every}, tmp_path / str(every))
    one, two = (load_file(tmp_path / name / "last.safetensors") for name in "01")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_best_is_the_best_validated_step_and_last_is_the_last(
    student: dict[str, Any], tmp_path: Path, read_metrics: Read, scenes: str
) -> None:
    settings = student | {"iterations": 16, "val_every": 2, "lr": 0.02, "schedule": "constant", "seed": 1}
    result = go(settings, tmp_path)
    rows = read_metrics(tmp_path, "validation")
    assert [row["step"] for row in rows] == list(range(2, 17, 2))
    scores = [row["miou"] for row in rows]
    assert result["best_miou"] == max(scores)
    assert result["best_step"] == rows[int(np.argmax(scores))]["step"]
    assert result["best_step"] < 16, "choose settings whose score does not rise to the end"
    for which, expected in (("best", max(scores)), ("last", scores[-1])):
        model, summary = load_run(tmp_path, which)
        assert not model.training
        assert evaluate_model(model, open_split(scenes, "val"), summary.size).miou == pytest.approx(expected, abs=1e-12)
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert [entry["name"] for entry in rows[0]["classes"]] == list(open_split(scenes, "val").classes.names)


def test_without_validation_best_is_last(student: dict[str, Any], tmp_path: Path, read_metrics: Read) -> None:
    result = go(student | {"val": None}, tmp_path)
    assert (result["best_miou"], result["best_step"]) == (None, 6)
    assert (tmp_path / "best.safetensors").read_bytes() == (tmp_path / "last.safetensors").read_bytes()
    assert not read_metrics(tmp_path, "validation")


def test_a_validation_that_cannot_be_scored_still_leaves_best_weights(tmp_path: Path, settings: dict[str, Any]) -> None:
    root = write_scenes(tmp_path / "data", "scenes:32x48,train=3,val=1")
    for label in (root / "labels" / "val").glob("*.png"):
        Image.fromarray(np.full((32, 48), 255, np.uint8)).save(label)
    result = go(settings | {"data": str(root), "val": str(root)}, tmp_path / "run")
    assert result["best_miou"] is None
    load_run(tmp_path / "run", "best")


def test_learning_lowers_the_loss_and_raises_the_score(
    settings: dict[str, Any], tmp_path: Path, read_metrics: Read
) -> None:
    data = "scenes:32x48,train=12,val=6"
    long = settings | {"data": data, "val": data, "iterations": 100, "val_every": 50, "lr": 5e-3, "batch_size": 4}
    teacher = go(long, tmp_path / "teacher")
    split, val = open_split(data, "train"), open_split(data, "val")
    taught = load_teacher(str(tmp_path / "teacher"), split.classes)
    build_cache(split, taught, tmp_path / "cache.zarr", BuildOptions(size=(32, 48), views=1))
    torch.manual_seed(0)
    start = evaluate_model(build_model("kdcache:tiny", 7), val, (32, 48)).miou
    distilled = long | {"verb": "train-student", "data": None, "cache": str(tmp_path / "cache.zarr"), "method": "kl"}
    pupil = go(distilled | {"size": None}, tmp_path / "student")
    for run, result in ((tmp_path / "teacher", teacher), (tmp_path / "student", pupil)):
        rows = read_metrics(run, "train")
        for term in ("loss", "ce", *(["kl"] if run.name == "student" else [])):
            early, late = (np.mean([row[term] for row in part]) for part in (rows[:10], rows[-10:]))
            assert late < 0.6 * early, (run.name, term)
        assert result["best_miou"] > start + 0.15


def test_tied_weights_are_kept(settings: dict[str, Any], model_file: Callable[[str], str], tmp_path: Path) -> None:
    go(settings | {"model": model_file("tied")}, tmp_path / "run")
    with trusting():
        model, _ = load_run(tmp_path / "run", "last")
    assert torch.equal(model.state_dict()["left.weight"], model.state_dict()["right.weight"])


def test_the_same_command_gives_the_same_bytes(student: dict[str, Any], tmp_path: Path) -> None:
    for name in ("one", "two"):
        go(student, tmp_path / name)
    for weights in ("best.safetensors", "last.safetensors"):
        assert (tmp_path / "one" / weights).read_bytes() == (tmp_path / "two" / weights).read_bytes()


def test_students_with_and_without_a_teacher_start_from_the_same_loss(
    student: dict[str, Any], tmp_path: Path, read_metrics: Read
) -> None:
    for method in ("none", "kl"):
        go(student | {"method": method}, tmp_path / method)
    plain, taught = (read_metrics(tmp_path / method, "train") for method in ("none", "kl"))
    assert plain[0]["ce"] == taught[0]["ce"]
    assert (plain[0]["kl"], plain[0]["loss"]) == (0, plain[0]["ce"])
    assert plain[1]["ce"] != taught[1]["ce"]


def test_a_teacher_that_fades_is_all_there_at_first_and_gone_at_the_end(
    student: dict[str, Any], tmp_path: Path, read_metrics: Read
) -> None:
    settings = student | {"term": ["pseudo,threshold=0.01,weight=0.7"], "ce_weight": 0.5, "kl_weight": 2.0}
    settings |= {"iterations": 4, "log_every": 1, "gradients_every": 1}
    for name in ("constant", "fade"):
        go(settings | {"distill_schedule": name}, tmp_path / name)
    fading, norms = (read_metrics(tmp_path / "fade", kind) for kind in ("train", "gradients"))
    for step, row in enumerate(fading):
        strength = 1 - step / 4
        assert row["loss"] == pytest.approx(
            0.5 * row["ce"] + strength * (2 * row["kl"] + 0.7 * row["pseudo"]), rel=1e-5
        )
    constant = read_metrics(tmp_path / "constant", "gradients")
    assert norms[0] == constant[0]
    for term in ("kl", "pseudo"):
        assert norms[3][term] < 0.5 * constant[3][term]


def test_observers_see_everything(student: dict[str, Any], tmp_path: Path) -> None:
    class Seen(Observer):
        def __init__(self) -> None:
            self.calls: list[tuple[Any, ...]] = []

        def started(self, *, step: int, iterations: int, parameters: int) -> None:
            self.calls.append(("started", step, iterations, parameters))

        def stepped(self, step: int, values: dict[str, float]) -> None:
            self.calls.append(("stepped", step, *values))

        def gradients(self, step: int, norms: dict[str, float]) -> None:
            self.calls.append(("gradients", step, *norms))

        def validating(self, done: int, total: int) -> None:
            self.calls.append(("validating", done, total))

        def validated(self, step: int, task: str, score: Score, *, best: bool, ema: bool) -> None:
            self.calls.append(("validated", step, task, best, ema))

    seen = Seen()
    go(student | {"log_every": 2}, tmp_path, observer=seen)
    parameters = sum(p.numel() for p in build_model("kdcache:tiny", 7).parameters())
    assert seen.calls[0] == ("started", 0, 6, parameters)
    assert seen.calls[1] == ("gradients", 1, "ce", "kl")
    steps = [call for call in seen.calls if call[0] == "stepped"]
    assert steps == [("stepped", n, "loss", "ce", "kl", "lr", "images_per_second", "wait_share") for n in (2, 4, 6)]
    validations = [call for call in seen.calls if call[0] == "validated"]
    assert [call[:3] for call in validations] == [("validated", 3, "segmentation"), ("validated", 6, "segmentation")]
    assert validations[0][3:] == (True, False)
    assert ("validating", 3, 3) in seen.calls


# --- what is refused ---------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_stops_the_run_and_is_explained(
    settings: dict[str, Any], model_file: Callable[[str], str], tmp_path: Path, read_metrics: Read
) -> None:
    changed = settings | {"model": model_file("nan"), "val_every": 2, "val": None, "gradients_every": 1}
    with pytest.raises(ModelError) as caught:
        go(changed, tmp_path)
    assert "term ce of the head segmentation is nan at iteration 3" in caught.value.problem
    ids = open_split(settings["data"], "train").ids
    order = np.random.default_rng((0, 0)).permutation(6)
    assert all(ids[index] in caught.value.problem for index in order[4:6])
    assert all(ids[index] not in caught.value.problem for index in order[:4])
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["progress"]["step"] == 2
    assert all(tensor.isfinite().all() for tensor in state["model"].values())
    assert max(row["step"] for row in read_metrics(tmp_path)) == 2


def test_a_target_that_is_no_number_is_named_as_kl(
    student: dict[str, Any], cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = int(np.random.default_rng((0, 0)).permutation(6)[3])
    read_into = Cache.read_into

    def spoilt(self: Cache, record: int, path: str, out: Any) -> None:
        read_into(self, record, path, out)
        if record == bad and path == "targets/segmentation/values":
            out[:, 1, 1] = np.nan

    monkeypatch.setattr(Cache, "read_into", spoilt)
    with pytest.raises(ModelError) as caught:
        go(student | {"augment": "none"}, tmp_path)
    assert "term kl of the head segmentation is nan at iteration 2" in caught.value.problem
    assert cache.ids[bad] in caught.value.problem


@pytest.mark.skipif(not torch.cuda.is_available(), reason="losses are looked at late on a GPU alone")
def test_on_a_gpu_no_checkpoint_is_written_after_a_loss_that_is_no_number(
    settings: dict[str, Any], model_file: Callable[[str], str], tmp_path: Path
) -> None:
    changed = settings | {"model": model_file("nan"), "val_every": 2, "val": None, "log_every": 6, "gradients_every": 0}
    with pytest.raises(ModelError, match="iteration 3"):
        go(changed | {"device": "cuda"}, tmp_path)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["progress"]["step"] == 2


def test_losses_not_yet_looked_at_are_checked_before_a_checkpoint(
    settings: dict[str, Any], model_file: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where a look at every loss would stall the queue."""

    class Late(Trainer):
        def one_step(self, *arguments: Any) -> None:
            watch = self.watch
            check, watch.check_finite = watch.check_finite, lambda: []  # type: ignore[method-assign]
            try:
                super().one_step(*arguments)
            finally:
                watch.check_finite = check  # type: ignore[method-assign]

    monkeypatch.setattr("kdcache.training.api.Trainer", Late)
    changed = settings | {"model": model_file("nan"), "val_every": 2, "log_every": 5, "gradients_every": 0}
    with pytest.raises(ModelError, match="iteration 3"):
        go(changed, tmp_path)
    state = weights_of(tmp_path / "checkpoint.pt")
    assert all(tensor.isfinite().all() for tensor in state.values())
    assert all(tensor.isfinite().all() for tensor in load_file(tmp_path / "best.safetensors").values())


class Notes(Observer):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)


def test_what_an_initialisation_leaves_at_random_is_said(
    student: dict[str, Any], settings: dict[str, Any], tmp_path: Path
) -> None:
    torch.manual_seed(1)
    other = build_model("kdcache:tiny", 3)
    torch.save(other.state_dict(), tmp_path / "other.pth")
    notes = Notes()
    go(
        student | {"init": str(tmp_path / "other.pth"), "iterations": 1, "val_every": 1},
        tmp_path / "run",
        observer=notes,
    )
    assert any("classifier" in text and "at random" in text for text in notes.texts)
    assert any("enlarges the stored views" in text for text in notes.texts)


def test_views_are_replayed_unless_something_else_is_said(
    student: dict[str, Any], make_cache: Callable[..., Path], tmp_path: Path
) -> None:
    short = {key: value for key, value in student.items() if key != "augment"} | {"iterations": 1, "val_every": 1}
    several = str(make_cache(views=3))
    for name, changes, expected in (
        ("one", {}, "warp"),
        ("several", {"cache": several}, "replay"),
        ("asked", {"cache": several, "augment": "none"}, "none"),
    ):
        go(short | changes, tmp_path / name)
        assert f'augment = "{expected}"' in (tmp_path / name / "recipe.toml").read_text()


def test_few_labels_are_in_every_batch(student: dict[str, Any], tmp_path: Path) -> None:
    notes = Notes()
    few = student | {"limit_labels": 2, "iterations": 1, "val_every": 1}
    go(few, tmp_path / "run", observer=notes)
    assert any("2 of 6 samples have a label; 50 % of every batch" in text for text in notes.texts)
    assert "labelled-share = 0.5" in (tmp_path / "run" / "recipe.toml").read_text()
    go(few | {"limit_labels": 4}, tmp_path / "more")
    assert "labelled-share" not in (tmp_path / "more" / "recipe.toml").read_text()
    words = "warning: --limit-labels 6 uses the labels of all 6 samples"
    for changes, said in (({}, True), ({"method": "none"}, False)):
        heard = Notes()
        go(few | {"limit_labels": 6} | changes, tmp_path / f"all {said}", observer=heard)
        assert any(words in text for text in heard.texts) == said


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"size": None}, RecipeError, "--size"),
        ({"device": "tpu"}, RecipeError, "tpu"),
        ({"data": "scenes:32x48,train=0,unlabelled=3", "split": "unlabelled"}, DataError, "none of 3 images"),
        ({"val_split": "nowhere"}, DataError, "nowhere"),
        ({"model": "kdcache:tinny"}, ModelError, "kdcache:tiny"),
        ({"init": "no-such-file.safetensors"}, ModelError, "no-such-file"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(
    settings: dict[str, Any], tmp_path: Path, changes: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        go(settings | changes, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_validation_data_has_the_training_s_classes(student: dict[str, Any], tmp_path: Path) -> None:
    root = write_scenes(tmp_path / "data", "scenes:32x48,train=1,val=1")
    lines = (root / "classes.txt").read_text().splitlines()
    (root / "classes.txt").write_text("\n".join([lines[1], lines[0], *lines[2:]]))
    with pytest.raises(MismatchError, match=f"different classes: .* in {root} against ") as caught:
        go(student | {"val": str(root)}, tmp_path / "run")
    assert "the same class list" in caught.value.fix


def test_devices_are_picked() -> None:
    assert pick_device("cpu").type == "cpu"
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


# --- class weights -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["median", "sqrt"])
def test_class_weights_come_from_the_data(
    settings: dict[str, Any],
    student: dict[str, Any],
    source_path: Path,
    scenes: str,
    tmp_path: Path,
    read_metrics: Read,
    kind: str,
) -> None:
    split = open_split(scenes, "train")
    labels = [split.label(index) for index in range(len(split))]
    counts = sum(np.bincount(label.reshape(-1), minlength=256)[:7] for label in labels)
    weights = torch.as_tensor(class_weights(counts, kind), dtype=torch.float32)
    still = {"augment": "none", "class_weights": kind, "iterations": 1, "val": None, "method": "none"}
    runs = {
        "folder": settings | still | {"data": str(write_scenes(tmp_path / "data", scenes))},
        "scenes": settings | still,
        "stored": student | still,
        "source": student | still | {"cache": str(source_path), "data": scenes},
    }
    losses = {}
    for name, changed in runs.items():
        go(changed, tmp_path / name)
        losses[name] = read_metrics(tmp_path / name, "train")[0]["ce"]
    torch.manual_seed(0)
    model = build_model("kdcache:tiny", 7)
    order = np.random.default_rng((0, 0)).permutation(6)[:2]
    pixels = torch.from_numpy(np.stack([split.image(index) for index in order]))
    z = F.interpolate(model(model.normalise(pixels)).logits, (32, 48), mode="bilinear")
    label = torch.from_numpy(np.stack([labels[index] for index in order])).long()
    expected = F.cross_entropy(z, label, weights, ignore_index=255).item()
    assert losses == pytest.approx(dict.fromkeys(runs, expected), rel=5e-6)
    assert expected != pytest.approx(F.cross_entropy(z, label, ignore_index=255).item(), rel=1e-4)


# --- no teacher --------------------------------------------------------------------------------------------

_ALONE = """
import json, sys
from kdcache.training import make_config, train
print(json.dumps(train(make_config(**json.loads(sys.argv[1])), sys.argv[2])))
teachers = [name for name in sys.modules if name.startswith("kdcache.teacher")]
assert not teachers, teachers
assert "torchvision" not in sys.modules
"""


def test_a_student_needs_neither_teacher_nor_data_set(
    student: dict[str, Any],
    settings: dict[str, Any],
    tmp_path: Path,
    python: Callable[..., subprocess.CompletedProcess[str]],
    read_metrics: Read,
) -> None:
    data = write_scenes(tmp_path / "data", "scenes:32x48,train=4,val=1")
    go(settings | {"data": str(data), "val": str(data), "iterations": 2}, tmp_path / "teacher")
    split = open_split(str(data), "train")
    teacher = load_teacher(str(tmp_path / "teacher"), split.classes)
    build_cache(split, teacher, tmp_path / "cache.zarr", BuildOptions(size=(32, 48), views=1))
    shutil.rmtree(tmp_path / "teacher")
    shutil.rmtree(data)
    changed = student | {"cache": str(tmp_path / "cache.zarr"), "val": None, "iterations": 3}
    done = python(_ALONE, json.dumps(changed), str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["iterations"] == 3
    assert all(row["kl"] > 0 for row in read_metrics(tmp_path / "run", "train"))


# --- a run as a model --------------------------------------------------------------------------------------


def test_a_run_is_loaded_by_its_weights(student: dict[str, Any], tmp_path: Path) -> None:
    go(student, tmp_path / "run")
    model, summary = load_run(tmp_path / "run", "last")
    saved = load_file(tmp_path / "run" / "last.safetensors")
    assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items())
    assert summary.size == (32, 48)
    assert summary.spec == "kdcache:tiny"
    summary.check_classes(summary.class_names, "here")
    with pytest.raises(MismatchError, match="on there"):
        summary.check_classes(tuple(reversed(summary.class_names)), "there")


def test_what_is_no_run_is_said(student: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"Run not found: .*nothing"):
        load_run(tmp_path / "nothing")
    with pytest.raises(RecipeError, match=r"has no model\.json"):
        load_run(tmp_path)
    run = tmp_path / "run"
    go(student, run)
    (run / "best.safetensors").unlink()
    with pytest.raises(RecipeError, match="only last"):
        load_run(run)
    (run / "last.safetensors").unlink()
    with pytest.raises(RecipeError, match="no weights"):
        load_run(run, "last")
    (run / "model.json").write_text('{"spec": "kdcache:tiny"}')
    with pytest.raises(RecipeError, match=r"model\.json"):
        load_run(run)


def test_weights_that_are_damaged_or_of_another_model_are_refused(student: dict[str, Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    go(student, run)
    path = run / "best.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match=r"best\.safetensors"):
        load_run(run)
    path.write_bytes(whole)
    summary = json.loads((run / "model.json").read_text())
    summary["class_names"], summary["class_colours"] = summary["class_names"][:-1], summary["class_colours"][:-1]
    (run / "model.json").write_text(json.dumps(summary))
    with pytest.raises(ModelError):
        load_run(run)


def test_a_student_s_run_knows_the_store_s_classes(
    student: dict[str, Any], cache_path: Path, tmp_path: Path, scenes: str
) -> None:
    go(student, tmp_path / "run")
    _, summary = load_run(tmp_path / "run")
    classes = open_split(scenes, "train").classes
    assert summary.class_names == classes.names == open_cache(cache_path).manifest.dataset.class_names
    assert summary.class_colours == classes.colours


@pytest.mark.parametrize("verb", ["train-teacher", "train-student"])
def test_a_batch_of_more_than_there_are_is_noted(
    verb: str, settings: dict[str, Any], student: dict[str, Any], tmp_path: Path
) -> None:
    notes: list[str] = []

    class Watcher(Observer):
        def note(self, text: str) -> None:
            notes.append(text)

    oversized = (settings if verb == "train-teacher" else student) | {"iterations": 1, "val": None}
    for batch_size in (2, 200):
        notes.clear()
        train(make_config(**(oversized | {"batch_size": batch_size})), tmp_path / str(batch_size), observer=Watcher())
        warnings = [text for text in notes if text.startswith("--batch-size 200 is more than the ")]
        assert len(warnings) == (batch_size == 200), notes
