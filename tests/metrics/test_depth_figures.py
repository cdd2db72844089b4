"""Depth in colours: lightness rises with the metres, unknown is grey, bars end at round numbers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcache.metrics.depth_figures import MAPS, UNKNOWN_RGB, DepthMap, absolute_error, bar_end, colours_of


@pytest.mark.parametrize("kind", MAPS)
def test_lightness_rises_and_no_colour_is_grey(kind) -> None:
    rgb = colours_of(np.linspace(0, 1, 256), kind).astype(float)
    lightness = rgb @ (0.2126, 0.7152, 0.0722)
    assert np.all(np.diff(lightness) > -1)
    assert lightness[-1] - lightness[0] > 150
    assert np.abs(rgb - UNKNOWN_RGB).max(1).min() > 20


def test_unknown_is_grey_and_what_lies_beyond_has_the_last_colour() -> None:
    values = np.array([[np.nan, np.inf, -1.0, 0.0, 80.0, 200.0]])
    rgb = DepthMap(values, 80.0).rgb()[0]
    assert rgb[:2].tolist() == [list(UNKNOWN_RGB)] * 2
    assert np.array_equal(rgb[2], rgb[3])
    assert np.array_equal(rgb[4], rgb[5])


@given(st.lists(st.floats(0.01, 500), min_size=1, max_size=50))
def test_a_bar_ends_at_a_round_number_above_the_values(values: list[float]) -> None:
    end = bar_end([np.array(values), np.array([np.nan])])
    assert np.percentile(values, 99) <= end * (1 + 1e-5)
    assert end <= 2.1 * np.percentile(values, 99)
    assert len(f"{end / 4:g}") <= 6


def test_nothing_known_has_a_bar_all_the_same() -> None:
    assert bar_end([np.full((2, 2), np.nan)]) == 1
    assert bar_end([np.zeros((2, 2))]) == 1


@pytest.mark.parametrize("size", [(1, 1), (37, 61), (90, 400)])
def test_a_picture_has_its_bar_below(size: tuple[int, int]) -> None:
    picture = np.array(DepthMap(np.full(size, 3.0), 4.0).picture())
    assert np.array_equal(picture[: size[0], : size[1]], DepthMap(np.full(size, 3.0), 4.0).rgb())
    assert picture.shape[0] > size[0] + 20


def test_errors_are_unknown_where_labels_are() -> None:
    error = absolute_error(np.array([[3.0, 5.0]]), np.array([[1.0, np.nan]]))
    assert error[0, 0] == 2
    assert np.isnan(error[0, 1])
