"""How images of one shape are fitted into pixels of another."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from kdcache.data import Window, choose_fit, draw_view, fitted_share, open_split, whole_window
from kdcache.data.rendering.fit import MOST_SQUASHED, squashed

SIZES = st.tuples(st.integers(1, 3000), st.integers(1, 3000))


@given(image=SIZES, size=SIZES, fit=st.sampled_from(["crop", "pad"]))
def test_a_view_has_the_shape_of_the_pixels_and_touches_two_sides(image, size, fit) -> None:
    window = whole_window(fit, image, size)
    share = fitted_share(fit, image, size)
    # A quotient and two products a side, each rounded by 2^-53 of itself.
    assert share[0] * image[0] * size[1] == pytest.approx(share[1] * image[1] * size[0], rel=2.0**-50)
    assert 1.0 in share
    assert (max(share) <= 1) if fit == "crop" else (min(share) >= 1)
    for first, last, side in ((window.y0, window.y1, image[0]), (window.x0, window.x1, image[1])):
        assert abs(first + last - side) <= 2.0**-50 * max(abs(first), abs(last))  # in the middle


@given(size=st.tuples(st.integers(1, 500), st.integers(1, 500)), factor=st.integers(1, 9))
def test_equal_shapes_are_fitted_in_one_way(size, factor) -> None:
    image = size[0] * factor, size[1] * factor
    for fit in ("squash", "crop", "pad"):
        assert fitted_share(fit, image, size) == (1.0, 1.0)
        assert whole_window(fit, image, size) == Window.full(*image)


def test_the_first_view_is_the_fitted_image_and_others_are_drawn_in_it() -> None:
    share = fitted_share("pad", (100, 300), (50, 50))
    assert draw_view(0, "a", 0, (100, 300), (1.0, 1.0), False, fitted=share)[0] == whole_window(
        "pad", (100, 300), (50, 50)
    )
    window, _ = draw_view(0, "a", 1, (100, 300), (2.0, 2.0), False, fitted=share)
    assert (window.y1 - window.y0, window.x1 - window.x0) == pytest.approx((150, 150))


def test_shapes_differ_by_their_ratio_in_either_direction() -> None:
    assert squashed((100, 105), (50, 50)) == squashed((105, 100), (50, 50)) == MOST_SQUASHED == 0.05
    assert squashed((100, 106), (50, 50)) > MOST_SQUASHED
    assert squashed((360, 480), (144, 192)) == 0


def test_images_are_padded_from_5_percent_on_and_a_note_names_one() -> None:
    split = open_split("scenes:40x42,train=2,val=1", "train")
    assert choose_fit(split, (40, 40)) == choose_fit(split, (80, 84)) == ("squash", None)
    fit, note = choose_fit(split, (42, 40))
    assert fit == "pad"
    assert f"{split.ids[0]} of 40x42 has another shape than 42x40 by 10 %, more than 5 %" in note


def test_one_image_of_another_shape_is_enough_and_lies_as_its_camera_meant_it(tmp_path) -> None:
    (tmp_path / "classes.txt").write_text("a\nb\n")
    (tmp_path / "images/train").mkdir(parents=True)
    turned = Image.Exif()
    turned[0x0112] = 6  # a quarter
    for name, size, exif in (("a", (48, 32), Image.Exif()), ("b", (32, 48), turned)):
        Image.new("RGB", size).save(tmp_path / f"images/train/{name}.jpg", exif=exif)
    split = open_split(str(tmp_path), "train")
    assert [split.image_size(index) for index in range(2)] == [(32, 48)] * 2
    assert choose_fit(split, (64, 96))[0] == "squash"
    Image.new("RGB", (32, 48)).save(tmp_path / "images/train/b.jpg")
    fit, note = choose_fit(open_split(str(tmp_path), "train"), (64, 96))
    assert fit == "pad"
    assert "b of 48x32" in note


def test_every_kind_of_split_has_the_sizes_of_its_images(tmp_path) -> None:
    for data in ("scenes:24x40,train=3,val=1", "depth:scenes:24x40,train=3,val=1,depth=exact"):
        split = open_split(data, "train")
        assert split.image_size(2) == split.image(2).shape[:2] == (24, 40)
    joined = open_split("scenes:24x40,train=1,val=1 + scenes:32x32,train=1,val=1,seed=5", "train")
    assert sorted(joined.image_size(index) for index in range(2)) == [(24, 40), (32, 32)]
