"""Confusion matrices of the page: which class is taken for which, by the first run of each row."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from kdcache.analysis.comparison import Comparison
from kdcache.analysis.report.render import render
from kdcache.metrics import ConfusionMatrix

MOST = 24
"""Most classes in a table. With more, it shows those whose pixels are found least."""


def confusions(comparison: Comparison, matrices: Sequence[tuple[int, ConfusionMatrix]]) -> Markup | None:
    """Return the section of confusion matrices, the best row first, or None if all counts are 0.

    `matrices` has pairs of an index into `comparison.rows` and the confusion matrix of that row's first run.
    """
    rows = comparison.rows
    known = [(place, matrix) for place, matrix in matrices if int(matrix.counts.sum())]
    known.sort(key=lambda pair: (rows[pair[0]].teacher, -rows[pair[0]].miou.mean))
    if not known:
        return None
    return render("confusion.html", tables=[(rows[place], place, _table(matrix)) for place, matrix in known], most=MOST)


def _table(matrix: ConfusionMatrix) -> dict[str, Any]:
    """Return class names, and for each labelled class the share of its pixels that every class gets."""
    counts = matrix.counts.numpy()
    labelled = counts.sum(1)
    shares = counts / np.maximum(labelled, 1)[:, None]
    rows = np.flatnonzero(labelled)
    if len(rows) > MOST:
        rows = np.sort(rows[np.argsort(shares[rows, rows], kind="stable")[:MOST]])
    columns = rows if len(rows) == MOST else np.union1d(rows, np.flatnonzero(counts[rows].sum(0)))
    names = matrix.class_names
    lines = [(names[row], [(column == row, float(shares[row, column])) for column in columns]) for row in rows]
    return {
        "names": [names[column] for column in columns],
        "lines": lines,
        "cut": len(rows) < int((labelled > 0).sum()),
    }
