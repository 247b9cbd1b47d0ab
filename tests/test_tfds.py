"""Data sets in the format of TFDS, written here by TFDS itself and read without a network."""

import os
import socket
import time

import numpy as np
import pytest
from PIL import Image
from small import smoke

from jaxclust.config import base
from jaxclust.data.decode import decode
from jaxclust.data.pipeline import exact_batches, train_batches
from jaxclust.data.records import open_records
from jaxclust.data.source import open_source
from jaxclust.data.sources import cars196
from jaxclust.errors import ConfigError, DataError
from jaxclust.runtime import tensorflow

tf = tensorflow()
import tensorflow_datasets as tfds  # noqa: E402

CLASSES = ["cat", "dog", "späß"]
FORMATS = ["tfrecord", "array_record"]


def _features(**others):
    return {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(names=CLASSES)} | others


def _write(root, splits, features, name="mine", version="1.0.0", config=None, format="tfrecord", keys=None):
    """A data set in shards of three records; `splits` are lists of records by name."""
    folder = root.joinpath(*filter(None, (name, config, version)))
    folder.mkdir(parents=True)
    identity = tfds.core.DatasetIdentity(
        name=name, version=tfds.core.Version(version), data_dir=str(folder), module_name="none", config_name=config
    )
    info = tfds.core.DatasetInfo(builder=identity, features=tfds.features.FeaturesDict(features), supervised_keys=keys)
    writer = tfds.core.SequentialWriter(info, max_examples_per_shard=3, file_format=format)
    writer.initialize_splits(list(splits))
    writer.add_examples(splits)
    writer.close_all()
    return folder


def _pictures(folder, count):
    """Files of several sizes, formats and modes, and not all upright."""
    folder.mkdir()
    rng = np.random.default_rng(count)
    paths = []
    for i in range(count):
        pixels = rng.integers(0, 256, (20 + i, 25, 3)).astype(np.uint8)
        image = Image.fromarray(pixels)
        exif = Image.Exif()
        if i % 5 == 1:
            image = image.convert("L")
        if i % 5 == 2:
            image = image.convert("CMYK")
        if i % 5 == 3:
            image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
        if i % 5 == 4:
            exif[0x0112] = 6
        paths.append(folder / f"{i}.{'png' if i % 5 in (0, 3) else 'jpg'}")
        image.save(paths[-1], exif=exif)
    return paths


def _records(paths, **others):
    return [{"image": str(path), "label": i % len(CLASSES)} | others for i, path in enumerate(paths)]


def _bytes(*pixels):
    """Encoded flat pictures, each of one value."""
    return [tf.io.encode_png(np.full((8, 8, 3), value, np.uint8)).numpy() for value in pixels]


def _open(root, name="mine", **fields):
    config = base()
    config.data.update({"source": f"tfds:{name}", "data_dir": str(root), **fields})
    return open_source(config)


def _values(split):
    """The first pixel of every image, by id."""
    return np.concatenate([b["image"][b["mask"]] for b in exact_batches(split, 4)])[:, 0, 0, 0].tolist()


# --- what is read


