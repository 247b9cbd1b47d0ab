"""The picture of a sweep: one plot for each measure, over the values of a setting."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator, PercentFormatter

from jaxclust.report.figures import LIGHT, Theme, frame, printable, styled

COLUMNS = 3
LABEL = 120  # letters of labels that have room in a line
TICKS = 7  # as many values of a setting have room below a plot
WIDE = 20.0  # a setting whose largest value is this many times its smallest is drawn on a logarithmic axis


class Series(NamedTuple):
    """One line: values of the setting, what was measured, and how far bars reach below and above it (NaN: no bar).

    Values that are not all numbers are words.
    """

    label: str
    x: Sequence[Any]
    y: Sequence[float]
    below: Sequence[float]
    above: Sequence[float]


class Panel(NamedTuple):
    """One plot; all panels have the same labels in the same order."""

    title: str
    series: Sequence[Series]
    percent: bool = False


@styled
def draw(panels: Sequence[Panel], field: str, theme: Theme = LIGHT) -> Figure:
    """Small multiples over the values of `field`: an axis of numbers, or of words in the order they come."""
    values = list(dict.fromkeys(x for panel in panels for line in panel.series for x in line.x))
    labels = [printable(line.label, LABEL) for line in panels[0].series]
    side_by_side = max(1, min(COLUMNS, LABEL // max(1, *map(len, labels))))
    legend = 0.2 * -(-len(labels) // side_by_side) if len(labels) > 1 else 0.0
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    above, below = 0.42, 0.95 if _slanted(values) else 0.55  # inches around each plot
    height = legend + rows * (above + 1.8 + below)
    figure = Figure(figsize=(3.45 * columns, height), facecolor=theme.paper)
    grid = figure.subplots(rows, columns, squeeze=False, gridspec_kw={"wspace": 0.28, "hspace": (above + below) / 1.8})
    figure.subplots_adjust(0.19 / columns, below / height, 1 - 0.07 / columns, 1 - (legend + above) / height)
    for axes, panel in zip(grid.flat, panels, strict=False):
        _panel(axes, panel, field, values, theme)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    if legend:
        figure.legend(
            *grid.flat[0].get_legend_handles_labels(), loc="upper left", bbox_to_anchor=(0.01, 1), ncols=side_by_side,
            frameon=False, fontsize=8, labelcolor=theme.ink, handlelength=1.6,
        )  # fmt: skip
    return figure


def _panel(axes: Axes, panel: Panel, field: str, values: Sequence[Any], theme: Theme) -> None:
    frame(axes, theme)
    axes.set_title(panel.title, loc="left", color=theme.ink, fontsize=10, weight="bold", pad=8)
    axes.set_xlabel(printable(field, 40), color=theme.muted, fontsize=8)
    axes.grid(axis="y", color=theme.line, linewidth=0.8)
    axes.yaxis.set_major_locator(MaxNLocator(5, min_n_ticks=3))
    if panel.percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    numeric = _is_numeric(values)
    colours = itertools.cycle((theme.first, theme.second, theme.third, theme.alarm, theme.muted, theme.ink))
    for number, (line, colour) in enumerate(zip(panel.series, colours, strict=False)):
        aside = 0.0 if numeric else 0.12 * (number - (len(panel.series) - 1) / 2)  # words are far enough apart
        places = [x if numeric else values.index(x) + aside for x in line.x]
        axes.errorbar(
            places, line.y, np.nan_to_num([line.below, line.above]), label=printable(line.label, LABEL), color=colour,
            linestyle="-" if numeric else "", linewidth=1.8, marker="o", markersize=4.5, elinewidth=1.2, capsize=2.5,
        )  # fmt: skip
    (_number_axis if numeric else _word_axis)(axes, values)
    _widen(axes)


def _number_axis(axes: Axes, values: Sequence[float]) -> None:
    shown = sorted(values)[:: -(-len(values) // TICKS)]
    if min(values) > 0 and max(values) / min(values) >= WIDE:
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(shown, [f"{value:g}" for value in shown])


def _word_axis(axes: Axes, values: Sequence[Any]) -> None:
    names = _words(values)
    axes.set_xticks(range(len(names)), names)
    axes.set_xlim(-0.5, len(names) - 0.5)
    if _slanted(values):
        axes.tick_params(axis="x", rotation=25)
        for text in axes.get_xticklabels():
            text.set(ha="right", rotation_mode="anchor")


def _is_numeric(values: Sequence[Any]) -> bool:
    return all(isinstance(x, int | float) and not isinstance(x, bool) for x in values)


def _words(values: Sequence[Any]) -> list[str]:
    return [printable(str(value), 16) for value in values]


def _slanted(values: Sequence[Any]) -> bool:
    return not _is_numeric(values) and sum(map(len, _words(values))) > 32


def _widen(axes: Axes) -> None:
    """A difference of less than a twentieth is not blown up to the whole height."""
    low, high = axes.get_ylim()
    missing = 0.05 * max(abs(low), abs(high)) - (high - low)
    if missing > 0:
        axes.set_ylim(low - missing / 2, high + missing / 2)
