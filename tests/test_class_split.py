"""Classes that are trained on, and others that only the test has."""

import json
import logging
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from small import prepared, run, small_config
from test_splits import archive, config_of, pixels, seen

from jaxclust.data import class_split
from jaxclust.data.class_split import places
from jaxclust.data.source import of_stage, open_source
from jaxclust.data.split import Source, fingerprint, from_array
from jaxclust.errors import ConfigError
from jaxclust.train.stage import seen_labels

NAMES = ("ant", "bee", "cat", "dog-fish", "eel")


@pytest.mark.parametrize(
    "text, chosen",
    [
        ("0-2", [0, 1, 2]), ("4, 1,0-1", [4, 1, 0, 1]), ("cat,ant", [2, 0]), ("dog-fish", [3]), ("first:2", [0, 1]),
        ("0.4", [0, 1]), (".5", [0, 1]), ("0.99", [0, 1, 2, 3, 4]), ("eel,1-2", [4, 1, 2]), ("3", [3]),
    ],
)  # fmt: skip
def test_classes_are_named_by_place_name_number_or_share(text, chosen):
    assert places(text, NAMES) == chosen


@pytest.mark.parametrize(
    "text, message",
    [
        ("cut", "there is no class 'cut'; did you mean 'cat'?"),
        ("5", r"there are 5 classes, 0 \('ant'\) to 4 \('eel'\)"),
        ("first:6", "there are 5 classes"),
        ("first:0", "there are 5 classes"),
        ("3-2", "'3-2' ends before it begins"),
        ("1.5", "there is no class '1.5'"),
        ("0,,1", "there is no class ''"),
    ],
)
def test_classes_that_do_not_exist_are_refused(text, message):
    with pytest.raises(ConfigError, match=f"config.data.train_classes='{text}': {message}"):
        places(text, NAMES)


def test_images_of_all_splits_go_where_their_class_is_and_keep_their_names(tmp_path):
    """Labels 7, 8, 7 in train, 8, 9 in test and none in unlabelled, which is asked for."""
    place = archive(tmp_path / "mine.npz")
    source = open_source(config_of(place, train_classes="1-2"))
    train, test = source.splits["train"], source.splits["test"]
    assert seen(train) == [1, 3, 4] and seen(test) == [0, 2]
    assert source.class_names == ("8", "9", "7") and (source.train_classes, source.num_classes) == (2, 3)
    assert train.labels.tolist() == [0, 0, 1] and test.labels.tolist() == [2, 2]
    assert [train.path(i) for i in range(3)] == ["mine/train/1", "mine/test/0", "mine/test/1"]
    assert source.parts == {"train": 1, "test": 2}
    again = open_source(config_of(place, train_classes="2,1"))
    assert fingerprint(again.splits["train"], 3) == fingerprint(train, 3)
    other = open_source(config_of(place, train_classes="0"))
    assert fingerprint(other.splits["train"], 2) != fingerprint(train, 2) and seen(other.splits["train"]) == [0, 2]


def test_images_without_a_label_are_left_out_and_counted(tmp_path, caplog):
    config = config_of(archive(tmp_path / "mine.npz"), "test+train+unlabelled", train_classes="0-1")
    with caplog.at_level(logging.WARNING):
        source = open_source(config)
    assert "4 images without a label" in caplog.text
    assert seen(source.splits["train"]) == [3, 0, 1, 2] and seen(source.splits["test"]) == [4]
    assert source.parts == {"test": 1, "train": 3, "unlabelled": 0}
    config.stages = "one"
    with config.unlocked():
        config.stage = {"one": {"data": {"train": "test"}}}
    assert seen(of_stage(source, config, "one").splits["train"]) == [3]


def test_classes_need_labels_and_both_sides_some_images(tmp_path):
    np.savez(tmp_path / "bare.npz", images=pixels(0, 3))
    with pytest.raises(ConfigError, match="needs images with classes, and bare has no labels"):
        open_source(config_of(f"npz:{tmp_path / 'bare.npz'}", train_classes="0"))
    for text, counts in {"0-2": r"takes 3 of 3 classes .* leaves 0 images", "0.1": "takes 0 of 3 classes"}.items():
        with pytest.raises(ConfigError, match=counts):
            open_source(config_of(archive(tmp_path / "mine.npz"), train_classes=text))
    labels = np.array([0, 0, 2, 2], np.int32)  # nothing of class 1
    split = replace(from_array(pixels(0, 4)[..., None], (8, 8, 1), str), labels=labels)
    source = Source("gap", {"train": split}, ("a", "b", "c"), [])
    with pytest.raises(ConfigError, match="takes 1 of 3 classes of gap with 0 images to train on"):
        class_split.disjoint(source, "b", ["train"])


