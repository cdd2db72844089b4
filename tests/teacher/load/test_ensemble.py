"""Stores of several teachers, of larger renderings, of one teacher per fold."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from kdcache.data import Window, folds_of, open_split, render
from kdcache.distill import DistillLoss
from kdcache.errors import MismatchError, ModelError, RecipeError, StoreError
from kdcache.models import EnsembleModel, Tta
from kdcache.models.run import write_run_model, write_weights
from kdcache.run_folder import RunModel
from kdcache.store import CopyChanges, Records, copy_store, open_cache, spread_samples, verify_files
from kdcache.store.format.teacher_models import Training
from kdcache.teacher import (
    Teacher,
    TeacherProbe,
    build_cache,
    check_cross_fit,
    compare_teacher,
    load_like,
    load_teacher,
    load_teachers,
    options_of,
    plan_manifest,
)
from kdcache.teacher.load.forward import coarser, teach
from kdcache.training import CacheDataset
from kdcache_kernels import pack

CPU = torch.device("cpu")
VALUES = "targets/segmentation/values"


@pytest.fixture
def origins(tmp_path, classes, model_of) -> list[str]:
    """Three teachers of the data's classes."""
    found = []
    for seed in range(3):
        save_file(dict(model_of(len(classes), seed).state_dict()), tmp_path / f"{seed}.safetensors")
        found.append(f"kdcache:tiny@{tmp_path}/{seed}.safetensors")
    return found


@pytest.fixture
def runs(tmp_path, folder_data, model_of) -> list[str]:
    """What `train-teacher --fold I/3` leaves behind, as far as a teacher is concerned."""
    split = open_split(folder_data, "train")
    found = []
    for fold in range(3):
        folder = tmp_path / f"fold{fold}"
        folder.mkdir()
        about = RunModel(
            spec="kdcache:tiny",
            class_names=split.classes.names,
            class_colours=split.classes.colours,
            size=(32, 48),
            mean=(0.4, 0.5, 0.1 * fold),
            std=(0.3, 0.3, 0.3),
            trained_on=f"data {split.digest()}",
        )
        write_run_model(folder, about)
        write_weights(folder, "best", model_of(len(split.classes), fold))
        (folder / "recipe.toml").write_text(f'model = "kdcache:tiny"\nfold = "{fold}/3"\n')
        found.append(str(folder))
    return found


def views(split, samples, size=(32, 48)) -> torch.Tensor:
    images = [split.image(sample) for sample in samples]
    return torch.from_numpy(
        np.stack([render(i, None, Window.full(*i.shape[:2]), flip=False, size=size)[0] for i in images])
    )


def logits(model, pixels) -> torch.Tensor:
    with torch.inference_mode():
        return model(model.normalise(pixels)).logits


