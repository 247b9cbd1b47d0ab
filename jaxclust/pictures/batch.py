"""The batch of a step that learns from classes: of each of some classes the images that the sampler drew."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from jaxclust.data import sampler
from jaxclust.data.pipeline import images_at, train_batches
from jaxclust.data.source import Source
from jaxclust.data.split import Split
from jaxclust.errors import DataError
from jaxclust.pictures import Draw, Seen
from jaxclust.report import figures
from jaxclust.report.gallery import Gallery, Shown
from jaxclust.train.stage import Stage, seen_labels

CLASSES, IMAGES = 12, 10  # at most, of a batch


class Row(NamedTuple):
    """A class, how many images of it the batch has, and some of them, uint8 [n, H, W, C]."""

    name: str
    size: int
    images: NDArray[np.uint8]


def prepare(seen: Seen) -> Draw:
    """DataError where a step does not learn from classes, there is no step, or there are no images."""
    stage = seen.stage
    if stage.method.labels != "class" or not stage.lengths.stage:
        raise DataError(f"stage {stage.name!r} has no step that learns from classes")
    if len(stage.info.image_shape) != 3:
        raise DataError("the run is on vectors, of which there are no images to show")
    source = seen.source()
    return partial(draw, stage, source, drawn(stage, source.splits["train"]))


def drawn(stage: Stage, split: Split) -> NDArray[np.int32]:
    """The ids of the first batch of the training, in the order in which they were drawn."""
    labels, config = seen_labels(stage.method, stage.config, stage.info, split), stage.config
    if labels is None:
        raise DataError("the images have no labels any more")
    ids, length = np.flatnonzero(labels >= 0).astype(np.int32), stage.lengths.round * config.batch_size
    seed = (config.seed, stage.number, 0)
    order = sampler.draw(
        config.sampler, ids, labels, length, seed, config.batch_size, per_class=config.images_per_class
    )
    return order[: config.batch_size]


def draw(stage: Stage, source: Source, ids: NDArray[np.int32], folder: Path) -> Gallery:
    """batch.png: a row for each class."""
    split = source.splits["train"]
    assert split.labels is not None
    labels = split.labels[ids]
    shown = rows(stage, split, ids, source.class_names or ())
    for suffix, theme in (("", figures.LIGHT), ("-dark", figures.DARK)):
        figures.save(grid(shown, theme), folder / f"batch{suffix}.png")
    of_all = len(np.unique(labels))
    caption = (
        f"The first batch, of {len(ids):,} images of {of_all} classes, drawn by sampler={stage.config.sampler}; "
        f"below a class how many it has. Shown are {min(of_all, CLASSES)} classes and up to {IMAGES} images of each, "
        "augmented as a step sees them (crops and turns are drawn anew)."
    )
    return Gallery("A batch", caption, [Shown("batch.png", "", "", "batch-dark.png")])


def rows(stage: Stage, split: Split, ids: NDArray[np.int32], names: Sequence[str]) -> list[Row]:
    """Of the first classes of a batch, in their order, the first images that were drawn."""
    assert split.labels is not None
    labels = split.labels[ids]
    found = []
    for label in np.unique(labels)[:CLASSES].tolist():
        own = ids[labels == label]
        found.append(Row(names[label], len(own), seen_images(stage, split, own[:IMAGES])))
    return found


def seen_images(stage: Stage, split: Split, ids: NDArray[np.int32]) -> NDArray[np.uint8]:
    """Images as a step sees them, [n, H, W, C]: as they are where a frozen body keeps no augmented copies."""
    if stage.config.freeze_body and not stage.config.frozen_views:
        return images_at(split, ids)
    (name, *_) = stage.method.views
    zeros, ones = np.zeros(split.size, np.int32), np.ones(split.size, np.float32)
    (batch,) = train_batches(
        split, {name: stage.config.views[name]}, ids, zeros, ones, start_position=0, first_step=0, last_step=1,
        batch_size=len(ids), seed=stage.config.seed, stage_index=stage.number,
    )  # fmt: skip
    images: NDArray[np.uint8] = batch["views"][name]
    return images


@figures.styled
def grid(shown: Sequence[Row], theme: figures.Theme = figures.LIGHT) -> Figure:
    """One row for each class, with its name and the number of its images on the left."""
    across, margin, words, gap = 11.0, 0.32, 1.6, 6
    tile = (across - 2 * margin - words) / IMAGES
    height, width = shown[0].images.shape[1:3]
    step = max(tile * height / width, 0.5)
    down = 2 * margin + step * len(shown)
    figure = Figure((across, down), facecolor=theme.paper)
    canvas = figure.add_axes((0, 0, 1, 1), xlim=(0, across), ylim=(down, 0))
    canvas.axis("off")
    for number, row in enumerate(shown):
        middle = margin + (number + 0.5) * step
        title = figures.printable(row.name, 16)
        canvas.text(margin, middle - 0.08, title, color=theme.ink, fontsize=10, weight="bold", va="center")
        canvas.text(margin, middle + 0.13, f"{row.size:,} images", color=theme.muted, fontsize=8, va="center")
        sheet = figures.contact_sheet(row.images, len(row.images), round(tile * figures.DPI), gap)
        high, wide = np.array(sheet.shape[:2]) / figures.DPI
        place = ((margin + words) / across, 1 - (middle + high / 2) / down, wide / across, high / down)
        axes = figure.add_axes(place)
        axes.imshow(sheet, interpolation="none", aspect="auto")
        axes.axis("off")
    return figure
