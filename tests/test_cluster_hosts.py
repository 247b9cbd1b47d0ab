"""Clustering on several hosts: what one host finds, whichever host has a row; the same on all, refusals too."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from host_runs import all_well, snippet

from jaxclust import cluster, hosts
from jaxclust.cluster import _memory, _on_first, kmeans_faiss, kmeans_jax, minibatch, reduce
from jaxclust.config import base
from jaxclust.errors import JaxclustError
from jaxclust.features.rows import Rows

SCRIPT = """
import pathlib
from test_cluster_hosts import work
work(pathlib.Path(sys.argv[1]))
"""
METHODS = [
    ("kmeans", "auto"), ("kmeans", "faiss"), ("kmeans", "jax"), ("minibatch", "auto"), ("pic", "auto"),
    ("spherical", "jax"),
]  # fmt: skip
NAMES = [f"{method}-{backend}" for method, backend in METHODS]
SIZE = 301  # divides by neither hosts nor devices
pytestmark = pytest.mark.medium


def features(size=SIZE, dim=20, offset=3.0):
    rng = np.random.default_rng(0)
    return (rng.normal(size=(size, dim)) @ rng.normal(size=(dim, dim)) + offset).astype(np.float32)


def blobs():
    """Unit rows of 9 blobs in their order; the last ones are equal."""
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(9, 6))[np.arange(SIZE) // 34] + 0.2 * rng.normal(size=(SIZE, 6))
    rows[-20:] = rows[-1]
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def own(rows, memory=1 << 30):
    """This host's part of rows, as features are kept."""
    held = Rows(len(rows), rows.shape[1:], rows.dtype, memory, Path(tempfile.gettempdir()))
    held.append(rows[hosts.own_ids(len(rows))])
    return held.finish()


def configured(method, backend, **settings):
    config = base()
    config.runtime.deadline = 60.0
    config.cluster.update({"method": method, "backend": backend, "k": 9, "batch_rows": 64, **settings})
    return config


def reductions():
    mean, scatter = reduce._moments(own(features(offset=100.0)), scatter=True)
    found = {"mean": mean, "scatter": scatter}
    for name, x, dim in (("tall", features(), 8), ("wide", features(30, 90), 12), ("few", features(2), 1)):
        whitening, info = reduce.fit(own(x), dim, power=0.5)
        points, zeros = reduce.transform(own(x), whitening, l2=True)
        found |= {f"{name}/{field}": value for field, value in info.items()}
        found |= {f"{name}/points": points.whole(), f"{name}/projection": whitening.projection, f"{name}/zeros": zeros}
    return found


def clusterings():
    x = blobs()
    found = {name: cluster.get(configured(*which))(own(x, 0), 3) for name, which in zip(NAMES, METHODS, strict=True)}
    mine, ids = own(x).array(), np.arange(9) * 30
    found["ids"] = kmeans_jax.kmeans(mine, 9, 0, initial_ids=ids)
    found["plus"] = kmeans_jax.kmeans(mine, 9, 5, init="kmeans++")
    found["minibatch++"] = cluster.get(configured("minibatch", "auto", init="kmeans++"))(own(x), 3)
    equal = np.full(9, SIZE - 1)
    equal[:5] = ids[:5]
    for repair in ("split", "farthest"):
        found[repair] = kmeans_jax.kmeans(mine, 9, 0, initial_ids=equal, reseed_empty=repair)
    found["few"] = kmeans_jax.kmeans(own(x[:2]).array(), 2, 0)
    arrays = {}
    for name, (labels, distances, centroids, info, *_) in found.items():
        arrays |= {f"{name}/labels": labels, f"{name}/distances": distances, f"{name}/centroids": centroids}
        arrays |= {f"{name}/{key}": np.asarray(value) for key, value in info.items()}
    return arrays


