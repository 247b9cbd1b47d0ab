"""FixMatch on labels of some images (spice.md, section 8 and check S11): its loss, its average, what it reads."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from small import few_digits, prepared, run, small_config, with_settings

from jaxclust import runtime
from jaxclust.config import from_file
from jaxclust.data.label_file import read_labels
from jaxclust.errors import ConfigError, DataError
from jaxclust.jobs import train
from jaxclust.methods import fixmatch
from jaxclust.methods.base import DataInfo
from jaxclust.models.heads import MLP
from jaxclust.train import donor, loop
from jaxclust.train.refresh import refresh
from jaxclust.train.refresh import run as over_all

SIZE, RATIO, K = 96, 3, 10
LABELS = np.where(np.arange(SIZE) % 4 == 0, np.arange(SIZE) % K, -1)


def fixmatch_config(labels, **fields):
    """A tiny network; `a__b=value` sets config.a.b."""
    fields = {
        "method": "fixmatch", "stages": "semi", "sampler": "labelled_first", "unlabelled_ratio": RATIO,
        "fixmatch__labels": str(labels), "fixmatch__ema": 0.75, "batch_size": 16, "model__blocks": 1, "model__width": 4,
        "model__dim": 8, "refresh_every": "3 steps", "rounds": 1, "eval_batch_size": SIZE,
        "optimizer__body__name": "sgd", "optimizer__body__lr": 0.1, **fields,
    }  # fmt: skip
    config = small_config()
    with config.unlocked():
        config.views.weak = ConfigDict({"translate": 0.1})
        config.views.strong = ConfigDict({"rotate": 30.0})
    return with_settings(config, **fields)


def stage_of(folder, **fields):
    """A stage without class labels, its first state after the refresh, targets, and the first batch."""
    labels = folder / "labels.npy"
    np.save(labels, LABELS)
    source = few_digits(SIZE)
    unlabelled = source._replace(splits={"train": replace(source.splits["train"], labels=None)})
    stage = prepared(fixmatch_config(labels, **fields), folder, unlabelled)
    state, targets, _ = refresh(stage, *stage.first(), 0, last=False)
    return stage, jax.device_get(state), targets, next(loop._batches(stage, targets, 0))


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    return stage_of(tmp_path_factory.mktemp("fixmatch"))


@pytest.fixture(scope="module")
def after(begun):
    """The state after a step, on the host."""
    stage, state, _, batch = begun
    return jax.device_get(stage.step(runtime.put_replicated(state, stage.mesh), batch, jax.random.key(0))[0])


def same(a, b):
    return all((x == y).all() for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


NET = fixmatch.Net(None, MLP(1, 3, np.float32), RATIO, 0.8, 2.0, 0.75)


def loss_of(monkeypatch, scores, net=NET, target=(2, -1, -1, -1, 0, 1, 1, 1)):
    """The loss of two groups where the network gives `scores` of eight weak and then six strong views."""
    monkeypatch.setattr(fixmatch, "_trained", lambda net, params, extra, images, rng: (params, "new"))
    images = np.zeros((8, 2, 2, 1), np.uint8)
    batch = {"views": {"weak": images, "strong": images}, "target": np.array(target), "weight": np.ones(8, np.float32)}

    def function(scores):
        return fixmatch.loss(net, scores, {"average": "old"}, batch, None)

    return jax.value_and_grad(function, has_aux=True)(scores)


def double(scores, threshold=0.8, weight=2.0):
    """The loss and its gradient, row by row in float64; which strong views count."""
    scores = np.asarray(scores, np.float64)
    p = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    value, gradient, sure = 0.0, np.zeros_like(scores), []

    def learn(row, target, share):
        nonlocal value
        value -= share * np.log(p[row, target])
        gradient[row] += share * (p[row] - np.eye(3)[target])

    learn(0, 2, 1 / 2)
    learn(4, 0, 1 / 2)
    for strong, weak in enumerate((1, 2, 3, 5, 6, 7), start=8):
        sure.append(p[weak].max() >= threshold)
        if sure[-1]:
            learn(strong, p[weak].argmax(), weight / 6)
    return value, gradient, np.array(sure)


def test_s11_the_loss_and_its_gradient_are_those_of_a_slow_double(monkeypatch):
    scores = 2 * np.random.default_rng(3).standard_normal((14, 3)).astype(np.float32)
    (value, aux), gradient = loss_of(monkeypatch, scores)
    expected, slope, sure = double(scores)
    assert 0 < sure.sum() < 6
    assert value == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(gradient, slope, atol=1e-6)
    assert not gradient[np.array([1, 2, 3, 5, 6, 7])].any(), "the guess is no path of the gradient"
    assert aux.metrics["sure"] == pytest.approx(sure.mean())
    parts = aux.metrics["loss/labelled"] + 2.0 * aux.metrics["loss/unlabelled"]
    assert value == pytest.approx(parts) and aux.extra == {"average": "old", "batch_stats": "new"}
    hits = (scores[0].argmax() == 2) + (scores[4].argmax() == 0)
    assert aux.metrics["labelled_accuracy"] == hits / 2


def test_s11_a_guess_that_is_as_sure_as_the_threshold_counts(monkeypatch):
    scores = np.zeros((14, 3), np.float32)
    scores[2] = [0.1, 1.7, -0.3]
    p = float(jax.nn.softmax(scores[2]).max())
    kept = [
        float(loss_of(monkeypatch, scores, NET._replace(threshold=t))[0][1].metrics["sure"]) * 6
        for t in (p, np.nextafter(np.float32(p), np.float32(1)))
    ]
    assert np.round(kept).tolist() == [1, 0]


def test_the_targets_of_the_others_do_not_matter(monkeypatch):
    scores = np.random.default_rng(0).standard_normal((14, 3)).astype(np.float32)
    values = [
        loss_of(monkeypatch, scores, target=t)[0][0] for t in ((2, 0, 1, 2, 0, 2, 0, 0), (2, *[-1] * 3, 0, *[-1] * 3))
    ]
    assert values[0] == values[1]


def test_all_weak_and_the_strong_views_of_the_others_pass_at_once(begun, monkeypatch):
    _, state, _, batch = begun
    seen = {}
    monkeypatch.setattr(fixmatch, "_trained", lambda net, params, extra, images, rng: (seen.update(images=images), {}))
    views = {name: np.asarray(view) for name, view in batch["views"].items()}
    with pytest.raises(TypeError):  # there are no scores to go on with
        fixmatch.loss(NET, state.params, state.extra, {**batch, "views": views}, None)
    others = np.flatnonzero(np.arange(16) % 4)
    np.testing.assert_array_equal(seen["images"], np.concatenate([views["weak"], views["strong"][others]]))


def test_s11_a_step_moves_the_average_by_its_formula_and_copies_statistics(begun, after):
    _, before, _, _ = begun
    assert same(before.params, before.extra["average"]) and not same(before.params, after.params)
    for old, new, average in zip(
        *map(jax.tree.leaves, (before.extra["average"], after.params, after.extra["average"])), strict=True
    ):
        np.testing.assert_allclose(average, 0.75 * old + 0.25 * new, rtol=1e-6, atol=1e-9)
    assert not same(before.extra["batch_stats"], after.extra["batch_stats"])


def test_evaluation_asks_the_average_and_the_log_has_what_is_predicted(begun, after):
    stage, _, targets, _ = begun
    nothing = jax.tree.map(np.zeros_like, after.params)

    def said(params, extra):
        images = stage.split.images
        return jax.device_get((stage.predict(params, extra, images), stage.embed(params, extra, images)))

    whole, other = said(after.params, after.extra), said(nothing, after.extra)
    assert same(whole, other) and whole[1].std() > 0
    assert not same(whole, said(after.params, {**after.extra, "average": nothing}))
    rows = over_all(stage, runtime.put_replicated(after, stage.mesh), stage.look, "test")["features"]
    found = stage.method.refresh(after, targets, rows, None)
    np.testing.assert_array_equal(found.cluster, whole[0]["cluster"])
    np.testing.assert_allclose(1 - found.distance, whole[0]["score"], atol=1e-6)
    np.testing.assert_array_equal(found.target, LABELS)


def test_labels_are_targets_of_some_and_every_image_may_be_drawn(begun):
    stage, _, targets, batch = begun
    np.testing.assert_array_equal(targets.target, LABELS)
    np.testing.assert_array_equal(targets.ids, np.arange(SIZE))
    assert stage.split.labels is None and stage.method.labels is None
    drawn = np.asarray(batch["target"]).reshape(-1, 1 + RATIO)
    assert (drawn[:, 0] >= 0).all() and (drawn[:, 1:] < 0).any()


@pytest.mark.medium
def test_two_devices_take_the_step_of_one(begun, after, tmp_path):
    stage, state, _, batch = stage_of(tmp_path, runtime__devices=2)
    assert same(state, begun[1])
    other = jax.device_get(stage.step(runtime.put_replicated(state, stage.mesh), batch, jax.random.key(0))[0])
    for a, b in zip(jax.tree.leaves(after.extra), jax.tree.leaves(other.extra), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_batches_that_devices_cannot_share_by_groups_and_unlike_views_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"batch_size=24 on 4 devices .* each 6 images, .* multiple of 4: .*ratio=3"):
        stage_of(tmp_path, batch_size=24, runtime__devices=4)
    with pytest.raises(ConfigError, match=r"views.weak makes images \(8, 8, 1\) and config.views.strong \(6, 6, 1\)"):
        stage_of(tmp_path, views__strong__size=6)


INFO = DataInfo(SIZE, (8, 8, 1), files={})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"freeze_body": True}, "freeze_body must be False"),
        ({"sampler": "uniform_image"}, "sampler='uniform_image', .* set it to 'labelled_first'"),
        ({"init_from": "there"}, "init_from='there', .* trains a new network; set that of its stage to ''"),
        ({"cluster__method": "pic", "cluster__k": 0}, "cluster.k=0: say into how many"),
        ({"fixmatch__labels": "no.npz"}, "fixmatch.labels='no.npz': there is no such file"),
        ({"fixmatch__labels": "relaible"}, r"labels='relaible': no stage of that name .* \(there is: reliable\)"),
    ],
)
def test_what_fixmatch_cannot_work_with_is_refused(fields, message):
    info = INFO._replace(files={"assignments/reliable": "folder", "checkpoints/moco": "folder"})
    with pytest.raises(ConfigError, match=message):
        fixmatch.make(fixmatch_config("reliable", **fields), info)


def test_labels_are_those_of_the_last_round_of_a_stage_or_yet_to_come(tmp_path):
    config, info = fixmatch_config("reliable"), INFO._replace(files={"assignments/reliable": tmp_path})
    assert fixmatch.labels_file(config, info) is None
    fixmatch.make(config, info)  # the stage before this one may write them
    with pytest.raises(DataError, match="labels='reliable': that stage has left no assignment"):
        fixmatch._labels(config, info)
    for name in ("2.npz", "10.npz", ".7.11.npz"):
        np.savez(tmp_path / name, cluster=LABELS)
    assert fixmatch.labels_file(config, info) == tmp_path / "10.npz"
    np.testing.assert_array_equal(fixmatch._labels(config, info), LABELS)


def test_labels_of_other_images_are_refused_before_work_starts_and_not_asked_for_after(tmp_path):
    np.save(tmp_path / "labels.npy", LABELS[:-1])
    config = fixmatch_config(tmp_path / "labels.npy")
    with pytest.raises(DataError, match=r"labels of shape \(95,\) for 96 images"):
        fixmatch.make(config, INFO)
    fixmatch.make(config, INFO._replace(begun=True))


@pytest.mark.parametrize("dtype", [np.int8, np.int64, np.float64])
@pytest.mark.parametrize("none", [-1, -100])
def test_labels_may_have_any_number_type(tmp_path, dtype, none):
    labels = np.where(LABELS < 0, none, LABELS).astype(dtype)
    np.savez(tmp_path / "labels.npz", cluster=labels, id=np.arange(SIZE))
    found = read_labels(tmp_path / "labels.npz", SIZE, K)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, LABELS)


def test_labels_may_end_with_a_split(tmp_path):
    np.save(tmp_path / "labels.npy", LABELS)
    found = read_labels(tmp_path / "labels.npy", 100, K, (50, 46, 4))
    np.testing.assert_array_equal(found, [*LABELS, -1, -1, -1, -1])
    with pytest.raises(
        DataError, match=r"shape \(96,\) for 100 images; they must be \[50\] or \[97\] or \[100\], by id"
    ):
        read_labels(tmp_path / "labels.npy", 100, K, (50, 47, 3))


def test_a_stage_knows_the_sizes_of_its_splits(monkeypatch):
    source = few_digits(5)._replace(parts={"train": 2, "unlabelled": 3})
    monkeypatch.setattr(train, "prepare", lambda config, name, split, info, workdir, others: info)
    assert train.ready(None, "semi", source, None).parts == (2, 3)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, 4], r"image 2 has the label 4; it must be below 4 \(config.cluster.k\)"),
        ([0, -2, 1], "image 1 has the label -2"),
        ([0, 0.5, 1], "must be whole numbers, and these are float64"),
        ([0, np.nan, 1], "must be whole numbers"),
        (["a", "b", "c"], "must be whole numbers, and these are <U1"),
        ([-1, -100, -1], "none of 3 images has a label"),
        ([[0], [1], [2]], r"labels of shape \(3, 1\) for 3 images"),
        (np.array([{}, {}, {}]), "cannot be read as labels: .*allow_pickle"),
    ],
)
def test_wrong_labels_are_refused(tmp_path, labels, message):
    np.save(tmp_path / "labels.npy", labels)
    with pytest.raises(DataError, match=message):
        read_labels(tmp_path / "labels.npy", 3, 4)


def test_files_of_something_else_are_refused(tmp_path):
    np.savez(tmp_path / "labels.npz", labels=LABELS)
    with pytest.raises(DataError, match="no array 'cluster', only labels"):
        read_labels(tmp_path / "labels.npz", SIZE, K)
    (tmp_path / "labels.npz").write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(DataError, match="cannot be read as labels"):
        read_labels(tmp_path / "labels.npz", SIZE, K)


def test_clusters_without_a_label_are_told_and_those_of_a_new_network_are_not(monkeypatch):
    told = []
    monkeypatch.setattr(fixmatch, "warn_once", told.append)
    said = np.eye(4, dtype=np.float32)[[0, 1, 1, 3, 3]]
    rows = SimpleNamespace(array=lambda: said, shape=said.shape)
    targets = SimpleNamespace(target=np.int32([0, -1, 1, 2, -1]), refreshed_at=0)
    config = SimpleNamespace(cluster=SimpleNamespace(k=4), fixmatch=SimpleNamespace(labels="reliable"))
    found = {}
    for step in (0, 5):
        state = SimpleNamespace(params=None, extra=None, step=step)
        found[step] = fixmatch.refresh(config, DataInfo(5, (2, 2, 1)), state, targets, rows, None)
        assert found[step].metrics == {"labels/count": 3}
    assert found[0].cluster is None and found[5].cluster.tolist() == [0, 1, 1, 3, 3]
    assert len(told) == 2 and "'reliable' has no label of 1 of 4 clusters, such as 3" in told[0]


def test_the_network_starts_anew_where_labels_are_of_another_run(tmp_path):
    (tmp_path / "other" / "assignments" / "reliable").mkdir(parents=True)
    config = from_file(Path("configs/spice.py"))
    config.stages, config.init_from = "self,semi", str(tmp_path / "other")
    with pytest.raises(ConfigError, match="holds no run"):
        donor.body(config, "self", tmp_path / "run")
    assert donor.body(config, "semi", tmp_path / "run") is None
    config.stages = "semi"
    assert donor.body(config, "semi", tmp_path / "run") is None
    folder = tmp_path / "other" / "assignments" / "reliable"
    assert donor.files(config, "semi", tmp_path / "run")["assignments/reliable"] == folder


@pytest.mark.wide
def test_the_semi_stage_alone_learns_from_labels_that_another_run_left(tmp_path, optimized):
    """Of 1,797 images fifty have a label; the nearest of these in pixels has the class of 70 %."""
    source = few_digits(1797)
    images, classes = source.splits["train"].images, source.splits["train"].labels
    rng = np.random.default_rng(0)
    labels = np.full(1797, -100)
    chosen = np.concatenate([rng.choice(np.flatnonzero(classes == c), 5, replace=False) for c in range(10)])
    labels[chosen] = classes[chosen]
    flat = images.reshape(1797, -1).astype(np.float64)
    nearest = np.square(flat[:, None] - flat[chosen]).sum(axis=2).argmin(axis=1)
    baseline = np.mean(labels[chosen][nearest] == classes)
    folder = tmp_path / "other" / "assignments" / "reliable"
    folder.mkdir(parents=True)
    np.savez(folder / "0.npz", cluster=labels)
    workdir = tmp_path / "run"
    command = (
        "--config=configs/spice.py", "--config.stages=semi", f"--config.init_from={tmp_path / 'other'}",
        f"--workdir={workdir}", "--config.stage.semi.rounds=1", "--config.stage.semi.batch_size=64",
        "--config.model.width=16", "--config.model.dim=64",
    )  # fmt: skip
    assert run(*command) == 0
    results = json.loads((workdir / "results.json").read_text())
    assert results["train/acc"] > max(baseline, 0.85)
