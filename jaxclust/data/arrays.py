"""Images that are arrays already, to a `Source`."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict
from numpy.typing import NDArray
from PIL import Image

from jaxclust.data.decode import convert, reduced
from jaxclust.data.numbering import say_renumbered
from jaxclust.data.split import Source, from_array, image_side, reduced_side
from jaxclust.errors import DataError


class Arrays(NamedTuple):
    """`images` uint8 [N, H, W, C] with C 1 grey, 2 grey and alpha, 3 RGB, 4 RGBA; `labels` ints [N]."""

    images: NDArray[np.uint8]
    labels: NDArray[Any] | None = None


def make_source(name: str, splits: Mapping[str, Arrays], settings: ConfigDict) -> Source:
    """A source over arrays that were checked by `check`; paths are NAME/ID or NAME/SPLIT/ID."""
    sizes = {(s.images.shape[1], s.images.shape[2]) for s in splits.values()}
    side = image_side(list(sizes), settings.image_size)
    grey = all(s.images.shape[3] <= 2 for s in splits.values())
    channels = settings.channels or (1 if grey else 3)
    values = [s.labels for s in splits.values() if s.labels is not None]
    classes = np.unique(np.concatenate(values)) if values else np.array([])
    say_renumbered(name, classes.tolist())
    made = {}
    for split, (images, labels) in splits.items():
        prefix = f"{name}/{split}" if len(splits) > 1 else name
        shape = (side, side, channels)
        pixels = canonical(images, channels, reduced_side(side), settings.stretch)
        made[split] = from_array(pixels, shape, partial("{}/{}".format, prefix))
        if labels is not None:
            made[split] = replace(made[split], labels=np.searchsorted(classes, labels).astype(np.int32))
    return Source(name, made, tuple(str(c) for c in classes) or None, [])


def check(images: NDArray[Any], labels: NDArray[Any] | None, what: str, max_pixels: int) -> Arrays:
    """The arrays with a channel axis, or a DataError in which `what` names them."""
    if images.dtype != np.uint8:
        raise DataError(f"{what}: images are {images.dtype}; they must be uint8, 0 to 255")
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[3] not in (1, 2, 3, 4) or 0 in images.shape:
        raise DataError(
            f"{what}: images have shape {images.shape}; it must be [N, H, W] or [N, H, W, C] with C "
            "1 (grey), 2 (grey, alpha), 3 (RGB) or 4 (RGBA), and none of them 0"
        )
    if images.shape[1] * images.shape[2] > max_pixels:
        raise DataError(
            f"{what}: {images.shape[2]} x {images.shape[1]} pixels are more than data.max_pixels={max_pixels}"
        )
    if labels is not None and labels.dtype.kind not in "iub":
        raise DataError(f"{what}: labels are {labels.dtype}; they must be integers")
    if labels is not None and labels.shape != (len(images),):
        raise DataError(f"{what}: {len(images)} images, but labels have shape {labels.shape}; one each is needed")
    return Arrays(images, None if labels is None else labels.astype(np.int64))


def canonical(images: NDArray[np.uint8], channels: int, side: int, stretch: bool = False) -> NDArray[np.uint8]:
    """`images` uint8 [N, H, W, C] by the conversion of `decode`: uint8 [N, h, w, channels]."""
    has = images.shape[3]
    shape = images.shape[1], images.shape[2]
    if reduced(*shape, side, stretch) == shape and (has == channels or has == 1):
        return images if has == channels else np.repeat(images, channels, axis=3)

    def one(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return convert(Image.fromarray(pixels[..., 0] if has == 1 else pixels), channels, side, stretch)

    with ThreadPoolExecutor() as pool:
        return np.stack(list(pool.map(one, images)))
