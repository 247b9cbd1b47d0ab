"""Spherical k-means on both back ends, against a slow double."""

import numpy as np
import pytest

from jaxclust import cluster
from jaxclust.cluster import _lloyd, kmeans_faiss, kmeans_jax, spherical
from jaxclust.config import base
from jaxclust.errors import ConfigError
from jaxclust.features.rows import Rows

ENGINES = pytest.mark.parametrize("engine", [kmeans_faiss.engine, kmeans_jax.engine], ids=["faiss", "jax"])


def directions(size=300, dim=6, seed=0):
    rows = np.random.default_rng(seed).normal(size=(size, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def slow_spherical(rows, ids, iterations):
    """Products, sums and norms in float64."""
    rows = rows.astype(np.float64)
    centroids = rows[ids]
    for _ in range(iterations):
        labels = (rows @ centroids.T).argmax(axis=1)
        for c in range(len(centroids)):
            total = rows[labels == c].sum(axis=0)
            if (labels == c).any():
                centroids[c] = total / np.linalg.norm(total)
    return (rows @ centroids.T).argmax(axis=1), centroids


@ENGINES
def test_labels_and_centroids_are_those_of_the_slow_double(engine):
    rows = directions()
    found = spherical.spherical(engine, rows, 8, 3, iterations=10)
    labels, centroids = slow_spherical(rows, _lloyd.draw_initial_ids(300, 8, 3), 10)
    np.testing.assert_array_equal(found.labels, labels)
    np.testing.assert_allclose(found.centroids, centroids, atol=1e-6)
    assert found.centroids.dtype == np.float32 and found.info["iterations"] <= 10
    np.testing.assert_allclose(found.distances, 2 - 2 * (rows * centroids[labels]).sum(axis=1), atol=1e-5)


@ENGINES
def test_an_empty_centroid_keeps_its_value(engine):
    distinct = directions(3, 4)
    found = spherical.spherical(engine, np.repeat(distinct, 20, axis=0), 8, 0)
    assert found.info["empty"] == 5 and set(found.info["splits"]) == {5}
    np.testing.assert_allclose((found.centroids @ distinct.T).max(axis=1), 1, rtol=1e-6)
    search = _lloyd.Found(0.0, np.array([2, 0]), np.array([[3.0, 4.0], [0.0, 0.0]]), None)
    moved, empty = spherical._directions(None, search, np.array([[1, 0], [-0.6, 0.8]], np.float32))
    np.testing.assert_allclose(moved, [[0.6, 0.8], [-0.6, 0.8]], rtol=1e-6)
    assert empty == 1


@ENGINES
def test_rows_of_zeros_change_nothing(engine):
    rows = directions(80)
    places = np.sort(np.random.default_rng(1).choice(200, 80, replace=False))
    holes = np.zeros((200, 6), np.float32)
    holes[places] = rows
    whole, found = (spherical.spherical(engine, x, 7, 1) for x in (rows, holes))
    np.testing.assert_allclose(found.centroids, whole.centroids, atol=1e-6)
    np.testing.assert_array_equal(found.labels[places], whole.labels)
    with pytest.raises(ConfigError, match=r"cluster.k=81 is more than the 80 rows"):
        spherical.spherical(engine, holes, 81, 0)


@pytest.mark.parametrize("backend", ["faiss", "jax"])
def test_it_is_a_clustering_like_others(backend):
    config = base().cluster
    config.method, config.backend, config.k, config.iterations = "spherical", backend, 5, 4
    points = Rows(300, (6,), np.float32, 1 << 30, None)
    points.append(directions())
    whole = base()
    whole.cluster = config
    found = cluster.get(whole, 3)(points.finish(), 11)
    labels, _ = slow_spherical(directions(), _lloyd.draw_initial_ids(300, 5, 11), 4)
    np.testing.assert_array_equal(found.labels, labels)
    assert found.nearest.ids.shape == (300, 3) and (found.nearest.ids[:, 0] == labels).all()
    whole.cluster.init = "kmeans++"
    with pytest.raises(ConfigError, match="cluster.method='spherical' begins with rows"):
        cluster.get(whole)
