"""Pictures of results: figures without a display, and labels in the colours of their classes.

matplotlib is imported when a picture is made. Figures do not use pyplot: no global state, no window.
"""

import io
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

import numpy as np

from kdcache.data import IGNORE_INDEX
from kdcache.errors import RecipeError, one_line, plain_text
from kdcache.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

Array = np.ndarray[Any, Any]
Colours = Sequence[tuple[int, int, int]]
VOID_RGB = (224, 224, 192)  # as in PASCAL VOC; black is a class there
WRONG_RGB = (225, 30, 45)
_REDS = (WRONG_RGB, (255, 0, 96), (255, 64, 32), (190, 0, 70), (255, 0, 170), (255, 110, 110), (150, 0, 0))
_APART = 60.0
"""Distance in RGB from which two colours are distinct at a glance."""
Format = Literal["png", "svg", "pdf"]
Layout = Literal["grid", "row"]
INK = "#303030"
_DOTS_PER_INCH = 120
_LONGEST_NAME = 100
_SHOWN = 40  # classes of a matrix that still has readable names
_MOST_PAIRS = 12  # of pictures, one below the other
_ROW_INCHES = 3.0  # of a picture in a row
_LEGEND_INCHES = 1.2  # of a name in the legend below a row
_LETTERS_PER_INCH = 11
"""Height of a line in 10 points bold."""


