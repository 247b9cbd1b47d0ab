"""What training sees: a few images, and beside each the views that augmentation makes of it."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from jaxclust.data.pipeline import images_at, train_batches
from jaxclust.data.source import Source
from jaxclust.errors import DataError
from jaxclust.pictures import Draw, Seen
from jaxclust.report import figures
from jaxclust.report.gallery import Gallery, Shown

ROWS = 8


class Column(NamedTuple):
    """A view of some images, uint8 [n, copies, H, W, C]."""

    name: str
    images: NDArray[np.uint8]


def prepare(seen: Seen) -> Draw:
    """DataError where there are no images, or the stage learns from kept features of them as they are."""
    if len(seen.stage.info.image_shape) != 3:
        raise DataError("the run is on vectors, of which there are no images to show")
    if seen.stage.config.freeze_body and not seen.stage.config.frozen_views:
        raise DataError(f"stage {seen.stage.name!r} has config.freeze_body=True and sees all images as they are")
    return partial(draw, seen, seen.source())


def draw(seen: Seen, source: Source, folder: Path) -> Gallery:
    """views.png: a row for each image, first as it is."""
    shown = columns(seen, source)
    for suffix, theme in (("", figures.LIGHT), ("-dark", figures.DARK)):
        figures.save(grid(shown, theme), folder / f"views{suffix}.png")
    caption = "In each row an image as evaluation sees it, and views of it as a step of training sees them."
    return Gallery("Views", caption, [Shown("views.png", "", "", "views-dark.png")])


def columns(seen: Seen, source: Source) -> list[Column]:
    """Some images drawn by the seed: as they are, and all views of the method, with the numbers of a first batch."""
    stage, split = seen.stage, source.splits["train"]
    rng = np.random.default_rng((stage.config.seed, 6))
    ids = rng.permutation(split.size)[:ROWS].astype(np.int32)
    zeros, ones = np.zeros(split.size, np.int32), np.ones(split.size, np.float32)
    wanted = {name: stage.config.views[name] for name in stage.method.views}
    (batch,) = train_batches(
        split, wanted, ids, zeros, ones, start_position=0, first_step=0, last_step=1, batch_size=len(ids),
        seed=stage.config.seed, stage_index=stage.number,
    )  # fmt: skip
    found = [Column("image", images_at(split, ids)[:, None])]
    for name in stage.method.views:
        images = batch["views"][name]
        found.append(Column(name, images if images.ndim == 5 else images[:, None]))
    return found


@figures.styled
def grid(shown: Sequence[Column], theme: figures.Theme = figures.LIGHT) -> Figure:
    """One row for each image; copies of a view stand side by side under its name."""
    count, copies = len(shown[0].images), [column.images.shape[1] for column in shown]
    margin, gap, head = 0.32, 0.18, 0.62  # inches
    tile = min(1.1, (11 - 2 * margin - gap * (len(shown) - 1)) / sum(copies))
    across, down = 2 * margin + gap * (len(shown) - 1) + tile * sum(copies), head + tile * count + margin
    figure, left = Figure((across, down), facecolor=theme.paper), margin
    for column, wide in zip(shown, copies, strict=True):
        flat = column.images.reshape(-1, *column.images.shape[2:])
        sheet = figures.contact_sheet(flat, wide, round(tile * figures.DPI), 6)
        axes = figure.add_axes((left / across, margin / down, tile * wide / across, tile * count / down))
        axes.imshow(sheet, interpolation="none", aspect="auto")
        axes.axis("off")
        axes.set_title(column.name, loc="left", color=theme.ink, fontsize=10, weight="bold", pad=8)
        left += tile * wide + gap
    return figure