def refusals():
    """What every host is told: {name: "type: message"}."""
    bad, tell = blobs(), {}
    bad[[4, 7, 200], 1] = np.nan
    whitening, _ = reduce.fit(own(blobs()), 4)
    asked = {
        "fit": lambda: reduce.fit(own(bad), 4),
        "fit/wide": lambda: reduce.fit(own(np.repeat(bad[:40], 9, axis=1)), 4),
        "transform": lambda: reduce.transform(own(bad), whitening, l2=True),
        "many": lambda: kmeans_jax.kmeans(own(blobs()[:7]).array(), 8, 0),
    }
    for name, which in zip(NAMES, METHODS, strict=True):
        asked[name] = lambda which=which: cluster.get(configured(*which))(own(bad), 0)
        if which[0] != "pic":
            asked[f"{name}/many"] = lambda which=which: cluster.get(configured(*which))(own(blobs()[:7]), 0)
    asked["memory"] = lambda: with_memory(10**4, lambda: cluster.get(configured("pic", "auto"))(own(blobs()), 0))
    asked["broken"] = lambda: _on_first.on_first_host(broken, lambda *_: 0, "it", configured("pic", "jax"))(
        own(blobs()), 0
    )
    for name, call in asked.items():
        try:
            call()
        except (JaxclustError, RuntimeError) as error:
            tell[name] = f"{type(error).__name__}: {error}"
    return tell


def with_memory(size, call):
    available, _memory.available = _memory.available, lambda: size if hosts.is_first() else 10**12
    try:
        return call()
    finally:
        _memory.available = available


def broken(rows, seed):
    raise RuntimeError("the disk is gone")


def work(folder):
    arrays = {**reductions(), **clusterings()}
    arrays |= {f"refused/{name}": np.asarray(message) for name, message in refusals().items()}
    np.savez(folder / f"{hosts.index()}.npz", **arrays)