def new_figure(width: float, height: float, title: str) -> "Figure":
    """Return a matplotlib figure of `width` x `height` inches with a title only. Its layout avoids overlaps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=_DOTS_PER_INCH, layout="constrained", facecolor="white")
    figure.suptitle(title, fontsize=13, color=INK)
    return figure


def save_figure(
    figure: "Figure", path: Path, above: str | None = None, formats: Sequence[Format] = ("png",)
) -> list[Path]:
    """Save a figure in each of `formats`, each file completely or not at all. Return the paths of the files.

    Args:
        figure: a matplotlib figure.
        path: the PNG file. Files of other formats have the same name with another suffix.
        above: a warning to draw in red at the top, or None.
        formats: the formats to save. Without "png", no PNG is saved.
    """
    from matplotlib import rc_context

    if above is not None:
        _put_above(figure, above)
    path.parent.mkdir(parents=True, exist_ok=True)
    _make_plain(figure)
    if layout := figure.get_layout_engine():
        layout.execute(figure)
    files = [path.with_name(f"{path.name.removesuffix('.png')}.{kind}") for kind in formats]
    with rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "kdcache",
            "pdf.fonttype": 42,
            "figure.autolayout": False,
            "figure.constrained_layout.use": False,
        }
    ):
        figure.set_layout_engine(None)  # with an engine, even "none", savefig draws everything twice
        for kind, file in zip(formats, files, strict=True):
            dated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)
            with replacing(file) as partial:
                figure.savefig(partial, format=kind, metadata=dated)
    return files


def check_formats(formats: Sequence[str]) -> tuple[Format, ...]:
    """Return the formats to save pictures in: `png`, which is always saved, and the formats named in `formats`.

    Raises: RecipeError for a name other than `png`, `svg` and `pdf`.
    """
    known: tuple[Format, ...] = get_args(Format)
    if strange := [name for name in formats if name not in known]:
        raise RecipeError(f"Unknown format in --format: {','.join(strange)!r}", fix=f"Choose from: {','.join(known)}")
    return tuple(name for name in known if name == "png" or name in formats)


def _put_above(figure: "Figure", text: str) -> None:
    """Put text above the title, and enlarge the figure by its lines."""
    width, height = figure.get_size_inches()
    lines = textwrap.wrap(text, int(_LETTERS_PER_INCH * width))
    figure.set_size_inches(width, height + 0.23 * len(lines))
    figure.suptitle("\n" * len(lines) + figure.get_suptitle())
    top = 1 - 0.06 / figure.get_figheight()
    colour = hex_colours([WRONG_RGB])[0]
    figure.text(0.5, top, "\n".join(lines), ha="center", va="top", fontsize=10, fontweight="bold", color=colour)


def _make_plain(figure: "Figure") -> None:
    """Show names of classes, samples and runs as plain text, without formulas or control characters."""
    from matplotlib.text import Text

    axes = [axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]
    powers = {id(text) for axis in axes if axis.get_scale() == "log" for text in axis.get_ticklabels(which="both")}
    for text in figure.findobj(Text):
        if id(text) not in powers:
            text.set_parse_math(False)
            text.set_text(plain_text(text.get_text()))


def dress(axes: "Axes", title: str, x: str = "", y: str = "") -> "Axes":
    """Set the title and the axis labels (`x`, `y`) of matplotlib axes. Return the axes.

    Also give the axes a light grid, and remove their frame at the top and right.
    """
    axes.set_title(title, fontsize=11, color=INK)
    axes.set_xlabel(x, fontsize=10)
    axes.set_ylabel(y, fontsize=10)
    axes.tick_params(labelsize=9)
    axes.grid(color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return axes


def hex_colours(colours: Colours) -> list[str]:
    """Return RGB colours (0 to 255) as `#rrggbb` text for matplotlib."""
    return ["#{:02x}{:02x}{:02x}".format(*colour) for colour in colours]


def class_bars(
    axes: "Axes", names: Sequence[str], colours: Colours, solid: Sequence[float], outlined: Sequence[float]
) -> None:
    """Draw two horizontal bars for each class, in percent.

    Args:
        axes: matplotlib axes to draw into.
        names: the class names. The first is at the top.
        colours: the colour of each class.
        solid: a fraction from 0 to 1, or NaN, for each class, drawn as a filled bar.
        outlined: the same, drawn as an outlined bar below the filled one.
    """
    places = np.arange(len(names))
    fills = hex_colours(colours)
    above, below = 100 * np.array(solid), 100 * np.array(outlined)
    axes.barh(places - 0.2, np.nan_to_num(above), 0.38, color=fills, edgecolor=INK, linewidth=0.6)
    axes.barh(places + 0.2, np.nan_to_num(below), 0.38, color="white", edgecolor=fills, linewidth=1.4, hatch="////")
    for offset, values in ((-0.2, above), (0.2, below)):
        for place, value in enumerate(values):
            text = "none" if np.isnan(value) else f"{value:.1f}"
            axes.text(np.nan_to_num(value) + 1, place + offset, text, va="center", fontsize=7, color=INK)
    axes.set_yticks(places, [one_line(name) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(0, 112)
    axes.grid(axis="y", visible=False)


def colour_ids(ids_HW: Array, colours: Colours) -> Array:
    """Return class ids (H, W) as an image in the colours of the classes, uint8 (H, W, 3). Void is light grey."""
    table = np.full((256, 3), VOID_RGB, np.uint8)
    table[: len(colours)] = colours
    return table[ids_HW]


def palette_png(ids_HW: Array, colours: Colours) -> bytes:
    """Return the bytes of a PNG that stores class ids, uint8 (H, W), as palette indices.

    Viewers show the class colours.
    """
    from PIL import Image

    image = Image.fromarray(ids_HW)
    palette = np.zeros((256, 3), np.uint8)
    palette[: len(colours)], palette[IGNORE_INDEX] = colours, VOID_RGB
    image.putpalette(palette.tobytes())
    return png_bytes(image)


def png_bytes(image: "Image") -> bytes:
    """Return a PIL image as the bytes of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def error_colour(colours: Colours) -> tuple[int, int, int]:
    """Return the colour (RGB) for wrong pixels: the first of seven reds that differs clearly from all class colours.

    If all reds resemble a class colour, it is the most distant red.
    """
    classes = np.array(colours, float).reshape(-1, 3)
    distances = [np.linalg.norm(classes - red, axis=1).min(initial=np.inf) for red in _REDS]
    apart = [place for place, distance in enumerate(distances) if distance >= _APART]
    return _REDS[apart[0] if apart else int(np.argmax(distances))]


def mark_wrong(
    pixels_HW3: Array, label_HW: Array, predicted_HW: Array, wrong: tuple[int, int, int] = WRONG_RGB
) -> Array:
    """Return an image in dark grey, with wrong pixels in the colour `wrong` and void in light grey, uint8 (H, W, 3).

    Args:
        pixels_HW3: the image, RGB from 0 to 255.
        label_HW: class ids, 255 for void.
        predicted_HW: predicted class ids. A pixel is wrong if they differ from the label.
        wrong: RGB colour.
    """
    grey_HW1 = pixels_HW3.mean(2, keepdims=True)
    marked_HW3 = np.broadcast_to(30 + 0.5 * grey_HW1, pixels_HW3.shape).astype(np.uint8)
    marked_HW3[label_HW != predicted_HW] = wrong
    marked_HW3[label_HW == IGNORE_INDEX] = VOID_RGB
    return marked_HW3


class Drawn(Protocol):
    """A picture that draws itself and its colour bar into matplotlib axes, such as a `DepthMap`."""

    def draw(self, axes: "Axes") -> None:
        """Draw the picture and its colour bar into matplotlib axes."""


