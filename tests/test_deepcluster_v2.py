"""DeepCluster-v2: its loss, its memory bank, its prototypes, and what it refuses."""

import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import few_digits, few_vectors, prepared, with_settings

from jaxclust import runtime
from jaxclust.errors import ConfigError
from jaxclust.methods import deepcluster, deepcluster_v2
from jaxclust.runtime import StopSignal
from jaxclust.train import loop
from jaxclust.train.refresh import refresh, run

SIZE, BATCH, HEADS, DIM = 96, 32, 3, 32
P = jax.sharding.PartitionSpec


def made(**fields):
    """Three steps a round, four clusters, two crops of each kind; `a__b=value` sets config.a.b."""
    config = runpy.run_path("configs/deepcluster.py")["get_config"]("v2_digits,smoke")
    fields = {
        "batch_size": BATCH, "eval_batch_size": 64, "refresh_every": "1 epoch", "cluster__k": 4, "cluster__runs": 1,
        "views__small__number": 2, "runtime__devices": 1, **fields,
    }  # fmt: skip
    return with_settings(config, **fields)


def ready(workdir, **fields):
    return prepared(made(**fields), workdir, few_digits(SIZE))


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    return ready(tmp_path_factory.mktemp("v2"))


@pytest.fixture(scope="module")
def begun(stage):
    """State and targets after the first refresh, and its first batch."""
    state, targets, _ = refresh(stage, *stage.first(), 0, last=False)
    return jax.device_get(state), targets, next(loop._batches(stage, targets, 0))


def net_of(stage):
    return stage.method.loss.args[0]


def on_one_device(stage, function):
    """`function(params, extra, batch)` where the axis of the devices has a name."""
    specs = {name: P() if name == "step" else P(runtime.AXIS) for name in loop.train_step.BATCH_NAMES}
    return jax.jit(jax.shard_map(function, mesh=stage.mesh, in_specs=(P(), P(), specs), out_specs=P(), check_vma=False))


def slow_cross_entropy(scores, target):
    scores = scores - scores.max()
    return np.log(np.exp(scores).sum()) - scores[target]


def test_the_loss_is_that_of_a_slow_double_and_its_rows_are_the_large_crops(stage, begun):
    state, _, batch = begun
    net = net_of(stage)
    target = np.random.default_rng(0).integers(0, 4, (BATCH, HEADS)).astype(np.int32)
    target[::3] = -1  # a third of the images was not in the bank
    batch = {**batch, "target": jnp.asarray(target)}

    def embeddings(params, extra, batch):
        feature, _ = deepcluster_v2._features(net, params, extra, batch, jax.random.key(0))
        variables = {"params": params["projection"], "batch_stats": extra["projection"]}
        flat = jnp.maximum(feature, 0).reshape(-1, feature.shape[-1])
        return net.g.apply(variables, flat, train=True, mutable=["batch_stats"])[0].reshape(*feature.shape[:2], -1)

    def program(params, extra, batch):
        value, aux = stage.method.loss(params, extra, batch, jax.random.key(0))
        return value, aux.rows["embeddings"], aux.metrics["accuracy"]

    raw = np.asarray(on_one_device(stage, embeddings)(state.params, state.extra, batch), np.float64)
    value, rows, accuracy = on_one_device(stage, program)(state.params, state.extra, batch)
    z = raw / np.linalg.norm(raw, axis=2, keepdims=True)
    assert z.shape == (BATCH, 4, DIM)
    prototypes = [np.asarray(state.params["prototypes"][f"head{h}"], np.float64) for h in range(HEADS)]
    terms = [
        slow_cross_entropy(z[i, crop] @ prototypes[h] / 0.1, target[i, h])
        for i in range(BATCH)
        for crop in range(4)
        for h in range(HEADS)
        if target[i, h] >= 0
    ]
    assert value == pytest.approx(np.mean(terms), rel=1e-5)
    known = target[:, 0] >= 0
    hits = (z @ prototypes[0]).argmax(axis=2) == target[:, :1]
    assert accuracy == pytest.approx(hits[known].mean(), rel=1e-5)
    np.testing.assert_allclose(rows, z[:, :2].reshape(BATCH, 2 * DIM), atol=1e-5)