@pytest.mark.parametrize("pixels", ["stored", "source"])
def test_an_ensemble_is_a_teacher_like_any(tmp_path, origins, split, classes, options, pixels, tree) -> None:
    """Taught, continued, verified, extended; every setting of it is told apart."""
    tta = Tta(flip=True, scales=(1.0, 1.5))
    teacher = load_teachers(origins[:2], classes, weights=(3, 1), tta=tta)
    build_cache(split, teacher, tmp_path / "s.zarr", options(batch_size=1, pixels=pixels))
    cache = open_cache(tmp_path / "s.zarr")
    members = [load_teacher(origin, classes).model for origin in origins[:2]]
    for record in (0, 4):
        image = views(split, [record])
        passes = [[], []]
        for said, member in zip(passes, members, strict=True):
            for factor in (1.0, 1.5):
                x = image.permute(0, 3, 1, 2).double() / 255
                x = x if factor == 1 else F.interpolate(x, (48, 72), mode="bilinear", antialias=True)
                mean, std = (torch.tensor(m, dtype=torch.float64).view(3, 1, 1) for m in (member.mean, member.std))
                for mirrored in (False, True):
                    with torch.inference_mode():
                        z = member(((x.flip(-1) if mirrored else x) - mean).div(std).float()).logits.double()
                    p = (z.flip(-1) if mirrored else z).softmax(1)
                    said.append(F.interpolate(p, (12, 18), mode="bilinear", align_corners=False))
        wanted = (0.75 * torch.stack(passes[0]).mean(0) + 0.25 * torch.stack(passes[1]).mean(0)).log()[0]
        stored = torch.from_numpy(cache.read(record, [VALUES])[VALUES]).double()
        assert cache.head.size == (12, 18)
        assert (stored - (wanted - wanted.amax(0))).abs().max() < 0.01
    about = cache.manifest.teacher
    assert [(m.spec, m.share, m.mean) for m in about.members] == [
        ("kdcache:tiny", 0.75, members[0].mean), ("kdcache:tiny", 0.25, members[0].mean)
    ]  # fmt: skip
    assert about.members[0].weights != about.members[1].weights
    assert (about.tta.flip, about.tta.scales, about.folds) == (True, (1.0, 1.5), None)
    assert json.loads((tmp_path / "s.zarr/zarr.json").read_text())["attributes"]["kdcache"]["teacher"]["tta"] == {
        "flip": True,
        "scales": [1.0, 1.5],
    }
    before = tree(tmp_path / "s.zarr")
    like = load_like(about, origins[:2], classes)
    source = split if pixels == "source" else None
    assert compare_teacher(Records(cache, source), like, CPU).ok
    assert build_cache(split, like, tmp_path / "s.zarr", options(batch_size=1, pixels=pixels)).kept == 7
    others = {
        "members": load_teachers(origins[:2], classes, weights=(1, 1), tta=tta),
        "weights": load_teachers([origins[1], origins[0]], classes, weights=(3, 1), tta=tta),
        "spec": load_teachers(origins, classes, tta=tta),
        "tta": load_teachers(origins[:2], classes, weights=(3, 1), tta=Tta(flip=True)),
        "mean": load_teacher(origins[0], classes),
    }
    for field, other in others.items():
        with pytest.raises(MismatchError, match=rf"{field}:"):
            build_cache(split, other, tmp_path / "s.zarr", options(batch_size=1, pixels=pixels))
    assert tree(tmp_path / "s.zarr") == before
    chosen = options_of(cache.manifest, views=2, render_threads=1, fidelity=False)
    extended = build_cache(split, like, tmp_path / "new.zarr", chosen, reuse=cache)
    assert (extended.records, extended.reused) == (7, 7)


def test_equal_builds_of_an_ensemble_are_equal(tmp_path, origins, split, classes, options) -> None:
    for name in "ab":
        teacher = load_teachers(origins, classes, tta=Tta.parse("flip,scales=0.75:1.25"))
        build_cache(split, teacher, tmp_path / name, options(statistics=("at:head",), raw_logits=True))
    a, b = (open_cache(tmp_path / name) for name in "ab")
    assert a.ledger.completion.ledger_sha256 == b.ledger.completion.ledger_sha256
    assert a.manifest.teacher == b.manifest.teacher


def test_normalisation_is_each_members_own(tmp_path, origins, split, classes) -> None:
    """A store says each member's mean and std, and they are what `load_like` sets."""
    members = [load_teacher(origins[0], classes, mean=(0.1, 0.2, 0.3)).model, load_teacher(origins[1], classes).model]
    about = plan_manifest(TeacherProbe(split, Teacher(EnsembleModel(members).eval(), "two"), _options())).teacher
    like = load_like(about, origins[:2], classes)
    assert [member.mean for member in like.model.parts] == [(0.1, 0.2, 0.3), members[1].mean]
    assert about.differences(plan_manifest(TeacherProbe(split, like, _options())).teacher) == []
    for weights in ((0.1, 0.3), (0.1, 1.3), (0.1, 1.4)):  # whose shares would change if they were divided by their sum
        shares = EnsembleModel(members, weights).shares
        parts = [
            member.model_copy(update={"share": share}) for member, share in zip(about.members, shares, strict=True)
        ]
        again = load_like(about.model_copy(update={"members": tuple(parts)}), origins[:2], classes)
        assert again.model.shares == shares
    for count in (1, 3):
        with pytest.raises(MismatchError, match="the cache has 2"):
            load_like(about, origins[:count], classes)


