"""The projector P on the columns of the features, whose rows are sorted by class (DSCL, section 9)."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from numpy.typing import NDArray

from jaxclust.data.source import Source
from jaxclust.errors import DataError
from jaxclust.pictures import Draw, Seen
from jaxclust.pictures._epochs import split_of
from jaxclust.pictures._readout import read_out
from jaxclust.report import figures
from jaxclust.report.gallery import Gallery, Shown

MOST = 500  # rows that have room
NAMED = 40  # classes that have room for their name

Array = NDArray[np.float64]


def prepare(seen: Seen) -> Draw:
    """DataError without labels to sort by."""
    source = seen.source()
    name, split = split_of(seen, source)
    if split.labels is None or not (split.labels >= 0).any():
        raise DataError(f"the rows of P are sorted by class, and no image of {name} has a label")
    return partial(draw, seen, source)


def draw(seen: Seen, source: Source, folder: Path) -> Gallery:
    """projector.png, and projector-dark.png for dark pages."""
    found = read_out(seen, source, min(MOST, seen.stage.config.report.sample), folder)
    known = found.labels >= 0
    p, labels = projector(found.rows[known], found.labels[known])
    for suffix, theme in (("", figures.LIGHT), ("-dark", figures.DARK)):
        figures.save(heat(p, labels, source.class_names or (), theme), folder / f"projector{suffix}.png")
    caption = (
        f"P, the projector on the column space of the features of {found.size:,} images of {found.name}, for "
        f"{len(labels):,} of them sorted by class. Were it the projector on the classes, each class would be a square "
        "of one colour and all else zero. The diagonal is left out."
    )
    return Gallery("Projector", caption, [Shown("projector.png", "", "", "projector-dark.png")])


def projector(rows: Array, labels: NDArray[np.int64]) -> tuple[Array, NDArray[np.int64]]:
    """P [n, n] of orthonormal columns, of which these are rows [n, r], and labels [n], both sorted by class."""
    order = np.argsort(labels, kind="stable")
    return rows[order] @ rows[order].T, labels[order]


@figures.styled
def heat(p: Array, labels: NDArray[np.int64], classes: Sequence[str], theme: figures.Theme = figures.LIGHT) -> Figure:
    """P as colours around zero, with names of classes beside their rows, and lines between classes if they are few."""
    figure = Figure((7.6, 6.0), facecolor=theme.paper)
    axes = figure.add_axes((0.16, 0.03, 0.71, 0.9))
    figures.frame(axes, theme)
    shown = np.where(np.eye(len(p), dtype=bool), np.nan, p)
    limit = float(np.nanquantile(np.abs(shown), 0.99)) or 1.0
    colours = LinearSegmentedColormap.from_list("signed", [theme.alarm, theme.paper, theme.first])
    image = axes.imshow(shown, cmap=colours, vmin=-limit, vmax=limit, interpolation="nearest")
    present, starts, counts = np.unique(labels, return_index=True, return_counts=True)
    axes.set(xticks=[], yticks=[])
    if len(present) <= NAMED:
        names = [figures.printable(classes[label], 16) for label in present]
        axes.set_yticks(starts + (counts - 1) / 2, names)
        for start in starts[1:]:
            axes.axhline(start - 0.5, color=theme.ink, linewidth=0.6)
            axes.axvline(start - 0.5, color=theme.ink, linewidth=0.6)
    axes.set_title("P, rows by class", loc="left", color=theme.ink, fontsize=10, weight="bold", pad=8)
    bar = figure.colorbar(image, cax=figure.add_axes((0.895, 0.03, 0.02, 0.9)))
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=8, labelcolor=theme.muted)
    return figure
