"""Sources and the pipeline, on real files made here."""

import gzip
import inspect
import os
import re
import shutil
import struct
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from jaxclust.config import base
from jaxclust.data import pipeline
from jaxclust.data.decode import decode, reduced, scan
from jaxclust.data.listing import list_images, split_folders
from jaxclust.data.pipeline import exact_batches, images_at, train_batches
from jaxclust.data.source import open_source
from jaxclust.errors import ConfigError, DataError

RNG = np.random.default_rng(0)
HOSTILE = [
    "a,b.jpg",
    'quo"te.jpg',
    "new\nline.jpg",
    "späß 猫.jpg",
    "-rf.jpg",
    "UPPER.JPEG",
    "semi;$(x).jpg",
]


def _open(source, **fields):
    config = base()
    config.data.update({"source": str(source), **fields})
    return open_source(config)


def _noise(height, width, channels=3):
    return RNG.integers(0, 256, (height, width, channels)).astype(np.uint8).squeeze()


def _smooth(height, width):
    """A picture that JPEG hardly changes."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 / width, y * 255 / height, (x + y) * 255 / (height + width)], -1).astype(np.uint8)


def _save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path, **options)
    return path


def _decode(path, channels=3):
    return decode(str(path), channels, 1000, 10**8)


# --- the conversion


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_exif_orientation_is_applied(tmp_path, orientation, suffix):
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    path = _save(tmp_path / f"a.{suffix}", _smooth(16, 32), exif=exif)
    with Image.open(path) as image:
        upright = np.asarray(ImageOps.exif_transpose(image))
    np.testing.assert_array_equal(_decode(path), upright)
    assert upright.shape[:2] == ((16, 32) if orientation < 5 else (32, 16))
    source = _open(f"folder:{tmp_path}", image_size=40)  # the header scan must say the same size
    assert source.splits["train"].images.shape[1:3] == upright.shape[:2] and not source.skipped


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_broken_exif_block_does_not_lose_the_picture(tmp_path):
    path = _save(tmp_path / "a.jpg", _smooth(16, 16), exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + b"\xff" * 30)
    assert _decode(path).shape == (16, 16, 3)


def test_transparency_lies_on_white_and_palettes_are_looked_up(tmp_path):
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[:2] = (200, 100, 0, 255)
    rgba[2:] = (200, 100, 0, 51)
    expected = np.full((4, 4, 3), (200, 100, 0), np.uint8)
    expected[2:] = np.rint(255 * 0.8 + 0.2 * np.array([200, 100, 0]))
    np.testing.assert_allclose(_decode(_save(tmp_path / "a.png", rgba)), expected, atol=1)

    palette = Image.fromarray(np.repeat(np.uint8([[0], [1]]), 4, 1), "P")
    palette.putpalette([10, 20, 30, 200, 0, 0])
    np.testing.assert_array_equal(_decode(_save(tmp_path / "b.png", palette))[0, 0], (10, 20, 30))
    clear = _decode(_save(tmp_path / "c.png", palette, transparency=1))
    np.testing.assert_array_equal(clear[:, 0], [(10, 20, 30), (255, 255, 255)])

    keyed = Image.fromarray(np.uint8([[[1, 2, 3], [9, 9, 9]]]))
    np.testing.assert_array_equal(_decode(_save(tmp_path / "d.png", keyed, transparency=(9, 9, 9)))[0, 1], (255,) * 3)

    grey = np.stack([np.full((2, 2), 100), [[255, 0], [255, 255]]], -1).astype(np.uint8)
    path = _save(tmp_path / "e.png", Image.fromarray(grey, "LA"))
    np.testing.assert_array_equal(_decode(path, 1)[..., 0], [[100, 255], [100, 100]])


def test_cmyk_animations_and_deep_pixels(tmp_path):
    cmyk = Image.fromarray(_smooth(16, 16)).convert("CMYK")
    np.testing.assert_allclose(
        _decode(_save(tmp_path / "a.jpg", cmyk, quality=100)).astype(int),
        _smooth(16, 16).astype(int),
        atol=4,
    )
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for name in ("b.gif", "b.webp", "b.tif"):
        path = _save(tmp_path / name, frames[0], save_all=True, append_images=frames[1:], lossless=True)
        np.testing.assert_array_equal(_decode(path), np.full((8, 8, 3), (255, 0, 0)))
    deep = np.uint16([[0, 128, 129, 257 * 77, 65535]])
    for name in ("c.png", "c.tif"):
        np.testing.assert_array_equal(_decode(_save(tmp_path / name, deep), 1)[0, :, 0], [0, 0, 1, 77, 255])
    unit = np.float32([[0, 0.5, 1, np.nan]])
    np.testing.assert_array_equal(_decode(_save(tmp_path / "d.tif", unit), 1)[0, :, 0], [0, 128, 255, 0])
    constant = np.full((1, 2), 5, np.float32)
    np.testing.assert_array_equal(_decode(_save(tmp_path / "g.tif", constant), 1)[0, :, 0], [0, 0])
    wide = np.float32([[-2, 0, 2]])
    np.testing.assert_array_equal(_decode(_save(tmp_path / "e.tif", wide), 1)[0, :, 0], [0, 128, 255])
    bits = Image.fromarray(np.array([[True, False]]))
    np.testing.assert_array_equal(_decode(_save(tmp_path / "f.png", bits), 3)[0], [(255,) * 3, (0,) * 3])


def test_one_channel_is_pillows_luminance(tmp_path):
    pixels = _noise(9, 9)
    path = _save(tmp_path / "a.png", pixels)
    np.testing.assert_array_equal(_decode(path, 1)[..., 0], np.asarray(Image.fromarray(pixels).convert("L")))


def test_large_images_are_reduced_to_the_canonical_short_side(tmp_path):
    path = _save(tmp_path / "a.jpg", _smooth(300, 450), quality=95)
    got = decode(str(path), 3, 73, 10**6)
    assert got.shape == (73, 110, 3)  # 450 · 73 / 300 = 109.5
    np.testing.assert_allclose(got.astype(int), _smooth(73, 110).astype(int), atol=5)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(height=st.integers(1, 400), width=st.integers(1, 400), side=st.integers(4, 80), orientation=st.integers(1, 8))
def test_the_header_scan_foretells_the_decoded_size(tmp_path, height, width, side, orientation):
    """Also where a JPEG is decoded at a fraction of its size."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = str(_save(tmp_path / "a.jpg", _smooth(height, width), exif=exif))
    header = scan(path, 10**6)
    assert decode(path, 3, side, 10**6).shape[:2] == reduced(header.height, header.width, side)


