"""Splits that are trained on together, and stages that are trained on the first of these."""

import csv
import json
from functools import partial

import numpy as np
import pytest
from PIL import Image
from small import run

from jaxclust.config import base, validate
from jaxclust.data.label_file import read_labels
from jaxclust.data.pipeline import exact_batches
from jaxclust.data.source import of_last_stage, of_stage, open_source
from jaxclust.data.split import fingerprint
from jaxclust.errors import ConfigError, DataError
from jaxclust.runtime import tensorflow

PARTS = "train+test+unlabelled"


def pixels(first, count, side=8):
    """Grey images whose first pixel says which they are."""
    images = np.zeros((count, side, side), np.uint8)
    images[:, 0, 0] = np.arange(first, first + count)
    return images


def archive(path, **others):
    """Three training, two test and four unlabelled images."""
    arrays = {"images": pixels(0, 3), "labels": np.array([7, 8, 7]), "test_images": pixels(3, 2)}
    arrays |= {"test_labels": np.array([8, 9]), "unlabelled_images": pixels(5, 4), **others}
    np.savez(path, **arrays)
    return f"npz:{path}"


def config_of(source, train="train", **data):
    config = base()
    config.data.update({"source": source, "train": train, **data})
    return config


def with_stages(config, **trains):
    """The config of stages that train on other splits."""
    config.stages = ",".join(trains)
    with config.unlocked():
        config.stage = {name: {"data": {"train": train}} for name, train in trains.items()}
    return validate(config)


def seen(split):
    """The first pixel of every image, by id, as it passes through the pipeline."""
    batches = list(exact_batches(split, 4))
    return np.concatenate([batch["image"][batch["mask"]] for batch in batches])[:, 0, 0, 0].tolist()


def test_several_splits_are_one_in_their_order_and_what_has_no_label_is_unknown(tmp_path):
    source = open_source(config_of(archive(tmp_path / "mine.npz"), PARTS))
    assert list(source.splits) == ["train"] and source.parts == {"train": 3, "test": 2, "unlabelled": 4}
    split = source.splits["train"]
    assert split.size == 9 and split.images is not None and seen(split) == list(range(9))
    assert split.labels.tolist() == [0, 1, 0, 1, 2, -1, -1, -1, -1] and source.class_names == ("7", "8", "9")
    assert [split.path(i) for i in (2, 3, 8)] == ["mine/train/2", "mine/test/0", "mine/unlabelled/3"]


def test_some_images_are_trained_on_the_same_each_time_and_the_test_stays(tmp_path):
    place = archive(tmp_path / "mine.npz", unlabelled_images=pixels(5, 90))
    source = open_source(config_of(place, PARTS, train_images=40))
    (split,) = source.splits.values()
    ids = seen(split)
    assert len(ids) == len({*ids}) == 40 and ids == sorted(ids) and max(ids) > 60
    bounds = {"train": range(0, 3), "test": range(3, 5), "unlabelled": range(5, 95)}
    assert source.parts == {name: sum(id in of for id in ids) for name, of in bounds.items()}
    assert split.labels.tolist() == [[0, 1, 0, 1, 2][id] if id < 5 else -1 for id in ids]
    again = open_source(config_of(place, PARTS, train_images=40, image_size=4))
    assert fingerprint(again.splits["train"], 40) == fingerprint(split, 40)
    alone = open_source(config_of(place, train_images=2)).splits
    assert {name: part.size for name, part in alone.items()} == {"train": 2, "test": 2}
    with pytest.raises(ConfigError, match="config.data.train_images=4: mine has 3 images to train on; 0: all"):
        open_source(config_of(place, train_images=4))


def test_only_splits_that_are_asked_for_are_trained_on_or_read(tmp_path):
    place = archive(tmp_path / "mine.npz")
    assert {name: split.size for name, split in open_source(config_of(place)).splits.items()} == {"train": 3, "test": 2}
    alone = open_source(config_of(place, "test"))
    assert list(alone.splits) == ["train"] and seen(alone.splits["train"]) == [3, 4]
    with pytest.raises(ConfigError, match=r"no split 'unlabeled'.* There is: train, test"):
        open_source(config_of(place, "train+unlabeled"))
    with pytest.raises(ConfigError, match=r"config.data.train='train\+train' must be names of splits such as"):
        validate(config_of(place, "train+train"))


@pytest.mark.parametrize("cache", [10**6, 0])
def test_images_of_several_sizes_and_files_are_joined_too(tmp_path, cache):
    for number, name in enumerate(["train/a/0", "train/b/1", "val/b/2", "extra/3", "extra/more/4", "left/a/5"]):
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8 + number, 9, 1), 10 * number, np.uint8)[..., 0]).save(path)
    settings = {"image_size": 8, "cache_bytes": cache}
    split = open_source(config_of(f"folder:{tmp_path}", "train+test+extra", **settings)).splits["train"]
    names = ["train/a/0.png", "train/b/1.png", "val/b/2.png", "extra/3.png", "extra/more/4.png"]
    assert [split.path(i) for i in range(split.size)] == split.paths == names
    assert split.labels.tolist() == [0, 1, 1, -1, -1] and seen(split) == [0, 10, 20, 30, 40]
    one = split.load(tensorflow().constant(2)).numpy()
    assert one.shape == (10, 9, 1)


def test_a_stage_is_trained_on_the_first_images_which_keep_their_ids(tmp_path):
    config = with_stages(
        config_of(archive(tmp_path / "mine.npz"), PARTS), first="train", second="train+test", last=PARTS
    )
    source = open_source(config)
    splits = [of_stage(source, config, name).splits["train"] for name in ("first", "second", "last")]
    assert [seen(split) for split in splits] == [list(range(size)) for size in (3, 5, 9)]
    assert np.shares_memory(splits[0].images, splits[2].images)
    assert [len(split.labels) for split in splits] == [3, 5, 9] and of_last_stage(source, config) is source


