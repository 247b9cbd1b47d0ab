"""The weights of the first convolution, which are small images themselves."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from numpy.typing import NDArray
from PIL import Image

from jaxclust.errors import DataError
from jaxclust.pictures import Draw, Seen
from jaxclust.report import figures
from jaxclust.report.gallery import Gallery, Shown

SIDE = 66  # pixels of an enlarged kernel, at most
GAP = 6
PAGE = 1160  # pixels of a row, about


def prepare(seen: Seen) -> Draw:
    """DataError if the run is on vectors, or its network has no convolution."""
    if len(seen.stage.info.image_shape) != 3:
        raise DataError("the run is on vectors, which pass through no network")
    weights = kernel(seen)
    if weights is None:
        raise DataError(f"the network {seen.stage.config.model.name} has no convolution")
    return partial(draw, weights)


def kernel(seen: Seen) -> NDArray[np.float32] | None:
    """The kernel [h, w, C, filters] of the convolution that comes first; None if there is none."""

    def look(params: Any, extra: Any, images: jax.Array) -> list[jax.Array]:
        found: list[jax.Array] = []

        def note(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            given = call(*args, **kwargs)
            if isinstance(context.module, nn.Conv):
                found.append(context.module.variables["params"]["kernel"])
            return given

        with nn.intercept_methods(note):
            seen.stage.method.embed(params, extra, images)
        return found[:1]

    images = np.zeros((1, *seen.stage.info.image_shape), np.uint8)
    found = jax.device_get(jax.jit(look)(seen.state.params, seen.state.extra, images))
    return np.asarray(found[0], np.float32) if found else None


def draw(weights: NDArray[np.float32], folder: Path) -> Gallery:
    """first_layer.png, one picture for each filter in the order of channels."""
    images = enlarged(weights)
    tile = images.shape[2] + GAP
    rows = -(-len(images) // max(1, PAGE // tile))
    sheet = figures.contact_sheet(images, -(-len(images) // rows), tile, GAP)
    Image.fromarray(sheet).save(folder / "first_layer.png")
    height, width, channels, count = weights.shape
    kinds = {1: "", 2: "; left what it weighs the horizontal gradient with, right the vertical", 3: ", in colour"}
    caption = (
        f"The {count} filters of {height} x {width}, channel by channel{kinds.get(channels, '; inputs side by side')}. "
        "Grey is zero, and each filter has a scale of its own."
    )
    return Gallery("First layer", caption, [Shown("first_layer.png", "", "")])


def enlarged(weights: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Kernels [h, w, C, n] as images [n, H, W, 3], where C is not 3 as C grey ones side by side, [n, H, W, 1].

    As squares, since a weight is no sample of something smooth. Grey is zero; the largest weight is black or white.
    """
    filters = weights.transpose(3, 0, 1, 2)
    largest = np.abs(filters).max(axis=(1, 2, 3), keepdims=True)
    unit = 0.5 + 0.5 * filters / np.maximum(largest, 1e-12)
    scale = max(1, SIDE // max(filters.shape[1:3]))
    pixels = np.round(255 * unit).astype(np.uint8).repeat(scale, axis=1).repeat(scale, axis=2)
    if pixels.shape[3] == 3:
        return pixels
    line = np.full((*pixels.shape[:2], 2, 1), 255, np.uint8)
    parts = [part for channel in np.split(pixels, pixels.shape[3], axis=3) for part in (line, channel)]
    return np.concatenate(parts[1:], axis=2)