def panels(
    title: str,
    pictures: Sequence[tuple[str, Array | Drawn]],
    legend: Sequence[tuple[str, tuple[int, int, int]]],
    layout: Layout = "grid",
) -> "Figure":
    """Return a figure of pictures of one size, with a legend of colours. The first picture must be an array.

    Args:
        title: text above the pictures. It is not drawn in the layout "row".
        pictures: pairs of a title and a picture, an array uint8 (H, W, 3) or a `Drawn`.
        legend: pairs of a name and an RGB colour.
        layout: "grid": two pictures in each line, and more if there are more than 24 pictures. The legend is at the
            side. "row": all side by side, with the legend below, as in a paper.
    """
    from matplotlib.patches import Patch

    first = pictures[0][1]
    assert isinstance(first, np.ndarray)
    height, width = first.shape[:2]
    in_row = layout == "row"
    pairs = -(-len(pictures) // 2)
    columns = -(-pairs // _MOST_PAIRS)
    rows = -(-pairs // columns)
    if in_row:
        across = _ROW_INCHES * len(pictures)
        words = max(1, int(across / _LEGEND_INCHES))
        figure = new_figure(across, _ROW_INCHES * height / width + 0.35 + 0.2 * -(-len(legend) // words), "")
    else:
        figure = new_figure(2.3 + 9.2 * columns, 0.8 + rows * (4.6 * height / width + 0.35), title)
    for number, (name, picture) in enumerate(pictures):
        column, row = divmod(number // 2, rows)
        place = 1 + 2 * columns * row + 2 * column + number % 2
        axes = figure.add_subplot(
            *((1, len(pictures), number + 1) if in_row else (rows, 2 * columns, place)), xticks=(), yticks=()
        )
        if isinstance(picture, np.ndarray):
            axes.imshow(picture, interpolation="nearest")
        else:
            picture.draw(axes)
        axes.set_title(one_line(name), fontsize=10 if in_row else 11, color=INK)
        axes.set_axis_off()
    colours = hex_colours([colour for _, colour in legend])
    handles = [Patch(facecolor=colour, edgecolor=INK, linewidth=0.5, label="class") for colour in colours]
    where: Any = {"loc": "outside lower center", "ncols": words} if in_row else {"loc": "outside right center"}
    legend_box = figure.legend(handles=handles, fontsize=9, frameon=False, **where)
    for text, (name, _) in zip(legend_box.get_texts(), legend, strict=True):
        text.set_text(one_line(name))  # as a label, matplotlib would hide a name that begins with _
    return figure


def draw_confusion(counts: Array, names: Sequence[str], title: str) -> "Figure":
    """Return a figure of a confusion matrix, in percent of each label's pixels.

    `counts` are pixels (C, C), with labels along the rows. `names` are the C class names. Of more than 40 classes, only
    those with the lowest recall are drawn.
    """
    labelled = counts.sum(1)
    shares = counts / np.maximum(labelled, 1)[:, None]
    rows = np.flatnonzero(labelled)
    if len(rows) > _SHOWN:
        rows = np.sort(rows[np.argsort(shares[rows, rows])[:_SHOWN]])
        title += f"; the {_SHOWN} classes that are found least"
    # A class that is in no label may be predicted all the same: it has a column.
    columns = np.union1d(rows, np.flatnonzero(counts[rows].sum(0) > 0)) if len(rows) < _SHOWN else rows
    shares = shares[np.ix_(rows, columns)]
    figure = new_figure(4 + 0.48 * len(columns), 3 + 0.48 * len(rows), title)
    axes = figure.add_subplot()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(
        range(len(columns)),
        [one_line(names[place]) for place in columns.tolist()],
        rotation=45,
        ha="right",
        fontsize=9,
    )
    axes.set_yticks(range(len(rows)), [one_line(names[place]) for place in rows.tolist()], fontsize=9)
    axes.set_xlabel("prediction", fontsize=10)
    axes.set_ylabel("label", fontsize=10)
    for (row, column), share in np.ndenumerate(shares):
        if share >= 0.005:
            colour = "white" if share > 0.55 else INK
            axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=8, color=colour)
    return figure


def file_part(sample: str) -> str:
    """Return a sample's id as a part of a file name.

    Other characters than ASCII letters, digits, "_", "." and "-" become "-". Only the last 100 characters are kept.
    """
    return re.sub(r"[^\w.-]+", "-", sample, flags=re.ASCII).strip("-.")[-_LONGEST_NAME:] or "sample"
