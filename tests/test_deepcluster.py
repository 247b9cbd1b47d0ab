"""DeepCluster's own behaviour: the acceptance checks of its specification, numbered as there."""

import contextlib
import io
import json
import math
from dataclasses import replace

import jax
import numpy as np
import pytest
from small import few_digits, prepared, smaller_config, trained

from jaxclust.data.source import Source
from jaxclust.data.split import from_array
from jaxclust.errors import CollapseError, ConfigError
from jaxclust.runtime import StopSignal
from jaxclust.train import loop
from jaxclust.train.refresh import refresh, run


def smallest(**overrides):
    """A network of one block, where another would only take longer to compile."""
    return smaller_config(**{"model__blocks": 1, **overrides})


def source_of(images, labels=None):
    split = from_array(images, images.shape[1:], "toy/{}".format)
    names = None if labels is None else tuple(str(i) for i in range(labels.max() + 1))
    return Source("toy", {"train": replace(split, labels=labels)}, names, [])


def leaves(tree):
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def test_3_features_depend_on_neither_batch_size_nor_augmentation_nor_order_of_batches(tmp_path):
    features = []
    for size, rotate in ((64, 0.0), (300, 40.0), (7, 5.0)):
        config = smallest(eval_batch_size=size, views__train__rotate=rotate)
        stage = prepared(config, tmp_path, few_digits())
        features.append(run(stage, stage.first().state, stage.embed, "test")["features"].array())
    for other in features[1:]:
        np.testing.assert_allclose(other, features[0], rtol=1e-4, atol=1e-5)


def test_9_duplicates_leave_empty_clusters_and_training_goes_on_with_contiguous_labels(tmp_path):
    distinct = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 1), dtype=np.uint8)
    source = source_of(np.repeat(distinct, 50, axis=0))
    config = smallest(cluster__k=50, cluster__iterations=5)
    snapshot = trained(config, tmp_path, source)
    found = len(np.unique(snapshot.targets.target))
    assert found <= 20
    assert np.unique(snapshot.targets.target).tolist() == list(range(found))
    assert snapshot.state.extra["num_outputs"] <= 20
    assert all(np.isfinite(leaf).all() for leaf in leaves(snapshot.state.params).values())


def test_13_with_rates_of_zero_only_batch_statistics_move_and_the_head_is_new_each_round(tmp_path):
    config = smallest(optimizer__body__lr=0.0, optimizer__top__lr=0.0)
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
    config = smallest(model__dim=512, cluster__k=100, cluster__pca_dim=0)
    stage = prepared(config, tmp_path, few_digits())
    top = stage.first().state.params["top"]
    assert abs(np.asarray(top["kernel"]).std() / 0.01 - 1) < 0.02
    assert not np.asarray(top["bias"]).any()


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


@pytest.mark.slow
def test_18_groups_of_shapes_are_learnt(tmp_path):
    images, labels = groups_of_shapes()
    good = 0
    for seed in range(5):
        config = smaller_config(
            seed=seed, cluster__k=4, rounds=10, refresh_every="4 epochs", batch_size=16, eval_batch_size=64,
            model__width=16, cluster__pca_dim=4, cluster__runs=20,
        )  # fmt: skip
        workdir = tmp_path / str(seed)
        trained(config, workdir, source_of(images, labels))
        last = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
        good += last["train/loss"] < 0.5 * math.log(4) and last["train/nmi"] >= 0.8
    assert good >= 3


def test_images_that_are_all_equal_are_a_collapse_said_in_words(tmp_path):
    with pytest.raises(CollapseError, match="fell into one cluster"):
        trained(smallest(), tmp_path, source_of(np.full((64, 8, 8, 1), 7, np.uint8)))


def test_fewer_images_than_clusters_are_refused_naming_both(tmp_path):
    with pytest.raises(ConfigError, match=r"cluster.k=500 clusters need at least 500 images; there are 300"):
        prepared(smallest(cluster__k=500), tmp_path, few_digits())


def test_predict_is_sure_of_centres_and_undecided_between_them(tmp_path):
    stage = prepared(smallest(), tmp_path, few_digits())
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
    monkeypatch.setattr(loop, "print_round", lambda *_: counts.append(len(compiled)))
    config = smallest(rounds=5, cluster__k=40, save_every="1 round", cluster__backend="jax")
    source = source_of(np.repeat(few_digits(41).splits["train"].images, 3, axis=0))  # so few that clusters stay empty
    stage = prepared(config, tmp_path, source)
    loop.run_stage(stage, StopSignal())
    found = [len(np.unique(np.load(p)["cluster"])) for p in (tmp_path / "assignments" / "deepcluster").glob("*.npz")]
    assert len(set(found)) > 1, "the number of non-empty clusters should change in this test"
    assert counts[0] > 0
    assert counts[2:5] == [counts[1]] * 3, counts  # the first round is 0 -> 1; the last adds `predict`


