"""Views of images: crops and augmentations as pure functions of pixels and uniform numbers.

A row of uniforms has a fixed column for every parameter (`COLUMNS`), so turning one augmentation on
leaves the others as they were. An augmentation of strength 0 is not in the graph. In order:

    crop (crop_area, crop_aspect, crop_shift), flip, one affine map (rotate, scale, shear, translate;
    bilinear, the nearest edge fills), brightness, contrast, saturation, hue, grey, blur, erase.

brightness, contrast and saturation f draw a factor from U(1-f, 1+f) and blend with black, the mean
luminance and the luminance (as torchvision's ColorJitter, in this fixed order); hue draws a turn
of U(-hue, hue) of the circle. blur draws a sigma of U(0.1, 2) pixels. erase cuts a square with a
side of U(0, erase) of the image's, anywhere, and fills it with the image's mean (DeVries & Taylor
2017, arXiv 1708.04552).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from jaxclust.data.split import reduced_side
from jaxclust.data.view import View
from jaxclust.runtime import tensorflow

if TYPE_CHECKING:
    from tensorflow import Tensor

COLUMNS = (
    "area", "aspect", "top", "left", "flip", "rotate", "scale", "shear", "down", "right",
    "brightness", "contrast", "saturation", "hue", "grey", "blur", "sigma", "erase", "erase_y", "erase_x",
)  # fmt: skip
LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R 601
MAX_SIGMA = 2.0


def columns(shape: tuple[int, ...]) -> int:
    """How many uniform numbers an image needs."""
    return len(COLUMNS)


def _column(u: Tensor, name: str, low: float = 0.0, high: float = 1.0) -> Tensor:
    """The numbers [B] of one parameter, uniform in [low, high)."""
    return low + (high - low) * u[:, COLUMNS.index(name)]


def crop(images: Tensor, u: Tensor, view: View, shape: tuple[int, ...]) -> Tensor:
    """Crops uint8 [B, h, w, C] to uint8 [B, *shape]; h and w may be known only at run time.

    A random crop keeps a share of U(crop_area, 1) of the area with a log-uniform aspect between
    crop_aspect and its inverse, at most the image's sides (Szegedy et al. 2015 without retries).
    Without `crop_area` it is the evaluation crop: an image of the wanted size stays, any other has
    its short side brought to R = 8/7 size and the centre cut out, or with `crop_shift` 1 any part of
    the central R x R pixels, with less one that is so much nearer to the centre.
    """
    tf = tensorflow()
    size = shape[0]
    random = 0.0 < view.crop_area < 1.0
    if not random and images.shape[1] == images.shape[2] == size:
        return images
    height, width = tf.unstack(tf.cast(tf.shape(images)[1:3], tf.float32))
    top, left, box_h, box_w = _random_box(u, view, height, width) if random else _centre_box(height, width, size)
    if view.crop_shift and not random:
        slack = view.crop_shift * (tf.minimum(height, width) - box_h) / 2
        top, left = top + _column(u, "top", -1, 1) * slack, left + _column(u, "left", -1, 1) * slack
    return _cut(images, top, left, box_h / size, box_w / size, size, zero=tf.zeros_like(u[:, 0]))


def _cut(images: Tensor, top: Tensor, left: Tensor, step_y: Tensor, step_x: Tensor, size: int, zero: Tensor) -> Tensor:
    """uint8 [B, size, size, C] from boxes of `size` steps, whose places are scalars or [B] like `zero`."""
    tf = tensorflow()
    # Pixel centres lie at halves: output i comes from top + (i + 1/2) step - 1/2.
    matrix = [step_x, 0.0, left + step_x / 2 - 0.5, 0.0, step_y, top + step_y / 2 - 0.5]
    return _to_uint8(_project(tf.cast(images, tf.float32), [zero + m for m in matrix], size))


def _random_box(u: Tensor, view: View, height: Tensor, width: Tensor) -> tuple[Tensor, ...]:
    tf = tensorflow()
    area = _column(u, "area", view.crop_area, 1.0) * height * width
    limit = -math.log(view.crop_aspect)
    aspect = tf.exp(_column(u, "aspect", -limit, limit))
    box_h = tf.minimum(tf.sqrt(area / aspect), height)
    box_w = tf.minimum(tf.sqrt(area * aspect), width)
    return _column(u, "top") * (height - box_h), _column(u, "left") * (width - box_w), box_h, box_w


def _centre_box(height: Tensor, width: Tensor, size: int) -> tuple[Tensor, ...]:
    tf = tensorflow()
    short, reduced = tf.minimum(height, width), float(reduced_side(size))
    side = tf.where((height == size) & (width == size), float(size), short * size / reduced)
    top, left = (height - side) / 2, (width - side) / 2
    whole = side == size  # then whole pixels need no interpolation
    return tf.where(whole, tf.floor(top), top), tf.where(whole, tf.floor(left), left), side, side


def border_crop(images: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The central square of images uint8 [B, h, w, C], brought to uint8 [B, *shape]."""
    tf = tensorflow()
    size = shape[0]
    if images.shape[1] == images.shape[2] == size:
        return images
    height, width = tf.unstack(tf.cast(tf.shape(images)[1:3], tf.float32))
    side = tf.minimum(height, width)
    top, left = (height - side) / 2, (width - side) / 2
    whole = side == size  # as in the evaluation crop
    top, left = tf.where(whole, tf.floor(top), top), tf.where(whole, tf.floor(left), left)
    return _cut(images, top, left, side / size, side / size, size, zero=tf.zeros([tf.shape(images)[0]]))


