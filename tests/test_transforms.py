"""Views: the numbers they draw, and every augmentation against a plain float64 NumPy version."""

import colorsys

import numpy as np
import pytest
import scipy.stats
from PIL import Image, ImageEnhance, ImageFilter

from jaxclust.data import vectors
from jaxclust.data.feature_file import open_npy
from jaxclust.data.pipeline import train_batches
from jaxclust.data.projection import rounded
from jaxclust.data.transforms import BLOCKS, COLUMNS, augment, crop
from jaxclust.data.view import View, philox_key, uniforms
from jaxclust.runtime import tensorflow

RNG = np.random.default_rng(0)


def _images(batch=3, size=16, channels=3):
    return RNG.integers(0, 256, (batch, size, size, channels)).astype(np.uint8)


def _u(batch, **columns):
    u = np.full((batch, len(COLUMNS)), 0.5, np.float32)
    for name, value in columns.items():
        u[:, COLUMNS.index(name)] = value
    return u


def _augment(images, u, **view):
    tf = tensorflow()
    return augment(tf.constant(images), tf.constant(u), View(**view)).numpy()


def _crop(images, u, size, **view):
    tf = tensorflow()
    return crop(tf.constant(images), tf.constant(u), View(**view), (size, size, images.shape[-1])).numpy()


def _uniforms(key, first, count):
    tf = tensorflow()
    return uniforms(tf.constant(key), tf.constant(first, tf.int64), count, BLOCKS).numpy()


# --- numbers


def test_a_row_depends_on_its_position_alone():
    key = philox_key(1, 2, 3)
    whole = _uniforms(key, 0, 100)
    assert whole.shape == (100, len(COLUMNS)) and whole.min() >= 0 and whole.max() < 1
    for first, count in ((0, 1), (17, 30), (99, 1)):
        np.testing.assert_array_equal(_uniforms(key, first, count), whole[first : first + count])
    far = 2**40
    np.testing.assert_array_equal(_uniforms(key, far + 3, 2), _uniforms(key, far, 8)[3:5])


def test_a_further_block_of_columns_leaves_the_numbers_of_the_others():
    tf = tensorflow()
    key, first = tf.constant(philox_key(1)), tf.constant(5, tf.int64)
    assert sum(BLOCKS) == len(COLUMNS) and BLOCKS[0] == COLUMNS.index("erase_x") + 1
    alone = uniforms(key, first, 9, BLOCKS[:1], copy=1).numpy()
    np.testing.assert_array_equal(uniforms(key, first, 9, BLOCKS, copy=1).numpy()[:, : BLOCKS[0]], alone)
    everything = [uniforms(key, first, 9, BLOCKS, copy).numpy() for copy in range(3)]
    assert len(np.unique(everything)) > 0.99 * np.size(everything)


def test_rows_and_keys_differ_and_are_uniform():
    a, b = (_uniforms(philox_key(0, 0, i), 0, 2000) for i in range(2))
    assert len(np.unique(a)) > 0.99 * a.size and np.mean(a == b) < 1e-3
    np.testing.assert_allclose(a.mean(0), 0.5, atol=0.04)
    np.testing.assert_allclose(a.std(0), 12**-0.5, atol=0.02)
    assert abs(np.corrcoef(a.T) - np.eye(len(COLUMNS))).max() < 0.1


def test_what_is_computed_of_a_number_does_not_depend_on_its_place():
    tf = tensorflow()
    x = tf.constant(np.linspace(-0.9, 0.9, 60, dtype=np.float32))
    for function in (tf.exp, tf.cos, tf.sin):
        alone = [rounded(function, x[i : i + 1]).numpy()[0] for i in range(60)]
        np.testing.assert_array_equal(rounded(function, x).numpy(), np.array(alone))


# --- crops


@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_of_the_wanted_size_is_not_touched(channels):
    images = _images(channels=channels)
    np.testing.assert_array_equal(_crop(images, _u(3), 16), images)
    tf = tensorflow()

    @tf.function(input_signature=[tf.TensorSpec((None, None, None, channels), tf.uint8)])
    def size_unknown(x):
        return crop(x, tf.constant(_u(3)), View(), (16, 16, channels))

    np.testing.assert_array_equal(size_unknown(images).numpy(), images)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (16, 27), (30, 16)])