def test_a_class_may_be_asked_for_and_images_without_one_are_trained_on(tmp_path):
    """As coarse_label of CIFAR-100, and the unlabelled images of STL10, whose label is -1."""
    coarse = tfds.features.ClassLabel(names=["big", "small"])
    records = [{"image": image, "label": i % 3, "coarse_label": i // 2} for i, image in enumerate(_bytes(0, 1, 2, 3))]
    unlabelled = [{"image": image, "label": -1, "coarse_label": -1} for image in _bytes(4, 5)]
    keys = ("image", "label")
    splits = {"train": records[:2], "test": records[2:], "unlabelled": unlabelled}
    _write(tmp_path, splits, _features(coarse_label=coarse), keys=keys)
    source = _open(tmp_path, label="coarse_label", train="train+test+unlabelled")
    split = source.splits["train"]
    assert source.class_names == ("big", "small") and split.labels.tolist() == [0, 0, 1, 1, -1, -1]
    assert _values(split) == [0, 1, 2, 3, 4, 5] and split.path(4) == "mine/unlabelled/0"
    assert _open(tmp_path).splits["test"].labels.tolist() == [2, 0]
    with pytest.raises(ConfigError, match=r"label='coarse_labl' is no class of .*did you mean 'coarse_label'\?"):
        _open(tmp_path, label="coarse_labl")
    with pytest.raises(ConfigError, match=r"no split 'unlabeled'; did you mean 'unlabelled'\? There is: train, test"):
        _open(tmp_path, train="train+unlabeled")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("cache", [10**9, 0])
def test_pixels_labels_and_order_are_those_of_the_files(tmp_path, format, cache):
    """Eight images in three shards, decoded as `decode` decodes the very files."""
    train, held_out = _pictures(tmp_path / "train", 8), _pictures(tmp_path / "held_out", 4)
    splits = {"train": _records(train), "validation": _records(held_out), "extra": _records(train)}
    _write(tmp_path / "data", splits, _features(), format=format)
    source = _open(tmp_path / "data", image_size=14, cache_bytes=cache)
    assert source.name == "mine" and list(source.splits) == ["train", "test"]
    assert source.class_names == tuple(CLASSES) and not source.skipped
    for paths, split, own in (
        (train, source.splits["train"], "train"),
        (held_out, source.splits["test"], "validation"),
    ):
        assert split.size == len(paths) and split.image_shape == (14, 14, 3)
        assert [split.path(i) for i in range(split.size)] == [f"mine/{own}/{i}" for i in range(split.size)]
        assert split.paths is None and split.gather is None
        np.testing.assert_array_equal(split.labels, np.arange(len(paths)) % 3)
        for id, path in enumerate(paths):
            expected = decode(str(path), 3, 16, 10**6)
            np.testing.assert_array_equal(split.load(tf.constant(id)).numpy(), expected)


def test_the_order_is_that_of_tfds(tmp_path):
    folder = _write(
        tmp_path, {"train": [{"image": image} for image in _bytes(*range(10))]}, {"image": tfds.features.Image()}
    )
    assert len(list(folder.glob("*train*"))) == 4
    own = tfds.builder_from_directory(folder).as_dataset(split="train", shuffle_files=False)
    order = [int(record["image"][0, 0, 0]) for record in own]
    assert order == list(range(10)) == _values(_open(tmp_path).splits["train"])


def test_memory_and_streaming_give_identical_batches(tmp_path):
    _write(tmp_path / "data", {"train": _records(_pictures(tmp_path / "files", 9))}, _features())
    order = np.array([3, 1, 8, 0, 2, 4, 4, 7], np.int32)
    view = {"train": {"crop_area": 0.5, "flip": 0.5, "brightness": 0.3}}
    seen = []
    for cache in (10**9, 0):
        split = _open(tmp_path / "data", image_size=12, cache_bytes=cache).splits["train"]
        batches = train_batches(
            split, view, order, np.arange(9), np.ones(9), start_position=0, first_step=0, last_step=2,
            batch_size=4, seed=1, stage_index=0,
        )  # fmt: skip
        seen.append([*(b["views"]["train"] for b in batches), *(b["image"] for b in exact_batches(split, 3))])
    assert len(seen[0]) == 2 + 3
    for cached, streamed in zip(*seen, strict=True):
        np.testing.assert_array_equal(cached, streamed)


def test_grey_images_of_one_size_lie_in_memory_as_they_are(tmp_path):
    features = {"image": tfds.features.Image(shape=(28, 28, 1)), "label": tfds.features.ClassLabel(num_classes=3)}
    pixels = np.random.default_rng(0).integers(0, 256, (5, 28, 28, 1)).astype(np.uint8)
    _write(tmp_path, {"train": [{"image": p, "label": i % 3} for i, p in enumerate(pixels)]}, features)
    source = _open(tmp_path)
    np.testing.assert_array_equal(source.splits["train"].images, pixels)
    assert source.class_names == ("0", "1", "2") and source.splits["train"].gather is not None


def test_labels_are_optional_and_may_be_unknown(tmp_path):
    images = _bytes(1, 2, 3)
    _write(tmp_path, {"train": [{"image": image} for image in images]}, {"image": tfds.features.Image()}, "none")
    source = _open(tmp_path, "none")
    assert source.class_names is None and source.splits["train"].labels is None

    some = [{"image": image, "label": label} for image, label in zip(images, (2, -1, 0), strict=True)]
    unknown = [{"image": image, "label": -1} for image in images]
    _write(tmp_path, {"train": some, "test": unknown}, _features(), "some")
    source = _open(tmp_path, "some")
    np.testing.assert_array_equal(source.splits["train"].labels, [2, -1, 0])
    assert source.splits["test"].labels is None and source.class_names == tuple(CLASSES)

    _write(tmp_path, {"train": unknown}, _features(), "unknown")
    assert _open(tmp_path, "unknown").class_names is None


def test_of_the_held_out_splits_the_first_with_known_labels_is_taken(tmp_path):
    known, hidden = ([{"image": image, "label": label} for image in _bytes(9, 8)] for label in (1, -1))
    for name, test, validation, expected in (("a", hidden, known, 1), ("b", known, hidden, 1), ("c", known, known, 1)):
        _write(tmp_path, {"train": known, "test": test, "validation": validation}, _features(), name)
        split = _open(tmp_path, name).splits["test"]
        np.testing.assert_array_equal(split.labels, [expected] * 2)
        assert split.path(0).split("/")[1] == ("validation" if name == "a" else "test")


def test_of_several_labels_the_one_to_be_predicted_is_taken(tmp_path):
    features = _features(coarse=tfds.features.ClassLabel(num_classes=2))
    records = [{"image": image, "label": 2, "coarse": 1} for image in _bytes(1, 2)]
    _write(tmp_path, {"train": records}, features, "both", keys=("image", "coarse"))
    np.testing.assert_array_equal(_open(tmp_path, "both").splits["train"].labels, [1, 1])
    _write(tmp_path, {"train": records}, features, "open")
    assert _open(tmp_path, "open").splits["train"].labels is None


@pytest.mark.parametrize("feature", ["file_name", "image/filename"])
def test_file_names_are_used_where_there_are_some(tmp_path, feature):
    names = ["n01/späß 1.png", "n01/2,x.png", "n02/bad.png", "n02/3.png"]
    images = _bytes(1, 2, 3, 4)
    images[2] = b"not an image"
    records = [{"image": image, "label": 0, feature: name} for image, name in zip(images, names, strict=True)]
    _write(tmp_path, {"train": records}, _features(**{feature: tfds.features.Text()}))
    source = _open(tmp_path)
    assert source.splits["train"].paths == [f"mine/train/{name}" for name in names if "bad" not in name]
    assert [(s.split, s.path) for s in source.skipped] == [("train", "mine/train/n02/bad.png")]


def test_a_picture_is_told_from_masks_and_depths_and_other_pictures(tmp_path):
    images = tfds.features
    picture, other = _bytes(7, 9)
    mask, depth = np.zeros((8, 8, 1), np.uint8), np.zeros((8, 8, 1), np.float32)
    features = {
        "photo": images.Image(),
        "mask": images.LabeledImage(labels=2, shape=(None, None, 1)),
        "depth": images.Image(shape=(None, None, 1), dtype=np.float32),
    }
    _write(tmp_path, {"train": [{"photo": picture, "mask": mask, "depth": depth}]}, features, "one")
    assert _values(_open(tmp_path, "one").splits["train"]) == [7]

    pair = {"left": images.Image(), "right": images.Image()}
    records = {"train": [{"left": other, "right": picture}]}
    _write(tmp_path, records, pair, "pair")
    with pytest.raises(DataError, match="several images and none called 'image': left, right"):
        _open(tmp_path, "pair")
    _write(tmp_path, records, pair, "said", keys=("right", "left"))
    assert _values(_open(tmp_path, "said").splits["train"]) == [7]

    named = {"train": [{"left": other, "image": picture}]}
    _write(tmp_path, named, {"left": images.Image(), "image": images.Image()}, "named")
    assert _values(_open(tmp_path, "named").splits["train"]) == [7]
    _write(tmp_path, {"train": [{"depth": depth}]}, {"depth": features["depth"]}, "deep")
    with pytest.raises(DataError, match="no image, only depth"):
        _open(tmp_path, "deep")


def test_versions_and_configurations(tmp_path):
    """Of a data set that TFDS could prepare in version 3.0.1, the newest version on the disk is taken."""
    for version, value in (("1.0.0", 1), ("2.10.0", 3), ("2.9.0", 2)):
        _write(tmp_path, {"train": [{"image": _bytes(value)[0], "label": 0}]}, _features(), "mnist", version)
    for name, value in (("mnist", 3), ("mnist:1.0.0", 1), ("mnist:2.9.0", 2), ("mnist:2.9.*", 2)):
        assert _values(_open(tmp_path, name).splits["train"]) == [value], name
    _write(tmp_path, {"train": [{"image": _bytes(4)[0], "label": 0}]}, _features(), "sized", "1.0.0", "160px-v2")
    source = _open(tmp_path, "sized/160px-v2")
    assert source.name == "sized" and _values(source.splits["train"]) == [4]


# --- damage


def _rewrite(shard, change):
    """Passes the records of a TFRecord file through `change`."""
    records = list(tf.data.TFRecordDataset(str(shard)).as_numpy_iterator())
    with tf.io.TFRecordWriter(str(shard)) as writer:
        for record in change(records):
            writer.write(record)


@pytest.mark.parametrize("cache", [10**9, 0])
def test_bad_images_and_records_are_skipped_and_say_why(tmp_path, cache):
    images = _bytes(*range(8))
    images[1], images[2] = b"text", b""
    records = [{"image": image, "label": i % 3} for i, image in enumerate(images)]
    folder = _write(tmp_path, {"train": records, "test": records}, _features())
    _rewrite(
        folder / "mine-train.tfrecord-00001",
        lambda raw: [raw[0], b"\xff\xff\xff", tf.train.Example().SerializeToString()],
    )
    source = _open(tmp_path, cache_bytes=cache)
    train = source.splits["train"]
    assert _values(train) == [0, 3, 6, 7] and train.labels.tolist() == [0, 0, 0, 1]
    assert [train.path(i) for i in range(4)] == [f"mine/train/{i}" for i in (0, 3, 6, 7)]
    reasons = {skipped.path: skipped.reason for skipped in source.skipped if skipped.split == "train"}
    assert list(reasons) == [f"mine/train/{i}" for i in (1, 2, 4, 5)]
    for reason, word in zip(reasons.values(), ("not an image", "empty", "damaged", "missing"), strict=True):
        assert word in reason
    with pytest.raises(DataError, match=r"mine.1\.0\.0'(.|\n)*max_skipped=3(.|\n)*mine/train/4"):
        _open(tmp_path, max_skipped=3)


def test_damage_that_only_decoding_finds_takes_its_label_along(tmp_path):
    images = _bytes(0, 1, 2)
    noise = tf.io.encode_png(np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)).numpy()
    images[1] = noise[:80] + bytes(20) + noise[100:]
    records = [{"image": image, "label": i} for i, image in enumerate(images)]
    _write(tmp_path, {"train": records}, _features())
    source = _open(tmp_path)
    assert [skipped.path for skipped in source.skipped] == ["mine/train/1"]
    assert source.splits["train"].labels.tolist() == [0, 2] and _values(source.splits["train"]) == [0, 2]


def test_a_label_that_is_no_class_is_damage(tmp_path):
    records = [{"image": image, "label": 0} for image in _bytes(1, 2)]
    folder = _write(tmp_path, {"train": records}, _features())

    def change(raw):
        example = tf.train.Example.FromString(raw[1])
        example.features.feature["label"].int64_list.value[0] = 3
        return [raw[0], example.SerializeToString()]

    _rewrite(folder / "mine-train.tfrecord-00000", change)
    assert [s.reason for s in _open(tmp_path).skipped] == ["its label 3 is none of the 3 classes"]


@pytest.mark.parametrize("format", FORMATS)
def test_files_that_are_not_whole_are_named(tmp_path, format):
    folder = _write(
        tmp_path, {"train": [{"image": i, "label": 0} for i in _bytes(*range(7))]}, _features(), format=format
    )
    shard = folder / f"mine-train.{format}-00001"
    whole = shard.read_bytes()
    for content in (whole[:-1], whole[:-40], whole[:5], b"\xff" * len(whole)):
        shard.write_bytes(content)
        with pytest.raises(DataError, match=shard.name) as caught:
            _open(tmp_path)
        assert f"{format}-00000" not in str(caught.value)
    shard.write_bytes((folder / f"mine-train.{format}-00002").read_bytes())
    with pytest.raises(DataError, match=rf"{shard.name}' holds 1 records; its dataset_info.json says 3"):
        _open(tmp_path)
    shard.unlink()
    with pytest.raises(DataError, match=rf"{shard.name}.*[Nn]o such file"):
        _open(tmp_path)


@pytest.mark.parametrize("cut", [-3, 0])
def test_a_record_that_goes_bad_later_is_named(tmp_path, cut):
    folder = _write(tmp_path, {"train": [{"image": i, "label": 0} for i in _bytes(*range(5))]}, _features())
    split = _open(tmp_path, cache_bytes=0).splits["train"]
    shard = folder / "mine-train.tfrecord-00001"
    os.truncate(shard, shard.stat().st_size + cut - 20 if cut else 0)
    with pytest.raises(DataError, match=r"mine/train/[34]' of .*shorter"):
        list(exact_batches(split, 2))


def test_other_formats_are_refused(tmp_path):
    with pytest.raises(DataError, match="'a.riegeli' has the format riegeli; .*tfrecord and array_record"):
        open_records("riegeli", ["a.riegeli"], [1])


def test_a_data_set_without_train_lists_its_splits(tmp_path):
    records = [{"image": _bytes(1)[0], "label": 0}]
    _write(tmp_path, {"test": records, "extra": records, "train": []}, _features())
    with pytest.raises(DataError, match="no split 'train', only test, extra"):
        _open(tmp_path)


def test_a_data_set_without_one_good_image(tmp_path):
    _write(tmp_path, {"train": [{"image": b"text", "label": 0}]}, _features())
    with pytest.raises(DataError, match=r"no images to train on; 1 cannot be used:\n.*mine/train/0"):
        _open(tmp_path)


@pytest.mark.parametrize("file", ["features.json", "dataset_info.json"])
def test_unreadable_descriptions(tmp_path, file):
    folder = _write(tmp_path, {"train": [{"image": _bytes(1)[0], "label": 0}]}, _features())
    (folder / file).write_text("{ nonsense")
    with pytest.raises(DataError, match="'mine' below .* cannot be opened: .*double quotes"):
        _open(tmp_path)


# --- names, and data sets that are not there


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", "names no data set; write tfds:NAME"),
        ("../mnist", "names no data set"),
        ("huggingface:mnist", "names no data set"),
        ("minst", r"'tfds:minst': neither .* nor TFDS [\d.]+ has this data set; did you mean 'mnist'\?"),
        ("min", r"did you mean 'mine'\?"),
        ("mine:9.0.0", r"; there is mine/small:2\.0\.0, mine:1\.0\.0"),
        ("mine/large", r"; there is mine/small:2\.0\.0, mine:1\.0\.0"),
        ("cifar10:9.9.9", r"cannot be loaded at version 9\.9\.9, only: \d"),
        ("imagenette/170px", r"170px not found.*; its configurations are full-size-v2, .*160px"),
    ],
)
def test_unknown_names_are_config_errors(tmp_path, name, words):
    records = {"train": [{"image": _bytes(1)[0], "label": 0}]}
    _write(tmp_path, records, _features())
    _write(tmp_path, records, _features(), "mine", "2.0.0", "small")
    with pytest.raises(ConfigError, match=words):
        _open(tmp_path, name)


