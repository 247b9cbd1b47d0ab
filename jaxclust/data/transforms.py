"""Views of images: crops and augmentations as pure functions of pixels and uniform numbers.

A row of uniforms has a fixed column for every parameter (`COLUMNS`), so turning one augmentation on
leaves the others as they were. An augmentation of strength 0 is not in the graph. In order:

    crop (crop_area, crop_area_max, crop_aspect, crop_shift), flip, one affine map (rotate, scale, shear, translate;
    bilinear, the nearest edge fills), brightness, contrast, saturation, hue, grey, blur, randaugment, pad, erase.

Of the colours, those from brightness to hue change together with the probability `jitter`.
brightness, contrast and saturation f draw a factor from U(1-f, 1+f) and blend with black, the mean
luminance and the luminance (as torchvision's ColorJitter, in this fixed order); hue draws a turn
of U(-hue, hue) of the circle. blur draws a sigma of U(0.1, 2) pixels. randaugment is the number of
operations that `randaugment` does in turn. pad puts zeros around and crops the image's size out of
that. erase cuts a square [c - l // 2, c + l // 2) of whole pixels, c any of them and l up to the
share `erase` of the side (DeVries & Taylor 2017, arXiv 1708.04552).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from jaxclust.data import randaugment
from jaxclust.data.projection import project, project_nearest, rounded
from jaxclust.data.split import Split, reduced_side
from jaxclust.data.view import View
from jaxclust.runtime import tensorflow

if TYPE_CHECKING:
    from tensorflow import Tensor

COLUMNS = (
    "area", "aspect", "top", "left", "flip", "rotate", "scale", "shear", "down", "right",
    "brightness", "contrast", "saturation", "hue", "grey", "blur", "sigma", "erase", "erase_y", "erase_x",
    "pad_y", "pad_x", "operation1", "amount1", "operation2", "amount2", "operation3", "amount3", "operation4",
    "amount4", "operation5", "amount5",
)  # fmt: skip
BLOCKS = (20, 12)  # columns that are drawn apart, so that new ones leave the numbers of earlier runs as they were
LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R 601
MAX_SIGMA = 2.0


def columns(shape: tuple[int, ...]) -> tuple[int, ...]:
    """How many uniform numbers an image needs, in blocks."""
    return BLOCKS


def _column(u: Tensor, name: str, low: float = 0.0, high: float = 1.0) -> Tensor:
    """The numbers [B] of one parameter, uniform in [low, high)."""
    return low + (high - low) * u[:, COLUMNS.index(name)]


def crop(images: Tensor, u: Tensor, view: View, shape: tuple[int, ...]) -> Tensor:
    """Crops uint8 [B, h, w, C] to uint8 [B, *shape]; h and w may be known only at run time.

    A random crop keeps a share of U(crop_area, crop_area_max) of the area with a log-uniform aspect between
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
    return _cut(images, top, left, box_h / size, box_w / size, size)


def _cut(images: Tensor, top: Tensor, left: Tensor, step_y: Tensor, step_x: Tensor, size: int) -> Tensor:
    """uint8 [B, size, size, C] from boxes of `size` steps, whose places and steps are scalars or [B]."""
    tf = tensorflow()
    # Pixel centres lie at halves: output i comes from top + (i + 1/2) step - 1/2.
    matrix = [step_x, 0.0, left + step_x / 2 - 0.5, 0.0, step_y, top + step_y / 2 - 0.5]
    return _to_uint8(project(tf.cast(images, tf.float32), matrix, size))


def _random_box(u: Tensor, view: View, height: Tensor, width: Tensor) -> tuple[Tensor, ...]:
    tf = tensorflow()
    area = _column(u, "area", view.crop_area, view.crop_area_max) * height * width
    limit = -math.log(view.crop_aspect)
    aspect = rounded(tf.exp, _column(u, "aspect", -limit, limit))
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
    return _cut(images, top, left, side / size, side / size, size)


def evaluation_crop(images: Tensor, shape: tuple[int, ...]) -> Tensor:
    """What `crop` does where nothing is random."""
    tf = tensorflow()
    return crop(images, tf.zeros([tf.shape(images)[0], len(COLUMNS)]), View(), shape)


def measured(view: View, split: Split) -> View:
    """The view as it is: nothing in it is measured by the images."""
    return view


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
    images = _to_uint8(pixels)
    for i in range(1, view.randaugment + 1):
        which, amount = _column(u, f"operation{i}"), _column(u, f"amount{i}")
        images = randaugment.operate(images, which, amount, view.randaugment_set)
    if view.pad:
        images = _pad(images, u, view)
    if view.erase:
        images = _erase(images, u, view)
    return images


