"""What a build knows before its first shard: who may teach, and what storing loses of whom."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kdcache.data import folds_of
from kdcache.errors import ModelError
from kdcache.models import EnsembleModel, Outputs, SegmentationModel, Tta
from kdcache.teacher import Teacher, TeacherProbe, plan_manifest
from kdcache.teacher.build.fidelity import measure_fidelity
from kdcache.teacher.build.render import render_batches, render_records


class Strided(SegmentationModel):
    """One convolution; `sharp` says how sure it is."""

    def __init__(self, classes: int, stride: int = 8, sharp: float = 1.0, *, align_corners: bool = False) -> None:
        super().__init__(spec=f"own:{stride}", num_classes=classes, stride=stride, taps=(), align_corners=align_corners)
        torch.manual_seed(stride)
        self.body = torch.nn.Conv2d(3, classes, stride, stride)
        torch.nn.init.normal_(self.body.weight, std=0.1 * sharp)

    def forward(self, x_B3HW: Tensor, taps: object = ()) -> Outputs:
        return Outputs({"segmentation": self.body(x_B3HW)}, {})


class Probabilities(Strided):
    def forward(self, x_B3HW: Tensor, taps: object = ()) -> Outputs:
        return Outputs({"segmentation": super().forward(x_B3HW).logits.softmax(1)}, {})


def of_folds(*members: SegmentationModel) -> Teacher:
    return Teacher(EnsembleModel(members).eval(), "folds", folds=len(members))


def test_probabilities_are_no_logits(split, options) -> None:
    with pytest.raises(ModelError, match="The outputs of own are not logits"):
        plan_manifest(TeacherProbe(split, Teacher(Probabilities(len(split.classes)).eval(), "own"), options()))


def test_teachers_of_folds_speak_on_one_grid(split, options) -> None:
    classes = len(split.classes)
    with pytest.raises(ModelError, match="different grids: 2x3, 4x6") as caught:
        plan_manifest(TeacherProbe(split, of_folds(Strided(classes, 8), Strided(classes, 16)), options()))
    assert caught.value.fix


def test_what_storing_loses_is_of_the_teacher_of_each_fold(split, options) -> None:
    """One of them is sure, and one is not: keeping a single class costs of the one alone."""
    classes = len(split.classes)
    members = [Strided(classes, sharp=0.1), Strided(classes, sharp=3.0)]
    found = plan_manifest(TeacherProbe(split, of_folds(*members), options(top_k=1, fidelity=True))).fidelity
    folds = folds_of(split.ids, 2).tolist()
    view = plan_manifest(TeacherProbe(split, of_folds(*members), options())).view

    def said(sample: int, fold: int) -> Tensor:
        pixels = torch.from_numpy(render_records(split, view, [sample])[0].pixels)[None]
        with torch.inference_mode():
            rgb = pixels.permute(0, 3, 1, 2).float() / 255
            return members[fold](members[fold].standardise(rgb)).logits[0]

    wanted = measure_fidelity([said(n, folds[n]) for n in range(7)], 1, "default", (32, 48), align_corners=False)
    assert found.kl_t1 == pytest.approx(wanted.kl_t1, rel=1e-3)
    assert found.argmax_agreement == pytest.approx(wanted.argmax_agreement, abs=1e-3)


@pytest.mark.parametrize(("taught", "grid"), [((64, 96), (4, 6)), ((16, 24), (2, 3)), ((64, 24), (4, 3))])
def test_the_grid_of_the_view_is_never_finer_than_the_teachers_own(split, options, taught, grid) -> None:
    """And it is that of the view alone, whatever other scales a teacher looks at."""
    for tta in (None, Tta(scales=(1.0, 2.0))):
        model = EnsembleModel([Strided(len(split.classes))], tta=tta).eval()
        chosen = options(teacher_size=taught, teacher_grid="view")
        head = plan_manifest(TeacherProbe(split, Teacher(model, "own"), chosen)).heads["segmentation"]
        assert head.size == (grid if tta is None else tuple(min(4 if i == 0 else 6, 2 * g) for i, g in enumerate(grid)))


@pytest.mark.parametrize("shard_records", [3, 5])
def test_rendering_ahead_gives_the_same_records(split, options, shard_records) -> None:
    """Which is how a build with a GPU renders."""
    teacher = Teacher(Strided(len(split.classes)).eval(), "own")
    manifest = plan_manifest(TeacherProbe(split, teacher, options(views=2, batch_size=2, shard_records=shard_records)))
    shards = [manifest.shards - 1, 0]
    one, other = (
        [(item.record, item.sample, item.view, item.checksum) for item in found]
        for found in (render_batches(split, manifest, shards, threads=2, ahead=ahead) for ahead in (False, True))
    )
    assert one == other
    assert [record for record, *_ in one] == [r for shard in shards for r in range(*manifest.shard_range(shard))]