def test_the_evaluation_crop_cuts_the_centre_of_a_canonical_image(height, width):
    """R = 16 for S = 14: whole pixels, no interpolation."""
    images = RNG.integers(0, 256, (2, height, width, 3)).astype(np.uint8)
    top, left = (height - 14) // 2, (width - 14) // 2
    np.testing.assert_array_equal(_crop(images, _u(2), 14), images[:, top : top + 14, left : left + 14])


def test_the_evaluation_crop_enlarges_a_small_image_as_pillow_does():
    small = np.asarray(Image.fromarray(_images(1, 6)[0]).resize((6, 6), Image.Resampling.BILINEAR))
    large = np.asarray(Image.fromarray(small).resize((16, 16), Image.Resampling.BILINEAR))
    np.testing.assert_allclose(_crop(small[None], _u(1), 14)[0].astype(int), large[1:15, 1:15].astype(int), atol=1)


def test_a_random_crop_of_a_ramp_lies_where_its_numbers_say():
    """On the image x + 2 y a crop must give the coordinates of its box."""
    y, x = np.mgrid[0:32, 0:40]
    image = (x + 2 * y).astype(np.uint8)[None, :, :, None]
    u = _u(1, area=0.0, aspect=0.5, top=0.25, left=0.75)
    out = _crop(image, u, 10, crop_area=0.36, crop_aspect=0.75)[0, :, :, 0]
    side = np.sqrt(0.36 * 32 * 40)
    centre = (np.arange(10) + 0.5) * side / 10 - 0.5
    expected = (0.75 * (40 - side) + centre)[None, :] + 2 * (0.25 * (32 - side) + centre)[:, None]
    np.testing.assert_allclose(out, expected, atol=0.51)


def test_random_crops_have_the_promised_area_and_aspect():
    """The steps of a crop of ramps in x and y reveal its box."""
    y, x = np.mgrid[0:64, 0:64].astype(np.uint8) * 3
    images = np.repeat(np.stack([x, y, x], -1)[None], 500, 0)
    out = _crop(images, _uniforms(philox_key(5), 0, 500), 16, crop_area=0.2, crop_aspect=0.75).astype(float) / 3
    width = (out[:, 8, -1, 0] - out[:, 8, 0, 0]) * 16 / 15
    height = (out[:, -1, 8, 1] - out[:, 0, 8, 1]) * 16 / 15
    assert width.max() < 64.8 and height.max() < 64.8
    area = width * height / 64**2
    assert 0.19 < area.min() < 0.25 and area.max() > 0.85
    inner = area < 0.5
    aspect = (width / height)[inner]
    assert 0.72 < aspect.min() < 0.8 and 1.25 < aspect.max() < 1.4


def test_crops_have_at_most_the_largest_area():
    y, x = np.mgrid[0:64, 0:64].astype(np.uint8) * 3
    images = np.repeat(np.stack([x, y, x], -1)[None], 300, 0)
    u = _uniforms(philox_key(6), 0, 300)
    out = _crop(images, u, 16, crop_area=0.05, crop_area_max=0.14).astype(float) / 3
    area = (out[:, 8, -1, 0] - out[:, 8, 0, 0]) * (out[:, -1, 8, 1] - out[:, 0, 8, 1]) * (16 / 15) ** 2 / 64**2
    assert 0.04 < area.min() < 0.06 and 0.13 < area.max() < 0.15


# --- augmentations


def test_nothing_is_done_by_a_view_of_zeros():
    images = _images()
    np.testing.assert_array_equal(_augment(images, _uniforms(philox_key(0), 0, 3)), images)


def test_flip_follows_its_number():
    images = _images(2)
    u = _u(2)
    u[:, COLUMNS.index("flip")] = [0.29, 0.31]
    out = _augment(images, u, flip=0.3)
    np.testing.assert_array_equal(out[0], images[0, :, ::-1])
    np.testing.assert_array_equal(out[1], images[1])


def test_the_middle_of_every_range_is_the_identity():
    images = _images()
    view = dict(rotate=30, scale=0.3, shear=20, translate=0.2)
    np.testing.assert_array_equal(_augment(images, _u(3), **view), images)
    colours = _augment(images, _u(3), brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)
    np.testing.assert_allclose(colours.astype(int), images.astype(int), atol=1)


def test_rotation_by_a_right_angle():
    images = _images()
    turned = _augment(images, _u(3, rotate=1.0), rotate=90)
    options = [np.rot90(images, k, (1, 2)) for k in (1, 3)]
    assert any((turned == option).all() for option in options)
    np.testing.assert_array_equal(_augment(images, _u(3, rotate=0.0), rotate=90), np.rot90(turned, 2, (1, 2)))


