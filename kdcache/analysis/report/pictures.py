"""Images with a slider between the predictions of two rows.

Without a script the layers of an image lie side by side, each with its name. With it they lie upon each other, the same
two of all images, and a line that is dragged divides them.
"""

import math
from collections.abc import Sequence
from pathlib import Path

from kdcache.analysis.comparison import Comparison
from kdcache.analysis.gallery import shorten
from kdcache.analysis.report.classes import class_swatch
from kdcache.analysis.report.html import Html, data_uri, join, number, section, tag
from kdcache.analysis.report.samples import Said, Sample
from kdcache.analysis.report.scores import swatch
from kdcache.analysis.report.summary import measured
from kdcache.metrics.tables import percent


def pictures(comparison: Comparison, samples: Sequence[Sample], folder: Path | None) -> Html | None:
    """Section of the images; None when there is nothing to show."""
    more = None
    if folder is not None:
        more = tag("p", "More pictures of each run are in the folder ", tag("code", str(folder)), ".", class_="lead")
    if not samples:
        return None if more is None else section("pictures", "Pictures", more)
    rows = [place for place, _ in enumerate(comparison.rows) if place in {one.place for one in samples[0].said}]
    lead = (
        "The best and the worst images by the mean over all rows, the teacher apart. The mIoU of an image is the mean "
        "over the classes in its label or its prediction; their mean is not the mIoU of the set."
    )
    body = tag("div", *(_sample(comparison, sample) for sample in samples), class_="samples")
    none = tag("p", "None of these images has that class.", class_="empty", id="no-sample", hidden=True)
    tools = tag("div", *_tools(comparison, rows), class_="card controls needs-script tools")
    return section("pictures", "Pictures", more, tools, _filter(comparison, samples), none, body, lead=lead)


def _tools(comparison: Comparison, rows: Sequence[int]) -> list[Html]:
    """The controls for the two sides of the line."""
    best = max(measured(comparison), key=lambda row: row.miou.mean, default=None)
    right = next((place for place in rows if comparison.rows[place] is best), rows[0])
    names = [("image", "image"), ("label", "ground truth")]
    layers = [*names, *((f"row{place}", comparison.rows[place].name) for place in rows)]
    marked = tag("label", tag("input", type="checkbox", id="mark-wrong"), "mark what is wrong")
    through = tag("label", tag("input", type="checkbox", id="see-through"), "over the image")
    return [
        _choice(comparison, "left", "Left of the line", layers, "image"),
        _choice(comparison, "right", "Right of the line", layers, f"row{right}"),
        tag("p", marked, through, class_="switches"),
    ]


def _choice(comparison: Comparison, side: str, title: str, layers: Sequence[tuple[str, str]], chosen: str) -> Html:
    """Radio buttons that look like tabs: arrow keys move between them."""
    buttons = []
    for key, name in layers:
        place = int(key[3:]) if key.startswith("row") else None
        colour = None if place is None else swatch(place, comparison.rows[place])
        box = tag("input", type="radio", name=side, value=key, checked=key == chosen)
        buttons.append(tag("label", box, tag("span", colour, shorten(name, 48)), class_="pill"))
    return tag("fieldset", tag("legend", title), tag("div", *buttons, class_="pills"))


def _filter(comparison: Comparison, samples: Sequence[Sample]) -> Html:
    """Classes that occur; each is a switch that leaves the images which have it."""
    counts = {place: sum(place in one.present for one in samples) for place in range(len(comparison.class_names))}
    everything = tag("button", "all images", type="button", class_="pill-button", data_class="", aria_pressed="true")
    buttons = [
        tag(
            "button",
            class_swatch(comparison.class_colours[place]),
            comparison.class_names[place],
            tag("small", f" {count}"),
            type="button",
            class_="pill-button",
            data_class=place,
            aria_pressed="false",
        )
        for place, count in counts.items()
        if count
    ]
    title = tag("p", "Only images with", class_="filter-title needs-script")
    return join(
        title,
        tag(
            "div", everything, *buttons, class_="pills", role="group", aria_label="Only images with", id="class-filter"
        ),
    )


def _sample(comparison: Comparison, sample: Sample) -> Html:
    height, width = sample.size
    head = tag(
        "h3", tag("span", sample.why, class_="rank"), " ", tag("span", shorten(sample.sample), title=sample.sample)
    )
    layers = [
        _layer("image", "image", [_picture(sample, "image", data_uri("image/jpeg", sample.image))]),
        _layer("label", "ground truth", [_picture(sample, "ground truth", data_uri("image/png", sample.label), "map")]),
        *(_said(comparison, sample, one) for one in sample.said),
    ]
    handle = tag("span", class_="handle", role="slider", tabindex="0", aria_valuemin="0", aria_valuemax="100",
                 aria_valuenow="50", aria_label=f"Line between the two layers of {sample.sample}")  # fmt: skip
    stage = tag("div", *layers, handle, class_="stage", style=f"--ratio:{width}/{height};--width:{width}")
    sides = tag("p", tag("span", class_="side-left"), tag("span", class_="side-right"), class_="sides needs-script")
    scores = _scores(comparison, sample)
    return tag(
        "article", head, stage, sides, scores, class_="card sample", data_classes=" ".join(map(str, sample.present))
    )


def _layer(key: str, name: str, pictures: Sequence[Html]) -> Html:
    return tag("figure", tag("div", *pictures), tag("figcaption", name), class_="layer", data_layer=key, data_name=name)


def _said(comparison: Comparison, sample: Sample, one: Said) -> Html:
    name = comparison.rows[one.place].name
    pictures = [
        _picture(sample, f"prediction of {name}", data_uri("image/png", one.classes), "map"),
        _picture(sample, "", data_uri("image/png", one.wrong), "wrong"),
    ]
    return _layer(f"row{one.place}", f"{name}: {percent(one.miou)}\N{NO-BREAK SPACE}%", pictures)


def _picture(sample: Sample, what: str, source: str, class_: str | None = None) -> Html:
    height, width = sample.size
    alt = f"{what} of {sample.sample}" if what else ""
    return tag(
        "img", src=source, alt=alt, width=width, height=height, class_=class_, draggable="false", decoding="async"
    )


def _scores(comparison: Comparison, sample: Sample) -> Html:
    """mIoU of this image by row; the script shows the IoU of a class instead while its filter is on."""
    values = []
    for one in sample.said:
        row = comparison.rows[one.place]
        ious = ",".join("" if math.isnan(value) else number(100 * value) for value in one.iou)
        name = tag("dt", swatch(one.place, row), row.name)
        values.append(tag("div", name, tag("dd", percent(one.miou), data_miou=percent(one.miou), data_iou=ious)))
    head = tag("p", "mIoU of this image, %", class_="score-title")
    return join(head, tag("dl", *values, class_="scores"))
