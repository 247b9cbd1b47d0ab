"""Where in an image its cluster's prototype is, after Niu, Shan, Wang, arXiv 2103.09382 (SPICE).

The similarity of a prototype to each place of the network's last map. Features that are the mean of that map over its
places are what prototypes are means of; where a network makes its feature otherwise, that mean stands in its place.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import matplotlib
import numpy as np
from numpy.typing import NDArray

from jaxclust.data.pipeline import images_at
from jaxclust.data.source import Source, Split
from jaxclust.features.extract import Program
from jaxclust.pictures import Draw, Seen
from jaxclust.pictures._prototypes import COLUMNS, Prototypes, find, names_of, sheets, source_of
from jaxclust.report.gallery import Gallery
from jaxclust.train.stage import layer_names

SHARE = 0.4  # of the colours; the rest is the image

Array = NDArray[np.float32]


def prepare(seen: Seen) -> Draw:
    """Checks that there are images, and a method that says how probable each cluster is."""
    return partial(draw, seen, source_of(seen))


def draw(seen: Seen, source: Source, folder: Path) -> Gallery:
    """similarity.png, a row for each cluster: its most similar images, each beside the same with its map."""
    split, places = source.splits["train"], last_map(seen)
    found = find(seen, split, partial(mean, places), COLUMNS // 2, folder)
    names = names_of(found.cluster, split, source.class_names or ())
    note = "each row: images, and where one cluster's prototype is in them"
    caption = (
        "Red is where an image is most similar to the prototype of the cluster, blue where it is least; each image has "
        "a scale of its own."
    )
    drawn = pairs(seen, split, places, found)
    return Gallery("Where the prototypes are", caption, sheets(drawn, found, names, note, folder, "similarity"))


def last_map(seen: Seen) -> Program:
    """(params, extra, images) -> the last map [B, h, w, C] of the network."""
    name = layer_names(seen.stage)[-1]
    embed = seen.stage.method.embed
    return lambda params, extra, images: embed(params, extra, images, layers=(name,))[name]


def mean(places: Program, params: Any, extra: Any, images: jax.Array) -> jax.Array:
    """The mean of a map over its places, [B, C]."""
    averaged: jax.Array = places(params, extra, images).mean(axis=(1, 2))
    return averaged


def pairs(seen: Seen, split: Split, places: Program, found: Prototypes) -> Iterator[NDArray[np.uint8]]:
    """For each prototype its images, each followed by the same with its map, RGB uint8 [2 n, H, W, 3]."""
    program = jax.jit(places)
    for centre, ids in zip(found.centre, found.ids, strict=True):
        images = images_at(split, ids)
        maps = np.asarray(program(seen.state.params, seen.state.extra, images), np.float32)
        colour = np.broadcast_to(images, (*images.shape[:3], 3))
        yield np.stack([colour, mixed(colour, maps @ centre)], axis=1).reshape(-1, *colour.shape[1:])


def mixed(images: NDArray[np.uint8], similar: Array) -> NDArray[np.uint8]:
    """RGB images [n, H, W, 3] under the colours of maps [n, h, w], each of which goes from blue to red."""
    heat = matplotlib.colormaps["jet"](enlarged(scaled(similar), images.shape[1:3]))[..., :3]
    return np.round(255 * SHARE * heat + (1 - SHARE) * images).astype(np.uint8)


def scaled(maps: Array) -> Array:
    """Each map [n, h, w] from 0 to 1; one without any difference is 0."""
    low, high = (side(axis=(1, 2), keepdims=True) for side in (maps.min, maps.max))
    return (maps - low) / np.where(high > low, high - low, 1)


def enlarged(maps: Array, shape: tuple[int, int]) -> Array:
    """Maps [n, h, w] at another size, bilinear between the middles of their cells."""
    return np.asarray(jax.image.resize(maps, (len(maps), *shape), "bilinear", antialias=False))
