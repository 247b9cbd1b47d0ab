"""Labelled training, and what is done with the body it leaves: clustering and classifying frozen features."""

import contextlib
import io
import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from small import few_digits, few_vectors, prepared, run, smaller_config, trained

from jaxclust import methods
from jaxclust.data.feature_file import open_npy
from jaxclust.data.pipeline import exact_batches, train_batches
from jaxclust.errors import ConfigError, DataError
from jaxclust.features import extract
from jaxclust.train import frozen

pytestmark = pytest.mark.medium  # whole trainings


def leaves(tree):
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


DONOR = ("--config.model.width=32", "--config.model.blocks=2")


@pytest.fixture(scope="module")
def donor(tmp_path_factory):
    """A supervised training on all digits, by command line."""
    workdir = tmp_path_factory.mktemp("supervised") / "run"
    arguments = ("--config.refresh_every=1 epoch", "--config.rounds=5", *DONOR)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert run("--config=configs/supervised.py:smoke", f"--workdir={workdir}", *arguments) == 0
    assert "10 classes known, to learn from" in printed.getvalue()
    return workdir


def results(workdir):
    return json.loads((workdir / "results.json").read_text())


@pytest.mark.medium
def test_labels_are_learnt_which_is_said(donor):
    assert results(donor)["train/acc"] > 0.95
    assert results(donor)["clusters"] == 10


def test_labelled_training_without_labels_is_refused(tmp_path):
    source = few_digits()
    with pytest.raises(ConfigError, match="method='supervised' learns from class labels, and .* has none"):
        prepared(smaller_config(method="supervised"), tmp_path, source._replace(class_names=None))


def test_images_of_unknown_class_are_left_out(tmp_path):
    source = few_digits()
    source.splits["train"].labels[::3] = -1
    stage = prepared(smaller_config(method="supervised", sampler="uniform_image"), tmp_path, source)
    assert stage.first().targets.ids.tolist() == [i for i in range(300) if i % 3]


@pytest.fixture(scope="module")
def clustered(donor, tmp_path_factory):
    """DeepCluster on the frozen features of the donor, with one seed for all its clusterings."""
    workdir = tmp_path_factory.mktemp("frozen") / "run"
    arguments = (
        *DONOR,
        "--config.cluster.seed=3",
        "--config.cluster.pca_dim=9",
        "--config.rounds=3",
    )
    frozen_by = (f"--config.init_from={donor}", "--config.freeze_body=True")
    assert run("--config=configs/deepcluster.py:smoke", f"--workdir={workdir}", *arguments, *frozen_by) == 0
    return workdir


