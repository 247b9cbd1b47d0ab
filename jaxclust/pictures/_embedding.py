"""Features in the plane: a sample of the images as points, coloured by cluster and by class."""

import colorsys
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

from jaxclust.data.pipeline import images_at
from jaxclust.data.source import Source, Split
from jaxclust.data.subset import subset
from jaxclust.errors import ConfigError, DataError
from jaxclust.evaluation import clustering
from jaxclust.features.extract import compile_for, extract
from jaxclust.hints import did_you_mean
from jaxclust.pictures import Draw, Seen
from jaxclust.report import figures
from jaxclust.report.gallery import Gallery, Shown
from jaxclust.report.workdir import newest_assignment
from jaxclust.train.stage import layer_names

FEWEST = 10  # images that a neighbourhood can be kept of
NAMED = 30  # groups whose names have room

Array = NDArray[np.float32]
Flatten = Callable[[Array, int], Array]
"""(unit rows [n, D], seed) -> points [n, 2]."""


class Sample(NamedTuple):
    """Some images: ids [n], features [n, D], clusters [n] where the method predicts any, labels [n]; pixels [n, P]."""

    ids: NDArray[np.int64]
    features: Array
    cluster: NDArray[np.int64] | None
    labels: NDArray[np.int64]
    pixels: Array | None = None  # if they are asked for


class Groups(NamedTuple):
    """One colouring: what it shows, the group of each point (negative: unknown), names and colours of groups."""

    title: str
    group: NDArray[np.int64]
    names: Sequence[str]
    colour: NDArray[np.int64]  # of each group, places in a palette


def drawing(seen: Seen, name: str, title: str, flatten: Flatten, layer: str = "feature") -> Draw:
    """What a picture's `prepare` gives back, of a layer's maps or of the features.

    ConfigError where there is no such layer, DataError where there are no images, or fewer than ten.
    """
    known = ("feature",) if layer == "feature" else ("feature", *layer_names(seen.stage))
    if layer not in known:
        raise ConfigError(
            f"config.report.{name}.layer={layer!r} is unknown{did_you_mean(layer, known)} There is: {', '.join(known)}."
        )
    source = seen.source()
    size = min(split_of(seen, source)[1].size, seen.stage.config.report.sample)
    if size < FEWEST:
        raise DataError(f"{title} needs {FEWEST} images, and there are {size}")
    return partial(draw, seen, source, name, title, flatten, layer)


def split_of(seen: Seen, source: Source) -> tuple[str, Split]:
    """The images that are shown, and what they are called: training images, or if asked test images."""
    if seen.stage.config.report.split == "test" and "test" in source.splits:
        return "test", source.splits["test"]
    return "training", source.splits["train"]


def draw(seen: Seen, source: Source, name: str, title: str, flatten: Flatten, layer: str, folder: Path) -> Gallery:
    """<name>.png, with `report.pixels` <name>-pixels.png, and the same with -dark for dark pages."""
    of, split = split_of(seen, source)
    sample = sampled(seen, split, layer, folder)
    partly = partial_assignments(seen, sample.ids) if of == "training" else {}
    panels = colourings(sample, partly, source.class_names or ())
    what = "features" if layer == "feature" else f"maps of {layer}"
    rows, shown = {name: sample.features}, []
    if sample.pixels is not None:
        rows[f"{name}-pixels"] = sample.pixels
    for file, of_images in rows.items():
        points = flatten(unit(of_images), seen.stage.config.seed)
        for suffix, theme in (("", figures.LIGHT), ("-dark", figures.DARK)):
            figures.save(scatter(points, panels, theme), folder / f"{file}{suffix}.png")
        words = "" if len(rows) == 1 else what if file == name else "the pixels of the same images"
        shown.append(Shown(f"{file}.png", words, "", f"{file}-dark.png"))
    drawn = "All" if len(sample.ids) == split.size else "A sample of"
    caption = (
        f"{drawn} {len(sample.ids):,} {of} images: {what} of neighbouring points are alike, by the cosine. Distances "
        "between groups and their sizes say little. "
    )
    if len(panels) > 1:
        caption += "Where clusters are matched to classes both have the same colour."
    return Gallery(title, caption, shown)


def sampled(seen: Seen, split: Split, layer: str, folder: Path) -> Sample:
    """What is shown of `report.sample` images of a split; features are those of `layer`, flat."""
    stage, state = seen.stage, seen.state
    rng = np.random.default_rng((stage.config.seed, 5))
    ids = np.sort(rng.permutation(split.size)[: stage.config.report.sample])
    part = subset(replace(split, labels=None), ids)
    maps = lambda params, extra, images: stage.method.embed(params, extra, images, (layer,))[layer]  # noqa: E731
    embed = stage.embed if layer == "feature" else compile_for(maps, stage.mesh)
    found = {
        name: extract(program, state.params, state.extra, part, stage.config, stage.mesh, folder, name)
        for name, program in (("features", embed), ("cluster", stage.predict))
        if program is not None
    }
    labels = np.full(len(ids), -1) if split.labels is None else split.labels[ids]
    cluster = found["cluster"]["cluster"].array().astype(np.int64) if "cluster" in found else None
    features = found["features"]["features"].array().reshape(len(ids), -1).astype(np.float32)
    pixels = (
        images_at(split, ids.astype(np.int32)).reshape(len(ids), -1).astype(np.float32)
        if stage.config.report.pixels
        else None
    )
    return Sample(ids, features, cluster, labels.astype(np.int64), pixels)


