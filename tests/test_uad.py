"""UAD's own behaviour: the acceptance checks of its specification, numbered as there (1 to 20; 6 to 16 also in
test_fuzzy.py)."""

import json
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import normalized_mutual_info_score
from small import few_digits, few_vectors, prepared, run, smaller_config, trained

from jaxclust import config as config_lib
from jaxclust import models, runtime
from jaxclust.cluster import Clustering, Nearest, fuzzy, kmeans_faiss, pic
from jaxclust.errors import ConfigError
from jaxclust.features.rows import Rows
from jaxclust.methods import classifier, fusion, uad
from jaxclust.methods.base import DataInfo
from jaxclust.train.refresh import refresh


def uad_config(mode, **overrides):
    return smaller_config(method="uad", stages="uad", uad__mode=mode, **overrides)


def leaves(tree):
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def rows_of(array, tmp_path):
    rows = Rows(len(array), array.shape[1:], np.float32, 2**40, tmp_path)
    rows.append(array.astype(np.float32))
    return rows.finish()


@pytest.mark.wide
def test_1_baseline_is_deepcluster_to_the_bit(tmp_path):
    plain = trained(smaller_config(stages="one", method="deepcluster"), tmp_path / "a", few_digits())
    same = trained(smaller_config(stages="one", method="uad", uad__mode="baseline"), tmp_path / "b", few_digits())
    a, b = leaves(plain), leaves(same)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    logs = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in "ab"]
    losses = [[json.loads(line).get("train/loss") for line in log] for log in logs]
    assert losses[0] == losses[1] and len(losses[0]) == 3


@pytest.mark.parametrize(("network", "grid", "width"), [
    ("alexnet", 2, 1408), ("alexnet", 1, 352), ("vgg16", 2, 768), ("vgg16", 1, 192),
])  # fmt: skip
def test_2_sizes_of_the_low_block(network, grid, width):
    config = uad_config("full", uad__low_grid=grid, model__name=network, model__width=0, model__dim=0)
    config.data.image_size = 224
    info = DataInfo(10_000, (224, 224, 3))
    method = uad.make(config, info)
    batch = {"views": {"train": jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.uint8)}}
    params, extra = jax.eval_shape(method.init, jax.random.key(0), batch)
    rows = jax.eval_shape(method.look, params, extra, batch["views"]["train"])
    assert rows.shape == (1, width + 4096)


def test_2_pooling_is_by_overlapping_cells_and_channel_major():
    x = jnp.asarray(np.random.default_rng(0).random((2, 55, 5, 3), np.float32))
    got = np.asarray(fusion.pooled(x, 2, "avg")).reshape(2, 3, 2, 2)
    np.testing.assert_allclose(got[0, 1, 0, 0], x[0, :28, :3, 1].mean(), rtol=1e-5)
    np.testing.assert_allclose(got[1, 2, 1, 1], x[1, 27:, 2:, 2].mean(), rtol=1e-5)
    np.testing.assert_allclose(fusion.pooled(x, 1, "avg"), x.mean(axis=(1, 2)), rtol=1e-5)
    largest = np.asarray(fusion.pooled(x, 2, "max")).reshape(2, 3, 2, 2)
    np.testing.assert_array_equal(largest[0, 1, 0, 0], x[0, :28, :3, 1].max())
    np.testing.assert_array_equal(largest[1, 2, 1, 0], x[1, 27:, :3, 2].max())
    both = np.asarray(fusion.pooled(x, 2, "avgstd")).reshape(2, 2, 3, 2, 2)
    np.testing.assert_allclose(both[:, 0], got, rtol=1e-6)
    np.testing.assert_allclose(both[0, 1, 1, 0, 1], x[0, :28, 2:, 1].std(), rtol=1e-3)


