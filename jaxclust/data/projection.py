"""Affine maps of images, read from the output back to the input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from jaxclust.runtime import tensorflow

if TYPE_CHECKING:
    from tensorflow import Tensor


def project(images: Tensor, matrix: Sequence[Tensor | float], size: int) -> Tensor:
    """Reads output (x, y) of float32 images [B, h, w, C] at (m0 x + m1 y + m2, m3 x + m4 y + m5).

    Each m is a number or [B]. Bilinear, and beyond the edges the nearest pixel; [B, size, size, C].
    """
    return _project(images, matrix, size, "BILINEAR", "NEAREST")


def project_nearest(images: Tensor, matrix: Sequence[Tensor | float], size: int) -> Tensor:
    """As `project` for uint8 images: the nearest pixel, and 0 beyond the edges, as Pillow does."""
    return _project(images, matrix, size, "NEAREST", "CONSTANT")


def _project(images: Tensor, matrix: Sequence[Tensor | float], size: int, interpolation: str, fill_mode: str) -> Tensor:
    tf = tensorflow()
    zero = tf.zeros([tf.shape(images)[0]])
    projected = tf.raw_ops.ImageProjectiveTransformV3(
        images=images,
        transforms=tf.stack([zero + m for m in (*matrix, 0.0, 0.0)], axis=1),
        output_shape=[size, size],
        fill_value=0.0,
        interpolation=interpolation,
        fill_mode=fill_mode,
    )
    return tf.ensure_shape(projected, (None, size, size, images.shape[3]))


def rounded(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`function` of float32 numbers, by float64.

    In float32 vector and scalar code may differ in the last bit, so that an image's place in its batch would show.
    """
    tf = tensorflow()
    return tf.cast(function(tf.cast(x, tf.float64)), tf.float32)
