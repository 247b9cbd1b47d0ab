"""Plots over epochs that several pictures share: lines by net or by layer, and bars on top of or beside each other."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from jaxclust.pictures._embedding import palette
from jaxclust.report import figures
from jaxclust.report.figures import DARK, LIGHT, Theme
from jaxclust.report.gallery import Shown

Array = NDArray[np.float64]

SHARE = (-0.03, 1.03)  # limits of what lies between 0 and 1
LISTED = 26  # names of a legend below each other


class Line(NamedTuple):
    """A series over epochs."""

    label: str
    x: Sequence[int]
    y: Sequence[float]
    colour: int  # its place in the palette
    style: str = "-"
    width: float = 1.5


class Panel(NamedTuple):
    """One plot."""

    title: str
    lines: Sequence[Line]
    limits: tuple[float, float] | None = None


class Bars(NamedTuple):
    """One plot of bars: `heights` [series, places], NaN where there is none."""

    title: str
    heights: Array
    series: Sequence[str]
    places: Sequence[str]
    stacked: bool
    limits: tuple[float, float] | None = None
    xlabel: str = "epoch"


def save(figure: Callable[..., Figure], folder: Path, name: str, title: str = "", caption: str = "") -> Shown:
    """Draws `figure(theme=…)` as <name>.png and <name>-dark.png, and says where they are."""
    for suffix, theme in (("", LIGHT), ("-dark", DARK)):
        figures.save(figure(theme=theme), folder / f"{name}{suffix}.png")
    return Shown(f"{name}.png", title, caption, f"{name}-dark.png")


@figures.styled
def lines(panels: Sequence[Panel], columns: int = 1, theme: Theme = LIGHT) -> Figure:
    """Small multiples over epochs; one legend where all have the same names in the same colours, else one for each."""
    keys = [[(line.label, line.colour) for line in panel.lines] for panel in panels]
    shared = all(key == keys[0] for key in keys)
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    grid, figure = _grid(rows, columns, _legend_width([label for key in keys for label, _ in key], keys), theme)
    colours = palette(max(colour for key in keys for _, colour in key) + 1, theme)
    for number, (axes, panel) in enumerate(zip(grid, panels, strict=False)):
        _begin(axes, panel.title, "epoch", theme)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        for line in panel.lines:
            marker = "o" if len(line.x) < 2 else ""
            axes.plot(
                line.x, line.y, color=colours[line.colour], linestyle=line.style, linewidth=line.width, marker=marker,
                markersize=4, label=figures.printable(line.label, 48),
            )  # fmt: skip
        axes.set_ylim(*(panel.limits or (min(0.0, axes.get_ylim()[0]), None)))
        if number == columns - 1 if shared else True:
            _legend(axes, theme)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    return figure


@figures.styled
def bars(plots: Sequence[Bars], theme: Theme = LIGHT) -> Figure:
    """Bars of several series, stacked or grouped, one plot below the other."""
    grid, figure = _grid(len(plots), 1, _legend_width([s for p in plots for s in p.series], []), theme)
    for axes, plot in zip(grid, plots, strict=True):
        _begin(axes, plot.title, plot.xlabel, theme)
        count, colours = len(plot.series), palette(len(plot.series), theme)
        places, below = np.arange(len(plot.places)), np.zeros(len(plot.places))
        width = 0.85 if plot.stacked else 0.8 / count
        for number, (name, heights) in enumerate(zip(plot.series, np.nan_to_num(plot.heights), strict=True)):
            aside = 0.0 if plot.stacked else width * (number - (count - 1) / 2)
            axes.bar(places + aside, heights, width, below if plot.stacked else 0, color=colours[number], label=name)
            below = below + heights
        around = max(0.0, 4 - len(places)) / 2  # few bars are no wider than others
        axes.set_xlim(-0.6 - around, len(places) - 0.4 + around)
        _name_places(axes, plot.places)
        if plot.limits is not None:
            axes.set_ylim(*plot.limits)
        _legend(axes, theme)
    return figure


def _grid(rows: int, columns: int, legend: float, theme: Theme) -> tuple[list[Axes], Figure]:
    """Axes from left to right and top to bottom, with room for a legend of so many inches on the right."""
    side, above, below, left, gap = 2.1, 0.42, 0.62, 0.6, 0.55  # inches
    wide = 7.6 if columns == 1 else 3.9
    across = left + columns * wide + (columns - 1) * gap + legend + 0.2
    down = rows * (above + side + below)
    figure = Figure((across, down), facecolor=theme.paper)
    found = []
    for row in range(rows):
        for column in range(columns):
            x, y = left + column * (wide + gap), down - (row + 1) * (above + side + below) + below
            found.append(figure.add_axes((x / across, y / down, wide / across, side / down)))
    return found, figure


def _begin(axes: Axes, title: str, xlabel: str, theme: Theme) -> None:
    figures.frame(axes, theme)
    axes.set_title(title, loc="left", color=theme.ink, fontsize=10, weight="bold", pad=8)
    axes.set_xlabel(xlabel, color=theme.muted, fontsize=8)
    axes.grid(axis="y", color=theme.line, linewidth=0.8)


def _name_places(axes: Axes, names: Sequence[str]) -> None:
    """As many names below the bars as have room, slanted where they are long."""
    longest = max(map(len, names), default=1)
    every = -(-len(names) // max(1, 80 // max(longest + 1, 3))) if longest < 8 else 1
    axes.set_xticks(range(0, len(names), every), [figures.printable(name, 24) for name in names[::every]])
    if longest >= 8:
        axes.tick_params(axis="x", rotation=20, labelsize=7)
        for text in axes.get_xticklabels():
            text.set(ha="right", rotation_mode="anchor")


def _legend_width(labels: Sequence[str], keys: Sequence[Sequence[Any]]) -> float:
    columns = -(-max(map(len, keys), default=1) // LISTED)
    return columns * (0.5 + 0.075 * max((min(len(label), 48) for label in labels), default=0))


def _legend(axes: Axes, theme: Theme) -> None:
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(
        handles, labels, loc="upper left", bbox_to_anchor=(1.01, 1.03), ncols=max(1, -(-len(labels) // LISTED)),
        frameon=False, fontsize=8, labelcolor=theme.ink, handlelength=1.6, borderaxespad=0.0,
    )  # fmt: skip
