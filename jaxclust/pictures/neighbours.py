"""What is found with an image: some queries, and the images most similar to each by the cosine of their features."""

import csv
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from jaxclust.data.pipeline import images_at
from jaxclust.data.source import Source, Split
from jaxclust.errors import DataError
from jaxclust.features.extract import extract
from jaxclust.features.rows import Rows
from jaxclust.pictures import Draw, Seen
from jaxclust.pictures._embedding import unit
from jaxclust.pictures._epochs import split_of
from jaxclust.pictures.activations import strongest
from jaxclust.report import figures
from jaxclust.report.gallery import Gallery, Shown

QUERIES = 12
FOUND = 8  # images beside a query

Ids = NDArray[np.int64]


class Hits(NamedTuple):
    """Of queries [n] the images found [n, FOUND], nearest first, their similarity, and whether the class is the same:
    1 or 0, -1 where it is not known."""

    query: Ids
    found: Ids
    similarity: NDArray[np.float32]
    right: NDArray[np.int64]


def prepare(seen: Seen) -> Draw:
    """DataError where there are no images, or too few to find others."""
    if len(seen.stage.info.image_shape) != 3:
        raise DataError("the run is on vectors, of which there are no images to show")
    source = seen.source()
    name, split = split_of(seen, source)
    if split.size <= FOUND:
        raise DataError(f"{FOUND} neighbours need more than the {split.size} images of {name}")
    return partial(draw, seen, source)


def draw(seen: Seen, source: Source, folder: Path) -> Gallery:
    """neighbours.png, a row for each of some queries drawn by the seed, and neighbours.csv with the files."""
    stage, state = seen.stage, seen.state
    name, split = split_of(seen, source)
    of = (split, stage.config, stage.mesh, folder, f"features of {name}")
    rows = extract(stage.embed, state.params, state.extra, *of)["features"]
    rng = np.random.default_rng((stage.config.seed, 7))
    hits = nearest(rows, rng.permutation(split.size)[:QUERIES], split.labels)
    write(folder / "neighbours.csv", hits, split)
    for suffix, theme in (("", figures.LIGHT), ("-dark", figures.DARK)):
        figure = panels(hits, split, source.class_names or (), theme)
        figures.save(figure, folder / f"neighbours{suffix}.png")
    words = f"Left an image of {name}, then the {FOUND} others of {name} that are most similar to it, nearest first. "
    if (hits.right >= 0).any():
        words += "A whole frame is the same class, a dashed one another; labels do nothing but draw the frames."
    return Gallery("Nearest neighbours", words, [Shown("neighbours.png", "", "", "neighbours-dark.png")])


def nearest(rows: Rows, query: Ids, labels: NDArray[np.int32] | None) -> Hits:
    """The nearest of features [N, D] to those of `query`, which is not its own neighbour."""
    wanted = unit(np.concatenate([rows.read(int(id), 1) for id in query]).astype(np.float32))

    def similar() -> Iterator[tuple[Ids, NDArray[np.float32]]]:
        start = 0
        for chunk in rows.chunks():
            ids = np.arange(start, start + len(chunk))
            values = unit(chunk.astype(np.float32)) @ wanted.T
            yield ids, np.where(ids[:, None] == query, -np.inf, values).astype(np.float32)
            start += len(chunk)

    ids, values = strongest(similar(), FOUND)
    found, known = ids.T, np.full(rows.shape[0], -1) if labels is None else labels.astype(np.int64)
    same = known[found] == known[query][:, None]
    unknown = (known[found] < 0) | (known[query][:, None] < 0)
    return Hits(query, found, values.T, np.where(unknown, -1, same))


def write(path: Path, hits: Hits, split: Split) -> None:
    """Which images were found: query, rank (1: the nearest), id, path, similarity, same class (1, 0, empty)."""
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as table:  # names of files
        writer = csv.writer(table)
        writer.writerow(("query", "rank", "id", "path", "similarity", "same_class"))
        for query, *found in zip(*hits, strict=True):
            for rank, (id, value, right) in enumerate(zip(*found, strict=True), 1):
                known = "" if right < 0 else int(right)
                writer.writerow((int(query), rank, int(id), split.path(int(id)), f"{value:.4f}", known))


@figures.styled
def panels(hits: Hits, split: Split, classes: Any, theme: figures.Theme = figures.LIGHT) -> Figure:
    """One row for each query: what it is, how many of those found are right, the query, and the found."""
    across, margin, words, gap = 11.0, 0.32, 1.6, 0.3
    tile = (across - 2 * margin - words - gap) / (FOUND + 1)
    height, width = split.image_shape[:2]
    step = max(tile * height / width, 0.5) + 0.1
    down = margin + step * len(hits.query) + margin - 0.1
    figure = Figure((across, down), facecolor=theme.paper)
    canvas = figure.add_axes((0, 0, 1, 1), xlim=(0, across), ylim=(down, 0))
    canvas.axis("off")
    for number, query in enumerate(hits.query.tolist()):
        middle = margin + number * step + (step - 0.1) / 2
        label = -1 if split.labels is None else int(split.labels[query])
        title = figures.printable(classes[label], 16) if label >= 0 else f"image {query}"
        right = hits.right[number]
        canvas.text(margin, middle - 0.08, title, color=theme.ink, fontsize=10, weight="bold", va="center")
        if (right >= 0).any():
            said = f"{(right == 1).sum()} of {(right >= 0).sum()}"
            canvas.text(margin, middle + 0.13, said, color=theme.muted, fontsize=8, va="center")
        images = images_at(split, np.array([query, *hits.found[number]], np.int32))
        _strip(figure, images[:1], np.array([-1]), margin + words, middle, tile, theme)
        _strip(figure, images[1:], right, margin + words + tile + gap, middle, tile, theme)
    return figure


def _strip(
    figure: Figure, images: NDArray[np.uint8], right: NDArray[np.int64], left: float, middle: float, tile: float,
    theme: figures.Theme,
) -> None:  # fmt: skip
    """Images side by side from `left` inches on, around `middle`, framed."""
    across, down = figure.get_size_inches()
    pixels, gap = round(tile * figures.DPI), 12
    sheet = figures.contact_sheet(images, len(images), pixels, gap)
    high, wide = np.array(sheet.shape[:2]) / figures.DPI
    place = (left / across, 1 - (middle + high / 2) / down, wide / across, high / down)
    axes = figure.add_axes(place)
    axes.imshow(sheet, interpolation="none", aspect="auto")
    axes.axis("off")
    for number, state in enumerate(right.tolist()):
        if state < 0:
            continue
        corner, size = (number * pixels - 3, -3), (pixels - gap + 5, sheet.shape[0] + 5)
        colour, style = (theme.first, "solid") if state else (theme.alarm, (0, (2, 1.2)))
        axes.add_patch(
            Rectangle(corner, *size, fill=False, edgecolor=colour, linestyle=style, linewidth=2, clip_on=False)
        )