@pytest.mark.parametrize("channels", [1, 3])
def test_npz_and_folder_convert_alike(tmp_path, channels):
    """RGBA of 40 x 60 to S = 14: alpha, luminance and the reduction are the same code."""
    rgba = np.stack([_noise(40, 60, 4) for _ in range(3)])
    np.savez(tmp_path / "a.npz", images=rgba)
    for i, pixels in enumerate(rgba):
        _save(tmp_path / "files" / f"{i}.png", pixels)
    fields = {"image_size": 14, "channels": channels}
    one = _open(f"npz:{tmp_path / 'a.npz'}", **fields).splits["train"]
    two = _open(f"folder:{tmp_path / 'files'}", **fields).splits["train"]
    np.testing.assert_array_equal(one.images, two.images)
    assert one.image_shape == two.image_shape == (14, 14, channels) and one.images.shape == (
        3,
        16,
        24,
        channels,
    )


# --- array sources


def test_digits():
    source = _open("digits")
    train = source.splits["train"]
    assert list(source.splits) == ["train"] and train.size == 1797 and train.image_shape == (8, 8, 1)
    assert source.num_classes == 10 and train.labels.dtype == np.int32 and train.path(17) == "digits/17"
    from sklearn.datasets import load_digits

    np.testing.assert_allclose(train.images[..., 0] * (16 / 255), load_digits().images, atol=0.04)
    assert train.images.max() == 255


