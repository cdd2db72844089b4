"""The store against its teacher, and its score against the labels, both computed a second way."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F

from kdcache.data import IGNORE_INDEX, Window, open_split, render
from kdcache.errors import KDCacheError, MismatchError, ModelError
from kdcache.heads import RegressionHead
from kdcache.metrics import evaluate_model
from kdcache.models import Outputs, SegmentationModel
from kdcache.store import Records, open_cache
from kdcache.teacher import Agreement, Teacher, build_cache, compare_teacher, load_teacher, score_cache

CPU = torch.device("cpu")


@pytest.fixture(params=["stored", "source"])
def built(request, tmp_path, teacher, folder_data, options):
    """(cache, split) of a folder data set."""
    source = open_split(folder_data, "train")
    build_cache(source, teacher, tmp_path / "s.zarr", options(pixels=request.param))
    return open_cache(tmp_path / "s.zarr"), source


@pytest.mark.parametrize("k", [7, 3])
def test_the_same_teacher_agrees(tmp_path, teacher, split, options, k) -> None:
    build_cache(split, teacher, tmp_path / "s.zarr", options(top_k=k))
    found = compare_teacher(Records(open_cache(tmp_path / "s.zarr")), teacher, CPU)
    assert found.ok
    assert (found.records, found.fingerprint, found.drifted) == (7, (), ())
    assert found.argmax == 1
    assert found.kl < 1e-6
    assert found.largest_error < 0.02  # fp16 of logits down to -20


def test_other_weights_do_not(built, teacher) -> None:
    cache, source = built
    with torch.no_grad():
        teacher.model.get_submodule("classifier").weight[0, 0] += 1e-6
    slightly = compare_teacher(Records(cache, source), teacher, CPU)
    assert not slightly.ok  # whatever it says: it is not the teacher that was asked
    assert [line.partition(":")[0] for line in slightly.fingerprint] == ["weights"]
    with torch.no_grad():
        teacher.model.get_submodule("classifier").weight.mul_(-1)
    far = compare_teacher(Records(cache, source), teacher, CPU)
    assert not far.ok
    assert far.argmax < 0.9
    assert far.kl > 0.01


class Says(SegmentationModel):
    """The same logits everywhere: nothing for most classes, `second` for the second one."""

    def __init__(self, classes: int, second: float) -> None:
        super().__init__(spec="own:says", num_classes=classes, stride=8, taps=())
        self.second = second

    def forward(self, x_B3HW: torch.Tensor, taps: object = ()) -> Outputs:
        logits = torch.zeros(len(x_B3HW), self.num_classes, 4, 6)
        logits[:, 1] = self.second
        return Outputs({"segmentation": logits}, {})


@pytest.mark.parametrize(
    ("stored", "now", "error"),
    [
        (-1000.2, -1000.2, 0),  # float16 stores -1000: a class without any probability
        (-40, -1000, 0),
        (-10, -30, 20),  # what had one may not lose it
        (-30, -10, 20),
        (-3, -5, 2),
    ],
)
def test_the_largest_error_is_of_logits_that_carry_probability(split, options, tmp_path, stored, now, error) -> None:
    classes = len(split.classes)
    build_cache(split, Teacher(Says(classes, stored).eval(), "own"), tmp_path / "s.zarr", options())
    found = compare_teacher(Records(open_cache(tmp_path / "s.zarr")), Teacher(Says(classes, now).eval(), "own"), CPU)
    assert found.largest_error == pytest.approx(error, abs=0.01)


class SaysInTurn(Says):
    """Adds another error to the second class and to depth at each image."""

    def __init__(self, classes: int, errors: tuple[float, ...]) -> None:
        super().__init__(classes, 5)
        self.errors = itertools.cycle(errors)
        self.head_kinds = self.head_kinds | {"depth": RegressionHead(parameterisation="identity", max_depth=None)}

    def forward(self, x_B3HW: torch.Tensor, taps: object = ()) -> Outputs:
        error = next(self.errors)
        heads = super().forward(x_B3HW, taps).heads
        heads["segmentation"][:, 1] += error
        return Outputs({**heads, "depth": torch.full((len(x_B3HW), 1, 4, 6), 10 + error)}, {})


@pytest.mark.parametrize("errors", [(0, 2, 1), (2, 0, 0), (0, 0, 2)])
def test_the_largest_error_is_of_all_records(split, options, tmp_path, errors) -> None:
    """Whichever record has it. Shares are of all records together."""
    classes = len(split.classes)
    same, now = (Teacher(SaysInTurn(classes, each).eval(), "own") for each in ((0,), errors))
    build_cache(split, same, tmp_path / "s.zarr", options())
    found = compare_teacher(Records(open_cache(tmp_path / "s.zarr")), now, CPU, 3)
    assert found.largest_error == pytest.approx(2, abs=0.01)
    assert found.values == {"targets/depth/values": pytest.approx(2 / 10, abs=0.01)}


@pytest.mark.parametrize(("argmax", "kl", "ok"), [(1, 0, True), (0.9, 0, False), (1, 0.1, False)])
def test_a_teacher_agrees_in_its_classes_and_its_probabilities(argmax, kl, ok) -> None:
    assert Agreement(16, (), (), argmax, kl, 0.0).ok is ok


def test_few_records_are_enough_when_asked(built, teacher) -> None:
    cache, source = built
    assert compare_teacher(Records(cache, source), teacher, CPU, 3).records == 3


def test_few_records_are_spread_over_the_store(built, teacher, folder_data) -> None:
    cache, _ = built
    for number in (3, 6):
        path = folder_data / "images" / "train" / f"train-{number:06d}.png"
        Image.fromarray(np.asarray(Image.open(path)) ^ 64).save(path)
    found = compare_teacher(Records(cache, open_split(folder_data, "train")), teacher, CPU, 3)
    assert found.drifted == ("train-000003", "train-000006")


def test_a_teacher_of_another_number_of_classes(built, model_of, tmp_path) -> None:
    _, source = built
    save_file(dict(model_of(5).state_dict()), tmp_path / "five.safetensors")
    with pytest.raises(ModelError, match="--class-map"):
        load_teacher(f"kdcache:tiny@{tmp_path}/five.safetensors", source.classes)


def test_a_changed_image_is_named(built, teacher, folder_data) -> None:
    cache, _ = built
    path = folder_data / "images" / "train" / "train-000002.png"
    pixels = np.asarray(Image.open(path)).copy()
    pixels[:20, :20] ^= 64
    Image.fromarray(pixels).save(path)
    found = compare_teacher(Records(cache, open_split(folder_data, "train")), teacher, CPU)
    assert found.drifted == ("train-000002",)
    assert not found.ok
    # The teacher is asked on what it was taught on; without stored pixels, on what there is now.
    assert (found.kl < 1e-6) == cache.pixels_stored


def test_without_pixels_the_data_set_is_needed(built, teacher) -> None:
    cache, source = built
    if cache.pixels_stored:
        assert compare_teacher(Records(cache), teacher, CPU).ok
        return
    with pytest.raises(MismatchError, match="--data"):
        compare_teacher(Records(cache), teacher, CPU)
    assert compare_teacher(Records(cache, source), teacher, CPU).ok


def test_another_data_set_is_refused(built, teacher) -> None:
    """Not merely drift: records would be compared with other samples."""
    cache, _ = built
    for other in ("scenes:36x52,train=7,seed=3", "scenes:36x52,train=2"):
        with pytest.raises(KDCacheError) as caught:
            compare_teacher(Records(cache, open_split(other, "train")), teacher, CPU)
        assert other in caught.value.problem


def test_the_score_is_that_of_the_teacher(built, teacher) -> None:
    """Argmax of the resized logits against the label, at view size, pixel by pixel."""
    cache, source = built
    counts, sure = np.zeros((7, 7), np.int64), []
    for record in range(len(source)):
        image, label = source.image(record), source.label(record)
        view, small = render(image, label, Window.full(*image.shape[:2]), flip=False, size=(32, 48))
        with torch.inference_mode():
            logits = teacher.model(teacher.model.normalise(torch.from_numpy(view)[None])).logits
        resized = F.interpolate(logits.double(), (32, 48), mode="bilinear", align_corners=False)[0]
        best = resized.argmax(0).numpy()
        counted = small != IGNORE_INDEX
        sure.append(resized.softmax(0).amax(0).numpy()[counted])
        np.add.at(counts, (small[counted], best[counted]), 1)
    hits = np.diag(counts)
    with np.errstate(invalid="ignore"):
        iou = hits / (counts.sum(0) + counts.sum(1) - hits)
    found = score_cache(Records(cache, source))
    assert found.confidence == pytest.approx(np.concatenate(sure).mean(), abs=5e-5)
    assert found.doubt is None  # it is wrong nearly everywhere
    score = found.metrics
    assert score.aacc == pytest.approx(hits.sum() / counts.sum(), abs=2e-3)
    assert score.miou == pytest.approx(np.nanmean(iou), abs=2e-3)
    assert score.label_pixels == tuple(counts.sum(1))
    assert score.miou == pytest.approx(evaluate_model(teacher.model, source, (32, 48), at_size=True).miou, abs=2e-3)


@pytest.mark.parametrize(("scale", "doubted"), [(20.0, False), (0.4, True)])
def test_a_teacher_that_is_right_and_hardly_sure_is_doubted(tmp_path, split, options, scale, doubted) -> None:
    """Sharp logits and flat ones of the same argmax: the labels themselves, times a number."""
    masks = {split.image(n)[0].tobytes(): split.label(n) for n in range(len(split))}

    class Knows(SegmentationModel):
        def __init__(self) -> None:
            super().__init__(spec="own:knows", num_classes=len(split.classes), stride=1, taps=())

        def normalise(self, pixels_BHW3):
            self.asked = pixels_BHW3
            return super().normalise(pixels_BHW3)

        def forward(self, x_B3HW, taps=()):
            labels = [
                masks.get(image[0].numpy().tobytes(), np.zeros(x_B3HW.shape[-2:], np.uint8)) for image in self.asked
            ]
            labels_BHW = torch.from_numpy(np.stack(labels)).long().clamp(max=self.num_classes - 1)
            logits = F.one_hot(labels_BHW, self.num_classes).permute(0, 3, 1, 2).float()
            return Outputs({"segmentation": scale * logits - 0.1}, {})

    build_cache(split, Teacher(Knows().eval(), "knows"), tmp_path / "s.zarr", options(size=(36, 52), batch_size=1))
    score = score_cache(Records(open_cache(tmp_path / "s.zarr"), split))
    assert score.metrics.aacc > 0.99
    assert (score.doubt is not None) == doubted
    if doubted:
        assert f"mean top probability is {score.confidence:.3f}" in score.doubt


def test_a_score_counts_labelled_records_only(tmp_path, teacher, folder_data, options) -> None:
    for path in list((folder_data / "labels" / "train").iterdir())[:4]:
        path.unlink()
    source = open_split(folder_data, "train")
    for pixels in ("stored", "source"):
        build_cache(source, teacher, tmp_path / pixels, options(pixels=pixels))
        labels = [source.label(r) for r in range(7) if source.has_label(r)]
        void = sum((render(np.zeros((*x.shape, 3), np.uint8), x, Window.full(*x.shape), flip=False, size=(32, 48))[1]
                    == 255).sum() for x in labels)  # fmt: skip
        score = score_cache(Records(open_cache(tmp_path / pixels), source)).metrics
        assert sum(score.label_pixels) == 3 * 32 * 48 - void


def test_no_labels_no_score(tmp_path, teacher, options) -> None:
    source = open_split("scenes:36x52,unlabelled=3", "unlabelled")
    build_cache(source, teacher, tmp_path / "s.zarr", options())
    assert score_cache(Records(open_cache(tmp_path / "s.zarr"), source)) is None
