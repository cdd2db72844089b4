"""The audit's figures, computed a second way: float64, one pixel's logits at a time, straight from the arrays."""

from __future__ import annotations

import json
import math
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from kdcache.data import OUTSIDE_RGB, open_split
from kdcache.errors import CorruptError, MismatchError, RecipeError
from kdcache.metrics.figures import save_figure
from kdcache.store import Records, open_cache
from kdcache.teacher import build_cache
from kdcache.teacher.audit.audit import THRESHOLDS, audit_cache
from kdcache.teacher.audit.figures import REPORT, write_report
from kdcache.teacher.audit.first_views import read_wholes
from kdcache.teacher.audit.store_audit import StoreAudit
from kdcache.teacher.audit.topk_error import candidates, gradient_errors
from kdcache.teacher.audit.verify import packed_target
from kdcache_kernels import gradient_error

SIZE = (32, 48)


def dense(cache, record: int) -> np.ndarray:
    """What the store holds of a record as (C, h, w) float64, by the format's rules."""
    rows = {
        path.rsplit("/")[-1]: row.astype(np.float64) for path, row in cache.read(record, cache.target_paths()).items()
    }
    if "indices" not in rows:
        return rows["values"]
    k, classes = len(rows["values"]), cache.num_classes
    kept = np.log(np.exp(rows["values"]).sum(0))
    out = np.tile(kept + rows["tail"] - math.log(classes - k), (classes, 1, 1))
    np.put_along_axis(out, rows["indices"].astype(np.int64), rows["values"], 0)
    return out


def probabilities(cache, record: int) -> np.ndarray:
    up = F.interpolate(torch.from_numpy(dense(cache, record))[None], SIZE, mode="bilinear", align_corners=False)
    return up.softmax(1)[0].numpy()


@pytest.fixture(params=["dense", "top-k", "views", "source"])
def audited(request, tmp_path, teacher, folder_data, options):
    """(audit, cache, split, labels) of one store of each kind; two of seven images have no label."""
    for name in ("train-000001", "train-000004"):
        (folder_data / "labels" / "train" / f"{name}.png").unlink()
    split = open_split(folder_data, "train")
    changes = {"top-k": {"top_k": 3}, "views": {"views": 2}, "source": {"pixels": "source"}}.get(request.param, {})
    build_cache(split, teacher, tmp_path / "s.zarr", options(**changes))
    build_cache(split, teacher, tmp_path / "labels.zarr", options())
    cache, other = open_cache(tmp_path / "s.zarr"), open_cache(tmp_path / "labels.zarr")
    labels = [other.read(record, ["labels/segmentation"])["labels/segmentation"] for record in range(7)]
    return audit_cache(Records(cache, split), worst=3), cache, split, labels