def test_some_digits_are_the_test_the_same_each_time():
    whole = _open("digits").splits["train"]
    source = _open("digits:397")
    assert {name: split.size for name, split in source.splits.items()} == {"train": 1400, "test": 397}
    parts = (*source.splits.values(), whole)
    rows = [np.column_stack([split.images.reshape(split.size, -1), split.labels]) for split in parts]
    train, test, everything = ({tuple(row) for row in of.tolist()} for of in rows)
    assert train | test == everything and not train & test
    assert np.bincount(source.splits["test"].labels).min() > 20  # a mixture of all classes
    np.testing.assert_array_equal(_open("digits:397").splits["test"].images, source.splits["test"].images)
    for where in ("0", "1797", "all", "-3"):
        with pytest.raises(ConfigError, match=f"'digits:{where}': after digits comes how many of the 1,797 images"):
            _open(f"digits:{where}")


def test_unknown_kinds_and_missing_places_are_config_errors():
    for source, word in (
        ("folders:x", "folder"),
        ("folder:", "folder:DIR"),
        ("npz", "npz:FILE"),
        ("idx", "idx:DIR"),
    ):
        with pytest.raises(ConfigError, match=word):
            _open(source)
    with pytest.raises(ConfigError, match="digits.*folder.*idx.*npz"):
        _open("zzz:1")


def _write_idx(path, array, magic=None, cut=None):
    head = struct.pack(f">I{array.ndim}I", magic or 0x800 + array.ndim, *array.shape)
    content = (head + array.tobytes())[:cut]
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("separator", ["-", "."])
def test_idx(tmp_path, suffix, separator):
    images, labels = {}, {}
    for prefix, count in (("train", 12), ("t10k", 5)):
        images[prefix], labels[prefix] = (
            _noise(count, 28, 28),
            RNG.integers(0, 10, count).astype(np.uint8),
        )
        labels[prefix][:2] = (0, 9)
        _write_idx(tmp_path / f"{prefix}-images{separator}idx3-ubyte{suffix}", images[prefix])
        _write_idx(tmp_path / f"{prefix}-labels{separator}idx1-ubyte{suffix}", labels[prefix])
    source = _open(f"idx:{tmp_path}")
    for split, prefix in (("train", "train"), ("test", "t10k")):
        np.testing.assert_array_equal(source.splits[split].images[..., 0], images[prefix])
        names = np.array(source.class_names)[source.splits[split].labels]
        np.testing.assert_array_equal(names.astype(int), labels[prefix])
    assert source.splits["test"].path(3).endswith("/test/3")