def test_a_store_of_one_teacher_says_its_normalisation_too(origins, split, classes) -> None:
    """Which need not be the model's own."""
    chosen = load_teacher(origins[0], classes, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    about = plan_manifest(TeacherProbe(split, chosen, _options())).teacher
    like = load_like(about, origins[:1], classes)
    assert (like.model.mean, like.model.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert about.differences(plan_manifest(TeacherProbe(split, like, _options())).teacher) == []


@pytest.mark.parametrize("tta", [None, Tta(flip=True), Tta(flip=False, scales=(0.75, 1.5))])
def test_augmentation_is_as_the_store_says(origins, split, classes, tta) -> None:
    about = plan_manifest(TeacherProbe(split, load_teachers(origins[:2], classes, tta=tta), _options())).teacher
    like = load_like(about, origins[:2], classes)
    assert like.model.tta == tta
    assert about.differences(plan_manifest(TeacherProbe(split, like, _options())).teacher) == []


def test_what_several_teachers_have_to_say(monkeypatch, classes, model_of) -> None:
    """Every note once, in their order; the size is known where all have seen images of one."""
    known = {
        "a": ((32, 48), ("first",)),
        "b": ((32, 48), ("second", "first")),
        "c": ((64, 96), ()),
        "d": (None, ("third",)),
    }

    def load(origin: str, *_: object, **__: object) -> Teacher:
        size, notes = known[origin]
        return Teacher(model_of(len(classes)), origin, size, None, notes)

    monkeypatch.setattr("kdcache.teacher.load.ensemble.load_teacher", load)
    for names, size, notes in (
        ("ab", (32, 48), ("first", "second")),
        ("ba", (32, 48), ("second", "first")),
        ("ac", None, ("first",)),
        ("cd", None, ("third",)),
        ("c", (64, 96), ()),
    ):
        found = load_teachers(list(names), classes)
        assert (found.size, found.notes, found.origin) == (size, notes, ", ".join(names))


def _options(**changes):
    from kdcache.teacher import BuildOptions

    return BuildOptions(**{"size": (32, 48), "views": 1, "fidelity": False, **changes})


def test_teachers_that_cannot_speak_together(tmp_path, origins, classes, model_of) -> None:
    save_file(dict(model_of(len(classes) - 1).state_dict()), tmp_path / "fewer.safetensors")
    with pytest.raises(ModelError, match="classes, but the data set has"):
        load_teachers([origins[0], f"kdcache:tiny@{tmp_path}/fewer.safetensors"], classes)
    for weights in ((1,), (1, -1), (1, float("nan"))):
        with pytest.raises(RecipeError, match="--teacher-weights"):
            load_teachers(origins[:2], classes, weights=weights)
    with pytest.raises(RecipeError, match="--teacher-weights"):
        load_teachers(origins[:1], classes, weights=(1, 2))
    for folds in (0, 1, 2, 4):
        with pytest.raises(RecipeError, match=f"--folds {folds} "):
            load_teachers(origins, classes, folds=folds)
    with pytest.raises(RecipeError, match="Cannot use --teacher-weights 1,2,3 with --folds 3"):
        load_teachers(origins, classes, folds=3, weights=(1, 2, 3))


@pytest.mark.parametrize("pixels", ["stored", "source"])
def test_a_teacher_may_look_at_more_pixels(tmp_path, teacher, split, options, pixels) -> None:
    """Targets are of the larger rendering of the same window, pixels the student's; a training takes them."""
    chosen = options(teacher_size=(64, 80), pixels=pixels, batch_size=1, views=3, view_scale=(0.7, 2.0))
    build_cache(split, teacher, tmp_path / "s.zarr", chosen)
    cache = open_cache(tmp_path / "s.zarr")
    assert (cache.view_size, cache.head.size) == ((32, 48), (16, 20))
    assert (cache.manifest.view.teacher_size, cache.head.resampled) == ((64, 80), False)
    for record in (0, 4, 8):
        row = cache.read(record, [VALUES, "records/window", "records/flip", "records/sample"])
        window, flip = Window(*row["records/window"]), bool(row["records/flip"])
        larger, _ = render(split.image(int(row["records/sample"])), None, window, flip=flip, size=(64, 80))
        values, _, _ = pack(logits(teacher.model, torch.from_numpy(larger)[None]), 7)
        assert np.array_equal(row[VALUES], values[0])
    assert compare_teacher(Records(cache, split), teacher, CPU).ok
    with pytest.raises(MismatchError, match=r"Missing --data: .* was built at 64x80") as caught:
        compare_teacher(Records(cache), teacher, CPU)
    assert "--data" in caught.value.fix
    with pytest.raises(MismatchError, match=r"view\.teacher_size"):
        build_cache(split, teacher, tmp_path / "s.zarr", options(pixels=pixels, batch_size=1))
    data = CacheDataset(Records(cache, None if pixels == "stored" else split), augment="warp")
    batch = torch.utils.data.default_collate([data[n] for n in range(2)])
    student = torch.zeros(2, 7, 8, 12, requires_grad=True)
    found = DistillLoss(cache)(student, batch)
    found.loss.backward()
    assert student.grad.abs().sum() > 0


def test_extended_at_the_same_sizes(tmp_path, teacher, split, options) -> None:
    build_cache(split, teacher, tmp_path / "old", options(teacher_size=(64, 96), teacher_grid="view", batch_size=1))
    old = open_cache(tmp_path / "old")
    result = build_cache(split, teacher, tmp_path / "new", options_of(old.manifest, views=2, fidelity=False), reuse=old)
    assert (result.records, result.reused) == (7, 7)
    for field, change in {
        "view.teacher_size": {"teacher_size": None, "teacher_grid": "own"},
        "heads": {"teacher_grid": "own"},
    }.items():
        other = options_of(old.manifest, **{"fidelity": False, **change})
        with pytest.raises(MismatchError, match=field):
            build_cache(split, teacher, tmp_path / "other", other, reuse=old)


def test_targets_on_the_grid_of_the_view(tmp_path, teacher, split, options) -> None:
    """Mean probabilities of the larger grid; nothing to average where the grids are the same."""
    build_cache(split, teacher, tmp_path / "s.zarr", options(teacher_size=(64, 96), teacher_grid="view", top_k=4))
    cache = open_cache(tmp_path / "s.zarr")
    assert (cache.head.size, cache.head.resampled) == ((8, 12), True)
    own = logits(teacher.model, views(split, [3], (64, 96)))[0].double().numpy()
    assert own.shape == (7, 16, 24)
    p = np.exp(own - np.log(np.exp(own).sum(0)))
    wanted = np.log(p.reshape(7, 8, 2, 12, 2).mean((2, 4)))
    stored = cache.read(3, [VALUES, "targets/segmentation/indices"])
    best = np.sort(wanted, axis=0)[::-1][:4]
    assert np.abs(stored[VALUES] - (best - best[0])).max() < 0.01
    assert compare_teacher(Records(cache, split), teacher, CPU).ok
    same = plan_manifest(TeacherProbe(split, teacher, options(teacher_grid="view"))).heads["segmentation"]
    assert (same.size, same.resampled) == ((8, 12), False)
    smaller = plan_manifest(TeacherProbe(split, teacher, options(teacher_grid="view", teacher_size=(32, 40)))).heads[
        "segmentation"
    ]
    assert (smaller.size, smaller.resampled) == ((8, 10), False), "an own grid that is coarser stays"
    ensemble = Teacher(EnsembleModel([teacher.model] * 2, tta=Tta.parse("scales=1:2")).eval(), "two")
    head = plan_manifest(TeacherProbe(split, ensemble, options(teacher_grid="view"))).heads["segmentation"]
    assert (head.size, head.resampled) == ((8, 12), True)
    teacher.model.align_corners = True
    with pytest.raises(RecipeError, match="align_corners"):
        plan_manifest(TeacherProbe(split, teacher, options(teacher_grid="view")))


@pytest.mark.parametrize(("own", "grid"), [((5, 9), (4, 9)), ((7, 4), (3, 2)), ((6, 6), (6, 6)), ((10, 8), (1, 1))])
def test_averages_of_any_ratio(own, grid) -> None:
    """Against cells that are cut into equal pieces; a constant is no part of what is averaged, and comes back."""
    logits = 5 * torch.randn(2, 3, *own, generator=torch.Generator().manual_seed(1))
    z = logits.double().numpy()
    pieces = z.repeat(grid[0], axis=2).repeat(grid[1], axis=3).reshape(2, 3, grid[0], own[0], grid[1], own[1])
    mass = np.log(np.exp(pieces).sum(1, keepdims=True))
    wanted = np.log(np.exp(pieces - mass).mean((3, 5))) + mass.mean((3, 5))
    assert np.abs(coarser(logits, grid).numpy() - wanted).max() < 1e-5
    assert np.abs(coarser(logits + 40, grid).numpy() - wanted - 40).max() < 2e-5
    ruled_out = logits.clone()
    ruled_out[:, 1] = -torch.inf
    assert coarser(ruled_out, grid).isfinite().all() or own == grid
    ruled_out[0, 0, 0, 0] = torch.nan
    assert coarser(ruled_out, grid)[0, :, 0, 0].isnan().any()


def test_means_are_not_of_the_precision_of_the_pass(teacher, split) -> None:
    pixels = views(split, [0])
    own, averaged = (teach(teacher.model, pixels, (), "bf16", CPU, grid).logits for grid in (None, (4, 6)))
    assert torch.equal(averaged, coarser(own, (4, 6)))


@pytest.mark.parametrize("size", [(0, 48), (32, 70000)])
def test_sizes_that_cannot_be(teacher, split, options, size) -> None:
    for name in ("teacher_size", "crop", "size"):
        with pytest.raises(RecipeError, match="65536 pixels"):
            plan_manifest(TeacherProbe(split, teacher, options(**{name: size})))


@pytest.mark.parametrize("tta", [None, Tta(flip=True)])
def test_each_sample_is_taught_by_who_has_not_seen_it(tmp_path, runs, folder_data, options, tta) -> None:
    split = open_split(folder_data, "train")
    check_cross_fit(runs, split)
    teacher = load_teachers(runs, split.classes, folds=3, tta=tta)
    sizes = []
    for member in teacher.model.parts:
        member.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    chosen = options(batch_size=2, shard_records=5, views=2)
    build_cache(split, teacher, tmp_path / "s.zarr", chosen)
    cache = open_cache(tmp_path / "s.zarr")
    folds = folds_of(split.ids, 3)
    assert cache.column("fold").tolist() == np.repeat(folds, 2).tolist()
    shards = [range(first, min(first + 5, 14)) for first in range(0, 14, 5)]
    batches = sum(-(-sum(folds[r // 2] == fold for r in shard) // 2) for shard in shards for fold in range(3))
    passes = 1 if tta is None else 2
    assert len(sizes) == passes * (3 + 3 + batches), "shapes, the fixed images, and batches of one fold each"
    for sample in range(7):
        alone = load_teacher(runs[folds[sample]], split.classes).model
        pixels = views(split, [sample])
        if tta is None:
            wanted = logits(alone, pixels)
        else:
            p = logits(alone, pixels).softmax(1) + logits(alone, pixels.flip(2)).softmax(1).flip(-1)
            wanted = (p / 2).log()
        stored = torch.from_numpy(cache.read(2 * sample, [VALUES])[VALUES])
        assert (stored - (wanted - wanted.amax(1, keepdim=True))[0]).abs().max() < 0.02
    about = cache.manifest.teacher
    assert (about.folds, len(about.members)) == (3, 3)
    like = load_like(about, runs, split.classes)
    assert compare_teacher(Records(cache, split), like, CPU, 14).ok
    copy_store(cache, tmp_path / "part", CopyChanges(samples=spread_samples(cache, 3)))
    assert compare_teacher(Records(open_cache(tmp_path / "part")), like, CPU).ok, "records say their fold"
    together = load_teachers(runs, split.classes, tta=tta)
    assert "folds: 3 against None" in about.differences(plan_manifest(TeacherProbe(split, together, chosen)).teacher)
    assert verify_files(tmp_path / "s.zarr").damaged == []


def test_a_store_says_what_its_teachers_were_trained_on(tmp_path, runs, origins, folder_data, options) -> None:
    """Of runs on a data set. Who the teacher is, it does not change."""
    split = open_split(folder_data, "train")
    recipe = Path(runs[1], "recipe.toml")
    recipe.write_text('model = "kdcache:tiny"\n')
    description = Path(runs[2], "model.json")
    description.write_text(description.read_text().replace('"data ', '"store '))
    teacher = load_teachers([*runs, origins[0]], split.classes)
    build_cache(split, teacher, tmp_path / "s.zarr", options())
    about = open_cache(tmp_path / "s.zarr").manifest.teacher
    digest = split.digest()
    known = [Training(ids_digest=digest, fold=(0, 3)), Training(ids_digest=digest, fold=None)]
    assert about.trainings == (*known, None, None)
    assert about.differences(about.model_copy(update={"trainings": ()})) == []
    assert load_teacher(runs[0], split.classes).trainings == (known[0],)
    for broken in ('fold = "3/3"', 'fold = "0/99999999999"', "fold = "):
        recipe.write_text(broken)
        assert load_teacher(runs[1], split.classes).trainings == (None,)
    recipe.unlink()
    assert load_teacher(runs[1], split.classes).trainings == (None,)


def test_extending_a_cross_fitted_store(tmp_path, runs, folder_data, options) -> None:
    split = open_split(folder_data, "train")
    teacher = load_teachers(runs, split.classes, folds=3)
    build_cache(split, teacher, tmp_path / "old", options(batch_size=1))
    old = open_cache(tmp_path / "old")
    chosen = options_of(old.manifest, views=2, fidelity=False)
    assert build_cache(split, teacher, tmp_path / "new", chosen, reuse=old).reused == 7
    image = folder_data / "images/train/train-000000.png"
    (image.parent / "more.png").write_bytes(image.read_bytes())
    larger = open_split(folder_data, "train")
    with pytest.raises(MismatchError, match="the folds of a larger split"):
        build_cache(larger, teacher, tmp_path / "other", chosen, reuse=old)


def test_teachers_that_have_seen_their_fold(tmp_path, runs, folder_data, options) -> None:
    split = open_split(folder_data, "train")
    with pytest.raises(MismatchError, match="number 0 of ") as caught:
        check_cross_fit([runs[1], runs[0], runs[2]], split)
    assert "number 0 of 3, has fold 1/3" in caught.value.problem
    with pytest.raises(MismatchError, match="number 0 of "):
        check_cross_fit(runs[:2], split)
    recipe = Path(runs[2], "recipe.toml")
    whole = recipe.read_text()
    recipe.write_text('model = "kdcache:tiny"\n')
    with pytest.raises(MismatchError, match=r"Teacher .*, number ") as caught:
        check_cross_fit(runs, split)
    assert "has seen all folds" in caught.value.problem
    for broken in ("fold = ", None):
        recipe.unlink() if broken is None else recipe.write_text(broken)
        with pytest.raises(RecipeError, match="recipe") as caught:
            check_cross_fit(runs, split)
        assert str(recipe) in caught.value.problem
    recipe.write_text(whole)
    with pytest.raises(RecipeError, match="Run not found"):
        check_cross_fit([*runs[:2], "kdcache:tiny@w.pth"], split)
    with pytest.raises(MismatchError, match="other samples or classes than"):
        check_cross_fit(runs, open_split("scenes:36x52,train=9", "train"))
    with pytest.raises(RecipeError, match="Cannot deal 7 samples into 8 folds"):
        check_cross_fit(runs + runs[:2] + runs, split)
    teacher = load_teachers(runs, split.classes, folds=3)
    with pytest.raises(RecipeError, match="Cannot store features"):
        plan_manifest(TeacherProbe(split, teacher, options(features=("head",))))


def test_folds_of_whole_sequences(tmp_path, runs, folder_data, options) -> None:
    split, by = open_split(folder_data, "train"), "(.)$"
    with pytest.raises(MismatchError, match=r"Teacher .*, number ") as caught:
        check_cross_fit(runs, split, by)
    assert "--folds-by '(.)$', has fold 0/3" in caught.value.problem
    for run in runs:
        recipe = Path(run, "recipe.toml")
        recipe.write_text(f"{recipe.read_text()}folds-by = '{by}'\n")
    check_cross_fit(runs, split, by)
    with pytest.raises(MismatchError, match=r"Teacher .*, number "):
        check_cross_fit(runs, split)
    with pytest.raises(RecipeError, match="--folds-by"):
        load_teachers(runs, split.classes, folds_by=by)
    teacher = load_teachers(runs, split.classes, folds=3, folds_by=by)
    build_cache(split, teacher, tmp_path / "s.zarr", options())
    cache = open_cache(tmp_path / "s.zarr")
    assert cache.column("fold").tolist() == folds_of(split.ids, 3, by).tolist() != folds_of(split.ids, 3).tolist()
    about = cache.manifest.teacher
    assert (about.folds, about.folds_by) == (3, by)
    assert about.trainings[1] == Training(ids_digest=split.digest(), fold=(1, 3), folds_by=by)
    assert load_like(about, runs, split.classes).folds_by == by
    assert about.differences(about.model_copy(update={"folds_by": None})) == ["folds_by: (.)$ against None"]
    with pytest.raises(StoreError, match="Cannot continue"):
        build_cache(split, load_teachers(runs, split.classes, folds=3), tmp_path / "s.zarr", options())


def test_crops_of_larger_renderings(tmp_path, model_of) -> None:
    """An ensemble with augmentation at twice the size, in crops, with every kind of array."""
    split = open_split("scenes:96x128,train=1,val=4", "val")
    for seed in range(2):
        save_file(dict(model_of(len(split.classes), seed).state_dict()), tmp_path / f"{seed}.safetensors")
    teacher = load_teachers(
        [f"kdcache:tiny@{tmp_path}/{seed}.safetensors" for seed in range(2)], split.classes, tta=Tta(flip=True)
    )
    chosen = _options(
        size=(72, 96), crop=(64, 64), views=2, view_scale=(0.5, 2.0), teacher_size=(128, 128),
        statistics=("at:head",), raw_logits=True, fidelity=True,
    )  # fmt: skip
    build_cache(split, teacher, tmp_path / "s.zarr", chosen)
    cache = open_cache(tmp_path / "s.zarr")
    assert (len(cache), cache.view_size, cache.head.size) == (2 * len(split), (64, 64), (32, 32))
    assert compare_teacher(
        Records(cache, split), load_like(cache.manifest.teacher, teacher.origin.split(", "), split.classes), CPU
    ).ok
    row = cache.read(5, list(cache.specs))
    assert 0 <= row["statistics/at.head"].min() <= row["statistics/at.head"].max() == 1
    assert cache.manifest.fidelity.kl_t1 < 1e-4
