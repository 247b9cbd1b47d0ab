"""DeepCluster's own behaviour: the acceptance checks of its specification, numbered as there."""

import json
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from small import few_digits, prepared, small_config, trained

from jaxclust.data.source import Source
from jaxclust.data.split import from_array
from jaxclust.errors import CollapseError, ConfigError
from jaxclust.runtime import StopSignal
from jaxclust.train import loop, optim
from jaxclust.train.refresh import refresh, run


def source_of(images, labels=None):
    split = from_array(images, images.shape[1:], "toy/{}".format)
    names = None if labels is None else tuple(str(i) for i in range(labels.max() + 1))
    return Source("toy", {"train": replace(split, labels=labels)}, names, [])


def leaves(tree):
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def test_3_features_depend_on_neither_batch_size_nor_augmentation_nor_order_of_batches(tmp_path):
    features = []
    for size, rotate in ((64, 0.0), (300, 40.0), (7, 5.0)):
        config = small_config(eval_batch_size=size, views__train__rotate=rotate)
        stage = prepared(config, tmp_path, few_digits())
        features.append(run(stage, stage.first().state, stage.embed, "test")["features"].array())
    for other in features[1:]:
        np.testing.assert_allclose(other, features[0], rtol=1e-4, atol=1e-5)


def test_9_duplicates_leave_empty_clusters_and_training_goes_on_with_contiguous_labels(tmp_path):
    distinct = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 1), dtype=np.uint8)
    source = source_of(np.repeat(distinct, 50, axis=0))
    config = small_config(cluster__k=50, cluster__iterations=5)
    snapshot = trained(config, tmp_path, source)
    found = len(np.unique(snapshot.targets.target))
    assert found <= 20
    assert np.unique(snapshot.targets.target).tolist() == list(range(found))
    assert snapshot.state.extra["num_outputs"] <= 20
    assert all(np.isfinite(leaf).all() for leaf in leaves(snapshot.state.params).values())


def test_13_with_rates_of_zero_only_batch_statistics_move_and_the_head_is_new_each_round(tmp_path):
    config = small_config(optimizer__body__lr=0.0, optimizer__top__lr=0.0)
    stage = prepared(config, tmp_path, few_digits())
    first = stage.first()
    params, statistics = leaves(first.state.params), leaves(first.state.extra["batch_stats"])
    state, targets, _ = refresh(stage, *first, 0, last=False)
    renewed = leaves(state.params["top"])
    for batch in loop._batches(stage, targets, 0):
        state, _, _ = stage.step(state, batch, jax.random.key(0))
    after = leaves(state.params)
    for name in params:
        if "body" in name:
            np.testing.assert_array_equal(after[name], params[name])
    np.testing.assert_array_equal(after["['top']['kernel']"], renewed["['kernel']"])
    moved = leaves(state.extra["batch_stats"])
    assert all((moved[name] != statistics[name]).any() for name in moved)
    state, _, _ = refresh(stage, state, targets, stage.lengths.round, last=False)
    assert (leaves(state.params["top"])["['kernel']"] != renewed["['kernel']"]).all()


def test_13_head_is_drawn_as_specified(tmp_path):
    config = small_config(model__dim=512, cluster__k=100, cluster__pca_dim=0)
    stage = prepared(config, tmp_path, few_digits())
    top = stage.first().state.params["top"]
    assert abs(np.asarray(top["kernel"]).std() / 0.01 - 1) < 0.02
    assert not np.asarray(top["bias"]).any()


def test_14_a_step_of_sgd_is_that_of_pytorch_on_every_parameter():
    group = ConfigDict({"name": "sgd", "lr": 0.05, "schedule": "none", "momentum": 0.9, "weight_decay": 1e-2})
    optimizer = optim.group_optimizer(group, steps=10)
    params = {"kernel": jnp.asarray([1.0, -2.0]), "bias": jnp.asarray([0.5]), "scale": jnp.asarray([1.5])}
    state = optimizer.init(params)
    expected, velocity = {k: np.asarray(v, np.float64) for k, v in params.items()}, dict.fromkeys(params, 0.0)
    for step in range(3):
        gradient = {name: jnp.full_like(value, 0.3 * (step + 1)) for name, value in params.items()}
        changes, state = optimizer.update(gradient, state, params, step=jnp.asarray(step))
        params = jax.tree.map(jnp.add, params, changes)
        for name in expected:
            g = 0.3 * (step + 1) + 1e-2 * expected[name]
            velocity[name] = 0.9 * velocity[name] + g
            expected[name] = expected[name] - 0.05 * velocity[name]
    for name in expected:
        np.testing.assert_allclose(params[name], expected[name], rtol=1e-6)