def evaluation_crop(images: Tensor, shape: tuple[int, ...]) -> Tensor:
    """What `crop` does where nothing is random."""
    tf = tensorflow()
    return crop(images, tf.zeros([tf.shape(images)[0], len(COLUMNS)]), View(), shape)


def augment(images: Tensor, u: Tensor, view: View) -> Tensor:
    """Augments uint8 [B, S, S, C] to uint8 of the same shape; see the module for what and how."""
    tf = tensorflow()
    if view.flip:
        images = _rows(_column(u, "flip") < view.flip, tf.reverse(images, [2]), images)
    pixels = tf.cast(images, tf.float32)
    if view.rotate or view.scale or view.shear or view.translate:
        pixels = _affine(pixels, u, view)
    pixels = _colour(pixels, u, view)
    if view.blur:
        pixels = _blur(pixels, u, view)
    if view.erase:
        pixels = _erase(pixels, u, view)
    return _to_uint8(pixels)


def _affine(pixels: Tensor, u: Tensor, view: View) -> Tensor:
    """Rotation, shear, change of size and shift about the centre, with one interpolation."""
    tf = tensorflow()
    size = pixels.shape[1]
    angle = _column(u, "rotate", -1, 1) * math.radians(view.rotate)
    slope = tf.tan(_column(u, "shear", -1, 1) * math.radians(view.shear))
    zoom = tf.exp(_column(u, "scale", -1, 1) * math.log1p(view.scale))
    down, right = (_column(u, name, -1, 1) * view.translate * size for name in ("down", "right"))
    # Output to input: A = rotation(angle) shear(slope) / zoom about the centre, after the shift back.
    cos, sin = tf.cos(angle) / zoom, tf.sin(angle) / zoom
    a, b, c, d = cos, cos * slope - sin, sin, sin * slope + cos
    centre = (size - 1) / 2
    x, y = centre + right, centre + down
    matrix = [a, b, centre - a * x - b * y, c, d, centre - c * x - d * y]
    return _project(pixels, matrix, size)


def _project(pixels: Tensor, matrix: list[Tensor], size: int) -> Tensor:
    """Reads output (x, y) at (m0 x + m1 y + m2, m3 x + m4 y + m5); each m is [B]."""
    tf = tensorflow()
    zero = tf.zeros_like(matrix[0])
    projected = tf.raw_ops.ImageProjectiveTransformV3(
        images=pixels,
        transforms=tf.stack([*matrix, zero, zero], axis=1),
        output_shape=[size, size],
        fill_value=0.0,
        interpolation="BILINEAR",
        fill_mode="NEAREST",
    )
    return tf.ensure_shape(projected, (None, size, size, pixels.shape[3]))