def test_translation_by_whole_pixels_repeats_the_edge():
    images = _images()
    out = _augment(images, _u(3, down=1.0, right=0.0), translate=0.25)
    np.testing.assert_array_equal(out[:, 4:, :12], images[:, :12, 4:])
    np.testing.assert_array_equal(out[:, :4, :12], np.repeat(images[:, :1, 4:], 4, 1))


def _affine_double(image, angle, slope, zoom, down, right):
    """Forward map about the centre: shear inverse, rotation inverse, zoom, shift; bilinear by hand."""
    size = len(image)
    centre = (size - 1) / 2
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = rotation @ np.array([[1, slope], [0, 1]]) / zoom
    out = np.zeros(image.shape)
    for y in range(size):
        for x in range(size):
            sx, sy = matrix @ [x - centre - right, y - centre - down] + centre
            x0, y0 = int(np.floor(sx)), int(np.floor(sy))
            for dy in (0, 1):
                for dx in (0, 1):
                    weight = (1 - abs(sx - x0 - dx)) * (1 - abs(sy - y0 - dy))
                    out[y, x] += weight * image[np.clip(y0 + dy, 0, size - 1), np.clip(x0 + dx, 0, size - 1)]
    return out


def test_the_affine_map_against_a_plain_one():
    images = _images(2, 12, 1)
    u = _uniforms(philox_key(9), 0, 2)
    out = _augment(images, u, rotate=25, scale=0.3, shear=15, translate=0.1)
    for image, row, got in zip(images, u.astype(np.float64), out, strict=True):
        value = {name: 2 * row[COLUMNS.index(name)] - 1 for name in ("rotate", "shear", "scale", "down", "right")}
        double = _affine_double(
            image.astype(float),
            np.radians(25) * value["rotate"],
            np.tan(np.radians(15) * value["shear"]),
            1.3 ** value["scale"],
            1.2 * value["down"],
            1.2 * value["right"],
        )
        np.testing.assert_allclose(got, double, atol=0.52)


def _luminance(image):
    return image @ np.array([0.299, 0.587, 0.114])


def test_brightness_contrast_and_saturation_against_their_definitions():
    images = _images(1)
    pixels = images[0].astype(float)
    u = _u(1, brightness=0.9, contrast=0.2, saturation=0.0)
    bright = _augment(images, u, brightness=0.5)[0]
    np.testing.assert_allclose(bright, np.clip(pixels * 1.4, 0, 255), atol=0.51)
    contrast = _augment(images, u, contrast=0.5)[0]
    mean = _luminance(pixels).mean()
    np.testing.assert_allclose(contrast, np.clip(mean + 0.7 * (pixels - mean), 0, 255), atol=0.51)
    saturated = _augment(images, u, saturation=1.0)[0]
    np.testing.assert_allclose(saturated, np.repeat(_luminance(pixels)[..., None], 3, 2), atol=0.51)