def test_malformed_idx_names_the_file_and_the_fault(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        _open(f"idx:{tmp_path / 'none'}")
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte is missing.*t10k-labels"):
        _open(f"idx:{tmp_path}")
    images, path = _noise(4, 5, 5), tmp_path / "train-images-idx3-ubyte"
    for options, word in (
        ({"magic": 2049}, "00000801"),
        ({"cut": -1}, "99 follow"),
        ({"cut": 9}, "header of 16"),
    ):
        _write_idx(path, images, **options)
        with pytest.raises(DataError, match=word):
            _open(f"idx:{tmp_path}")
    path.write_bytes(gzip.compress(b"\0\0\x08\x03" + bytes(50))[:-12])
    with pytest.raises(DataError, match="cannot be read"):
        _open(f"idx:{tmp_path}")
    _write_idx(path, images)
    assert _open(f"idx:{tmp_path}").class_names is None  # labels are optional
    _write_idx(tmp_path / "train-labels-idx1-ubyte", np.zeros(3, np.uint8))
    with pytest.raises(DataError, match="4 images, but labels have shape"):
        _open(f"idx:{tmp_path}")


def test_npz(tmp_path):
    path = tmp_path / "my.npz"
    np.savez(
        path,
        images=_noise(6, 10, 12),
        labels=[7, 3, 3, 7, 9, 3],
        test_images=_noise(2, 10, 12),
        test_labels=[9, 7],
    )
    source = _open(f"npz:{path}")
    assert source.class_names == ("3", "7", "9") and source.splits["train"].image_shape == (
        10,
        10,
        1,
    )
    np.testing.assert_array_equal(source.splits["train"].labels, [1, 0, 0, 1, 2, 0])
    np.testing.assert_array_equal(source.splits["test"].labels, [2, 1])
    assert _open(f"npz:{path}", channels=3).splits["train"].images.shape == (6, 10, 12, 3)


@pytest.mark.parametrize(
    ("arrays", "word"),
    [
        ({"images": np.array([b"x", None], object)}, "Python objects"),
        ({"pictures": np.zeros((2, 3, 3), np.uint8)}, "no array 'images'"),
        ({"images": np.zeros((2, 3, 3))}, "float64.*uint8"),
        ({"images": np.zeros((2, 3), np.uint8)}, "shape"),
        ({"images": np.zeros((0, 3, 3), np.uint8)}, "shape"),
        ({"images": np.zeros((2, 3, 3, 5), np.uint8)}, "shape"),
        ({"images": np.zeros((2, 3, 3), np.uint8), "labels": np.zeros(3, int)}, "2 images"),
        ({"images": np.zeros((2, 3, 3), np.uint8), "labels": np.zeros(2)}, "integers"),
        (
            {"images": np.zeros((2, 3, 3), np.uint8), "labels": np.array(["a", None], object)},
            "Python objects",
        ),
    ],
)
def test_malformed_npz(tmp_path, arrays, word):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=word):
        _open(f"npz:{tmp_path / 'a.npz'}")


def test_npz_that_is_none(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"text")
    for name, word in (("a.npz", "not an npz"), ("b.npz", "no such file")):
        with pytest.raises(DataError, match=word):
            _open(f"npz:{tmp_path / name}")


# --- folders


def _folder(root, names, size=8):
    for i, name in enumerate(names):
        _save(root / name, np.full((size, size, 3), 10 * i, np.uint8), format="PNG")
    return root


def test_order_depends_on_names_alone(tmp_path):
    names = ["b/2.png", "a/10.PNG", "a/9.png", "B/1.Png", "a-b/1.png", "a/x/1.png", "ä/1.png"]
    one = list_images(_folder(tmp_path / "one", names))
    two = list_images(_folder(tmp_path / "two", names[::-1]))
    assert one == two == ["B/1.Png", "a-b/1.png", "a/10.PNG", "a/9.png", "a/x/1.png", "b/2.png", "ä/1.png"]


def test_hidden_names_other_files_and_loops_of_links(tmp_path):
    _folder(tmp_path, ["a/1.png", "b/2.png", ".trash/3.png", "a/.4.png"])
    (tmp_path / "a" / "notes.txt").write_text("x")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "b" / "here").symlink_to(".")
    (tmp_path / "b" / "itself").symlink_to("itself")
    assert list_images(tmp_path) == ["a/1.png", "b/2.png"]
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    _folder(outside, ["5.png"])
    (tmp_path / "c").symlink_to(outside)
    assert list_images(tmp_path) == ["a/1.png", "b/2.png", "c/5.png"]
    shutil.rmtree(outside)


@pytest.mark.parametrize(
    ("tops", "folders"),
    [
        (["a", "b"], {"train": ""}),
        (["train"], {"train": "train/"}),
        (["train", "test", "val"], {"train": "train/", "test": "test/"}),
        (["train", "validation", "extra"], {"train": "train/", "test": "validation/"}),
        (["train", "car", "bus"], {"train": ""}),  # a class of trains
        (["test", "a"], {"train": ""}),
    ],
)
def test_splits(tops, folders):
    assert split_folders([f"{top}/x/1.png" for top in tops]) == folders