def records(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def saved(workdir, stage):
    import orbax.checkpoint as ocp

    folder = sorted((workdir / "checkpoints" / stage).iterdir(), key=lambda path: int(path.name))[-1]
    return ocp.StandardCheckpointer().restore((folder / "default").absolute())


def test_23_frozen_body_keeps_every_bit_and_the_same_seed_finds_the_same_clusters(donor, clustered):
    before, after = saved(donor, "supervised"), saved(clustered, "deepcluster")
    body = [name for name in before if ".body." in name and name.startswith("state.params") or "batch_stats" in name]
    assert len(body) > 6
    for name in body:
        np.testing.assert_array_equal(after[name], before[name], err_msg=name)
    agreements = [record["clusters/nmi_prev"] for record in records(clustered) if "clusters/nmi_prev" in record]
    assert agreements == [1.0, 1.0, 1.0]
    assert [r["clusters/changed"] for r in records(clustered) if "clusters/changed" in r] == [0.0, 0.0, 0.0]


def test_features_learnt_with_labels_cluster_by_class(clustered):
    assert results(clustered)["train/acc"] > 0.9


def test_the_head_learns_from_the_kept_features(clustered):
    accuracies = [record["train/accuracy"] for record in records(clustered) if "train/accuracy" in record]
    assert accuracies[-1] > 0.5
    assert results(clustered)["train/head_agreement"] > 0.5


@pytest.mark.wide
def test_frozen_features_are_computed_once(donor, tmp_path, monkeypatch):
    passes = []
    outputs = extract.outputs
    monkeypatch.setattr(
        extract, "outputs", lambda *args: passes.append((args[-1], args[3].image_shape)) or outputs(*args)
    )
    config = smaller_config(init_from=str(donor), freeze_body=True, rounds=3, model__width=32)
    trained(config, tmp_path, few_digits())
    of_images = [title for title, shape in passes if len(shape) == 3]
    assert of_images == ["features of the frozen body"]
    config.rounds = 4
    trained(config, tmp_path, few_digits())  # goes on: the file is still there
    assert [title for title, shape in passes if len(shape) == 3] == of_images


@pytest.mark.wide
def test_kept_features_are_those_of_the_images(donor, tmp_path):
    config = smaller_config(init_from=str(donor), freeze_body=True, model__width=32)
    stage = prepared(config, tmp_path, few_digits())
    state = stage.first().state
    kept = frozen.with_features(stage, state, restored=False).split
    images = next(iter(exact_batches(stage.split, 300)))["image"]
    expected = stage.method.embed(state.params, state.extra, images)
    np.testing.assert_allclose(kept.images, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(kept.labels, stage.split.labels)
    assert kept.path(7) == stage.split.path(7)


def test_a_file_of_features_of_other_images_is_refused(donor, tmp_path):
    config = smaller_config(init_from=str(donor), freeze_body=True, model__width=32)
    stage = prepared(config, tmp_path, few_digits(40))
    kept = frozen.with_features(stage, stage.first().state, restored=False).split
    np.testing.assert_array_equal(frozen.with_features(stage, None, restored=True).split.images, kept.images)
    fewer = stage._replace(split=few_digits(30).splits["train"])
    turned = stage._replace(split=replace(stage.split, name_of=lambda id: stage.split.name_of(39 - id)))
    for other, words in ((fewer, "its 40 rows are not of this stage's 30"), (turned, "another order")):
        with pytest.raises(DataError, match=rf"features/deepcluster.npy: .*{words}.*config.data.train"):
            frozen.with_features(other, None, restored=True)
    np.save(tmp_path / "features" / "deepcluster.npy", kept.images[:7])
    with pytest.raises(DataError, match="its 7 rows"):
        frozen.with_features(stage, None, restored=True)


def test_a_step_draws_from_the_features_of_views_and_evaluation_does_not(tmp_path):
    size, views = 70, 3
    config = smaller_config(
        method="supervised", freeze_body=True, frozen_views=views, eval_batch_size=32, model__blocks=1,
        views__train__rotate=0.0, views__train__scale=0.0, views__train__shear=0.0, views__train__translate=0.0,
        views__train__crop_area=0.3,
    )  # fmt: skip
    stage = prepared(config, tmp_path, few_digits(size))
    state = stage.first().state
    kept = frozen.with_features(stage, state, restored=False).split

    def batches(split, view, steps=1):
        order, zeros = np.tile(np.arange(size, dtype=np.int32), steps), np.zeros(size, np.int32)
        return train_batches(
            split, {"train": view}, order, zeros, zeros + 1.0, start_position=0, first_step=0, last_step=steps,
            batch_size=size, seed=config.seed, stage_index=0,
        )  # fmt: skip

    (seen,) = batches(stage.split, {**config.views.train, "number": views})
    (plain,) = exact_batches(stage.split, size)
    features = [
        np.asarray(stage.method.embed(state.params, state.extra, images))
        for images in (plain["image"], *seen["views"]["train"].swapaxes(0, 1))
    ]
    np.testing.assert_allclose(next(iter(exact_batches(kept, size)))["image"], features[0], rtol=1e-4, atol=1e-5)
    drawn = np.stack([batch["views"]["train"] for batch in batches(kept, config.views.train, 8)])
    distance = np.stack([np.abs(drawn - of_view).max(axis=2) for of_view in features])
    nearest = distance.argmin(axis=0)
    assert distance.min(axis=0).max() < 1e-4 and np.partition(distance, 1, axis=0)[1].min() > 1e-3
    assert (np.bincount(nearest.ravel(), minlength=4)[1:] > 120).all() and nearest.min() == 1
    assert (np.ptp(nearest, axis=0) > 0).mean() > 0.9  # another view in another pass


def test_copies_of_several_views_are_refused(tmp_path, monkeypatch):
    get = methods.get
    monkeypatch.setattr(methods, "get", lambda config, info: get(config, info)._replace(views=("train", "train")))
    config = smaller_config(freeze_body=True, frozen_views=2)
    with pytest.raises(ConfigError, match="frozen_views=2: copies are kept of one view"):
        prepared(config, tmp_path, few_digits())


def test_a_file_of_features_from_before_the_first_checkpoint_is_not_trusted(donor, tmp_path):
    config = smaller_config(init_from=str(donor), freeze_body=True, model__width=32)
    stage = prepared(config, tmp_path, few_digits())
    path = tmp_path / "features" / "deepcluster.npy"
    path.parent.mkdir()
    np.save(path, np.zeros((300, 32), np.float32))
    assert frozen.with_features(stage, stage.first().state, restored=False).split.images.any()


@pytest.mark.parametrize("cache_bytes", [0, 1e9])
def test_features_are_read_row_by_row_where_they_do_not_fit(tmp_path, cache_bytes):
    rows = np.random.default_rng(0).standard_normal((50, 6)).astype(np.float32)
    np.save(tmp_path / "a.npy", rows)
    split = open_npy(tmp_path / "a.npy", str, cache_bytes)
    assert (split.images is None) == (cache_bytes == 0)
    np.testing.assert_array_equal(next(iter(exact_batches(split, 50)))["image"], rows)
    order = np.array([7, 49, 0, 7], np.int32)
    batches = train_batches(
        split, {"train": {"noise": 0.0}}, order, np.zeros(50, np.int32), np.ones(50, np.float32),
        start_position=0, first_step=0, last_step=2, batch_size=2, seed=0, stage_index=0,
    )  # fmt: skip
    np.testing.assert_array_equal(np.concatenate([b["views"]["train"] for b in batches]), rows[order])


@pytest.mark.parametrize("array", [np.zeros(3, np.float32), np.zeros((3, 2)), np.zeros((3, 2), np.float32, order="F")])
def test_other_contents_are_refused(tmp_path, array):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(DataError, match=r"it must be float32 \[N, D\]"):
        open_npy(tmp_path / "a.npy", str, 1e9)


@pytest.mark.wide
def test_vectors_from_elsewhere_count_as_frozen_features(tmp_path):
    config = smaller_config(data__source="features:somewhere", freeze_body=True, cluster__k=4, cluster__pca_dim=3)
    snapshot = trained(config, tmp_path, few_vectors())
    assert set(snapshot.state.params) == {"top"}
    last = records(tmp_path)[-1]
    assert last["train/acc"] > 0.95


def test_vectors_without_a_frozen_body_are_refused_with_the_remedy(tmp_path):
    with pytest.raises(ConfigError, match=r"holds vectors.*with config.freeze_body=True"):
        prepared(smaller_config(data__source="features:somewhere"), tmp_path, few_vectors())


def test_a_checkpoint_of_another_network_is_refused_naming_the_settings(donor, tmp_path, capsys):
    arguments = (f"--config.init_from={donor}", "--config.freeze_body=True", f"--workdir={tmp_path / 'run'}")
    assert run("--config=configs/deepcluster.py:smoke", *arguments) == 2  # of width 8
    error = capsys.readouterr().err
    assert "is of another network: convnet" in error and "config.model.width=8 here" in error
    assert run("--config=configs/deepcluster.py:smoke", "--config.model.name=vgg16", *arguments) == 2
    assert "config.init_from" in capsys.readouterr().err
    assert not Path(tmp_path / "run").exists()


@pytest.mark.wide
def test_a_linear_classifier_on_frozen_features_is_supervised_training_with_a_frozen_body(donor, tmp_path):
    arguments = (f"--config.init_from={donor}", "--config.freeze_body=True", *DONOR)
    workdir = tmp_path / "run"
    assert run("--config=configs/supervised.py:smoke", f"--workdir={workdir}", *arguments) == 0
    assert results(workdir)["train/acc"] > 0.8
