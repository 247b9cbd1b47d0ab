"""RandAugment: one of fourteen operations on each image (Cubuk et al. 2019, arXiv 1909.13719), as Pillow computes them.

The amounts are those of SCAN (Van Gansbeke et al. 2020, arXiv 2005.12320) and FixMatch (Sohn et al. 2020, arXiv
2001.07685): uniform in a range, which differs between the two in shears and translations alone. All ranges of
geometry are even about zero, so that the random sign of SCAN changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from jaxclust.data.projection import project_nearest, rounded
from jaxclust.runtime import tensorflow

if TYPE_CHECKING:
    from tensorflow import Tensor

SHIFT = {"scan": 0.1, "fixmatch": 0.3}  # largest shear, and largest translation as a share of the side
LUMINANCE = (19595.0, 38470.0, 7471.0)  # ITU-R 601 in parts of 65536


class Operation(NamedTuple):
    """Changes uint8 [n, S, S, C] by amounts float32 [n], which are uniform from `low` to `high`."""

    change: Callable[[Tensor, Tensor], Tensor]
    low: float = 0.0
    high: float = 0.0


def operate(images: Tensor, which: Tensor, amount: Tensor, published: str) -> Tensor:
    """Does one operation on each image uint8 [B, S, S, C]; `which` and `amount` are uniform numbers [B] in [0, 1).

    Images that drew the same operation go through it together, and through no other.
    """
    tf = tensorflow()
    table = operations(SHIFT[published])
    drawn = tf.minimum(tf.cast(which * len(table), tf.int32), len(table) - 1)

    def parts(values: Tensor) -> list[Tensor]:
        return tf.dynamic_partition(values, drawn, len(table))

    changed = [
        one.change(some, one.low + (one.high - one.low) * amounts)
        for one, some, amounts in zip(table, parts(images), parts(amount), strict=True)
    ]
    places = parts(tf.range(tf.shape(images)[0]))
    return tf.ensure_shape(tf.dynamic_stitch(places, changed), images.shape)


def operations(shift: float) -> tuple[Operation, ...]:
    """The fourteen; geometry moves by at most `shift`."""
    return (
        Operation(lambda images, amount: images),
        Operation(_autocontrast),
        Operation(_equalize),
        Operation(_rotate, -30.0, 30.0),
        Operation(_solarize, 0.0, 256.0),
        Operation(_colour, 0.05, 0.95),
        Operation(_contrast, 0.05, 0.95),
        Operation(_brightness, 0.05, 0.95),
        Operation(_sharpness, 0.05, 0.95),
        Operation(_shear_x, -shift, shift),
        Operation(_shear_y, -shift, shift),
        Operation(_translate_x, -shift, shift),
        Operation(_translate_y, -shift, shift),
        Operation(_posterize, 4.0, 8.0),
    )


# --- geometry: amounts map the output to the input, in coordinates where the centre of the first pixel is (1/2, 1/2)


def _rotate(images: Tensor, degrees: Tensor) -> Tensor:
    """Counterclockwise about the centre."""
    tf = tensorflow()
    cos, sin = (rounded(f, degrees * (math.pi / 180)) for f in (tf.cos, tf.sin))
    centre = (images.shape[1] - 1) / 2
    matrix = [cos, -sin, centre * (1 - cos + sin), sin, cos, centre * (1 - cos - sin)]
    return project_nearest(images, matrix, images.shape[1])


def _shear_x(images: Tensor, slope: Tensor) -> Tensor:
    return project_nearest(images, [1.0, slope, slope / 2, 0.0, 1.0, 0.0], images.shape[1])


def _shear_y(images: Tensor, slope: Tensor) -> Tensor:
    return project_nearest(images, [1.0, 0.0, 0.0, slope, 1.0, slope / 2], images.shape[1])


def _translate_x(images: Tensor, share: Tensor) -> Tensor:
    return project_nearest(images, [1.0, 0.0, share * images.shape[1], 0.0, 1.0, 0.0], images.shape[1])


def _translate_y(images: Tensor, share: Tensor) -> Tensor:
    return project_nearest(images, [1.0, 0.0, 0.0, 0.0, 1.0, share * images.shape[1]], images.shape[1])


# --- levels


def _autocontrast(images: Tensor, _: Tensor) -> Tensor:
    """Every channel stretched from its least and largest value to 0 and 255, rounded down.

    In float64 as Pillow, since the largest may come out as 254.99…
    """
    tf = tensorflow()
    pixels = tf.cast(images, tf.float64)
    low, high = (f(pixels, axis=(1, 2), keepdims=True) for f in (tf.reduce_min, tf.reduce_max))
    scale = 255.0 / tf.maximum(high - low, 1.0)
    return tf.where(high > low, tf.cast(pixels * scale - low * scale, tf.uint8), images)


def _equalize(images: Tensor, _: Tensor) -> Tensor:
    """Every channel through its own cumulative histogram, in steps that leave out the count of the largest value."""
    tf = tensorflow()
    size, channels = images.shape[1], images.shape[3]
    flat = tf.cast(tf.reshape(tf.transpose(images, [0, 3, 1, 2]), [-1, size * size]), tf.int32)
    counts = tf.math.bincount(flat, minlength=256, maxlength=256, axis=-1)
    largest = tf.gather(counts, tf.reduce_max(flat, axis=1), batch_dims=1)
    step = ((size * size - largest) // 255)[:, None]
    below = tf.cumsum(counts, axis=1, exclusive=True)
    table = tf.minimum((below + step // 2) // tf.maximum(step, 1), 255)
    equal = tf.where(step > 0, tf.gather(table, flat, batch_dims=1), flat)
    return tf.transpose(tf.reshape(tf.cast(equal, tf.uint8), [-1, channels, size, size]), [0, 2, 3, 1])


def _solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """Values from the threshold on are inverted."""
    tf = tensorflow()
    return tf.where(tf.cast(images, tf.float32) < threshold[:, None, None, None], images, 255 - images)


def _posterize(images: Tensor, bits: Tensor) -> Tensor:
    """The highest floor(bits) of the eight bits stay."""
    tf = tensorflow()
    lost = tf.cast(8.0 - tf.floor(bits), tf.uint8)[:, None, None, None]
    return tf.bitwise.left_shift(tf.bitwise.right_shift(images, lost), lost)


# --- blends: an amount of 1 is the image, 0 what it is blended with


def _colour(images: Tensor, amount: Tensor) -> Tensor:
    if images.shape[3] == 1:
        return images
    pixels = tensorflow().cast(images, "float32")
    return _blend(_luminance(pixels), pixels, amount)


def _contrast(images: Tensor, amount: Tensor) -> Tensor:
    tf = tensorflow()
    pixels = tf.cast(images, tf.float32)
    mean = tf.reduce_mean(_luminance(pixels), axis=(1, 2, 3), keepdims=True)
    return _blend(tf.floor(mean + 0.5), pixels, amount)


def _brightness(images: Tensor, amount: Tensor) -> Tensor:
    return _blend(0.0, tensorflow().cast(images, "float32"), amount)


def _sharpness(images: Tensor, amount: Tensor) -> Tensor:
    """Blends with the mean of 3 x 3 pixels of which the middle one counts five times; the border stays."""
    tf = tensorflow()
    pixels = tf.cast(images, tf.float32)
    middle = pixels[:, 1:-1, 1:-1]
    rows = pixels[:, :-2] + pixels[:, 1:-1] + pixels[:, 2:]
    around = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]
    smooth = tf.floor((around + 4.0 * middle) / 13.0 + 0.5)
    return _blend(pixels + tf.pad(smooth - middle, [[0, 0], [1, 1], [1, 1], [0, 0]]), pixels, amount)


def _blend(other: Tensor | float, pixels: Tensor, amount: Tensor) -> Tensor:
    """Rounded down."""
    tf = tensorflow()
    return tf.cast(other + amount[:, None, None, None] * (pixels - other), tf.uint8)


def _luminance(pixels: Tensor) -> Tensor:
    """[n, S, S, 1] in whole numbers."""
    tf = tensorflow()
    if pixels.shape[3] == 1:
        return pixels
    return tf.floor((tf.reduce_sum(pixels * LUMINANCE, axis=3, keepdims=True) + 32768.0) / 65536.0)
