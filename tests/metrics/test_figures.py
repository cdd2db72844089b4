"""Names in pictures are text: no formula, nothing that no font has. Classes and mistakes have colours."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.text import Text

from kdcache.metrics import figures
from kdcache.metrics.figures import class_bars, dress, new_figure, panels, save_figure

GREY = np.zeros((8, 8, 3), np.uint8)


@pytest.mark.parametrize("name", ["$x$", r"$\frac$", "a $5 b $6", r"\$", "^{", "\x1b]0;t\x07b", "\u202ea\x00", "[/]"])
def test_any_name_can_be_drawn_and_is_shown_as_it_is(tmp_path, name) -> None:
    shown = "".join(character for character in name if character.isprintable())
    both = panels(name, [(name, GREY), (name, GREY)], [(name, (1, 2, 3))])
    bars = new_figure(4, 3, name)
    class_bars(dress(bars.add_subplot(), name, name, name), [name, "other"], [(1, 2, 3)] * 2, [0.5, 0.4], [0.4, 0.5])
    for number, figure in enumerate((both, bars)):
        save_figure(figure, tmp_path / f"{number}.png")
        texts = [text for text in figure.findobj(Text) if shown in text.get_text()]
        assert len(texts) >= 4
        assert not any(text._preprocess_math(text.get_text())[1] for text in texts)
        assert all(text.get_text() == shown for text in texts)


@pytest.mark.parametrize(("name", "shown"), [("_road", "_road"), ("road\n99.9 sky", "road 99.9 sky")])
def test_a_name_is_one_line_of_a_legend_and_of_bars(tmp_path, name, shown) -> None:
    both = panels("title", [(name, GREY)], [(name, (1, 2, 3))])
    bars = new_figure(4, 3, "title")
    class_bars(dress(bars.add_subplot(), "x"), [name, "other"], [(1, 2, 3)] * 2, [0.5, 0.4], [0.4, 0.5])
    for number, figure in enumerate((both, bars)):
        save_figure(figure, tmp_path / f"{number}.png")
        assert shown in [text.get_text() for text in figure.findobj(Text)]
    assert [text.get_text() for text in both.legends[0].get_texts()] == [shown]


@pytest.mark.parametrize(("pictures", "columns", "rows"), [(1, 2, 1), (3, 2, 2), (24, 2, 12), (25, 4, 7), (80, 8, 10)])
def test_pairs_of_pictures_stay_side_by_side(pictures: int, columns: int, rows: int) -> None:
    figure = panels("title", [(str(number), GREY) for number in range(pictures)], [])
    grids = [axes.get_subplotspec() for axes in figure.axes]
    assert {spec.get_gridspec().get_geometry() for spec in grids} == {(rows, columns)}
    places = [(spec.rowspan.start, spec.colspan.start) for spec in grids]
    assert len(set(places)) == pictures
    for (row, column), (next_row, next_column) in zip(places[::2], places[1::2], strict=False):
        assert (next_row, next_column) == (row, column + 1)
        assert column % 2 == 0


def test_powers_on_an_axis_stay_formulas(tmp_path) -> None:
    figure = new_figure(4, 3, "title")
    axes = figure.add_subplot()
    axes.plot([1, 1e6], [1, 1e6])
    axes.set_yscale("log")
    save_figure(figure, tmp_path / "a.png")
    assert any(text.get_parse_math() and "$" in text.get_text() for text in axes.get_yticklabels())


def test_colours() -> None:
    colours = [(1, 2, 3), (4, 5, 6)]
    ids = np.array([[0, 1], [255, 1]], np.uint8)
    assert figures.colour_ids(ids, colours).tolist() == [[[1, 2, 3], [4, 5, 6]], [list(figures.VOID_RGB), [4, 5, 6]]]
    marked = figures.mark_wrong(np.zeros((2, 2, 3), np.uint8), ids, np.array([[0, 0], [0, 1]]))
    assert marked.tolist() == [[[30] * 3, list(figures.WRONG_RGB)], [list(figures.VOID_RGB), [30] * 3]]


def test_wrong_pixels_have_a_colour_of_their_own() -> None:
    """Errors stand out beside the reds of Cityscapes and ADE20K too."""
    assert figures.error_colour([]) == figures.error_colour([(0, 0, 0)]) == figures.WRONG_RGB
    palettes = [
        [(220, 20, 60), (255, 0, 0), (250, 170, 30)],
        [figures.WRONG_RGB],
        [(r, 0, 60) for r in range(0, 256, 8)],
    ]
    for palette in palettes:
        assert np.abs(np.array(palette) - figures.error_colour(palette)).sum(1).min() > 40
