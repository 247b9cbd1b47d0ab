"""The spectral read-out in two and three dimensions, coloured by class (DSCL, sections 7 and 9)."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

from jaxclust.cluster.spectral import unit
from jaxclust.data.source import Source
from jaxclust.errors import DataError
from jaxclust.pictures import Draw, Seen
from jaxclust.pictures._embedding import FEWEST, NAMED, Groups, palette, scatter
from jaxclust.pictures._epochs import split_of
from jaxclust.pictures._readout import read_out
from jaxclust.report import figures
from jaxclust.report.gallery import Gallery, Shown

Array = NDArray[np.float64]


def prepare(seen: Seen) -> Draw:
    """DataError where there are fewer than ten images."""
    source = seen.source()
    name, split = split_of(seen, source)
    if split.size < FEWEST:
        raise DataError(f"the spectral read-out needs {FEWEST} images, and there are {split.size} of {name}")
    return partial(draw, seen, source)


def draw(seen: Seen, source: Source, folder: Path) -> Gallery:
    """spectral.png in the plane and spectral-3d.png in space, with -dark for dark pages."""
    found = read_out(seen, source, seen.stage.config.report.sample, folder)
    points, share = flattened(unit(found.rows))
    classes = source.class_names or ()
    title = "by class, as the labels say" if (found.labels >= 0).any() else ""
    groups = Groups(title, found.labels, classes, np.arange(len(classes)))
    shown = []
    for suffix, theme in (("", figures.LIGHT), ("-dark", figures.DARK)):
        figures.save(scatter(points[:, :2].astype(np.float32), [groups], theme), folder / f"spectral{suffix}.png")
        figures.save(space(points, groups, theme), folder / f"spectral-3d{suffix}.png")
    for file, number in (("spectral", 2), ("spectral-3d", 3)):
        words = f"{share[:number].sum():.0%} of the variance"
        shown.append(Shown(f"{file}.png", f"{number} dimensions", words, f"{file}-dark.png"))
    drawn = "All" if len(points) == found.size else "A sample of"
    caption = (
        f"{drawn} {len(points):,} images of {found.name}: rows of the left singular vectors of their features at unit "
        f"length, {found.rows.shape[1]} dimensions, in the directions of their largest variance."
    )
    return Gallery("Spectral read-out", caption, shown)


def flattened(rows: Array) -> tuple[Array, Array]:
    """Rows [n, r] in the three directions of their largest variance [n, 3], and the share of each [3]; zeros beyond."""
    centred = rows - rows.mean(axis=0)
    left, values, _ = np.linalg.svd(centred, full_matrices=False)
    values = np.pad(values, (0, max(0, 3 - len(values))))
    left = np.pad(left, ((0, 0), (0, max(0, 3 - left.shape[1]))))
    total = float(np.sum(values**2)) or 1.0
    return left[:, :3] * values[:3], values[:3] ** 2 / total


@figures.styled
def space(points: Array, groups: Groups, theme: figures.Theme = figures.LIGHT) -> Figure:
    """Points [n, 3] seen from above one corner; few groups have their name in their midst."""
    figure = Figure((6.2, 5.8), facecolor=theme.paper)
    axes: Any = figure.add_axes((0, 0, 1, 1), projection="3d")
    axes.set_facecolor(theme.paper)
    for axis in (axes.xaxis, axes.yaxis, axes.zaxis):
        axis.set_pane_color(theme.paper)
        axis.line.set_color(theme.line)
        axis._axinfo["grid"]["color"] = theme.line
        axis.set_ticks_position("none")
        axis.set_ticklabels([])
    axes.set_box_aspect(None, zoom=1.1)
    known = groups.group >= 0
    colours = palette(int(groups.colour.max(initial=-1)) + 1, theme)
    size = float(np.clip(14000 / len(points), 3, 26))
    dots: dict[str, Any] = {"s": size, "linewidths": 0, "alpha": 0.85}
    axes.scatter(*points[~known].T, color=theme.line, **dots)
    axes.scatter(*points[known].T, color=colours[groups.colour[groups.group[known]]], **dots)
    _name(axes, points, groups, np.unique(groups.group[known]).tolist(), theme)
    return figure


def _name(axes: Any, points: Array, groups: Groups, present: Sequence[int], theme: figures.Theme) -> None:
    outline = [withStroke(linewidth=3, foreground=theme.paper)]
    for group in present if len(present) <= NAMED else ():
        middle = np.median(points[groups.group == group], axis=0)
        name = figures.printable(groups.names[group], 16)
        axes.text(
            *middle, name, color=theme.ink, fontsize=9, weight="bold", ha="center", path_effects=outline, zorder=9
        )
