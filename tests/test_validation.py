"""What is said of DSCL while it trains: retrieval of every split, and the best state by images that are held out."""

import json
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
from small import few_digits, few_vectors, prepared, run, small_config, trained
from test_dscl import made

from jaxclust.cluster import warn_once
from jaxclust.data.split import from_array
from jaxclust.data.subset import with_validation
from jaxclust.errors import ConfigError
from jaxclust.jobs import evaluate
from jaxclust.report import curves
from jaxclust.report import workdir as workdirs
from jaxclust.train.checkpoint import Checkpoints, Judged


def divided(source):
    """A source of which a part of every class is held out, and the first 60 images are the test too."""
    whole = source.splits["train"]
    test = replace(from_array(whole.images[:60], whole.image_shape, "test/{}".format), labels=whole.labels[:60])
    splits = {"train": whole, "test": test}
    return with_validation(source._replace(splits=splits, parts={"train": whole.size}), 0.3)


@cache
def overlapping():
    """Vectors of four classes that overlap."""
    rng = np.random.default_rng(0)
    labels = np.arange(240, dtype=np.int32) % 4
    rows = (rng.standard_normal((4, 8))[labels] + rng.standard_normal((240, 8))).astype(np.float32)
    split = replace(from_array(rows, (8,), "vectors/{}".format), labels=labels)
    return divided(few_vectors(8)._replace(splits={"train": split}))


def records(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_images_are_held_out_of_every_class_and_the_same_each_time():
    source, whole = divided(few_digits(240)), few_digits(240).splits["train"]
    train, val = source.splits["train"], source.splits["val"]
    assert list(source.splits) == ["train", "val", "test"] and source.parts == {"train": train.size}
    assert train.size + val.size == 240
    assert not {*map(train.path, range(train.size))} & {*map(val.path, range(val.size))}
    for label, count in enumerate(np.bincount(whole.labels)):
        assert (val.labels == label).sum() == round(0.3 * count)
    for split in (train, val):
        ids = [int(split.path(i).rpartition("/")[2]) for i in range(split.size)]
        np.testing.assert_array_equal(split.images, whole.images[ids])
        np.testing.assert_array_equal(split.labels, whole.labels[ids])


def test_parts_that_are_trained_on_one_after_the_other_keep_their_ends():
    source = few_digits(240)._replace(parts={"train": 100, "more": 140})
    held = with_validation(source, 0.3)
    ids = np.array([int(held.splits["train"].path(i).rpartition("/")[2]) for i in range(held.splits["train"].size)])
    assert held.parts == {"train": (ids < 100).sum(), "more": (ids >= 100).sum()}


def test_held_out_images_among_which_nothing_can_be_found_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="hold_out=0.01 holds out 10 of the 240 .* of no class two"):
        with_validation(few_digits(240), 0.01)
    unlabelled = few_digits(240)
    unlabelled.splits["train"] = replace(unlabelled.splits["train"], labels=None)
    with pytest.raises(ConfigError, match="hold_out=0.3 .* the images have no labels"):
        with_validation(unlabelled, 0.3)
    with pytest.raises(ConfigError, match="hold_out=0.3: .* has a split 'val' of its own"):
        with_validation(divided(few_digits(240)), 0.3)
    with pytest.raises(ConfigError, match="hold_out=0.2 .*method='deepcluster' learns without labels"):
        prepared(small_config(data__hold_out=0.2), tmp_path)


def on_vectors(**fields):
    return made(
        freeze_body=True, dscl__vector_size=3, data__hold_out=0.3, save_every="never", keep_checkpoints=1, **fields
    )


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """A run of 12 steps that is judged after every third."""
    workdir = tmp_path_factory.mktemp("judged")
    config = on_vectors(steps=12, refresh_every="6 steps", eval_every="3 steps", optimizer__top__lr=0.01)
    return config, workdir, trained(config, workdir, overlapping())