def read(path):
    with np.load(path) as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One host of 8 devices."""
    folder = tmp_path_factory.mktemp("alone")
    work(folder)
    return read(folder / "0.npz")


@pytest.fixture(scope="module", params=[pytest.param(count, marks=pytest.mark.wide) for count in (2, 3)])
def several(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"hosts{request.param}")
    with snippet(SCRIPT, folder, count=request.param) as started:
        all_well(started)
    return [read(folder / f"{i}.npz") for i in range(request.param)]


def test_every_host_has_the_same_to_the_bit(several):
    first, *others = several
    assert len(first) > 100
    for other in others:
        assert first.keys() == other.keys()
        for name in first:
            if name not in ("refused/broken", "refused/kmeans-faiss/many"):  # failures of host 0 alone
                np.testing.assert_array_equal(other[name], first[name], err_msg=name)


def test_moments_are_those_of_one_host_in_float64(alone, several):
    np.testing.assert_allclose(several[0]["mean"], alone["mean"], rtol=1e-12)
    scale = np.sqrt(np.outer(np.diag(alone["scatter"]), np.diag(alone["scatter"])))
    np.testing.assert_allclose(several[0]["scatter"] / scale, alone["scatter"] / scale, atol=1e-12)


@pytest.mark.parametrize("shape", ["tall", "wide", "few"])
def test_the_reduction_is_that_of_one_host(alone, several, shape):
    for field in ("variance", "dim", "floored", "zeros"):
        assert several[0][f"{shape}/{field}"] == pytest.approx(alone[f"{shape}/{field}"], rel=1e-12)
    for field in ("projection", "points"):
        np.testing.assert_allclose(several[0][f"{shape}/{field}"], alone[f"{shape}/{field}"], atol=2e-6)


@pytest.mark.parametrize("name", [*NAMES, "ids", "plus", "minibatch++", "farthest", "few"])
def test_the_clustering_is_that_of_one_host(alone, several, name):
    mine, theirs = several[0], alone
    np.testing.assert_array_equal(mine[f"{name}/labels"], theirs[f"{name}/labels"])
    np.testing.assert_allclose(mine[f"{name}/centroids"], theirs[f"{name}/centroids"], atol=1e-5)
    np.testing.assert_allclose(mine[f"{name}/distances"], theirs[f"{name}/distances"], atol=1e-5)
    np.testing.assert_allclose(mine[f"{name}/objective"], theirs[f"{name}/objective"], rtol=1e-5)
    for field in ("splits", "iterations", "empty"):
        np.testing.assert_array_equal(mine[f"{name}/{field}"], theirs[f"{name}/{field}"])


def test_from_equal_initial_ids_faiss_finds_the_same_objective(several):
    found = kmeans_faiss.kmeans(blobs(), 9, 0, initial_ids=np.arange(9) * 30)
    np.testing.assert_array_equal(several[0]["ids/labels"], found.labels)
    assert several[0]["ids/objective"][-1] == pytest.approx(found.info["objective"][-1], rel=1e-6)
    plus = kmeans_faiss.kmeans(blobs(), 9, 5, init="kmeans++")
    assert several[0]["plus/objective"][0] == pytest.approx(plus.info["objective"][0], rel=1e-5)


@pytest.mark.parametrize("repair", ["split", "farthest"])
def test_empty_clusters_are_repaired_across_hosts(alone, several, repair):
    for found in (alone, several[0]):
        assert found[f"{repair}/splits"][0] == 3 and found[f"{repair}/empty"] == 0
    objectives = [found[f"{repair}/objective"][-1] for found in (alone, several[0])]
    assert objectives[1] == pytest.approx(objectives[0], rel=1e-4)


def test_distances_are_to_the_nearest_centroid(several):
    for name in (*NAMES, "ids", "plus", "split"):
        labels, centroids = several[0][f"{name}/labels"], several[0][f"{name}/centroids"].astype(np.float64)
        squared = ((blobs()[:, None] - centroids[None]) ** 2).sum(-1)
        own_squared = squared[np.arange(SIZE), labels]
        np.testing.assert_allclose(several[0][f"{name}/distances"], own_squared, atol=1e-6)
        if not name.startswith("pic"):
            np.testing.assert_allclose(own_squared, squared.min(1), atol=1e-6)


@pytest.mark.parametrize("name", ["fit", "fit/wide", "transform", *NAMES])
def test_a_bad_row_of_one_host_is_refused_on_all_by_its_id(several, name):
    for host in several:
        message = str(host[f"refused/{name}"])
        first = min(4, 7, 200) if not name.startswith("minibatch") else message.split()[5]
        assert message.startswith(f"DataError: the features of row {first} hold NaN")
        assert int(first) in (4, 7, 200)


def test_more_clusters_than_rows_are_refused_on_all(several):
    for name in ("many", "kmeans-auto/many", "kmeans-jax/many", "minibatch-auto/many", "spherical-jax/many"):
        for host in several:
            assert "more than the 7 rows" in str(host[f"refused/{name}"])


def test_too_little_memory_on_host_0_is_refused_on_all(several):
    for host in several:
        assert str(host["refused/memory"]).startswith("ConfigError: pic of 301 points")


def test_others_say_that_host_0_failed_and_why(several):
    first, *others = (str(host["refused/broken"]) for host in several)
    assert first == "RuntimeError: the disk is gone"
    for other in others:
        assert other.startswith("HostError: host 0 could not finish the clustering") and "the disk is gone" in other


def test_batches_hold_every_id_once_on_any_number_of_hosts(monkeypatch):
    points, seen = own(np.arange(1003, dtype=np.float32)[:, None]), []
    monkeypatch.setattr(minibatch._sharded, "place", lambda rows, ids, k, most: (rows, ids, most))
    monkeypatch.setattr(minibatch, "require_finite_everywhere", lambda rows, ids: None)
    monkeypatch.setattr(hosts, "count", lambda: 3)
    runs = minibatch._runs(1003, 256 * 7)
    assert runs.length == 7
    for index in range(3):
        monkeypatch.setattr(hosts, "index", lambda index=index: index)
        mine = own(points.array())
        for batch in minibatch._batches(runs, np.random.default_rng(0)):
            rows, ids, most = minibatch._placed(mine, runs, batch, 4, runs.batch)
            np.testing.assert_array_equal(rows[:, 0], ids)
            assert len(ids) <= most
            seen += [ids]
    np.testing.assert_array_equal(np.sort(np.concatenate(seen)), np.arange(1003))
