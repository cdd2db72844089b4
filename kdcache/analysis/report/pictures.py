"""Images with a slider between the predictions of two rows.

Without a script the layers of an image lie side by side, each with its name. With it they lie upon each other, the same
two of all images (at first the baseline and the best row), and a line that is dragged divides them.
"""

from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from kdcache.analysis.comparison import Comparison
from kdcache.analysis.report.render import render
from kdcache.analysis.report.samples import Sample
from kdcache.analysis.report.summary import measured

_SHOWN_CLASSES = 24
"""Classes that the images can be filtered by before the rest is folded away."""
NO_SHARED_IMAGE = (
    "No image is the best or the worst of all rows: some are judged in segmentation alone, others in depth alone. "
    "A page of either kind shows its images."
)


def pictures(comparison: Comparison, samples: Sequence[Sample] | None, folder: Path | None) -> Markup | None:
    """Section of the images; None when there is nothing to show and none were wanted (`samples` is None)."""
    if folder is None and samples is None:
        return None
    why_none = NO_SHARED_IMAGE if samples is not None else ""
    samples = samples or ()
    rows = comparison.rows
    drawn = sorted({one.place for sample in samples for one in sample.predictions if one.classes is not None})
    best, gap = max(measured(comparison), key=lambda pair: pair[0].miou.mean, default=(None, None))
    right = next((place for place in drawn if rows[place] is best), drawn[0] if drawn else None)
    left = next((place for place in drawn if gap is not None and rows[place].name == gap.baseline), None)
    counts = [sum(place in one.present for one in samples) for place in range(len(comparison.class_names))]
    classes = zip(comparison.class_names, comparison.class_colours, counts, strict=True)
    return render(
        "pictures.html",
        rows=rows,
        samples=samples,
        folder=folder,
        layers=[
            ("image", "image", None),
            ("label", "ground truth", None),
            *((f"row{place}", rows[place].name, place) for place in drawn),
        ],
        left="image" if left is None or left == right else f"row{left}",
        right="label" if right is None else f"row{right}",
        shown_classes=_SHOWN_CLASSES,
        has_classes=any(one.label is not None for one in samples) and bool(drawn),
        why_none=why_none,
        score=samples[0].score if samples else None,
        classes=[(place, *of_class) for place, of_class in enumerate(classes) if of_class[-1]],
    )
