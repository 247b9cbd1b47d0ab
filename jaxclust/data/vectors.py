"""Views of vectors, with the functions of `transforms`: nothing to crop, and noise for augmentation."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

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