@pytest.mark.parametrize("cache", [10**6, 0])
def test_class_folders_in_several_splits_and_sizes(tmp_path, cache):
    for number, name in enumerate(["train/a/0", "train/b/1", "test/b/2", "train/c/3", "test/a/4", "test/d/5"]):
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8 + number, 9), 10 * number, np.uint8)).save(path)
    config = config_of(f"folder:{tmp_path}", train_classes="a,d", image_size=8, cache_bytes=cache)
    source = open_source(config)
    train, test = source.splits["train"], source.splits["test"]
    assert seen(train) == [0, 40, 50] and seen(test) == [10, 30, 20]
    assert train.paths == ["train/a/0.png", "test/a/4.png", "test/d/5.png"] == [train.path(i) for i in range(3)]
    assert source.class_names == ("a", "d", "b", "c") and test.labels.tolist() == [2, 3, 2]


@given(st.lists(st.integers(-1, 5), min_size=1, max_size=40), st.sets(st.integers(0, 5), min_size=1, max_size=5))
@settings(max_examples=30)
def test_a_class_is_on_one_side_and_each_image_of_one_is_there_once(labels, trained):
    labels = np.array([*labels, *range(6)], np.int32)  # each class has an image
    one = np.arange(len(labels), dtype=np.uint8).reshape(-1, 1, 1, 1)
    split = replace(from_array(one, (1, 1, 1), str), labels=labels)
    names = tuple("abcdef")
    made = class_split.disjoint(Source("any", {"train": split}, names, []), ",".join(map(str, trained)), ["train"])
    found = {}
    for name, part in made.splits.items():
        for i in range(part.size):
            assert int(part.path(i)) not in found
            found[int(part.path(i))] = made.class_names[part.labels[i]]
            assert (names.index(found[int(part.path(i))]) in trained) == (name == "train")
            assert part.images[i, 0, 0, 0] == int(part.path(i))
    assert found == {i: names[label] for i, label in enumerate(labels) if label >= 0}
    assert made.splits["train"].labels.max() < made.train_classes == len(trained) <= made.splits["test"].labels.min()


def test_a_method_sees_labels_of_training_classes_alone(tmp_path):
    """Of the digits from 5 on, which are then 0 to 4: a class of the test has no output."""
    config = small_config(method="supervised", data__train_classes="5-9", model__blocks=1)
    source = open_source(config)
    made = prepared(config, tmp_path / "run", source)
    assert made.info.num_classes == made.method.num_clusters == 5
    assert made.split.labels.max() == 4 and source.splits["test"].labels.min() == 5
    assert np.array_equal(seen_labels(made.method, config, made.info, made.split), made.split.labels)


@pytest.mark.wide
def test_a_run_on_some_classes_is_judged_on_the_others(tmp_path):
    workdir = tmp_path / "run"
    arguments = ["--config.data.train_classes=0-4", "--config.evaluate.suite=retrieval", "--config.report.pictures="]
    assert run(
        "--config=configs/deepcluster.py:smoke", "--config.method=supervised", "--config.model.blocks=1",
        f"--workdir={workdir}", *arguments,
    ) == 0  # fmt: skip
    results = json.loads((workdir / "results.json").read_text())
    assert results["images"] == 1797 and results["retrieval/queries"] == 896
    assert json.loads((workdir / "data.json").read_text()) == {"size": 901, "image_shape": [8, 8, 1], "num_classes": 5}
    (tmp_path / "new").mkdir()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "new" / "one.png")
    out = tmp_path / "new.csv"
    assert run("--job=predict", f"--workdir={workdir}", f"--images={tmp_path / 'new'}", f"--out={out}") == 0
    assert len(out.read_text().splitlines()) == 2
    assert run(f"--workdir={workdir}", "--config=configs/deepcluster.py:smoke", "--config.method=supervised",
               "--config.model.blocks=1", "--config.data.train_classes=0-3") == 2  # fmt: skip
