"""Augmentations of natural photos beside Pillow's, each with its own tolerance in steps of 255.

Where the two differ by nature, ours is also held to the definition: Pillow's blur is three boxes in place of a Gaussian
(of a sigma of 0.3 that is 14 off), and its HSV has 8 bits (there and back alone is 5 off).
"""

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter
from scipy.ndimage import gaussian_filter1d
from sklearn.datasets import load_sample_images
from test_randaugment import AMOUNTS, SIZE, _pillow
from test_transforms import _augment, _u

from jaxclust.data.randaugment import operate
from jaxclust.runtime import tensorflow


@pytest.fixture(scope="module")
def photos():
    """Parts of scikit-learn's two photos, a temple and a flower, uint8 [6, 32, 32, 3]."""
    boxes = (0, 0, 384, 384), (200, 20, 584, 404), (128, 100, 384, 356)
    parts = [Image.fromarray(photo).crop(box) for photo in load_sample_images().images for box in boxes]
    return np.stack([np.asarray(part.resize((SIZE, SIZE), Image.Resampling.BICUBIC)) for part in parts])


def apart(ours, photos, change):
    """The differences from what Pillow's `change` makes of each photo."""
    theirs = np.stack([np.asarray(change(Image.fromarray(photo))) for photo in photos])
    return np.abs(ours.astype(int) - theirs.astype(int))


@pytest.mark.parametrize(
    ("name", "enhance"),
    [("brightness", ImageEnhance.Brightness), ("contrast", ImageEnhance.Contrast), ("saturation", ImageEnhance.Color)],
)
def test_brightness_contrast_and_saturation_within_1(photos, name, enhance):
    for place in (0.02, 0.3, 0.7, 0.98):
        ours = _augment(photos, _u(len(photos), **{name: place}), **{name: 0.4})
        found = apart(ours, photos, lambda photo, place=place: enhance(photo).enhance(1 + 0.4 * (2 * place - 1)))
        assert found.max() <= 1, place


def test_grey_within_1(photos):
    ours = _augment(photos, _u(len(photos), grey=0.1), grey=0.2)
    assert apart(ours, photos, lambda photo: photo.convert("L").convert("RGB")).max() <= 1


def turned(photo, share):
    hue, saturation, value = photo.convert("HSV").split()
    moved = (np.asarray(hue).astype(int) + round(255 * share)) % 256
    return Image.merge("HSV", (Image.fromarray(moved.astype(np.uint8)), saturation, value)).convert("RGB")


def test_hue_within_10_and_1_in_the_mean(photos):
    for place in (0.02, 0.3, 0.7, 0.98):
        share = 0.1 * (2 * place - 1)
        ours = _augment(photos, _u(len(photos), hue=place), hue=0.1)
        found = apart(ours, photos, lambda photo, share=share: turned(photo, share))
        assert found.max() <= 10 and found.mean() < 1, place


@pytest.mark.parametrize(
    ("sigma", "largest", "inner"), [(0.1, 0, 0), (0.29, 15, 15), (0.57, 6, 6), (1.05, 3, 3), (1.98, 10, 3)]
)
def test_blur_by_its_sigma_and_2_in_the_mean(photos, sigma, largest, inner):
    """Filled by reflection, which at edges is nearer to Pillow than repeating them, as its three boxes do in turn."""
    ours = _augment(photos, _u(len(photos), blur=0.1, sigma=(sigma - 0.1) / 1.9), blur=0.5)
    found = apart(ours, photos, lambda photo: photo.filter(ImageFilter.GaussianBlur(sigma)))
    assert found.max() <= largest and found[:, 6:-6, 6:-6].max() <= inner and found.mean() < 2
    exact = photos.astype(float)
    for axis in (1, 2):
        exact = gaussian_filter1d(exact, sigma, axis=axis, mode="reflect", truncate=max(8, 6 / sigma))
    np.testing.assert_allclose(ours, exact, atol=1)


def test_flip_pad_and_cutout_exactly(photos):
    assert not apart(
        _augment(photos, _u(len(photos), flip=0.1), flip=0.5), photos,
        lambda photo: photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    ).any()  # fmt: skip
    ours = _augment(photos, _u(len(photos), pad_y=0.99, pad_x=0.0), pad=4)  # 4 up, 4 to the right
    assert not apart(ours, photos, lambda photo: photo.crop((-4, 4, SIZE - 4, SIZE + 4))).any()

    def cut(photo):
        ImageDraw.Draw(photo).rectangle((20 - 6, 28 - 6, 20 + 5, 28 + 5), fill=(125, 123, 114))
        return photo

    place = {"erase": 12.5 / 16, "erase_y": 28.5 / SIZE, "erase_x": 20.5 / SIZE}  # a side of 13 is 6 on either side
    fill = (125 / 255, 123 / 255, 114 / 255)
    assert not apart(_augment(photos, _u(len(photos), **place), erase=0.5, erase_fill=fill), photos, cut).any()


@pytest.mark.parametrize("number", range(14))
def test_each_of_randaugment_within_its_own(photos, number):
    tf = tensorflow()
    for published, shift in (("scan", 0.1), ("fixmatch", 0.3)):
        change, low, high, largest, share = _pillow(shift)[number]
        values = np.float32(low) + np.float32(high - low) * AMOUNTS
        many, amounts = np.repeat(photos, len(AMOUNTS), axis=0), np.tile(AMOUNTS, len(photos))
        place = np.full(len(many), (number + 0.5) / 14, np.float32)
        ours = operate(tf.constant(many), tf.constant(place), tf.constant(amounts), published).numpy()
        theirs = [np.asarray(change(Image.fromarray(photo), float(v))) for photo in photos for v in values]
        found = np.abs(ours.astype(int) - np.stack(theirs).astype(int))
        assert found.max() <= largest and (found > 0).mean() <= share, (published, found.max(), (found > 0).mean())