@pytest.mark.parametrize(
    "stage, message",
    {
        "ids": (
            {"train": "test"},
            r"stage.own.data.train='test' must be the beginning of config.data.train='train\+test'",
        ),
        "part of a name": ({"train": "tra"}, r"'tra' must be the beginning"),
        "more": ({"train": "train+test+unlabelled"}, r"must be the beginning of"),
        "other images": ({"image_size": 4}, r"stage.own.data.image_size=4: images are read once, for all stages"),
    }.values(),
)
def test_a_stage_that_wants_images_of_its_own_is_refused(tmp_path, stage, message):
    config = config_of(archive(tmp_path / "mine.npz"), "train+test")
    config.stages = "own"
    with config.unlocked():
        config.stage = {"own": {"data": stage}}
    with pytest.raises(ConfigError, match=message):
        open_source(config)


def test_a_stage_may_have_its_own_colours(tmp_path):
    config = config_of(archive(tmp_path / "mine.npz"))
    config.stages = "own"
    with config.unlocked():
        config.stage = {"own": {"data": {"mean": (0.1,), "std": (0.2,)}}}
    assert open_source(config).splits["train"].size == 3


def test_labels_of_other_images_are_refused_also_where_there_are_as_many(tmp_path):
    split = open_source(config_of(archive(tmp_path / "mine.npz"), PARTS)).splits["train"]
    others = open_source(config_of(archive(tmp_path / "other.npz"), PARTS)).splits["train"]
    file, of_these = tmp_path / "labels.npz", partial(fingerprint, split)
    np.savez(file, cluster=np.array([0, 1, -1, 1, 0]), fingerprint=fingerprint(split, 5))
    assert read_labels(file, 9, 2, (3, 2, 4), of_these).tolist() == [0, 1, -1, 1, 0, -1, -1, -1, -1]
    np.savez(file, cluster=np.array([0, 1, -1, 1, 0]), fingerprint=fingerprint(others, 5))
    with pytest.raises(DataError, match="its 5 labels are of other images than the first ones of this run"):
        read_labels(file, 9, 2, (3, 2, 4), of_these)
    np.savez(file, cluster=np.array([0, 1, -1, 1, 0]))  # which says nothing of its images
    assert read_labels(file, 5, 2, (), of_these).max() == 1


def test_vectors_are_joined_if_they_are_of_one_length(tmp_path):
    rows = np.arange(12, dtype=np.float32).reshape(6, 2)
    np.savez(tmp_path / "v.npz", features=rows[:4], labels=np.array([0, 1, 0, 1]), test_features=rows[4:])
    split = open_source(config_of(f"features:{tmp_path / 'v.npz'}", "train+test")).splits["train"]
    np.testing.assert_array_equal(split.images, rows)
    assert split.labels.tolist() == [0, 1, 0, 1, -1, -1]
    np.savez(tmp_path / "v.npz", features=rows, test_features=rows[:, :1])
    with pytest.raises(DataError, match=r"splits of different shapes .*\(1,\), \(2,\)"):
        open_source(config_of(f"features:{tmp_path / 'v.npz'}", "train+test"))


@pytest.mark.wide
def test_a_run_is_judged_on_what_each_stage_was_trained_on(tmp_path):
    """Three clusters of vectors; the last stage also sees vectors of no class."""
    rng = np.random.default_rng(0)
    rows = (np.repeat(np.eye(3), 40, axis=0)[rng.permutation(120)] + 0.01 * rng.standard_normal((120, 3))).astype("f")
    labels, file = rows.argmax(axis=1), tmp_path / "v.npz"
    np.savez(
        file, features=rows[:60], labels=labels[:60], test_features=rows[60:90], test_labels=labels[60:90],
        unlabelled_features=rows[90:],
    )  # fmt: skip
    (tmp_path / "two.py").write_text(
        "from jaxclust import config as c\n"
        "def get_config(variant):\n"
        "    config = c.base()\n"
        f"    config.data.source, config.data.train, config.stages = 'features:{file}', {PARTS!r}, 'one,two'\n"
        "    config.freeze_body, config.rounds, config.batch_size, config.cluster.k = True, 1, 30, 3\n"
        "    with config.unlocked():\n"
        "        config.stage = {'one': {'data': {'train': 'train+test'}}}\n"
        "    return config\n"
    )
    workdir = tmp_path / "run"
    assert run(f"--config={tmp_path / 'two.py'}", f"--workdir={workdir}", "--config.report.pictures=") == 0
    results = json.loads((workdir / "results.json").read_text())
    assert results["one/train/acc"] == results["train/acc"] == 1.0 and results["images"] == 120
    assert "test/acc" not in results and json.loads((workdir / "data.json").read_text())["size"] == 120
    own = fingerprint(open_source(config_of(f"features:{file}", "train+test")).splits["train"], 90)
    assert np.load(workdir / "assignments" / "one" / "0.npz")["fingerprint"] == own
    sizes = {name: len(np.load(workdir / "assignments" / name / "0.npz")["cluster"]) for name in ("one", "two")}
    assert sizes == {"one": 90, "two": 120}
    with (workdir / "images.csv").open() as table:
        assert [row["path"] for row in csv.DictReader(table)][90] == "v/unlabelled/0"
    counted = (workdir / "confusion-train.csv").read_text().splitlines()[1:]
    assert sum(int(n) for line in counted for n in line.split(",")[1:]) == 90
    assert run("--job=evaluate", f"--workdir={workdir}", "--config.evaluate.suite=clustering,knn") == 0