def _colour(pixels: Tensor, u: Tensor, view: View) -> Tensor:
    tf = tensorflow()
    colour = pixels.shape[3] == 3

    def factor(name: str, strength: float) -> Tensor:
        return _column(u, name, max(0.0, 1 - strength), 1 + strength)[:, None, None, None]

    def blend(other: Tensor | float, weight: Tensor) -> Tensor:
        return tf.clip_by_value(other + weight * (pixels - other), 0.0, 255.0)

    if view.brightness:
        pixels = blend(0.0, factor("brightness", view.brightness))
    if view.contrast:
        mean = tf.reduce_mean(_luminance(pixels), axis=(1, 2, 3), keepdims=True)
        pixels = blend(mean, factor("contrast", view.contrast))
    if view.saturation and colour:
        pixels = blend(_luminance(pixels), factor("saturation", view.saturation))
    if view.hue and colour:
        turn = _column(u, "hue", -view.hue, view.hue)[:, None, None]
        hue, saturation, value = tf.unstack(tf.image.rgb_to_hsv(pixels / 255.0), axis=3)
        turned = tf.math.floormod(hue + turn, 1.0)
        pixels = 255.0 * tf.image.hsv_to_rgb(tf.stack([turned, saturation, value], axis=3))
    if view.grey and colour:
        grey = tf.repeat(_luminance(pixels), 3, axis=3)
        pixels = _rows(_column(u, "grey") < view.grey, grey, pixels)
    return pixels


def _rows(condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Rows of `a` where `condition` [B], else of `b`; copies rows, ten times as fast as tf.where."""
    return tensorflow().raw_ops.Select(condition=condition, x=a, y=b)


def _luminance(pixels: Tensor) -> Tensor:
    """[B, H, W, 1] of ITU-R 601."""
    tf = tensorflow()
    if pixels.shape[3] == 1:
        return pixels
    return tf.reduce_sum(pixels * LUMINANCE, axis=3, keepdims=True)


def _blur(pixels: Tensor, u: Tensor, view: View) -> Tensor:
    """A separable Gaussian with a sigma for every image; sigma 0 leaves an image as it is."""
    tf = tensorflow()
    size = pixels.shape[1]
    radius = min(math.ceil(3 * MAX_SIGMA), size - 1)
    sigma = tf.where(_column(u, "blur") < view.blur, _column(u, "sigma", 0.1, MAX_SIGMA), 0.0)
    offsets = np.arange(-radius, radius + 1)
    weights = tf.exp(-0.5 * tf.square(offsets.astype(np.float32) / tf.maximum(sigma, 1e-3)[:, None]))
    weights /= tf.reduce_sum(weights, axis=1, keepdims=True)
    # [taps, S, S]: which input a tap of an output reads, reflected at the edges.
    inputs = np.pad(np.arange(size), radius, mode="symmetric")
    taps = np.stack([np.eye(size, dtype=np.float32)[inputs[radius + o : radius + o + size]] for o in offsets])
    operator = tf.einsum("bk,kij->bij", weights, taps)
    return tf.einsum("bxj,bijc->bixc", operator, tf.einsum("byi,bijc->byjc", operator, pixels))


def _erase(pixels: Tensor, u: Tensor, view: View) -> Tensor:
    tf = tensorflow()
    size = pixels.shape[1]
    half = _column(u, "erase") * view.erase * size / 2
    centres = tf.range(size, dtype=tf.float32) + 0.5

    def inside(name: str) -> Tensor:
        return tf.abs(centres - _column(u, name, 0, size)[:, None]) < half[:, None]

    square = tf.cast(inside("erase_y")[:, :, None] & inside("erase_x")[:, None, :], tf.float32)
    return pixels + square[..., None] * (tf.reduce_mean(pixels, axis=(1, 2), keepdims=True) - pixels)


def _to_uint8(pixels: Tensor) -> Tensor:
    tf = tensorflow()
    return tf.cast(tf.round(tf.clip_by_value(pixels, 0.0, 255.0)), tf.uint8)