def test_every_figure(audited) -> None:
    found, cache, split, labels = audited
    views = cache.manifest.view.views_per_sample
    everything = [probabilities(cache, sample * views) for sample in range(7)]
    said = np.stack([p.argmax(0) for p in everything])
    sure = np.stack([p.max(0) for p in everything])
    truth = np.stack(labels).astype(np.int64)
    assert (found.images, found.labelled) == (7, 5)
    from torchmetrics.classification import MulticlassConfusionMatrix  # which imports Triton

    judge = MulticlassConfusionMatrix(7, ignore_index=255)
    counts = judge(torch.from_numpy(said), torch.from_numpy(truth)).numpy()
    # Ties of rounded logits may fall either way; a pixel here and there.
    assert abs(found.counts - counts).sum() <= 4
    known = truth != 255
    hits = np.diag(counts)
    with np.errstate(invalid="ignore"):
        iou = hits / (counts.sum(0) + counts.sum(1) - hits)
    np.testing.assert_allclose(found.metrics.iou, iou, atol=5e-3)
    assert found.metrics.aacc == pytest.approx((said == truth)[known].mean(), abs=1e-3)
    # Calibration, bin by bin over the pixels themselves.
    ece = 0.0
    for number, part in enumerate(found.calibration.bins):
        inside = known & (sure > number / 15) & (sure <= (number + 1) / 15)
        assert part.share == pytest.approx(inside.sum() / known.sum(), abs=4e-3)
        if inside.any():
            ece += inside.sum() / known.sum() * abs(sure[inside].mean() - (said == truth)[inside].mean())
    assert found.calibration.ece == pytest.approx(ece, abs=2e-3)
    for c in range(7):
        if (mine := known & (said == c)).any():
            assert found.calibration.confidence[c] == pytest.approx(sure[mine].mean(), abs=2e-3)
            assert found.calibration.precision[c] == pytest.approx((truth[mine] == c).mean(), abs=5e-3)
    # Pseudo labels; coverage counts all images, precision the labelled ones.
    for threshold, kept in zip(THRESHOLDS, found.coverage, strict=True):
        mask = sure >= threshold
        assert kept.total_share == pytest.approx(mask.mean(), abs=2e-3)
        if (mask & known).sum() > 100:
            assert kept.total_precision == pytest.approx((said == truth)[mask & known].mean(), abs=5e-3)
    # Images by mIoU, the worst first.
    mious = {}
    for sample in (0, 2, 3, 5, 6):
        from torchmetrics.classification import MulticlassJaccardIndex

        one = MulticlassJaccardIndex(7, average="none", ignore_index=255)
        classes = one(torch.from_numpy(said[sample])[None], torch.from_numpy(truth[sample])[None]).numpy()
        occurs = np.isin(np.arange(7), [*truth[sample][known[sample]], *said[sample][known[sample]]])
        mious[split.ids[sample]] = classes[occurs].mean()
    expected = sorted(mious, key=mious.__getitem__)[:3]
    assert [scored.sample for scored in found.worst] == expected
    for scored in found.worst:
        assert scored.miou == pytest.approx(mious[scored.sample], abs=5e-3)
        assert cache.ids[scored.record // views] == scored.sample
    # Pairs that are confused.
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    np.fill_diagonal(shares, 0)
    assert [pair.share for pair in found.confused] == pytest.approx(sorted(shares.flat, reverse=True)[:10], abs=5e-3)
    first = found.confused[0]
    names = found.class_names
    assert shares[names.index(first.label), names.index(first.predicted)] == pytest.approx(shares.max(), abs=5e-3)
    worst_class = names.index(first.label)
    assert found.confused_with(worst_class) == first


def test_a_store_without_pixels_needs_its_own_data(tmp_path, teacher, folder_data, options) -> None:
    split = open_split(folder_data, "train")
    build_cache(split, teacher, tmp_path / "s.zarr", options(pixels="source"))
    cache = open_cache(tmp_path / "s.zarr")
    with pytest.raises(MismatchError, match="--data"):
        audit_cache(Records(cache))
    with pytest.raises(MismatchError, match="built from"):
        audit_cache(Records(cache, open_split("scenes:36x52,train=2", "train")))
    path = folder_data / "images" / "train" / "train-000002.png"
    pixels = np.asarray(Image.open(path)).copy()
    pixels[:20, :20] ^= 64
    Image.fromarray(pixels).save(path)
    with pytest.raises(MismatchError, match=r"'train-000002'.*does not render as at the build"):
        audit_cache(Records(cache, open_split(folder_data, "train")))


def test_a_target_that_is_no_number_is_refused(tmp_path, teacher, split, options, monkeypatch) -> None:
    """kdcache writes none, but a store may come from elsewhere; counts must not go astray."""
    build_cache(split, teacher, tmp_path / "s.zarr", options())
    cache = open_cache(tmp_path / "s.zarr")

    def damaged(records, numbers):
        target = packed_target(records, numbers)
        target.values[0, 0, 0, 0] = math.nan
        return target

    monkeypatch.setattr("kdcache.teacher.audit.first_views.packed_target", damaged)
    with pytest.raises(CorruptError, match="record 0"):
        audit_cache(Records(cache))


def test_without_labels_there_is_less_to_say(tmp_path, teacher, options) -> None:
    source = open_split("scenes:36x52,unlabelled=3", "unlabelled")
    build_cache(source, teacher, tmp_path / "s.zarr", options())
    cache = open_cache(tmp_path / "s.zarr")
    found = audit_cache(Records(cache))
    assert (found.images, found.labelled, found.metrics, found.calibration) == (3, 0, None, None)
    assert (found.confused, found.worst) == ((), ())
    assert sum(found.coverage[0].predicted) == 3 * 32 * 48
    names = {path.name for path in write_report(StoreAudit(found.images, found), Records(cache), tmp_path / "report")}
    assert names == {"pseudo-labels.png", "gradient.png"}
    json.loads((tmp_path / "report" / REPORT).read_text())


def test_what_lies_beyond_an_image_is_not_counted(tmp_path, teacher, split, options) -> None:
    """Of crops alone the first of each image is judged, and the grey around it is no word of the teacher's."""
    build_cache(split, teacher, tmp_path / "s.zarr", options(views=2, crop=(32, 48), view_scale=(0.5, 1.0)))
    cache = open_cache(tmp_path / "s.zarr")
    found = audit_cache(Records(cache))
    assert found.images == 7
    shown = 0
    for whole in read_wholes(Records(cache)):
        rows = cache.read(whole.record, ["records/window", "records/flip", "pixels/image"])
        y0, x0, y1, x1 = rows["records/window"]
        inside = np.zeros((32, 48), bool)
        for i in range(32):
            for j in range(48):
                y = y0 + (i + 0.5) * (y1 - y0) / 32
                column = 47 - j if rows["records/flip"] else j
                x = x0 + (column + 0.5) * (x1 - x0) / 48
                inside[i, j] = 0 <= y < 36 and 0 <= x < 52
        assert (whole.inside == inside).all()
        assert (rows["pixels/image"][~inside] == OUTSIDE_RGB).all(1).mean() > 0.7  # but for blended edges
        assert (whole.label[~inside] == 255).all()
        shown += inside.sum()
    assert sum(found.coverage[0].predicted) == shown < 0.9 * 7 * 32 * 48


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("student", ["uniform", "noisy"])
def test_gradient_errors_are_those_of_autograd(student, align_corners) -> None:
    """||g_k - g|| / ||g|| with g the gradient of T^2 KL by the student's logits, in float64."""
    teacher = 3 * torch.randn(2, 7, 5, 6, generator=torch.Generator().manual_seed(1))
    found = gradient_errors(teacher, 7, (16, 20), align_corners=align_corners)
    assert (found.records, list(found.uniform), list(found.noisy[1])) == (2, [1, 2, 4], [1.0, 2.0, 4.0])
    generator = torch.Generator().manual_seed(20)
    noisy = torch.stack([x + torch.randn(x.shape, generator=generator) for x in teacher]).double()

    def up(x):
        return F.interpolate(x, (16, 20), mode="bilinear", align_corners=align_corners)

    def keep(k):
        p = teacher.double().softmax(1)
        order = p.argsort(1, descending=True)
        rest = p.gather(1, order[:, k:]).sum(1, keepdim=True) / (7 - k)
        return torch.where(order.argsort(1) < k, p, rest).log()

    for k in (1, 2, 4):
        for T in (1.0, 2.0, 4.0):
            gradients = []
            for said in (teacher.double(), keep(k)):
                z = (up(noisy) if student == "noisy" else torch.zeros(2, 7, 16, 20).double()).requires_grad_()
                loss = F.kl_div((z / T).log_softmax(1), (up(said) / T).log_softmax(1), reduction="sum", log_target=True)
                gradients.append(torch.autograd.grad(T**2 * loss, z)[0])
            expected = float((gradients[1] - gradients[0]).norm() / gradients[0].norm())
            assert getattr(found, student)[k][T] == pytest.approx(expected, rel=5e-3)


def test_the_noisy_student_is_that_of_the_kernels() -> None:
    teacher = 3 * torch.randn(1, 7, 5, 6, generator=torch.Generator().manual_seed(2))
    found = gradient_errors(teacher, 7, (16, 20), align_corners=False)
    for k, row in found.noisy.items():
        for T, error in row.items():
            assert error == pytest.approx(gradient_error(teacher, k, T, (16, 20)), rel=1e-4)


def test_candidates() -> None:
    assert candidates(1) == ()
    assert candidates(11) == (1, 2, 4, 8)
    assert candidates(16) == (1, 2, 4, 8)
    assert candidates(17) == (1, 2, 4, 8, 16)


def test_pictures_and_report(tmp_path, teacher, split, options) -> None:
    """Every picture can be opened, JSON has plain numbers, an earlier report is replaced."""
    build_cache(split, teacher, tmp_path / "s.zarr", options())
    cache = open_cache(tmp_path / "s.zarr")
    folder = tmp_path / "report"
    (folder / "worst").mkdir(parents=True)
    for old in (folder / REPORT, folder / "worst/rank07-old-miou0.1000.png"):
        old.write_bytes(b"")
    found = audit_cache(Records(cache), worst=2)
    written = write_report(StoreAudit(found.images, found), Records(cache), folder)
    assert sorted(written) == sorted(folder.rglob("*.png"))
    assert len(written) == 5 + 2
    for path in written:
        with Image.open(path) as image:
            assert min(image.size) > 300
            assert len(image.convert("RGB").getcolors(2**24)) > 10
    assert f"rank01-{found.worst[0].sample.replace('/', '-')}-miou{found.worst[0].miou:.4f}.png" in {
        path.name for path in written
    }
    report = json.loads((folder / REPORT).read_text(), parse_constant=pytest.fail)
    assert report["teacher"]["miou"] == found.metrics.miou
    assert [row["name"] for row in report["pseudo_labels"][0]["classes"]] == list(split.classes.names)
    assert report["kl_gradient_error"]["noisy"]["1"]["2.0"] > 0


@pytest.mark.parametrize("earlier", [False, True])
def test_a_kill_leaves_no_report_or_the_earlier_one(tmp_path, teacher, split, options, earlier, monkeypatch) -> None:
    build_cache(split, teacher, tmp_path / "s.zarr", options())
    cache, folder = open_cache(tmp_path / "s.zarr"), tmp_path / "report"
    found = StoreAudit(7, audit_cache(Records(cache), worst=2))

    def names() -> list[str]:
        return sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("**/*report*/**/*.*"))

    if earlier:
        write_report(found, Records(cache), folder)
    before = names()

    def killed(*picture) -> None:
        save_figure(*picture)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr("kdcache.teacher.audit.figures.save_figure", killed)
        with pytest.raises(KeyboardInterrupt):
            write_report(found, Records(cache), folder)
    assert names() == before
    (tmp_path / ".report.partial/worst").mkdir(parents=True)  # of a kill, which cleans up nothing
    write_report(found, Records(cache), folder)
    assert f"report/{REPORT}" in names()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("held", ["file", "other"])
def test_a_report_overwrites_nothing_else(tmp_path, teacher, split, options, held) -> None:
    build_cache(split, teacher, tmp_path / "s.zarr", options())
    cache = open_cache(tmp_path / "s.zarr")
    folder = tmp_path / "report"
    if held == "other":
        folder.mkdir()
    thesis = folder if held == "file" else folder / "thesis.tex"
    thesis.write_text("thesis")
    with pytest.raises(RecipeError, match="report"):
        write_report(StoreAudit(7, audit_cache(Records(cache))), Records(cache), folder)
    assert thesis.read_text() == "thesis"
    assert len(list(tmp_path.rglob("*.png"))) == 0
