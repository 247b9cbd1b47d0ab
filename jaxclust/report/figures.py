"""Pictures of a clustering: arrays in, a Matplotlib figure out; only `save` touches a file.

No figure uses pyplot, so there is no global state and no display is needed.
"""

import functools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from PIL import Image

Array = NDArray[Any]
P = ParamSpec("P")

DPI = 144
FALLBACK_FONTS = (  # for class names in scripts that DejaVu lacks, where the machine has one
    "Noto Sans CJK JP",
    "Noto Sans CJK SC",
    "PingFang SC",
    "Hiragino Sans",
    "Microsoft YaHei",
    "Arial Unicode MS",
    "Noto Sans Devanagari",
    "Noto Sans Thai",
)


class Theme(NamedTuple):
    """Colours of a figure; the page uses the same."""

    paper: str
    ink: str
    muted: str
    line: str
    first: str
    second: str
    third: str
    alarm: str


LIGHT = Theme("#ffffff", "#1c2126", "#69727d", "#e6e4de", "#0f766e", "#c27a12", "#5660a8", "#b5382a")
DARK = Theme("#1b2025", "#e9e6e0", "#98a2ad", "#323940", "#4fb8aa", "#dca548", "#98a2e6", "#e8755f")


class Line(NamedTuple):
    """A named series of one panel."""

    label: str
    x: Array
    y: Array
    end: str = ""  # what its right end says after the label; else the last value


class Panel(NamedTuple):
    """One plot of `curves`."""

    title: str
    lines: list[Line]
    limits: tuple[float, float] | None = None
    reference: tuple[float, str] | None = None  # a level worth comparing with, and its name
    others: Sequence[Line] = ()  # thin ones without a name, below the lines
    dot: tuple[float, float] | None = None  # a point of the last line