def with_pic(**fields):
    """A config in which the clustering finds the number of clusters."""
    fields = {"cluster__pic__neighbours": 12, "cluster__pic__alpha": 0.9, "cluster__pic__bucket": 8, **fields}
    fields = {"rounds": 3, "optimizer__body__schedule": "none", **fields}
    return smallest(cluster__method="pic", cluster__k=500, **fields)  # k is not looked at


@pytest.fixture(scope="module")
def whole_pic(tmp_path_factory):
    """A training of three rounds: its folder, where it ended and what it said."""
    workdir = tmp_path_factory.mktemp("pic")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        snapshot = trained(with_pic(), workdir, few_digits())
    return workdir, snapshot, printed.getvalue()


@pytest.mark.medium
def test_pic_sizes_the_head_by_buckets_and_masks_what_is_unused(whole_pic):
    workdir, snapshot, printed = whole_pic
    params, extra = snapshot.state.params, snapshot.state.extra
    log = [np.load(workdir / "assignments" / "deepcluster" / f"{i}.npz")["cluster"] for i in range(4)]
    found = [len(np.unique(clusters)) for clusters in log]
    assert len(set(found)) > 1, "the number of clusters should change in this test"
    outputs = params["top"]["kernel"].shape[1]
    assert outputs % 8 == 0 and outputs - 8 < found[-2] <= outputs  # the head is that of the last round but one
    assert extra["num_outputs"] == len(np.unique(log[-1])) and len(extra["centroids"]) % 8 == 0
    assert np.unique(snapshot.targets.target).tolist() == list(range(found[-2]))
    assert f"clusters {found[0]} " in printed and "/500" not in printed


@pytest.mark.wide
def test_pic_goes_on_after_a_restart_bit_for_bit_and_is_predicted_by_the_nearest_mean(whole_pic, tmp_path):
    config = with_pic(rounds=2)
    trained(config, tmp_path / "cut", few_digits())
    config.rounds = 3
    again = trained(config, tmp_path / "cut", few_digits())
    first, second = leaves(whole_pic[1]), leaves(again)
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)
    stage = prepared(config, tmp_path / "cut", few_digits())
    predicted = run(stage, again.state, stage.predict, "test")["cluster"].array()
    recorded = np.load(tmp_path / "cut" / "assignments" / "deepcluster" / "3.npz")["cluster"]
    np.testing.assert_array_equal(predicted, recorded)


def test_pic_needs_more_images_than_neighbours(tmp_path):
    with pytest.raises(ConfigError, match=r"cluster.pic.neighbours=300 must be less than .* images, which is 300"):
        prepared(with_pic(cluster__pic__neighbours=300), tmp_path, few_digits())


def test_pic_that_falls_to_pieces_says_so(tmp_path, capsys):
    stage = prepared(with_pic(cluster__pic__neighbours=2, cluster__pic__alpha=0.001), tmp_path, few_digits())
    loop.print_round(stage, 0, refresh(stage, *stage.first(), 0, last=False)[2])
    assert "small pieces: the graph has too few neighbours" in capsys.readouterr().out


def test_a_loss_is_not_held_against_the_clusters_found_after_it(tmp_path, capsys):
    stage = prepared(with_pic(), tmp_path, few_digits())
    values = {"train/loss": 1.6, "train/accuracy": 0.3, "clusters/found": 4.0}
    for before, warned in ((20.0, False), (4.0, True)):
        loop.print_round(stage, 3 * stage.lengths.round, values, before)
        assert ("guessing alone" in capsys.readouterr().out) == warned


def test_one_seed_for_all_clusterings_gives_equal_clusters_of_equal_features(tmp_path):
    config = smallest(cluster__seed=5, cluster__runs=1, cluster__iterations=1)
    stage = prepared(config, tmp_path, few_digits())
    state, targets = stage.first()
    _, first, _ = refresh(stage, state, targets, 0, last=False)
    _, second, _ = refresh(stage, state, targets, stage.lengths.round, last=False)
    np.testing.assert_array_equal(first.target, second.target)
    config.cluster.seed = -1
    stage = prepared(config, tmp_path, few_digits())
    _, first, _ = refresh(stage, state, targets, 0, last=False)
    _, second, _ = refresh(stage, state, targets, stage.lengths.round, last=False)
    assert (first.target != second.target).any()