def test_2_the_low_block_is_a_unit_vector():
    maps = [jnp.asarray(np.random.default_rng(i).random((4, 8, 8, c), np.float32)) for i, c in enumerate((3, 7))]
    low = fusion.low_vector(maps, 2, "avg")
    np.testing.assert_allclose(np.linalg.norm(low, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(low[:, :12], axis=1), 0.5**0.5, rtol=1e-5)


def blocks(size=200, low=6, high=9, seed=0):
    rng = np.random.default_rng(seed)
    parts = [rng.normal(size=(size, width)) for width in (low, high)]
    return [part / np.linalg.norm(part, axis=1, keepdims=True) for part in parts]


def points_of(config, parts, tmp_path):
    rows = rows_of(np.concatenate(parts, axis=1), tmp_path)
    _, points, _ = fusion.fit(config, rows, parts[1].shape[1])
    return points.array()


@pytest.mark.parametrize("reduction", ["per_block", "none", "joint"])
def test_3_the_weight_of_the_low_block_goes_from_nothing_to_all(tmp_path, reduction):
    low, high = blocks()
    other = blocks(seed=1)
    ids = np.arange(5)

    def labels(parts, beta):
        config = uad_config("full", uad__low_weight=beta, uad__fusion_pca=reduction)
        config.cluster.pca_dim, config.uad.low_dim = 8, 3
        return kmeans_faiss.kmeans(points_of(config, parts, tmp_path), 5, 0, initial_ids=ids).labels

    np.testing.assert_array_equal(labels([low, high], 0.0), labels([other[0], high], 0.0))
    np.testing.assert_array_equal(labels([low, high], 1.0), labels([low, other[1]], 1.0))
    assert (labels([low, high], 0.5) != labels([other[0], high], 0.5)).any()


def test_4_squared_distances_are_the_weighted_sum_of_those_of_the_blocks(tmp_path):
    parts = blocks()
    config = uad_config("full", uad__low_weight=0.3, uad__fusion_pca="none")
    points = points_of(config, parts, tmp_path)

    def squared(x):
        return ((x[:, None] - x[None]) ** 2).sum(axis=2)

    np.testing.assert_allclose(squared(points), 0.3 * squared(parts[0]) + 0.7 * squared(parts[1]), atol=1e-5)


def test_standard_gives_each_block_a_total_variance_of_one(tmp_path):
    parts = [7 * blocks()[0], 0.1 * blocks()[1] + 3]
    config = uad_config("full", uad__low_weight=0.5, uad__fusion_pca="none", uad__fusion_norm="standard")
    points = points_of(config, parts, tmp_path)
    np.testing.assert_allclose(points[:, :6].var(axis=0).sum(), 0.5, rtol=1e-4)
    np.testing.assert_allclose(points[:, 6:].var(axis=0).sum(), 0.5, rtol=1e-4)


def test_5_fusion_finds_groups_that_neither_block_shows(tmp_path):
    rng = np.random.default_rng(0)
    shape, texture = rng.integers(0, 4, (2, 800))
    truth = 4 * shape + texture
    low, high = (np.eye(4)[kind] + rng.normal(0, 0.05, (800, 4)) for kind in (texture, shape))

    def score(beta):
        config = uad_config("full", uad__low_weight=beta, uad__fusion_pca="per_block")
        config.cluster.pca_dim, config.uad.low_dim = 6, 3
        points = points_of(config, [low, high], tmp_path)
        return normalized_mutual_info_score(truth, kmeans_faiss.kmeans(points, 16, 0, runs=5).labels)

    assert score(0.5) >= 0.9 and score(0.0) <= 0.7


def test_joint_points_on_the_device_are_those_of_a_slow_double(tmp_path):
    parts = blocks(size=60)
    config = uad_config("full", uad__low_weight=0.3, uad__fusion_pca="joint")
    config.cluster.pca_dim = 5
    points = points_of(config, parts, tmp_path)
    x = np.concatenate([0.3**0.5 * parts[0], 0.7**0.5 * parts[1]], axis=1)
    x = x - x.mean(axis=0)
    values, vectors = np.linalg.eigh(x.T @ x / len(x))
    white = x @ vectors[:, ::-1][:, :5] / np.sqrt(values[::-1][:5])
    white /= np.linalg.norm(white, axis=1, keepdims=True)
    np.testing.assert_allclose(np.abs(np.asarray(points).T @ white), np.abs(white.T @ white), atol=1e-3)


def test_11_uncertainty_costs_no_further_search(monkeypatch, tmp_path):
    from jaxclust.cluster import _faiss

    searches = []
    plain = _faiss.search
    monkeypatch.setattr(_faiss, "search", lambda x, rows, num: searches.append(num) or plain(x, rows, num))
    rows = np.random.default_rng(0).normal(size=(400, 5)).astype(np.float32)
    for nearest in (1, 4):
        searches.clear()
        found = kmeans_faiss.kmeans(rows, 8, 0, iterations=6, nearest=nearest)
        assert len(searches) == found.info["iterations"] + 1
        assert searches == [1] * found.info["iterations"] + [nearest]


@pytest.mark.parametrize("backend", ["faiss", "jax"])
def test_the_nearest_centroids_are_those_of_a_slow_double(backend):
    from importlib import import_module

    rows = np.random.default_rng(0).normal(size=(300, 5)).astype(np.float32)
    found = import_module(f"jaxclust.cluster.kmeans_{backend}").kmeans(rows, 8, 0, nearest=4)
    squared = ((rows[:, None].astype(np.float64) - found.centroids[None]) ** 2).sum(axis=2)
    np.testing.assert_array_equal(found.nearest.ids, np.argsort(squared, axis=1, kind="stable")[:, :4])
    np.testing.assert_allclose(found.nearest.distances, np.sort(squared, axis=1)[:, :4], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found.nearest.ids[:, 0], found.labels)
    assert (np.diff(found.nearest.distances, axis=1) >= 0).all()


def test_13_what_images_weigh_follows_from_their_clustering():
    """Of six images in two clusters; a third, to whose centroid all are second nearest, is empty."""
    ids = np.array([[0, 2, 1]] * 4 + [[1, 2, 0]] * 2, np.int32)
    squared = np.sort(np.random.default_rng(0).uniform(0.5, 2, (6, 3)), axis=1).astype(np.float32)
    found = Clustering(ids[:, 0], squared[:, 0], np.zeros((3, 2), np.float32), {}, Nearest(ids, squared))

    def weighed(found, round_=0, **fields):
        return uad.weighed(
            uad_config("full", **{f"uad__{name}": value for name, value in fields.items()}), found, round_
        )

    near, _, far = 1 / squared.T
    without = weighed(found)
    np.testing.assert_allclose(without.record["membership"], near / (near + far), rtol=1e-4)
    everything = weighed(found, ignore_empty_centroids=False).record["membership"]
    np.testing.assert_allclose(everything, near / (1 / squared).sum(axis=1), rtol=1e-4)
    c = without.record["certainty"]
    assert without.metrics["certainty/p30"] == pytest.approx(np.percentile(c, 30))
    for round_, share in ((0, 0.25), (2, 0.75), (9, 1.0)):
        expected = fuzzy.weights(c, strength=0.5 * share, power=1.0, largest=5.0, direction="certain")
        np.testing.assert_allclose(weighed(found, round_, weight_warmup=3).weight, expected, rtol=1e-5)
    drawn = weighed(found, loss_norm="sampler").weight
    assert (drawn[:4].mean() + drawn[4:].mean()) / 2 == pytest.approx(1) and drawn.mean() != pytest.approx(1)
    capped = weighed(found, min_cluster_for_certainty=3).record["certainty"]
    assert capped[4:].max() <= np.median(c) + 1e-6 and c[4:].max() > np.median(c)
    one = weighed(found._replace(nearest=None))  # one centroid alone has nothing to be compared with
    assert (one.weight == 1).all() and not one.record


def test_14_an_image_counts_by_its_weight_and_batch_weights_have_no_scale():
    config = uad_config("full", uad__loss_norm="batch")
    c = classifier.classifier(config, DataInfo(100, (8, 8, 1)))
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 1), dtype=np.uint8)
    batch = {"views": {"train": images}, "target": np.arange(4)}
    params, extra, _ = classifier.init(c, jax.random.key(0), batch, 10)
    extra = {**extra, "num_outputs": jnp.int32(10)}
    mesh = runtime.mesh(config)

    def value_of(loss):
        def of(weight):
            return jax.lax.pmean(
                loss(c, params, extra, {**batch, "weight": weight}, jax.random.key(0))[0], runtime.AXIS
            )

        compiled = jax.jit(jax.shard_map(of, mesh=mesh, in_specs=jax.P(runtime.AXIS), out_specs=jax.P()))
        return lambda weight: float(compiled(jnp.asarray(weight, jnp.float32)))

    plain, weighted = value_of(classifier.loss), value_of(uad.loss)
    w = np.array([0.5, 2.0, 1.0, 0.25])
    one = [plain(4 * np.eye(4)[i]) for i in range(4)]
    assert plain(w) == pytest.approx(np.dot(w, one) / 4, rel=1e-5)
    assert weighted(w) == pytest.approx(np.dot(w, one) / w.sum(), rel=1e-5)
    assert weighted(10 * w) == pytest.approx(weighted(w), rel=1e-5)
    assert weighted(np.ones(4)) == pytest.approx(plain(np.ones(4)), rel=1e-6)