def test_a_renewed_head_goes_on_with_the_schedule():
    config = small_config(optimizer__top__schedule="cosine", optimizer__top__lr=1.0, optimizer__top__name="sgd")
    config.optimizer.top.momentum = 0.0
    optimizer = optim.group_optimizer(config.optimizer.top, steps=100)
    params = {"kernel": jnp.zeros(1)}
    changes, _ = optimizer.update({"kernel": jnp.ones(1)}, optimizer.init(params), params, step=jnp.asarray(50))
    np.testing.assert_allclose(changes["kernel"], -0.5, rtol=1e-6)


def groups_of_shapes():
    """64 images in 4 groups: a red disc, a blue square, a green ring or a yellow bar, at slightly different places."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:16, :16]
    images, labels = [], []
    for i in range(64):
        dy, dx = y - 7.5 - rng.uniform(-1.5, 1.5), x - 7.5 - rng.uniform(-1.5, 1.5)
        radius = np.hypot(dy, dx)
        shapes = (radius < 4.5, np.maximum(abs(dy), abs(dx)) < 4, abs(radius - 4.5) < 1.5, abs(dy) < 2)
        colours = ((230, 60, 40), (40, 90, 230), (40, 200, 60), (240, 220, 40))
        image = np.where(shapes[i % 4][..., None], colours[i % 4], (128, 128, 128)) + rng.normal(0, 8, (16, 16, 3))
        images.append(np.clip(image, 0, 255).astype(np.uint8))
        labels.append(i % 4)
    return np.stack(images), np.asarray(labels, np.int32)


@pytest.mark.medium
def test_18_groups_of_shapes_are_learnt(tmp_path):
    images, labels = groups_of_shapes()
    good = 0
    for seed in range(5):
        config = small_config(
            seed=seed, cluster__k=4, rounds=10, refresh_every="4 epochs", batch_size=16, eval_batch_size=64,
            model__width=16, cluster__pca_dim=4, cluster__runs=20,
        )  # fmt: skip
        workdir = tmp_path / str(seed)
        trained(config, workdir, source_of(images, labels))
        last = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
        good += last["train/loss"] < 0.5 * math.log(4) and last["train/nmi"] >= 0.8
    assert good >= 3


def test_images_that_are_all_equal_are_a_collapse_said_in_words(tmp_path):
    with pytest.raises(CollapseError, match="fell into one of 10 clusters"):
        trained(small_config(), tmp_path, source_of(np.full((64, 8, 8, 1), 7, np.uint8)))


def test_fewer_images_than_clusters_are_refused_naming_both(tmp_path):
    with pytest.raises(ConfigError, match=r"cluster.k=500 clusters need at least 500 images; there are 300"):
        prepared(small_config(cluster__k=500), tmp_path, few_digits())


def test_predict_is_sure_of_centres_and_undecided_between_them(tmp_path):
    stage = prepared(small_config(), tmp_path, few_digits())
    state, targets = stage.first()
    state, _, _ = refresh(stage, state, targets, 0, last=False)
    predicted = run(stage, state, stage.predict, "test")
    score, cluster = predicted["score"].array(), predicted["cluster"].array()
    assert ((score >= 0) & (score <= 1)).all()
    recorded = np.load(tmp_path / "assignments" / "deepcluster" / "0.npz")
    assert (recorded["cluster"] == cluster).mean() > 0.99  # a near tie may fall either way
    np.testing.assert_allclose(predicted["distance"].array(), recorded["distance"], rtol=1e-3, atol=1e-4)


def test_nothing_recompiles_after_the_first_round(tmp_path, monkeypatch):
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: compiled.append(name) if name.endswith("backend_compile_duration") else None
    )
    counts = []
    monkeypatch.setattr(loop, "print_round", lambda stage, step, values: counts.append(len(compiled)))
    config = small_config(rounds=5, cluster__k=40, save_every="1 round", cluster__backend="jax")
    source = source_of(np.repeat(few_digits(41).splits["train"].images, 3, axis=0))  # so few that clusters stay empty
    stage = prepared(config, tmp_path, source)
    loop.run_stage(stage, StopSignal())
    found = [len(np.unique(np.load(p)["cluster"])) for p in (tmp_path / "assignments" / "deepcluster").glob("*.npz")]
    assert len(set(found)) > 1, "the number of non-empty clusters should change in this test"
    assert counts[0] > 0
    assert counts[2:5] == [counts[1]] * 3, counts  # the first round is 0 -> 1; the last adds `predict`