@pytest.mark.wide
def test_the_bank_is_what_the_round_said_and_its_centroids_are_the_prototypes(stage, tmp_path, monkeypatch):
    said, clusterings, looked = {}, [], []
    assert (stage.lengths.round, stage.lengths.stage) == (3, 6)
    clustered = deepcluster.clustered

    def step(state, batch, key):
        state, rows, done = stage.step(state, batch, key)
        said.update(zip(np.asarray(rows["id"]).tolist(), np.asarray(rows["embeddings"]), strict=True))
        return state, rows, done

    def look(*arguments):
        looked.append(1)
        return stage.look(*arguments)

    def spy(clusterer, points, seed):
        found = clustered(clusterer, points, seed)
        clusterings.append((points.array().copy(), found, dict(said), seed))
        return found

    monkeypatch.setattr(deepcluster, "clustered", spy)
    snapshot = loop.run_stage(stage._replace(workdir=tmp_path, step=step, look=look), StopSignal())
    assert len(looked) == 2, "one pass over 96 images in batches of 64, before the first round alone"
    assert len(clusterings) == 3 * HEADS
    first, second = clusterings[:HEADS], clusterings[HEADS : 2 * HEADS]
    for points, *_ in first[1:]:
        np.testing.assert_array_equal(points, first[0][0])
    rows = np.stack([second[0][2][i] for i in range(SIZE)])
    for h, (points, *_) in enumerate(second):  # head h clusters bank h mod 2
        np.testing.assert_array_equal(points, rows[:, DIM * (h % 2) :][:, :DIM])
    assert (second[0][0] != second[1][0]).any() and len({seed for *_, seed in second}) == HEADS
    np.testing.assert_allclose(np.linalg.norm(rows.reshape(SIZE, 2, DIM), axis=2), 1, rtol=1e-5)
    for h, (_, found, *_) in enumerate(second):
        np.testing.assert_array_equal(snapshot.targets.target[:, h], found.labels)
        # Frozen, so that they still are what they were made from a round ago.
        np.testing.assert_array_equal(snapshot.state.params["prototypes"][f"head{h}"], found.centroids.T)
    last = np.load(tmp_path / "assignments" / "deepcluster_v2" / "2.npz")["cluster"]
    np.testing.assert_array_equal(run(stage, snapshot.state, stage.predict, "test")["cluster"].array(), last)
    assert not (tmp_path / "rows").exists()


@pytest.mark.wide
def test_prototypes_do_not_move_while_they_are_frozen(tmp_path, begun):
    stage = ready(tmp_path, optimizer__prototypes__frozen=1, optimizer__prototypes__weight_decay=0.1)
    params = begun[0].params
    state = stage.first().state._replace(params=runtime.put_replicated(params, stage.mesh))
    for expected in (False, True):
        before = jax.device_get(state.params)
        state, _, _ = stage.step(state, begun[2], jax.random.key(0))
        after = jax.device_get(state.params)
        assert (after["prototypes"]["head0"] != before["prototypes"]["head0"]).any() == expected
        assert (after["projection"]["embedding"]["kernel"] != before["projection"]["embedding"]["kernel"]).any()


@pytest.mark.wide
def test_images_that_a_round_did_not_meet_have_no_target_in_the_next(stage, tmp_path):
    lengths = stage.lengths._replace(stage=3, round=1, log=1, save=1)
    snapshot = loop.run_stage(stage._replace(workdir=tmp_path, lengths=lengths), StopSignal())
    log = [np.load(tmp_path / "assignments" / "deepcluster_v2" / f"{i}.npz")["cluster"] for i in range(4)]
    assert [int((clusters < 0).sum()) for clusters in log] == [0, SIZE - BATCH, SIZE - BATCH, 0]
    np.testing.assert_array_equal((snapshot.targets.target < 0).any(axis=1), log[2] < 0)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(snapshot.state.params)))


@pytest.mark.wide
def test_predict_names_the_prototype_with_the_largest_score(stage, begun):
    state = begun[0]
    images = few_digits(SIZE).splits["train"].images[:20]
    z = np.asarray(deepcluster_v2.embedding(net_of(stage), state.params, state.extra, images), np.float64)
    np.testing.assert_allclose(np.linalg.norm(z, axis=1), 1, rtol=1e-5)
    prototypes = np.asarray(state.params["prototypes"]["head0"], np.float64)
    predicted = stage.method.predict(state.params, state.extra, images)
    chosen = (z @ prototypes).argmax(axis=1)
    np.testing.assert_array_equal(predicted["cluster"], chosen)
    np.testing.assert_allclose(predicted["distance"], ((z - prototypes.T[chosen]) ** 2).sum(1), atol=1e-5)
    odds = np.exp(z @ prototypes / 0.1)
    np.testing.assert_allclose(predicted["score"], odds.max(1) / odds.sum(1), rtol=1e-4)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"freeze_body": True}, "learns from crops of images: config.freeze_body must be False"),
        ({"cluster__method": "pic"}, "makes no centroids, and .* takes them as prototypes; choose spherical"),
        ({"cluster__k": 97}, "config.cluster.k=97 clusters need at least 97 images; there are 96"),
        ({"model__blocks": 2}, "another number of weights for crops of 6 pixels .* than for those of 8"),
        ({"views__small__crop_area_max": 0.1}, r"small.crop_area=0.8 is the smallest share .*crop_area_max=0.1"),
    ],
)
def test_what_it_cannot_work_with_is_refused_before_it_starts(tmp_path, fields, words):
    with pytest.raises(ConfigError, match=words):
        ready(tmp_path, **fields)


def test_vectors_and_configs_without_its_crops_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="images, not vectors"):
        prepared(made(), tmp_path, few_vectors())
    config = made()
    del config.views.large
    with pytest.raises(ConfigError, match="config.views has no section 'large', which method 'deepcluster_v2' needs"):
        prepared(config, tmp_path, few_digits(SIZE))
