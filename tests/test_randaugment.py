"""RandAugment: every operation beside Pillow's, and who draws which."""

import numpy as np
import pytest
import scipy.stats
from PIL import Image, ImageEnhance, ImageOps
from sklearn.datasets import load_digits

from jaxclust import config
from jaxclust.data import randaugment
from jaxclust.data.randaugment import operate
from jaxclust.data.transforms import BLOCKS, COLUMNS, augment
from jaxclust.data.view import View, make_view, philox_key, uniforms
from jaxclust.runtime import tensorflow

SIZE = 32
AMOUNTS = np.array([0.0, 0.04, 0.23, 0.5, 0.81, 0.999], np.float32)


def _affine(*matrix):
    return lambda image, v: image.transform(image.size, Image.Transform.AFFINE, [m(v) for m in matrix])


def _one(_):
    return 1


def _zero(_):
    return 0


def _given(v):
    return v


def _times_size(v):
    return v * SIZE


def _pillow(shift):
    """(operation, smallest amount, largest amount, largest difference, share of pixels that may differ at all)."""
    exact, blend, nearest = (0, 0.0), (1, 0.001), (255, 0.0005)  # nearest: Pillow steps in parts of 65536 of a pixel
    return [
        (lambda image, v: image, 0, 0, *exact),
        (lambda image, v: ImageOps.autocontrast(image), 0, 0, *exact),
        (lambda image, v: ImageOps.equalize(image), 0, 0, *exact),
        (lambda image, v: image.rotate(v), -30, 30, *nearest),
        (lambda image, v: ImageOps.solarize(image, v), 0, 256, *exact),
        (lambda image, v: ImageEnhance.Color(image).enhance(v), 0.05, 0.95, *blend),
        (lambda image, v: ImageEnhance.Contrast(image).enhance(v), 0.05, 0.95, *blend),
        (lambda image, v: ImageEnhance.Brightness(image).enhance(v), 0.05, 0.95, *blend),
        (lambda image, v: ImageEnhance.Sharpness(image).enhance(v), 0.05, 0.95, *blend),
        (_affine(_one, _given, _zero, _zero, _one, _zero), -shift, shift, *nearest),
        (_affine(_one, _zero, _zero, _given, _one, _zero), -shift, shift, *nearest),
        (_affine(_one, _zero, _times_size, _zero, _one, _zero), -shift, shift, *nearest),
        (_affine(_one, _zero, _zero, _zero, _one, _times_size), -shift, shift, *nearest),
        (lambda image, v: ImageOps.posterize(image, int(v)), 4, 8, *exact),
    ]