class Row(NamedTuple):
    """One cluster of `overview`: its images, nearest first, and words about it."""

    images: Array  # uint8 [n, H, W, C]
    title: str
    name: str
    detail: str
    share: float


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Draws under our type settings, without reading $ in a name as mathematics."""

    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with _style():
            return draw(*args, **kwargs)

    return drawn


@contextmanager
def _style() -> Iterator[None]:
    settings: Any = {
        "font.family": _fonts(),
        "font.size": 9,
        "text.parse_math": False,
        "axes.unicode_minus": False,
        "figure.dpi": DPI,
        "savefig.dpi": DPI,
    }
    with matplotlib.rc_context(settings):
        yield


@functools.cache
def _fonts() -> list[str]:
    installed = set(font_manager.get_font_names())
    return ["DejaVu Sans", *(name for name in FALLBACK_FONTS if name in installed)]


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG; characters that no installed font has are drawn as boxes, without a warning."""
    with _style(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        FigureCanvasAgg(figure).print_png(path)


def printable(text: str, length: int = 28) -> str:
    """The text on one line, without characters that cannot be drawn, cut to `length`."""
    clean = "".join(c if c.isprintable() else "\N{MIDDLE DOT}" for c in text)
    return clean if len(clean) <= length else clean[: length - 1] + "…"


@styled
def curves(panels: Sequence[Panel], stages: Sequence[tuple[str, int]] = (), theme: Theme = LIGHT) -> Figure:
    """Small multiples over rounds, two in a row; `stages` are names and first rounds from 0."""
    rows = (len(panels) + 1) // 2
    figure = Figure(figsize=(10, 2.75 * rows), facecolor=theme.paper)
    grid = figure.subplots(rows, 2, squeeze=False, gridspec_kw={"wspace": 0.42, "hspace": 0.5})
    figure.subplots_adjust(0.06, 0.19 / rows, 0.9, 1 - 0.14 / rows)
    for axes, panel in zip(grid.flat, panels, strict=False):
        _panel(axes, panel, stages, theme)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    return figure


def _panel(axes: Axes, panel: Panel, stages: Sequence[tuple[str, int]], theme: Theme) -> None:
    frame(axes, theme)
    axes.set_title(panel.title, loc="left", color=theme.ink, fontsize=10, weight="bold", pad=10)
    axes.set_xlabel("round", color=theme.muted, fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.grid(axis="y", color=theme.line, linewidth=0.8)
    colours = (theme.first, theme.second, theme.third)
    for x, y in (part for line in panel.others for part in _by_stage(line, stages)):
        axes.plot(x, y, color=theme.muted, alpha=0.5, linewidth=0.8, marker="." if len(x) < 2 else "")
    ends = []
    for line, colour in zip(panel.lines, colours, strict=False):
        for x, y in _by_stage(line, stages):
            axes.plot(x, y, color=colour, linewidth=1.8, marker="o" if len(x) < 2 else "", markersize=4)
        ends.append((float(line.y[-1]), f"{line.label} {line.end or f'{line.y[-1]:.3f}'}", colour))
    if panel.dot is not None:
        axes.plot(*panel.dot, "o", color=colours[len(panel.lines) - 1], markersize=6, markeredgecolor=theme.paper)
    if panel.limits is not None:
        axes.set_ylim(*panel.limits)
    if panel.reference is not None:
        level, name = panel.reference
        axes.axhline(level, color=theme.muted, linewidth=1, linestyle=(0, (4, 3)))
        ends.append((level, name, theme.muted))
    _mark_stages(axes, stages, theme)
    _label_ends(axes, ends)


def _by_stage(line: Line, stages: Sequence[tuple[str, int]]) -> Iterator[tuple[Array, Array]]:
    """The points of a line in each stage: what one has learnt the next does not go on with."""
    starts = np.searchsorted(line.x, [start for _, start in stages[1:]])
    for x, y in zip(np.split(line.x, starts), np.split(line.y, starts), strict=True):
        if len(x):
            yield x, y


def _mark_stages(axes: Axes, stages: Sequence[tuple[str, int]], theme: Theme) -> None:
    """A line before the first round of each stage, and names where there is room for them."""
    if len(stages) < 2:
        return
    low, high = axes.get_xlim()
    ends = [start for _, start in stages[1:]] + [math.inf]
    for (name, start), end in zip(stages, ends, strict=True):
        left, right = max(start - 0.5, low), min(end - 0.5, high)
        if low < start - 0.5 < high:
            axes.axvline(start - 0.5, color=theme.line, linewidth=1.2)
        if right - left >= 0.12 * (high - low):
            place, kind = (left + 0.01 * (high - low), 1.0), ("data", "axes fraction")
            axes.annotate(printable(name, 12), place, xycoords=kind, color=theme.muted, fontsize=7, va="bottom")
    axes.set_xlim(low, high)


def _label_ends(axes: Axes, ends: list[tuple[float, str, str]]) -> None:
    """Names the lines at their right ends, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    gap, above = 0.085, math.inf
    for y, text, colour in sorted(ends, reverse=True):
        at = above = min((y - low) / ((high - low) or 1.0), above - gap)
        axes.annotate(
            text,
            (1.015, at),
            xycoords="axes fraction",
            color=colour,
            fontsize=8,
            va="center",
            annotation_clip=False,
        )


@styled
def sizes(counts: Array, clusters: Array, theme: Theme = LIGHT) -> Figure:
    """Sizes of clusters with these ids in falling order; one with over half is marked."""
    order = np.argsort(-np.asarray(counts), kind="stable")
    counts, clusters = np.asarray(counts)[order], np.asarray(clusters)[order]
    figure = Figure(figsize=(10, 2.9), facecolor=theme.paper)
    axes = figure.add_axes((0.06, 0.17, 0.84, 0.7))
    frame(axes, theme)
    axes.grid(axis="y", color=theme.line, linewidth=0.8)
    places = np.arange(len(counts))
    if len(counts) <= 100:
        axes.bar(places, counts, width=min(0.8, 0.15 * len(counts)), color=theme.first)
    else:  # bars thinner than a pixel would shimmer
        axes.stairs(counts, np.arange(len(counts) + 1) - 0.5, fill=True, color=theme.first)
    if counts[0] > counts.sum() / 2:
        axes.patches[0].set_color(theme.alarm)
    even = counts.mean()
    axes.axhline(even, color=theme.muted, linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(
        f"even split\n{even:,.0f} images",
        (1.012, even),
        color=theme.muted,
        fontsize=8,
        xycoords=("axes fraction", "data"),
        va="center",
    )
    axes.set_xlim(-0.5, len(counts) - 0.5)
    if len(counts) <= 40:
        axes.set_xticks(places, [str(cluster) for cluster in clusters])
    else:
        axes.set_xticks([])
    axes.set_xlabel("clusters, largest first", color=theme.muted, fontsize=8)
    axes.set_title("images per cluster", loc="left", color=theme.ink, fontsize=10, weight="bold", pad=10)
    return figure


@styled
def overview(
    rows: Sequence[Row],
    title: str,
    columns: int = 13,
    note: str = "each row: the images nearest to one cluster's centre",
    theme: Theme = LIGHT,
) -> Figure:
    """A contact sheet with one row of images and one block of words per cluster."""
    height, width = rows[0].images.shape[1:3]
    page, left, margin = 11.0, 2.4, 0.32
    tile = (page - left - margin) / columns
    step = max(tile * height / width, 0.52) + 0.07
    head = 0.78
    tall = head + step * len(rows) + margin - 0.07
    figure = Figure(figsize=(page, tall), facecolor=theme.paper)
    canvas = figure.add_axes((0, 0, 1, 1), xlim=(0, page), ylim=(tall, 0))
    canvas.axis("off")
    canvas.text(margin, 0.42, title, color=theme.ink, fontsize=14, weight="bold", va="center")
    canvas.text(
        page - margin,
        0.43,
        note,
        color=theme.muted,
        fontsize=9,
        va="center",
        ha="right",
    )
    largest = max(row.share for row in rows) or 1.0
    for number, row in enumerate(rows):
        top = head + number * step
        middle = top + (step - 0.07) / 2
        _words(canvas, row, margin, left - margin - 0.3, middle, row.share / largest, theme)
        strip = contact_sheet(row.images[:columns], columns, round(tile * DPI), 6)
        high, wide = np.array(strip.shape[:2]) / DPI
        axes = figure.add_axes((left / page, 1 - (middle + high / 2) / tall, wide / page, high / tall))
        axes.imshow(strip, interpolation="none", aspect="auto")
        axes.axis("off")
    return figure


def _words(canvas: Axes, row: Row, left: float, width: float, middle: float, fill: float, theme: Theme) -> None:
    canvas.text(left, middle - 0.14, row.title, color=theme.ink, fontsize=10, weight="bold", va="center")
    canvas.text(
        left + width,
        middle - 0.14,
        row.name,
        color=theme.first,
        fontsize=10,
        weight="bold",
        va="center",
        ha="right",
    )
    canvas.text(left, middle + 0.05, row.detail, color=theme.muted, fontsize=8, va="center")
    line: Any = {"linewidth": 2.2, "solid_capstyle": "butt"}
    canvas.plot([left, left + width], [middle + 0.2] * 2, color=theme.line, **line)
    canvas.plot([left, left + width * fill], [middle + 0.2] * 2, color=theme.first, **line)


@styled
def confusion(
    table: Array,
    clusters: Sequence[int],
    classes: Sequence[str],
    theme: Theme = LIGHT,
    share: Array | None = None,
    words: tuple[str, str] = ("cluster against class", "cluster, in the order of its class"),
) -> Figure:
    """Counts [clusters, classes], annotated when there are few cells, coloured by `share`, by default of their row.

    `words` are the title and what stands beside the rows.
    """
    table = np.asarray(table)
    rows, columns = table.shape
    cell = min(0.46, 9.0 / max(rows, columns))  # inches
    wide, tall = max(2.0, cell * columns), max(1.2, cell * rows)
    slanted = max(map(len, classes)) > 3
    left, top, right, bottom = 0.9, 0.55, 0.4, 1.05 if slanted and columns <= 40 else 0.45
    figure = Figure((wide + left + right, tall + top + bottom), facecolor=theme.paper)
    across, down = figure.get_size_inches()
    axes = figure.add_axes((left / across, bottom / down, wide / across, tall / down))
    share = table / np.maximum(table.sum(axis=1, keepdims=True), 1) if share is None else share
    colours = LinearSegmentedColormap.from_list("share", [theme.paper, theme.first])
    axes.imshow(share, cmap=colours, vmin=0, vmax=1, aspect="auto", interpolation="none")
    frame(axes, theme)
    axes.set_title(words[0], loc="left", color=theme.ink, fontsize=10, weight="bold")
    axes.set_ylabel(words[1], color=theme.muted, fontsize=8)
    axes.set(xticks=[], yticks=[])
    if rows <= 40:
        axes.set_yticks(range(rows), [str(cluster) for cluster in clusters])
    if columns <= 40:
        axes.set_xticks(range(columns), [printable(name, 14) for name in classes])
        if slanted:
            axes.tick_params(axis="x", rotation=40)
            for text in axes.get_xticklabels():
                text.set(ha="right", rotation_mode="anchor")
    if rows <= 20 and columns <= 20:
        for (row, column), count in np.ndenumerate(table):
            if count:
                colour = theme.paper if share[row, column] > 0.5 else theme.ink
                axes.text(column, row, f"{count}", color=colour, fontsize=7.5, ha="center", va="center")
    return figure


def contact_sheet(images: Array, columns: int, tile: int = 96, gap: int = 6) -> Array:
    """Images uint8 [n, H, W, C] in rows of `columns`, as RGBA uint8 with clear gaps.

    Every image is `tile` - `gap` pixels wide, so n images of one row are n · `tile` - `gap` wide.
    """
    width = tile - gap
    height = max(1, round(width * images.shape[1] / images.shape[2]))
    rows = -(-len(images) // columns)
    sheet = np.zeros((rows * (height + gap) - gap, columns * tile - gap, 4), np.uint8)
    for number, image in enumerate(images):
        top, left = (number // columns) * (height + gap), (number % columns) * tile
        sheet[top : top + height, left : left + width, :3] = _resized(image, width, height)
        sheet[top : top + height, left : left + width, 3] = 255
    return sheet


def _resized(image: Array, width: int, height: int) -> Array:
    """RGB at the given size, smooth: digits of 8 pixels cannot be read as squares."""
    colour = np.broadcast_to(image, (*image.shape[:2], 3)).astype(np.uint8)
    return np.asarray(Image.fromarray(colour).resize((width, height), Image.Resampling.BICUBIC))


def frame(axes: Axes, theme: Theme) -> None:
    """Paper, and nothing around the data but small muted labels."""
    axes.set_facecolor(theme.paper)
    axes.set_axisbelow(True)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.tick_params(length=0, labelsize=8, labelcolor=theme.muted)
