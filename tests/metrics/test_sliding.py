"""Images of another shape and sliding windows, against plain loops, mmsegmentation's formula and grid_sample."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from kdcache.data import Window, open_split, whole_window
from kdcache.errors import RecipeError
from kdcache.metrics import Framing, Inference, evaluate_model
from kdcache.metrics.sliding import at_image, slide
from kdcache.models import build_model

SIDE = st.integers(1, 40)


def starts_of_mmsegmentation(side: int, window: int, stride: int) -> list[int]:
    """The first coordinates of `EncoderDecoder.slide_inference`, one axis."""
    grids = max(side - window + stride - 1, 0) // stride + 1
    ends = [min(number * stride + window, side) for number in range(grids)]
    return [max(end - window, 0) for end in ends]


@given(side=SIDE, window=SIDE, stride=SIDE)
def test_windows_lie_where_mmsegmentation_s_do_and_cover_the_image(side, window, stride) -> None:
    window = min(window, side)
    framing = Framing(window=(window, window), stride=(min(stride, window),) * 2)
    starts = sorted({row for row, _ in framing.parts((side, side), (1, 1), "x")})
    assert starts == sorted(set(starts_of_mmsegmentation(side, window, min(stride, window))))
    covered = {at for start in starts for at in range(start, start + window)}
    assert covered == set(range(side))


@pytest.mark.parametrize(
    ("size", "window", "stride"),
    [((40, 56), (24, 32), (16, 20)), ((33, 47), (33, 16), (9, 15)), ((24, 24), (24, 24), None)],
)
def test_outputs_are_means_over_windows(size, window, stride) -> None:
    torch.manual_seed(0)
    model = build_model("kdcache:tiny", 5).eval()
    pixels = torch.randint(0, 256, (*size, 3), dtype=torch.uint8)
    framing = Framing(window=window, stride=stride)
    with torch.inference_mode():
        (found,) = slide(model, pixels, framing, (8, 8), ("segmentation",), batch_size=1).values()
        values = [[[] for _ in range(size[1])] for _ in range(size[0])]
        step = stride or (16, 16)
        for y in starts_of_mmsegmentation(size[0], window[0], step[0]):
            for x in starts_of_mmsegmentation(size[1], window[1], step[1]):
                part = pixels[None, y : y + window[0], x : x + window[1]]
                logits = model.upsample(model(model.normalise(part)).logits.float(), window)[0].double()
                for i in range(window[0]):
                    for j in range(window[1]):
                        values[y + i][x + j].append(logits[:, i, j])
    oracle = torch.stack([torch.stack([torch.stack(v).mean(0) for v in row], 1) for row in values], 1)
    # Up to six float32 sums and a quotient, each rounded to 2^-24 of the largest addend's sum.
    bound = 8 * 2.0**-24 * 6 * float(oracle.abs().max())
    assert float((found.double() - oracle).abs().max()) <= bound


def test_one_window_is_the_whole_image() -> None:
    torch.manual_seed(0)
    model = build_model("kdcache:tiny", 5).eval()
    pixels = torch.randint(0, 256, (24, 32, 3), dtype=torch.uint8)
    with torch.inference_mode():
        found = slide(model, pixels, Framing(window=(24, 32)), (8, 8), ("segmentation",), batch_size=4)["segmentation"]
        assert torch.equal(found, model.upsample(model(model.normalise(pixels[None])).logits, (24, 32))[0])


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"stride": (8, 8)}, "--stride 8x8 needs --window"),
        ({"window": (16, 16), "stride": (8, 17)}, "--stride 8x17 is larger than --window 16x16"),
    ],
)
def test_strides_that_make_no_sense_are_refused(settings, problem) -> None:
    with pytest.raises(RecipeError) as caught:
        Framing(**settings)
    assert problem in caught.value.problem


def test_a_window_larger_than_the_image_is_refused() -> None:
    split = open_split("scenes:24x40,train=2,val=1", "val")
    with pytest.raises(RecipeError, match="24x40") as caught:
        evaluate_model(
            build_model("kdcache:tiny", len(split.classes)), split, (24, 40), framing=Framing(window=(32, 32))
        )
    assert "--window 32x32 is larger than" in caught.value.problem
    assert "--size" in caught.value.fix


@given(
    image=st.tuples(st.integers(5, 60), st.integers(5, 60)),
    size=st.tuples(st.integers(8, 40), st.integers(8, 40)),
    fit=st.sampled_from(["crop", "pad"]),
    align_corners=st.booleans(),
)
def test_outputs_are_read_where_the_image_lies_in_the_view(image, size, fit, align_corners) -> None:
    """grid_sample with the same coordinates is the judge."""
    model = build_model("kdcache:tiny", 3)
    model.align_corners = align_corners
    output = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0))
    view = whole_window(fit, image, size)
    assume(view != Window.full(*image))
    axes = []
    for axis, (low, high) in enumerate(((view.y0, view.y1), (view.x0, view.x1))):
        at = (torch.arange(image[axis], dtype=torch.float64) + 0.5 - low) / (high - low)
        # grid_sample's -1 to 1 are the edges of the elements, or their centres where corners are aligned.
        axes.append(2 * (at * size[axis] - 0.5) / (size[axis] - 1) - 1 if align_corners else 2 * at - 1)
    grid = torch.stack([axes[1].expand(image), axes[0][:, None].expand(image)], -1)[None]
    oracle = torch.nn.functional.grid_sample(
        output[None].double(), grid, padding_mode="border", align_corners=align_corners
    )[0]
    found = at_image(model, output, image, view, size)
    # Fractions are rounded to float32, and two lerps follow: each errs by 2^-23 of the largest difference.
    assert float((found.double() - oracle).abs().max()) <= 2.0**-19 * float(output.abs().max())


def test_fits_are_one_where_shapes_agree() -> None:
    split = open_split("scenes:24x40,train=2,val=3", "val")
    torch.manual_seed(0)
    model = build_model("kdcache:tiny", len(split.classes))
    scores = [
        evaluate_model(model, split, (48, 80), framing=Framing(fit)).to_json() for fit in ("squash", "pad", "crop")
    ]
    assert scores[0] == scores[1] == scores[2]


@pytest.mark.parametrize("fit", ["pad", "crop"])
def test_every_pixel_is_judged_whatever_the_shape(fit) -> None:
    split = open_split("scenes:24x64,train=2,val=2", "val")
    model = build_model("kdcache:tiny", len(split.classes))
    labelled = sum(int((split.label(index) != 255).sum()) for index in range(2))
    for at_size in (False, True):
        metrics = evaluate_model(model, split, (32, 32), framing=Framing(fit), at_size=at_size)
        counted = int(np.sum(metrics.images.unions)) if at_size else None
        assert counted is None or counted > 0
    from kdcache.metrics.evaluate import count_pixels

    assert int(count_pixels(model, split, Inference((32, 32), framing=Framing(fit))).counts.sum()) == labelled


def test_an_image_is_scaled_before_it_is_cut() -> None:
    assert Framing("crop").scaled((100, 200), (50, 50)) == (50, 100)
    assert Framing("crop").scaled((99, 51), (32, 32)) == (62, 32)
    assert Framing("pad", window=(8, 8), whole=(50, 50)).scaled((100, 200), (9, 9)) == (25, 50)
    assert Framing(window=(8, 8)).scaled((100, 200), (9, 9)) == (100, 200)
    assert Framing(window=(8, 8), whole=(30, 40)).scaled((100, 200), (9, 9)) == (30, 40)