def _grey_images():
    """Digits, noise, and images of one, two and few values."""
    rng = np.random.default_rng(0)
    digits = load_digits().images[:3] * 255 / 16
    large = [
        np.asarray(Image.fromarray(d.astype(np.uint8)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)) for d in digits
    ]
    noise = rng.integers(0, 256, (SIZE, SIZE))
    two = np.where(noise < 250, 30, 201)
    return np.stack([*large, noise, np.full((SIZE, SIZE), 77), two, 90 + noise // 20]).astype(np.uint8)


def _colour_images():
    """Ramps in several directions, channels of which one is flat, and the images above."""
    y, x = np.mgrid[0:SIZE, 0:SIZE]
    ramps = np.stack([8 * x, 4 * x + 4 * y, 255 - 7 * y], -1)
    flat = np.stack([8 * x, np.full_like(x, 12), 100 + y], -1)
    grey = _grey_images()
    return np.concatenate([[ramps, flat], np.stack([grey, np.roll(grey, 1, 0), np.roll(grey, 2, 0)], -1)]).astype(
        np.uint8
    )


@pytest.mark.parametrize(("published", "shift"), [("scan", 0.1), ("fixmatch", 0.3)])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_operation_is_that_of_pillow(channels, published, shift):
    tf = tensorflow()
    images = _grey_images()[..., None] if channels == 1 else _colour_images()
    table = _pillow(shift)
    which, row, amount = (a.ravel() for a in np.meshgrid(range(len(table)), range(len(images)), AMOUNTS, indexing="ij"))
    place = ((which + 0.5) / len(table)).astype(np.float32)
    out = operate(tf.constant(images[row]), tf.constant(place), tf.constant(amount), published).numpy()
    assert out.dtype == np.uint8
    out = out.reshape(len(table), -1, *images.shape[1:])
    for k, (change, low, high, largest, share) in enumerate(table):
        values = np.float32(low) + np.float32(high - low) * amount[which == k]
        there = [
            np.asarray(change(Image.fromarray(images[i].squeeze()), float(v))).reshape(images.shape[1:])
            for i, v in zip(row[which == k], values, strict=True)
        ]
        apart = np.abs(out[k].astype(int) - np.stack(there).astype(int))
        assert apart.max() <= largest and (apart > 0).mean() <= share, (k, apart.max(), (apart > 0).mean())


def _drawn(count, seed=3):
    return uniforms(tensorflow().constant(philox_key(seed)), tensorflow().constant(0, "int64"), count, BLOCKS).numpy()


def _augment(images, u, **view):
    return augment(tensorflow().constant(images), tensorflow().constant(u), View(**view)).numpy()


def test_operations_are_drawn_alike_and_apart_from_each_other(monkeypatch):
    """Operation k of the fourteen here makes x to 14 x + k, so that a pixel of 0 tells the two it met."""
    table = tuple(randaugment.Operation(lambda images, amount, k=k: 14 * images + k) for k in range(14))
    monkeypatch.setattr(randaugment, "operations", lambda shift: table)
    count = 196 * 60
    met = _augment(np.zeros((count, 1, 1, 1), np.uint8), _drawn(count), randaugment=2).ravel()
    assert scipy.stats.chisquare(np.bincount(met, minlength=196)).pvalue > 1e-4


def test_each_operation_follows_its_own_two_numbers():
    tf = tensorflow()
    images = np.tile(_colour_images(), (4, 1, 1, 1))
    u = _drawn(len(images))
    expected = tf.constant(images)
    for i in range(1, 6):
        which, amount = (u[:, COLUMNS.index(f"{name}{i}")] for name in ("operation", "amount"))
        expected = operate(expected, tf.constant(which), tf.constant(amount), "fixmatch")
        got = _augment(images, u, randaugment=i, randaugment_set="fixmatch")
        np.testing.assert_array_equal(got, expected.numpy())
    assert (got != images).any((1, 2, 3)).mean() > 0.7


def test_an_image_is_changed_alike_whatever_stands_beside_it():
    images, u = np.tile(_colour_images(), (2, 1, 1, 1)), _drawn(18)
    view = dict(flip=0.5, randaugment=4, pad=4, erase=0.5, erase_fill=(0.5,))
    together = _augment(images, u, **view)
    for i in (0, 7, 17):
        np.testing.assert_array_equal(_augment(images[i : i + 1], u[i : i + 1], **view)[0], together[i])


def test_what_is_off_is_not_in_the_graph():
    tf = tensorflow()

    def operations(**view):
        def traced(images, u):
            return augment(images, u, View(**view))

        spec = [tf.TensorSpec((None, 8, 8, 3), tf.uint8), tf.TensorSpec((None, len(COLUMNS)), tf.float32)]
        return {
            o.type for o in tf.function(traced, autograph=False).get_concrete_function(*spec).graph.get_operations()
        }

    new = {"DynamicPartition", "DynamicStitch", "DenseBincount", "ImageProjectiveTransformV3"}
    assert not operations(flip=0.5) & new
    assert operations(randaugment=1) >= new
    assert operations(pad=1) & new == {"ImageProjectiveTransformV3"}


def test_a_view_with_all_of_it_is_read_from_a_config():
    made = config.base()
    assert make_view(made.views.train) == View()
    made.views.train.update({"randaugment": 3, "randaugment_set": "fixmatch", "pad": 4, "erase": 0.5})
    made.views.train.erase_fill = (0.485, 0.456, 0.406)
    view = make_view(config.validate(made).views.train)
    assert view == View(randaugment=3, randaugment_set="fixmatch", pad=4, erase=0.5, erase_fill=(0.485, 0.456, 0.406))
    assert {view: "graphs are kept by views"}[view]
