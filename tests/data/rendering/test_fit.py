"""How images of one shape are fitted into pixels of another."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcache.data import Window, fitted_share, whole_window
from kdcache.data.rendering.augment import draw_view
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