def test_hue_turns_the_circle():
    images = _images(1, 6)
    out = _augment(images, _u(1, hue=0.9), hue=0.5)[0]
    for got, pixel in zip(out.reshape(-1, 3), images.reshape(-1, 3) / 255, strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
        expected = np.array(colorsys.hsv_to_rgb((hue + 0.4) % 1, saturation, value)) * 255
        np.testing.assert_allclose(got, expected, atol=0.6)


def test_grey_follows_its_number_and_leaves_grey_images_alone():
    images = _images(2)
    u = _u(2)
    u[:, COLUMNS.index("grey")] = [0.1, 0.3]
    out = _augment(images, u, grey=0.2)
    np.testing.assert_allclose(out[0], np.repeat(_luminance(images[0].astype(float))[..., None], 3, 2), atol=0.51)
    np.testing.assert_array_equal(out[1], images[1])
    single = _images(2, channels=1)
    np.testing.assert_array_equal(_augment(single, u, grey=1, hue=0.5, saturation=1), single)


def test_colours_change_together_with_their_probability():
    images, u = _images(40), _uniforms(philox_key(8), 0, 40)
    colours = dict(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2)
    changed = u[:, COLUMNS.index("brightness")] < 0.6
    out = _augment(images, u, jitter=0.6, **colours)
    np.testing.assert_array_equal(out[~changed], images[~changed])
    given = u.copy()
    given[:, COLUMNS.index("brightness")] /= np.float32(0.6)
    np.testing.assert_array_equal(out[changed], _augment(images[changed], given[changed], **colours))
    np.testing.assert_array_equal(_augment(images, u, jitter=0.0, **colours), images)
    always = _augment(images, u, jitter=1.0, **colours)
    np.testing.assert_array_equal(always, _augment(images, u, **colours))


def test_colours_and_blur_are_those_of_pillow():
    """Within 1 of 255, where Pillow rounds in between; its blur, three boxes in place of a Gaussian, within 3."""
    smooth = Image.fromarray(_images(1, 6)[0]).resize((32, 32), Image.Resampling.BICUBIC)
    images = np.asarray(smooth)[None]
    for name, enhance in (
        ("brightness", ImageEnhance.Brightness), ("contrast", ImageEnhance.Contrast), ("saturation", ImageEnhance.Color)
    ):  # fmt: skip
        for place in (0.1, 0.9):
            expected = np.asarray(enhance(smooth).enhance(1 + 0.8 * (2 * place - 1)))
            got = _augment(images, _u(1, **{name: place}), **{name: 0.8})[0]
            np.testing.assert_allclose(got.astype(int), expected.astype(int), atol=1, err_msg=name)
    grey = _augment(images, _u(1, grey=0.1), grey=0.2)[0]
    grey_there = np.repeat(np.asarray(smooth.convert("L"))[..., None], 3, 2)
    np.testing.assert_allclose(grey.astype(int), grey_there.astype(int), atol=1)
    for place in (0.0, 0.5, 0.99):
        blurred = np.asarray(smooth.filter(ImageFilter.GaussianBlur(0.1 + 1.9 * place))).astype(int)
        got = _augment(images, _u(1, blur=0.1, sigma=place), blur=0.5)[0].astype(int)
        np.testing.assert_allclose(got[3:-3, 3:-3], blurred[3:-3, 3:-3], atol=3)  # edges are filled in other ways


def test_blur_against_scipy():
    from scipy.ndimage import gaussian_filter1d

    images = _images(2, 20)
    u = _u(2, sigma=0.5)
    u[:, COLUMNS.index("blur")] = [0.1, 0.9]
    out = _augment(images, u, blur=0.5)
    blurred = images[0].astype(float)
    for axis in (0, 1):
        blurred = gaussian_filter1d(blurred, 1.05, axis=axis, mode="reflect", radius=6)
    np.testing.assert_allclose(out[0], blurred, atol=0.51)
    np.testing.assert_array_equal(out[1], images[1])


def _square(size, top, bottom, left, right):
    square = np.zeros((size, size), bool)
    square[top:bottom, left:right] = True
    return square


def test_erase_fills_one_square_with_the_mean():
    images = _images(1)
    out = _augment(images, _u(1, erase=1.0, erase_y=0.5, erase_x=0.0), erase=0.5)[0]
    square = _square(16, 4, 12, 0, 4)
    np.testing.assert_array_equal(out[~square], images[0][~square])
    np.testing.assert_allclose(out[square], np.tile(images[0].mean((0, 1)), (32, 1)), atol=0.51)


@pytest.mark.parametrize(
    ("channels", "fill", "expected"),
    [
        (3, (0.485, 0.456, 0.406), (124, 116, 104)),
        (3, (0.2,), (51, 51, 51)),
        (1, (0.2,), (51,)),
        (1, (0.2, 0.4, 0.6), (93,)),
    ],
)
def test_erase_fills_with_a_colour_and_a_grey_image_with_its_luminance(channels, fill, expected):
    images = _images(1, channels=channels)
    out = _augment(images, _u(1, erase=0.4, erase_y=0.7, erase_x=0.99), erase=0.75, erase_fill=fill)[0]
    square = _square(16, 9, 13, 13, 16)  # floor(0.4 * 12) + 1 = 5 pixels are 2 on either side of (11, 15)
    np.testing.assert_array_equal(out[~square], images[0][~square])
    np.testing.assert_array_equal(out[square], np.tile(expected, (12, 1)))


def test_erased_squares_have_every_length_and_every_centre_alike():
    """A length l is l - 1 whole pixels where it is odd, so 1 erases nothing."""
    images, u = np.full((4000, 8, 8, 1), 255, np.uint8), _uniforms(philox_key(12), 0, 4000)
    gone = _augment(images, u, erase=0.5, erase_fill=(0.0,))[..., 0] == 0
    inner = gone.any(2).sum(1)[np.isin((u[:, COLUMNS.index("erase_y")] * 8).astype(int), (2, 3, 4, 5, 6))]
    np.testing.assert_allclose(np.bincount(inner, minlength=5) / len(inner), [0.25, 0, 0.5, 0, 0.25], atol=0.04)
    small = gone.sum((1, 2)) == 4
    places = np.bincount(gone[small].argmax(1).argmax(1), minlength=8)
    assert places[0] > 0 and places[7] == 0 and places[1:7].min() > 0.7 * places[1:7].max()


@pytest.mark.parametrize("channels", [1, 3])
def test_pad_crops_the_size_out_of_the_image_with_zeros_around(channels):
    images, u = _images(300, 6, channels), _uniforms(philox_key(13), 0, 300)
    out = _augment(images, u, pad=2)
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
    seen = np.zeros((5, 5), int)
    for got, image, row in zip(out, padded, u, strict=True):
        y, x = (int(row[COLUMNS.index(name)] * 5) for name in ("pad_y", "pad_x"))
        np.testing.assert_array_equal(got, image[y : y + 6, x : x + 6])
        seen[y, x] += 1
    assert seen.min() > 0


def test_what_one_augmentation_draws_does_not_depend_on_the_others():
    images, u = _images(8), _uniforms(philox_key(3), 0, 8)
    flipped = (_augment(images, u, flip=0.5) != images).any((1, 2, 3))
    both = _augment(images, u, flip=0.5, erase=0.3)
    alone = _augment(images, u, erase=0.3)
    np.testing.assert_array_equal(flipped, u[:, COLUMNS.index("flip")] < 0.5)
    np.testing.assert_array_equal(both[~flipped], alone[~flipped])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [3, 8])