def _affine(pixels: Tensor, u: Tensor, view: View) -> Tensor:
    """Rotation, shear, change of size and shift about the centre, with one interpolation."""
    tf = tensorflow()
    size = pixels.shape[1]
    angle = _column(u, "rotate", -1, 1) * math.radians(view.rotate)
    slope = rounded(tf.tan, _column(u, "shear", -1, 1) * math.radians(view.shear))
    zoom = rounded(tf.exp, _column(u, "scale", -1, 1) * math.log1p(view.scale))
    down, right = (_column(u, name, -1, 1) * view.translate * size for name in ("down", "right"))
    # Output to input: A = rotation(angle) shear(slope) / zoom about the centre, after the shift back.
    cos, sin = rounded(tf.cos, angle) / zoom, rounded(tf.sin, angle) / zoom
    a, b, c, d = cos, cos * slope - sin, sin, sin * slope + cos
    centre = (size - 1) / 2
    x, y = centre + right, centre + down
    matrix = [a, b, centre - a * x - b * y, c, d, centre - c * x - d * y]
    return project(pixels, matrix, size)


def _colour(pixels: Tensor, u: Tensor, view: View) -> Tensor:
    tf = tensorflow()
    if view.jitter == 1:
        pixels = _jitter(pixels, u, view)
    elif view.jitter:
        # Below the probability, the number of the brightness is as uniform as it was.
        brightness = COLUMNS.index("brightness")
        columns = [u[:, :brightness], u[:, brightness : brightness + 1] / view.jitter, u[:, brightness + 1 :]]
        changed = _jitter(pixels, tf.concat(columns, axis=1), view)
        pixels = _rows(_column(u, "brightness") < view.jitter, changed, pixels)
    if view.grey and pixels.shape[3] == 3:
        grey = tf.repeat(_luminance(pixels), 3, axis=3)
        pixels = _rows(_column(u, "grey") < view.grey, grey, pixels)
    return pixels


def _jitter(pixels: Tensor, u: Tensor, view: View) -> Tensor:
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
    weights = rounded(tf.exp, -0.5 * tf.square(offsets.astype(np.float32) / tf.maximum(sigma, 1e-3)[:, None]))
    weights /= tf.reduce_sum(weights, axis=1, keepdims=True)
    # [taps, S, S]: which input a tap of an output reads, reflected at the edges.
    inputs = np.pad(np.arange(size), radius, mode="symmetric")
    taps = np.stack([np.eye(size, dtype=np.float32)[inputs[radius + o : radius + o + size]] for o in offsets])
    operator = tf.einsum("bk,kij->bij", weights, taps)
    return tf.einsum("bxj,bijc->bixc", operator, tf.einsum("byi,bijc->byjc", operator, pixels))


def _pad(images: Tensor, u: Tensor, view: View) -> Tensor:
    """Zeros on every side and a crop of the image's size: a shift by whole pixels."""
    tf = tensorflow()
    places = 2 * view.pad + 1
    down, right = (tf.cast(_whole(u, name, places) - view.pad, tf.float32) for name in ("pad_y", "pad_x"))
    return project_nearest(images, [1.0, 0.0, right, 0.0, 1.0, down], images.shape[1])


def _erase(images: Tensor, u: Tensor, view: View) -> Tensor:
    tf = tensorflow()
    size, channels = images.shape[1], images.shape[3]
    half = (1 + _whole(u, "erase", max(1, round(view.erase * size)))) // 2

    def inside(name: str) -> Tensor:
        pixel, centre = tf.range(size)[None], _whole(u, name, size)[:, None]
        return (centre - half[:, None] <= pixel) & (pixel < centre + half[:, None])

    if view.erase_fill:
        fill = np.array(view.erase_fill) if len(view.erase_fill) <= channels else np.dot(view.erase_fill, LUMINANCE)
        colour = tf.constant(np.broadcast_to(255.0 * fill, (1, 1, 1, channels)), tf.float32)
    else:
        colour = tf.reduce_mean(tf.cast(images, tf.float32), axis=(1, 2), keepdims=True)
    square = (inside("erase_y")[:, :, None] & inside("erase_x")[:, None, :])[..., None]
    return tf.where(square, _to_uint8(colour), images)


def _whole(u: Tensor, name: str, count: int) -> Tensor:
    """Whole numbers [B], uniform from 0 to count - 1."""
    tf = tensorflow()
    return tf.minimum(tf.cast(_column(u, name, 0, count), tf.int32), count - 1)


def _to_uint8(pixels: Tensor) -> Tensor:
    tf = tensorflow()
    return tf.cast(tf.round(tf.clip_by_value(pixels, 0.0, 255.0)), tf.uint8)