def test_a_bucket_is_no_folder():
    with pytest.raises(ConfigError, match="data_dir='gs://tfds-data/datasets' is no folder"):
        _open("gs://tfds-data/datasets", "mnist")


def test_not_downloaded_and_no_network_is_said_at_once(tmp_path, monkeypatch, capsys):
    def unknown_host(*args, **kwargs):
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown_host)
    began = time.monotonic()
    with pytest.raises(DataError) as caught:
        _open(tmp_path, "cifar10")
    assert time.monotonic() - began < 10
    message = str(caught.value)
    assert f"'cifar10' is not in {tmp_path / 'cifar10'}" in message and "no connection to https://" in message
    assert "tfds build cifar10" in message and "config.data.data_dir" in message
    written = capsys.readouterr()
    assert "downloading and preparing" in written.out and written.err == ""
    assert not list(tmp_path.rglob("*.*"))  # nothing half done


class _Preparable(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """What TFDS knows how to prepare: `fault` says what comes in between."""

    VERSION = tfds.core.Version("1.0.0")
    fault: Exception | None = None

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(_features()))

    def _split_generators(self, dl_manager):
        if self.fault:
            raise self.fault
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i, image in enumerate(_bytes(5, 6)):
            yield i, {"image": image, "label": i}


@pytest.fixture
def preparable(monkeypatch):
    """Makes TFDS know `preparable`."""
    from tensorflow_datasets.core import registered

    monkeypatch.setitem(registered._DATASET_REGISTRY, "preparable", _Preparable)
    _Preparable.name = "preparable"
    return _Preparable