def test_everything_at_once_on_small_images(size, channels):
    view = View(
        crop_area=0.3, flip=0.5, rotate=30, scale=0.3, shear=10, translate=0.2, jitter=0.5, brightness=0.4,
        contrast=0.4, saturation=0.4, hue=0.1, grey=0.2, blur=0.5, randaugment=5, pad=2, erase=0.5,
    )  # fmt: skip
    images, u = _images(4, size, channels), _uniforms(philox_key(4), 0, 4)
    out = _augment(_crop(images, u, size, crop_area=0.3), u, **view._asdict())
    assert out.shape == images.shape and out.dtype == np.uint8


def test_noise_on_vectors_is_normal_and_depends_on_the_position_alone():
    tf = tensorflow()
    rows = np.zeros((4000, 6), np.float32)
    columns = vectors.columns((6,))
    assert columns == (8,)

    def noisy(first, count):
        u = uniforms(tf.constant(philox_key(7)), tf.constant(first, tf.int64), count, columns)
        return vectors.augment(tf.constant(rows[:count]), u, View(noise=0.5)).numpy()

    whole = noisy(0, 4000)
    # The uniforms are equal to the bit; log and cos may round a tail of a vector register differently.
    np.testing.assert_allclose(noisy(1000, 17), whole[1000:1017], rtol=1e-5, atol=1e-7)
    assert abs(whole.mean()) < 0.01 and abs(whole.std() - 0.5) < 0.01
    assert scipy.stats.kstest(whole.ravel() / 0.5, "norm").pvalue > 1e-4
    assert np.abs(np.corrcoef(whole.T) - np.eye(6)).max() < 0.06


@pytest.mark.parametrize("cache_bytes", [0, 1e9])
def test_noise_is_a_share_of_the_deviation_of_the_vectors(tmp_path, cache_bytes):
    rows = RNG.standard_normal((200, 768)) + 3
    rows[:, 0] *= 5
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    np.save(tmp_path / "rows.npy", rows)
    split = open_npy(tmp_path / "rows.npy", str, cache_bytes)
    (batch,) = train_batches(
        split, {"train": {"noise": 0.5}, "as it is": {}}, np.arange(200, dtype=np.int32), np.zeros(200, np.int32),
        np.ones(200, np.float32), start_position=0, first_step=0, last_step=1, batch_size=200, seed=0, stage_index=0,
    )  # fmt: skip
    np.testing.assert_array_equal(batch["views"]["as it is"], rows)
    added = batch["views"]["train"] - rows
    deviation = np.sqrt(rows.astype(np.float64).var(axis=0).mean())
    assert deviation < 0.02 and added.std() == pytest.approx(0.5 * deviation, rel=0.01)
    assert vectors.deviation(split, block=64) == pytest.approx(deviation, rel=1e-6)