def test_17_pic_knows_certainty_by_its_graph(tmp_path):
    rng = np.random.default_rng(0)
    left = rng.normal(0, 0.05, (20, 2)) + (-2, 0)
    rows = np.concatenate([left, left * (-1, 1), [[0.0, 0.0]]]).astype(np.float32)  # a mirror image, a bridge between
    found = pic.pic(rows, 0, neighbours=6, sigma=2.0, alpha=0.9, iterations=100, merge_singletons=True, backend="faiss")
    c = found.certainty
    assert c.shape == (41,) and ((c >= 0) & (c <= 1)).all()
    assert c[40] == pytest.approx(0.5) and c[:40].min() > 0.9


@pytest.mark.parametrize("backend", ["faiss", "jax"])
def test_17_means_of_pics_clusters_may_be_asked_for(backend):
    rows = np.random.default_rng(0).normal(size=(80, 2)).astype(np.float32)
    found = pic.pic(
        rows, 0, neighbours=5, sigma=0.5, alpha=0.001, iterations=50, merge_singletons=True, backend=backend, nearest=4
    )
    squared = ((rows[:, None].astype(np.float64) - found.centroids[None]) ** 2).sum(axis=2)
    elsewhere = squared.argmin(axis=1) != found.labels
    assert len(found.centroids) > 4 and elsewhere.any()
    for row, own, ids, distances in zip(squared, found.labels, *found.nearest, strict=True):
        others = [k for k in np.argsort(row, kind="stable") if k != own]
        np.testing.assert_array_equal(ids, [own, *others[:3]])
        np.testing.assert_allclose(distances, row[ids], rtol=1e-4, atol=1e-5)
    config = uad_config("full", cluster__method="pic", uad__pic_centroids=True)
    certainty = uad.weighed(config, found, 0).record["certainty"]
    assert certainty[~elsewhere].mean() > certainty[elsewhere].mean() + 0.1


