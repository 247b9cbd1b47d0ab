"""Which images a filter answers to most, after Caron et al. 2018 (DeepCluster), section 4.2."""

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from jaxclust.data import by_cluster
from jaxclust.data.pipeline import images_at
from jaxclust.data.source import Split, files_of
from jaxclust.errors import DataError
from jaxclust.features.extract import compile_for, outputs
from jaxclust.pictures import Draw, Seen
from jaxclust.pictures._layers import Layer, layers
from jaxclust.progress import progress
from jaxclust.report import figures
from jaxclust.report.gallery import Gallery, Shown

ROWS = 24  # channels on a sheet
COLUMNS = 12  # images on a sheet at most

Ids = NDArray[np.int64]
Values = NDArray[np.float32]


def prepare(seen: Seen) -> Draw:
    """Checks that the images are there."""
    chosen = layers(seen)
    return partial(draw, seen, chosen, seen.source().splits["train"])


def draw(seen: Seen, chosen: list[Layer], split: Split, folder: Path) -> Gallery:
    """conv<l>/layer<l>-channel<c>/<rank>_<file> of the strongest images of each channel, and a sheet for each layer.

    An image to which a channel does not answer at all is none of its strongest.
    """
    count = seen.stage.config.report.activations.count
    count = min(count, split.size) if count > 0 else split.size
    ids, values = strongest(answers(seen, chosen, split), count)
    first, shown = 0, []
    for layer in progress(chosen, len(chosen), "strongest images", "layers"):
        of_layer = slice(first, first + layer.shown)
        first += layer.shown
        shown.append(sheet(layer, ids[:, of_layer], values[:, of_layer], split, folder))
        for channel in range(layer.shown):
            found = ids[values[:, of_layer][:, channel] > 0, of_layer.start + channel]
            place(files_of(seen.stage.config), split, found, folder / layer.folder() / layer.stem(channel))
    caption = "In each row the images to which one channel answers most, by the mean of its map, strongest first."
    return Gallery("What filters answer to", caption, shown)


def answers(seen: Seen, chosen: list[Layer], split: Split) -> Iterator[tuple[Ids, Values]]:
    """(ids [B], the mean over each map of `chosen`, layer after layer [B, channels]) of all images, in batches."""
    stage, names = seen.stage, tuple(layer.name for layer in chosen)

    def means(params: Any, extra: Any, images: jax.Array) -> dict[str, jax.Array]:
        maps = stage.method.embed(params, extra, images, layers=names)
        found = [maps[layer.name][..., : layer.shown].mean(axis=(1, 2)) for layer in chosen]
        return {"means": jnp.concatenate(found, axis=1)}

    program, start = compile_for(means, stage.mesh), 0
    for mask, found in outputs(
        program, seen.state.params, seen.state.extra, split, stage.config, stage.mesh, "answers of the filters"
    ):
        rows = found["means"][mask]
        yield np.arange(start, start + len(rows)), rows
        start += len(rows)


def strongest(batches: Iterable[tuple[Ids, Values]], count: int) -> tuple[Ids, Values]:
    """The `count` rows with the largest value of each column: ids and values [count, C], largest first.

    `batches` are (ids [B], values [B, C]) with rising ids; of equal values the lower id comes first. Never more than
    3 * `count` rows, or a batch more, are kept.
    """
    kept: list[tuple[Ids, Values]] = []
    for ids, values in batches:
        kept.append((np.broadcast_to(ids[:, None], values.shape), values))
        if sum(len(values) for _, values in kept) > 2 * count:
            kept = [_best(kept, count)]
    return _best(kept, count)


def _best(kept: list[tuple[Ids, Values]], count: int) -> tuple[Ids, Values]:
    ids, values = (np.concatenate(parts) for parts in zip(*kept, strict=True))
    order = np.argsort(-values, axis=0, kind="stable")[:count]
    return np.take_along_axis(ids, order, axis=0), np.take_along_axis(values, order, axis=0)


def sheet(layer: Layer, ids: Ids, values: Values, split: Split, folder: Path) -> Shown:
    """A sheet with a row for each of the first channels that answer to anything."""
    alive = np.flatnonzero(values[0] > 0)
    rows = []
    for channel in alive[:ROWS].tolist():
        found = ids[:COLUMNS][values[:COLUMNS, channel] > 0, channel]
        largest = float(values[0, channel])
        rows.append(figures.Row(images_at(split, found), f"channel {channel}", "", f"strongest {largest:.2f}", largest))
    silent = layer.shown - len(alive)
    about = layer.words() + (f"; {silent} of them answer to no image" if silent else "")
    if not rows:
        return Shown("", layer.name, about)
    about += f"; the first {ROWS} that answer" if len(alive) > ROWS else ""
    note = "each row: the images that one channel answers to most"
    for suffix, theme in (("", figures.LIGHT), ("-dark", figures.DARK)):
        columns = max(len(row.images) for row in rows)
        figure = figures.overview(rows, layer.name, columns, note, theme)
        figures.save(figure, folder / f"{layer.name}{suffix}.png")
    return Shown(f"{layer.name}.png", layer.name, about, f"{layer.name}-dark.png")


def place(root: Path | None, split: Split, ids: Ids, home: Path) -> None:
    """`home`/<rank>_<file> of each image, rank 1 first: a copy of its file below `root`, or a PNG of its pixels."""
    home.mkdir(parents=True, exist_ok=True)
    for rank, id in enumerate(ids.tolist(), 1):
        path = Path(split.path(id))
        if root is None:
            image = images_at(split, np.array([id]))[0]
            picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
            picture.save(home / by_cluster.marked(f"{rank}_", f"{path.stem}.png"))
            continue
        try:
            by_cluster.copy(root / path, home / by_cluster.marked(f"{rank}_", path.name))
        except OSError as error:
            raise DataError(f"{str(root / path)!r} cannot be copied: {error.strerror or error}") from error