def test_labels_come_from_the_first_folder_or_not_at_all(tmp_path):
    nested = _open(f"folder:{_folder(tmp_path / 'n', ['cat/1.png', 'cat/old/2.png', 'dog/3.png'])}")
    assert nested.class_names == ("cat", "dog")
    np.testing.assert_array_equal(nested.splits["train"].labels, [0, 0, 1])
    assert nested.splits["train"].path(1) == "cat/old/2.png"
    for i, names in enumerate((["1.png", "2.png"], ["1.png", "cat/2.png", "dog/3.png"], ["2024/1.png", "2024/2.png"])):
        source = _open(f"folder:{_folder(tmp_path / str(i), names)}")
        assert source.class_names is None and source.splits["train"].labels is None
    (tmp_path / "b" / "train" / "a").mkdir(parents=True)
    (tmp_path / "b" / "train" / "a" / "bad.png").write_text("x")
    both = ["train/a/1.png", "train/b/2.png", "test/b/3.png", "test/c/4.png"]
    source = _open(f"folder:{_folder(tmp_path / 'b', both)}")
    assert source.class_names == ("a", "b", "c")
    np.testing.assert_array_equal(source.splits["test"].labels, [1, 2])
    assert [s.path for s in source.skipped] == ["train/a/bad.png"]
    assert source.splits["test"].paths == ["test/b/3.png", "test/c/4.png"]


def test_hostile_names(tmp_path):
    for name in HOSTILE:
        _save(tmp_path / name, _smooth(12, 12), format="JPEG")
    raw = os.fsencode(tmp_path) + b"/latin\xe9.jpg"
    shutil.copy(tmp_path / HOSTILE[0], raw)
    for cache in (10**9, 0):
        source = _open(f"folder:{tmp_path}", cache_bytes=cache)
        names = source.splits["train"].paths
        assert sorted(names) == sorted([*HOSTILE, os.fsdecode(b"latin\xe9.jpg")]) and not source.skipped
        assert sum(b["mask"].sum() for b in exact_batches(source.splits["train"], 3)) == len(names)


def _bomb(path, side=60000):
    """A valid PNG header that promises side² pixels."""
    import zlib

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""))