def test_17_forms_that_need_centroids_are_refused_for_pic():
    with pytest.raises(ConfigError, match="choose graph"):
        uad.make(uad_config("full", cluster__method="pic"), DataInfo(300, (8, 8, 1)))
    with pytest.raises(ConfigError, match="cluster.method='pic'"):
        uad.make(uad_config("full", uad__uncertainty="graph"), DataInfo(300, (8, 8, 1)))
    uad.make(uad_config("full", uad__uncertainty="graph", cluster__method="pic"), DataInfo(300, (8, 8, 1)))


def test_low_maps_that_leave_the_feature_no_dimension_are_refused():
    config = uad_config("fusion", uad__fusion_pca="per_block", uad__low_dim=16, cluster__pca_dim=16)
    with pytest.raises(ConfigError, match=r"low_dim=16 leaves the feature nothing of config.cluster.pca_dim=16; .* 4$"):
        uad.make(config, DataInfo(300, (8, 8, 1)))


def test_a_layer_that_does_not_exist_is_refused_with_those_there_are():
    with pytest.raises(ConfigError, match=r"conv9.*conv1, conv2, conv3"):
        uad.make(uad_config("full", uad__low_layers="conv1,conv9", model__blocks=3), DataInfo(300, (8, 8, 1)))


LONG = {"optimizer__body__schedule": "none", "save_every": "1 step", "cluster__k": 8}