def test_what_is_not_there_is_prepared_once(tmp_path, preparable, monkeypatch, capsys):
    source = _open(tmp_path, "preparable")
    assert sorted(_values(source.splits["train"])) == [5, 6]
    assert capsys.readouterr().out.startswith(f"tfds:preparable is not yet in {tmp_path / 'preparable'}")
    monkeypatch.setattr(preparable, "fault", AssertionError("prepared again"))
    assert sorted(_values(_open(tmp_path, "preparable").splits["train"])) == [5, 6]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "fault",
    [
        ConnectionError("host is gone"),
        AssertionError("Manual directory does not exist.\nDownload it:\n1. register"),
        ImportError("apache_beam is needed"),
    ],
)
def test_failures_of_preparing_are_one_line_and_a_remedy(tmp_path, preparable, monkeypatch, fault):
    monkeypatch.setattr(preparable, "fault", fault)
    with pytest.raises(
        DataError, match=r"'preparable' is not in .*cannot be prepared: .*\n.*tfds build preparable"
    ) as caught:
        _open(tmp_path, "preparable")
    assert " ".join(str(fault).split()) in str(caught.value)


def test_what_has_no_image_is_refused_before_it_is_downloaded(tmp_path, capsys):
    with pytest.raises(DataError, match="no image, only .*sex"):
        _open(tmp_path, "titanic")
    assert capsys.readouterr().out == ""