def _with_bad_files(root):
    """Five good images (one under a wrong extension) and the bad ones by name with words of the reason."""
    _folder(root, ["1.png", "2.png", "3.png"])
    _save(root / "really-png.jpg", _smooth(8, 8), format="PNG")
    _save(root / "camera.jpg", _smooth(8, 8))
    with open(root / "camera.jpg", "ab") as file:
        file.write(bytes(100))  # what cameras append
    thumbnail = _save(root / "thumb.tmp", _smooth(8, 8), format="JPEG").read_bytes()
    (root / "thumb.tmp").unlink()
    full = _save(root / "truncated.jpg", _noise(64, 64), comment=thumbnail[2:]).read_bytes()
    (root / "truncated.jpg").write_bytes(full[:-500])
    png = _save(root / "truncated.png", _noise(64, 64)).read_bytes()
    (root / "truncated.png").write_bytes(png[: len(png) // 2])
    webp = _save(root / "truncated.webp", _noise(64, 64)).read_bytes()
    (root / "truncated.webp").write_bytes(webp[: len(webp) // 2])
    (root / "text.png").write_text("not an image")
    (root / "empty.gif").touch()
    (root / "script.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    (root / "dangling.jpg").symlink_to(root / "nowhere.jpg")
    os.mkfifo(root / "pipe.jpg")
    _bomb(root / "bomb.png")
    _bomb(root / "bomblet.png", 1001)
    return {
        "truncated.jpg": "truncated",
        "truncated.png": "truncated",
        "truncated.webp": "decoder",
        "text.png": "not an image",
        "empty.gif": "empty",
        "script.jpg": "not an image",
        "dangling.jpg": "no such file",
        "pipe.jpg": "not a regular file",
        "bomb.png": "60000 x 60000 .*max_pixels",
        "bomblet.png": "1001 x 1001 .*max_pixels=1000000",
    }


@pytest.mark.parametrize("cache", [10**9, 0])
def test_bad_files_are_skipped_and_say_why(tmp_path, cache):
    bad = _with_bad_files(tmp_path)
    source = _open(f"folder:{tmp_path}", cache_bytes=cache, max_pixels=10**6)
    assert source.splits["train"].size == 5
    reasons = {s.path: s.reason for s in source.skipped}
    assert reasons.keys() == bad.keys() and {s.split for s in source.skipped} == {"train"}
    for name, words in bad.items():
        assert re.search(words, reasons[name]), (name, reasons[name])
    with pytest.raises(DataError, match=r"max_skipped=9(.|\n)*bomb.png"):
        _open(f"folder:{tmp_path}", max_pixels=10**6, max_skipped=9)


def test_damage_inside_a_file_is_found_when_caching(tmp_path):
    _folder(tmp_path, ["a/1.png", "b/2.png", "b/4.png"])
    whole = _save(tmp_path / "a" / "3.png", _noise(20, 20)).read_bytes()
    (tmp_path / "a" / "3.png").write_bytes(whole[:200] + whole[300:])
    source = _open(f"folder:{tmp_path}")
    train = source.splits["train"]
    assert [s.path for s in source.skipped] == ["a/3.png"] and train.paths == [
        "a/1.png",
        "b/2.png",
        "b/4.png",
    ]
    np.testing.assert_array_equal(train.images[:, 0, 0, 0], [0, 10, 20])
    np.testing.assert_array_equal(train.labels, [0, 1, 1])


def test_empty_and_missing_folders(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no images"):
        _open(f"folder:{tmp_path / 'empty'}")
    with pytest.raises(DataError, match="no such folder"):
        _open(f"folder:{tmp_path / 'missing'}")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.png").write_text("x")
    with pytest.raises(DataError, match="1 cannot be used(.|\n)*a.png"):
        _open(f"folder:{tmp_path / 'text'}")


def test_sizes_and_channels_are_chosen_from_the_headers(tmp_path):
    grey = [_save(tmp_path / "grey" / f"{i}.png", _noise(20, 20, 1)) for i in range(2)]
    assert _open(f"folder:{grey[0].parent}").splits["train"].image_shape == (20, 20, 1)
    assert _open(f"folder:{grey[0].parent}", channels=3).splits["train"].image_shape == (20, 20, 3)
    _save(grey[0].parent / "c.jpg", _smooth(100, 90))
    assert _open(f"folder:{grey[0].parent}").splits["train"].image_shape == (64, 64, 3)


# --- the pipeline


ON = {"crop_area": 0.5, "flip": 0.5, "rotate": 20, "brightness": 0.3}


@pytest.fixture(params=[*(pytest.param(kind, marks=pytest.mark.wide) for kind in ("array", "ragged")), "lazy"])
def split(request, tmp_path):
    """17 images with ids that can be read off their pixels, each way a split can hold them."""
    for i in range(17):
        extra = 0 if request.param == "array" else i % 3
        pixels = _noise(12 + extra, 12)
        _save(tmp_path / f"{i // 9}" / f"{i:02d}.png", pixels)
    cache = 0 if request.param == "lazy" else 10**9
    made = _open(f"folder:{tmp_path}", image_size=12, cache_bytes=cache).splits["train"]
    assert (made.gather is not None) == (request.param == "array")
    return made


def _train(split, first, last, start=0, order=None, views=None, batch_size=6, seed=3, **hosts):
    order = _order() if order is None else order
    targets, weights = np.arange(split.size) + 100, np.linspace(0, 1, split.size)
    return list(
        train_batches(
            split, views or {"train": ON}, order, targets, weights, start_position=start, first_step=first,
            last_step=last, batch_size=batch_size, seed=seed, stage_index=0, **hosts,
        )
    )  # fmt: skip


def _order():
    return np.random.default_rng(1).integers(0, 17, 48).astype(np.int32)


def _assert_same(a, b):
    assert len(a) == len(b)
    for one, two in zip(a, b, strict=True):
        assert one.keys() == two.keys()
        for name in one.keys() - {"views"}:
            np.testing.assert_array_equal(one[name], two[name])
        for view in one["views"]:
            np.testing.assert_array_equal(one["views"][view], two["views"][view])


def test_train_batches_follow_the_order(split):
    batches = _train(split, 0, 8, views={"train": {}})
    exact = np.concatenate([b["image"] for b in exact_batches(split, 17)])
    np.testing.assert_array_equal(images_at(split, _order()), exact[_order()])
    for step, batch in enumerate(batches):
        assert set(batch) == {"views", "id", "position", "target", "weight", "step"}  # and no label
        assert batch["step"] == step and batch["step"].dtype == np.int32
        np.testing.assert_array_equal(batch["position"], np.arange(6 * step, 6 * step + 6))
        np.testing.assert_array_equal(batch["id"], _order()[batch["position"]])
        np.testing.assert_array_equal(batch["target"], batch["id"] + 100)
        np.testing.assert_allclose(batch["weight"], batch["id"] / 16, atol=1e-6)
        assert batch["weight"].dtype == np.float32 and batch["id"].dtype == batch["target"].dtype == np.int32
        np.testing.assert_array_equal(batch["views"]["train"], exact[batch["id"]])


def test_the_middle_equals_the_tail_of_the_whole_and_decodes_nothing_before_it(split):
    whole = _train(split, 0, 8)
    _assert_same(_train(split, 5, 8), whole[5:])
    _assert_same(_train(split, 5, 8, start=24, order=_order()[24:]), whole[5:])
    poisoned = _order()
    poisoned[:30] = -1  # gathering these ids would fail
    _assert_same(_train(split, 5, 8, order=poisoned), whole[5:])


@pytest.mark.parametrize("hosts", [2, 3])
def test_hosts_share_the_batches_of_one(split, hosts):
    whole = _train(split, 1, 4)
    parts = [_train(split, 1, 4, host=h, hosts=hosts) for h in range(hosts)]
    for step, batch in enumerate(whole):
        joined = np.concatenate([part[step]["views"]["train"] for part in parts])
        np.testing.assert_array_equal(joined, batch["views"]["train"])
        np.testing.assert_array_equal(np.concatenate([part[step]["id"] for part in parts]), batch["id"])


def test_augmentation_differs_by_position_view_seed_but_not_by_batch_size(split):
    order = np.zeros(24, np.int32)
    views = {"query": ON, "key": ON}
    batches = _train(split, 0, 4, order=order, views=views)
    query = np.concatenate([b["views"]["query"] for b in batches])
    key = np.concatenate([b["views"]["key"] for b in batches])
    assert len(np.unique(query.reshape(24, -1), axis=0)) == 24
    assert (query != key).any((1, 2, 3)).all()
    larger = _train(split, 0, 2, order=order, views=views, batch_size=12)
    np.testing.assert_array_equal(np.concatenate([b["views"]["query"] for b in larger]), query)
    other = _train(split, 0, 4, order=order, views=views, seed=4)
    assert (np.concatenate([b["views"]["query"] for b in other]) != query).any()


def test_a_view_has_its_own_number_and_size_and_another_copy_leaves_the_first_as_they_were(split):
    views = {"large": {**ON, "number": 2}, "small": {**ON, "number": 3, "size": 6, "pad": 1}}
    whole = _train(split, 0, 3, views=views)
    first = whole[0]["views"]
    assert first["large"].shape == (6, 2, 12, 12, 3) and first["small"].shape == (6, 3, 6, 6, 3)
    assert len(np.unique(first["small"].reshape(18, -1), axis=0)) == 18
    fewer = {"large": ON, "small": {**views["small"], "number": 2}}
    for batch, other in zip(whole, _train(split, 0, 3, views=fewer), strict=True):
        np.testing.assert_array_equal(batch["views"]["large"][:, 0], other["views"]["large"])
        np.testing.assert_array_equal(batch["views"]["small"][:, :2], other["views"]["small"])
    _assert_same(_train(split, 2, 3, views=views), whole[2:])
    parts = [_train(split, 0, 3, views=views, host=h, hosts=2)[1]["views"]["small"] for h in range(2)]
    np.testing.assert_array_equal(np.concatenate(parts), whole[1]["views"]["small"])


@pytest.mark.parametrize(("batch_size", "hosts"), [(17, 1), (5, 1), (4, 2), (6, 3), (64, 2), (20, 20)])
def test_the_exact_pass_gives_every_id_once_in_order(split, batch_size, hosts):
    seen, counts = [], set()
    for host in range(hosts):
        batches = list(exact_batches(split, batch_size, host=host, hosts=hosts))
        counts.add(len(batches))
        assert all(b["image"].shape == (batch_size // hosts, 12, 12, 3) for b in batches)
        ids = np.concatenate([b["id"][b["mask"]] for b in batches])
        np.testing.assert_array_equal(ids, np.arange(host, 17, hosts))
        assert all(b["id"].max() < 17 for b in batches)
        seen.extend(ids)
    assert sorted(seen) == list(range(17)) and len(counts) == 1


def test_cache_and_lazy_decoding_give_identical_batches(tmp_path):
    for i in range(6):
        _save(tmp_path / f"{i}.jpg", _smooth(40 + 7 * i, 60))
    cached, lazy = (_open(f"folder:{tmp_path}", image_size=14, cache_bytes=c).splits["train"] for c in (10**9, 0))
    order = np.array([3, 1, 5, 0, 2, 4, 4, 4], np.int32)
    _assert_same(*(_train(s, 0, 2, order=order, batch_size=4) for s in (cached, lazy)))
    exact = [np.concatenate([b["image"] for b in exact_batches(s, 6)]) for s in (cached, lazy)]
    np.testing.assert_array_equal(*exact)


def test_labels_cannot_reach_a_batch(split):
    assert ".labels" not in inspect.getsource(pipeline)
    labels = None if split.labels is None else split.labels[::-1].copy()
    _assert_same(_train(split, 0, 3), _train(replace(split, labels=labels), 0, 3))


def test_a_file_that_goes_bad_is_named(tmp_path):
    name = "it's\nbad.png"
    _folder(tmp_path, ["0.png", name, "2.png"])
    split = _open(f"folder:{tmp_path}", cache_bytes=0).splits["train"]
    (tmp_path / name).write_bytes(b"gone")
    bad = split.paths.index(name)
    order = np.full(6, bad)
    for batches in (
        lambda: list(exact_batches(split, 2)),
        lambda: _train(split, 0, 1, order=order),
        lambda: images_at(split, order),
    ):
        with pytest.raises(DataError, match=r"it's\\nbad.png.*not an image"):
            batches()
    assert len(_train(split, 0, 1, order=np.zeros(6, np.int32))) == 1


def test_positions_outside_of_the_order_are_refused(split):
    for first, last, start in ((0, 9, 0), (0, 2, 6)):
        with pytest.raises(ValueError, match="positions"):
            _train(split, first, last, start=start)
    with pytest.raises(ValueError, match="4 hosts"):
        _train(split, 0, 1, hosts=4)


def test_a_new_round_traces_nothing_anew(split, monkeypatch):
    graphs = []
    make = pipeline._train_graphs
    monkeypatch.setattr(pipeline, "_train_graphs", lambda *args: graphs.append(make(*args)) or graphs[-1])
    counts = []
    for step in range(3):
        _train(split, step, step + 1, order=_order()[::-1].copy() if step else None, seed=step)
        counts.append([graph.experimental_get_tracing_count() for graph in graphs[-1]])
    assert counts == [[1, 1]] * 3