ANOTHER = [pytest.param(mode, marks=pytest.mark.wide) for mode in ("fusion", "uncertainty")]


@pytest.fixture(scope="module", params=[*ANOTHER, "full"])
def whole(request, tmp_path_factory):
    """(mode, folder, where a training of three rounds ended)."""
    workdir = tmp_path_factory.mktemp(request.param)
    return request.param, workdir, trained(uad_config(request.param, rounds=3, **LONG), workdir, few_digits())


@pytest.mark.medium
def test_18_20_every_mode_trains_and_writes_its_files(whole):
    mode, workdir, snapshot = whole
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(record["train/loss"]) for record in records[1:])
    assert all("clusters/nmi_prev" in record for record in records[1:])
    weight = np.load(workdir / "assignments" / "uad" / "2.npz")["weight"]
    np.testing.assert_array_equal(weight, snapshot.targets.weight)
    assert weight.mean() == pytest.approx(1, abs=1e-5)
    if mode == "fusion":
        assert (weight == 1).all() and not (workdir / "uncertainty").exists()
        return
    assert weight.std() > 0.01
    for round_ in range(4):
        with np.load(workdir / "uncertainty" / "uad" / f"{round_}.npz", allow_pickle=False) as saved:
            assert set(saved) >= {"id", "distance", "membership", "certainty", "weight"}
            of_images = [saved[name] for name in saved if name != "fingerprint"]
            assert all(len(values) == 300 and np.isfinite(values).all() for values in of_images)
    assert all(0 <= record["train/certainty_auc"] <= 1 for record in records)


@pytest.mark.wide
@pytest.mark.parametrize("whole", ["full"], indirect=True)
def test_18_a_restored_run_has_the_weights_of_its_round(whole, tmp_path):
    for rounds in (2, 3):
        parts = trained(uad_config("full", rounds=rounds, **LONG), tmp_path, few_digits())
    for (name, a), b in zip(leaves(whole[2]).items(), leaves(parts).values(), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)


def test_predict_agrees_with_the_clustering_of_the_same_features(tmp_path):
    config = uad_config("full", cluster__k=8)
    stage = prepared(config, tmp_path, few_digits())
    state, targets = stage.first()
    state, targets, _ = refresh(stage, state, targets, 0, last=False)
    from jaxclust.train.refresh import run as run_program

    predicted = run_program(stage, state, stage.predict, "test")["cluster"].array()
    saved = np.load(tmp_path / "assignments" / "uad" / "0.npz")["cluster"]
    assert (predicted == saved).mean() >= 0.995


@pytest.mark.wide
def test_20_the_four_modes_by_command_line(tmp_path):
    config = runpy.run_path("configs/uad.py")["get_config"]("smoke")
    assert config.uad.mode == "full" and config_lib.validate(config)
    arguments = ("--config.refresh_every=5 steps", "--config.model.blocks=2")
    assert run("--config=configs/uad.py:smoke", f"--workdir={tmp_path / 'run'}", *arguments) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["clusters"] >= 2


def test_vectors_have_no_maps():
    config = uad_config("full", freeze_body=True, data__source="features:x.npy")
    with pytest.raises(ConfigError, match="maps of images"):
        uad.make(config, DataInfo(300, few_vectors().splits["train"].image_shape))


def test_the_low_layers_of_a_network_are_its_early_ones():
    config = uad_config("full", model__name="vgg16")
    assert models.low_layers(config, (64, 64, 3)) == ("conv2", "conv4")
    config = uad_config("full", model__blocks=3)
    assert models.low_layers(config, (8, 8, 1)) == ("conv1", "conv2")