def test_the_official_counts_of_cars_are_checked_where_all_images_are_there(tmp_path, monkeypatch):
    pixels = np.zeros((8, 8, 3), np.uint8)
    records = [{"image": pixels, "label": label} for label in (0, 1, 1, 2)]
    _write(tmp_path, {"train": records[:3], "test": records[3:]}, _features(), name="cars196")
    _open(tmp_path, "cars196")  # of four images nothing is known
    monkeypatch.setattr(cars196, "IMAGES", 4)
    monkeypatch.setattr(cars196, "CLASSES", 3)
    monkeypatch.setattr(cars196, "PARTS", (4, 0))
    _open(tmp_path, "cars196")
    monkeypatch.setattr(cars196, "PARTS", (3, 1))
    with pytest.raises(DataError, match="the first 98 have 4 images and the others 0; of the official 196 .* 3 and 1"):
        _open(tmp_path, "cars196")


# --- the command line


@pytest.mark.wide
def test_a_run_by_command_line_can_be_continued_and_evaluated(tmp_path, capsys):
    from sklearn.datasets import load_digits

    digits = load_digits()
    features = {"image": tfds.features.Image(shape=(8, 8, 1)), "label": tfds.features.ClassLabel(num_classes=10)}
    records = [
        {"image": (image * 15).astype(np.uint8)[..., None], "label": label}
        for image, label in zip(digits.images[:300], digits.target[:300], strict=True)
    ]
    _write(tmp_path / "data", {"train": records[:240], "test": records[240:]}, features, "tiny_digits")
    workdir = tmp_path / "run"
    arguments = ["--config.data.source=tfds:tiny_digits", f"--config.data.data_dir={tmp_path / 'data'}"]
    assert smoke(workdir, *arguments) == 0
    assert "tiny_digits: 240 train, 60 test images" in capsys.readouterr().out
    assert (workdir / "images.csv").read_text().splitlines()[1] == "train,0,tiny_digits/train/0"
    before = (workdir / "assignments.csv").read_bytes()
    assert smoke(workdir, *arguments) == 0
    assert smoke(workdir, *arguments, "--job=evaluate") == 0
    assert (workdir / "assignments.csv").read_bytes() == before
    assert smoke(tmp_path / "other", "--config.data.source=tfds:tiny_digit", arguments[1]) == 2
    assert "did you mean 'tiny_digits'?" in capsys.readouterr().err


def test_a_box_is_cut_out_of_the_image(tmp_path):
    """TFDS keeps boxes as shares of height and width: top, left, bottom, right."""
    pixels = np.arange(20 * 30 * 3, dtype=np.uint8).reshape(20, 30, 3)
    box = tfds.features.BBox(ymin=0.1, xmin=0.1, ymax=0.4, xmax=0.5)
    over = tfds.features.BBox(ymin=0.5, xmin=0.5, ymax=1.0, xmax=1.0)
    records = [{"image": pixels, "label": i, "bbox": b} for i, b in enumerate([box, over])]
    _write(tmp_path, {"train": records}, _features(bbox=tfds.features.BBoxFeature()))
    config = base()
    config.data.source, config.data.data_dir = "tfds:mine", str(tmp_path)
    split = open_source(config).splits["train"]
    cut = [split.load(tf.constant(i)).numpy() for i in range(2)]
    np.testing.assert_array_equal(cut[0], pixels[2:8, 3:15])
    np.testing.assert_array_equal(cut[1], pixels[10:, 15:])
    config.data.box_crop = False
    np.testing.assert_array_equal(open_source(config).splits["train"].images, [pixels, pixels])