def partial_assignments(seen: Seen, ids: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
    """Of stages of the run whose newest assignment leaves images out, the cluster of each of `ids`, or -1."""
    found = {}
    for folder in sorted((seen.stage.workdir / "assignments").glob("*/")):
        cluster = newest_assignment(folder)
        if cluster is not None and (cluster < 0).any():
            known = ids < len(cluster)  # a stage may have been trained on fewer images
            found[folder.name] = np.where(known, cluster[np.where(known, ids, 0)], -1)
    return found


def unit(rows: Array) -> Array:
    """Rows of unit length; zeros stay."""
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def colourings(sample: Sample, partly: Mapping[str, NDArray[np.int64]], classes: Sequence[str]) -> list[Groups]:
    """By cluster, by the clusters of stages that leave images out, and, where labels are known, by class."""
    labels, panels = sample.labels, []
    if sample.cluster is not None:
        panels.append(by_cluster("by cluster", sample.cluster, labels, classes))
    panels += [by_cluster(f"by cluster, as far as {name} gives one", c, labels, classes) for name, c in partly.items()]
    if (labels >= 0).any():
        panels.append(Groups("by class, as the labels say", labels, classes, np.arange(len(classes))))
    return panels or [Groups("", labels, (), np.arange(0))]


def by_cluster(title: str, cluster: NDArray[np.int64], labels: NDArray[np.int64], classes: Sequence[str]) -> Groups:
    """Clusters [n] in the colours of the classes that they stand for, further ones in others."""
    known = (labels >= 0) & (cluster >= 0)
    stands_for = clustering.match(cluster[known], labels[known]) if known.any() else {}
    rest = itertools.count(len(classes) if stands_for else 0)
    colour = [stands_for[i] if i in stands_for else next(rest) for i in range(int(cluster.max(initial=-1)) + 1)]
    return Groups(title, cluster, [str(i) for i in range(len(colour))], np.array(colour, np.int64))


@figures.styled
def scatter(points: Array, panels: Sequence[Groups], theme: figures.Theme = figures.LIGHT) -> Figure:
    """Points [n, 2] once for each colouring, side by side; few groups have their name in their midst."""
    side, gap, head = 5.4, 0.3, 0.45
    across = side * len(panels) + gap * (len(panels) + 1)
    figure = Figure((across, side + head + gap), facecolor=theme.paper)
    colours = palette(max(int(panel.colour.max(initial=-1)) + 1 for panel in panels), theme)
    for number, panel in enumerate(panels):
        left = (gap + number * (side + gap)) / across
        axes = figure.add_axes((left, gap / (side + head + gap), side / across, side / (side + head + gap)))
        figures.frame(axes, theme)
        axes.set(xticks=[], yticks=[])
        axes.set_title(panel.title, loc="left", color=theme.ink, fontsize=10, weight="bold", pad=8)
        _dots(axes, points, panel, colours, theme)
    return figure


def _dots(axes: Axes, points: Array, panel: Groups, colours: NDArray[np.float64], theme: figures.Theme) -> None:
    known = panel.group >= 0
    size = float(np.clip(9000 / len(points), 2, 22))
    dots: dict[str, Any] = {"s": size, "linewidths": 0, "alpha": 0.8}
    axes.scatter(*points[~known].T, color=theme.line, **dots)
    axes.scatter(*points[known].T, color=colours[panel.colour[panel.group[known]]], **dots)
    axes.set_aspect("equal", adjustable="datalim")
    present = np.unique(panel.group[known])
    if len(present) > NAMED:
        return
    for group in present.tolist():
        members = points[panel.group == group]
        middle = members[np.argmin(np.abs(members - np.median(members, axis=0)).sum(axis=1))]  # where there are points
        name = figures.printable(panel.names[group], 16)
        outline = [withStroke(linewidth=3, foreground=theme.paper)]
        axes.annotate(
            name, middle, color=theme.ink, fontsize=9, weight="bold", ha="center", va="center", path_effects=outline
        )


def palette(count: int, theme: figures.Theme) -> NDArray[np.float64]:
    """RGB of `count` groups, [count, 3]: a known palette for up to 20, beyond it hues by the golden angle."""
    if count <= 20:
        colours = matplotlib.colormaps["tab10" if count <= 10 else "tab20"].colors  # type: ignore[attr-defined]
        return np.array(colours[: max(count, 1)])
    light = (0.45, 0.62) if theme == figures.LIGHT else (0.6, 0.75)
    return np.array([colorsys.hls_to_rgb(i * 0.61803 % 1, light[i % 2], 0.65) for i in range(count)])
