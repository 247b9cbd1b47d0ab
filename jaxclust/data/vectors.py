"""Views of vectors, with the functions of `transforms`: nothing to crop, and noise for augmentation."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

import numpy as np

from jaxclust.data.split import Split
from jaxclust.data.view import PER_COUNTER, View
from jaxclust.runtime import tensorflow

if TYPE_CHECKING:
    from tensorflow import Tensor


def columns(shape: tuple[int, ...]) -> tuple[int, ...]:
    """How many uniform numbers a vector [D] needs, in one block: one for each number, in pairs."""
    return (-(-shape[0] // PER_COUNTER) * PER_COUNTER,)


def crop(rows: Tensor, u: Tensor, view: View, shape: tuple[int, ...]) -> Tensor:
    """The vectors float32 [B, D] as they are."""
    return rows


def evaluation_crop(rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The vectors float32 [B, D] as they are."""
    return rows


def measured(view: View, split: Split) -> View:
    """The view with its noise in the numbers of the vectors of `split`, no longer in their overall deviation."""
    return view._replace(noise=view.noise * deviation(split)) if view.noise else view


@functools.lru_cache(maxsize=1)  # it keeps its split in memory
def deviation(split: Split, block: int = 65_536) -> float:
    """The square root of the mean over numbers of the variance of vectors, by which no unit of theirs counts."""
    tf = tensorflow()
    total, squares = np.zeros((2, *split.image_shape))
    for start in range(0, split.size, block):
        ids = tf.range(start, min(start + block, split.size))
        rows = (split.gather(ids) if split.gather else tf.stack([split.load(id) for id in ids])).numpy()
        total += rows.sum(axis=0, dtype=np.float64)
        squares += np.square(rows, dtype=np.float64).sum(axis=0)
    return float(np.sqrt(np.maximum(squares / split.size - np.square(total / split.size), 0).mean()))


def augment(rows: Tensor, u: Tensor, view: View) -> Tensor:
    """Adds normal noise with standard deviation `view.noise` (Box and Muller 1958)."""
    if not view.noise:
        return rows
    tf = tensorflow()
    half = u.shape[1] // 2
    radius = tf.sqrt(-2.0 * tf.math.log1p(-u[:, :half]))
    angle = 2 * math.pi * u[:, half:]
    normal = tf.concat([radius * tf.cos(angle), radius * tf.sin(angle)], axis=1)
    return rows + view.noise * normal[:, : rows.shape[1]]