def recalls(stage, snapshot, split):
    """R@1 and R@8 of a split, by the definition."""
    state = snapshot.state
    rows = np.asarray(stage.embed(state.params, state.extra, split.images), np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    order = np.argsort(-(rows @ rows.T) + 9 * np.eye(len(rows)), axis=1)
    same = split.labels[order] == split.labels[:, None]
    return [same[:, :k].any(axis=1).mean() for k in (1, 8)]


@pytest.mark.wide
def test_every_split_is_searched_during_training(judged):
    config, workdir, snapshot = judged
    said = {record["step"]: record for record in records(workdir) if "val/r@1" in record}
    assert list(said) == [0, 3, 6, 9, 12]
    stage = prepared(config, workdir, overlapping())
    for name, split in overlapping().splits.items():
        assert [said[12][f"{name}/r@{k}"] for k in (1, 8)] == pytest.approx(recalls(stage, snapshot, split), abs=0.01)
    assert len({record["val/r@1"] for record in said.values()}) > 2


def test_the_best_state_by_held_out_images_is_kept_beside_the_newest(judged):
    values = {record["step"]: record["val/r@1"] for record in records(judged[1]) if "val/r@1" in record}
    best = max(values, key=values.get)
    assert best not in (0, 12), values  # else this says nothing
    checkpoints = Checkpoints(judged[1] / "checkpoints" / "dscl")
    assert checkpoints.best() == Judged(best, values[best]) and checkpoints.steps() == [best, 12]


def test_what_is_best_by_other_splits_does_not_count(tmp_path):
    config = on_vectors(steps=2, refresh_every="1 step", eval_every="1 step")
    splits = {name: overlapping().splits[name] for name in ("train", "test")}
    trained(config, tmp_path, overlapping()._replace(splits=splits))
    assert "test/r@1" in records(tmp_path)[-1]
    checkpoints = Checkpoints(tmp_path / "checkpoints" / "dscl")
    assert checkpoints.best() is None and checkpoints.steps() == [2]


def test_a_val_that_was_not_held_out_selects_nothing(tmp_path):
    """It may be of a method that learns without labels, which must not choose its state."""
    config = on_vectors(steps=2, refresh_every="1 step", eval_every="1 step")
    config.data.hold_out = 0.0
    trained(config, tmp_path, overlapping())
    assert "val/r@1" in records(tmp_path)[-1]
    assert Checkpoints(tmp_path / "checkpoints" / "dscl").best() is None


def test_recall_is_a_panel_of_the_page(judged):
    panels = {panel.title: panel for panel in curves.panels(workdirs.read(judged[1]).metrics, 0)}
    assert sorted(line.label for line in panels["R@1"].lines) == ["test", "train", "val"]
    assert all(len(line.x) == 3 for line in panels["R@1"].lines)  # of each round the last


@pytest.mark.medium
@pytest.mark.wide
def test_a_frozen_body_is_judged_by_features_that_are_kept_too(tmp_path):
    config = made(
        freeze_body=True, steps=1, refresh_every="2 steps", eval_every="1 step", data__hold_out=0.3, save_every="never"
    )
    source = divided(few_digits(240))
    snapshot = trained(config, tmp_path, source)
    assert np.load(tmp_path / "features" / "dscl-val.npy").shape == (source.splits["val"].size, 12)
    stage = prepared(config, tmp_path / "again", source)
    expected = recalls(stage, snapshot, source.splits["val"])
    assert [records(tmp_path)[-1][f"val/r@{k}"] for k in (1, 8)] == pytest.approx(expected, abs=0.02)


@pytest.mark.medium
def test_results_name_the_best_step_and_a_job_takes_the_checkpoint_that_is_asked_for(tmp_path):
    split, workdir = overlapping().splits["train"], tmp_path / "run"
    rows, labels = split.images, split.labels
    np.savez(tmp_path / "rows.npz", features=rows, labels=labels, test_features=rows[:50], test_labels=labels[:50])
    start = (
        "--config=configs/dscl.py:smoke", f"--config.data.source=features:{tmp_path / 'rows.npz'}",
        "--config.data.train_classes=", "--config.freeze_body=True", "--config.dscl.vector_size=3",
        "--config.batch_size=48", "--config.steps=12", "--config.data.hold_out=0.3", "--config.eval_every=3 steps",
        "--config.save_every=never", "--config.keep_checkpoints=1", "--config.optimizer.top.lr=0.01",
        "--config.evaluate.nmi_runs=0", "--config.evaluate.untrained=False", f"--workdir={workdir}",
    )  # fmt: skip
    assert run(*start) == 0
    results = json.loads((workdir / "results.json").read_text())
    values = {record["step"]: record["val/r@1"] for record in records(workdir) if "val/r@1" in record}
    best = max(values, key=values.get)
    assert (results["step"], results["best/step"], results["best/val/r@1"]) == (12, best, values[best])
    assert best != 12
    assert run("--job=evaluate", *start, "--config.evaluate.step=-1") == 0
    at_best = json.loads((workdir / "results.json").read_text())
    said = {record["step"]: record for record in records(workdir)}[best]
    assert at_best["step"] == best and at_best["test/r@1"] == pytest.approx(said["test/r@1"], abs=0.01)


def test_of_checkpoints_the_nearest_to_the_one_that_is_asked_for_is_taken_with_a_notice(caplog):
    there = SimpleNamespace(steps=lambda: [100, 390, 400], best=lambda: None)
    warn_once.cache_clear()

    def taken(step):
        return evaluate._step(there, small_config(evaluate__step=step))

    assert (taken(0), taken(100), taken(390)) == (None, 100, 390) and not caplog.text
    assert (taken(410), taken(395), taken(1)) == (400, 400, 100)
    assert "config.evaluate.step=410: no such checkpoint; step 400 is taken of 100, 390, 400" in caplog.text
    with pytest.raises(ConfigError, match="step=-1 asks for the best checkpoint, and none was judged"):
        taken(-1)
