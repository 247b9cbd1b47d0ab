"""Spherical k-means, which clusters directions, with the searches of k-means on any back end.

Dhillon and Modha, "Concept decompositions for large sparse text data using clustering", Machine Learning 2001, as
DeepCluster-v2 uses it: random rows as first centroids, which are unit vectors from then on, and an empty one stays
where it is. Of unit centroids the nearest to a row is the one with the largest product, so a search need not know.
"""

from functools import partial

import numpy as np
from ml_collections import ConfigDict

from jaxclust.cluster import Clusterer, Clustering, Points, _lloyd, kmeans_backend, kmeans_faiss, kmeans_jax
from jaxclust.cluster._on_first import on_first_host
from jaxclust.errors import ConfigError


def make(config: ConfigDict, nearest: int = 1) -> Clusterer:
    """`spherical` as `config.cluster` describes it; ConfigError for other first centroids than rows."""
    c = config.cluster
    if c.init != "rows":
        raise ConfigError(f"config.cluster.init={c.init!r}: cluster.method='spherical' begins with rows")

    def cluster(make_engine: _lloyd.MakeEngine, rows: np.ndarray, seed: int) -> Clustering:
        return spherical(make_engine, rows, c.k, seed, iterations=c.iterations, runs=c.runs, nearest=nearest)

    if kmeans_backend(c.backend) == "jax":
        return partial(_own_rows, partial(cluster, kmeans_jax.engine))
    name = "spherical k-means with cluster.backend=faiss"
    return on_first_host(partial(cluster, kmeans_faiss.engine), kmeans_faiss.memory, name, config)


def _own_rows(cluster: partial[Clustering], points: Points, seed: int) -> Clustering:
    return cluster(points.array(), seed)


def spherical(
    make_engine: _lloyd.MakeEngine,
    rows: np.ndarray,
    k: int,
    seed: int,
    *,
    iterations: int = 10,
    runs: int = 1,
    nearest: int = 1,
) -> Clustering:
    """Clusters rows float32 [N, d], which should be unit vectors, by their largest product with k unit centroids.

    A row of zeros has no direction: it is never a first centroid, moves none, and what cluster it gets says nothing.
    Otherwise as `kmeans_faiss.kmeans`; `info["splits"]` counts the empty clusters of each iteration. ConfigError where
    fewer than k rows have a direction.
    """
    rows = np.ascontiguousarray(rows, np.float32)
    engine = make_engine(rows, k)
    usable = np.flatnonzero(engine.whole(np.any(rows != 0, axis=1)))
    _lloyd.check_size(len(usable), k)
    starts = [partial(_first, engine, usable, k, seed, run) for run in range(runs)]
    return _lloyd.lowest(engine, rows, starts, iterations, _directions, min(nearest, k))


def _first(engine: _lloyd.Engine, usable: np.ndarray, k: int, seed: int, run: int) -> np.ndarray:
    drawn = engine.take(usable[_lloyd.draw_initial_ids(len(usable), k, seed, run)])
    return _units(drawn, drawn)


def _directions(engine: _lloyd.Engine, found: _lloyd.Found, centroids: np.ndarray) -> tuple[np.ndarray, int]:
    return _units(found.sums, centroids), int(np.count_nonzero(found.counts == 0))


def _units(sums: np.ndarray, otherwise: np.ndarray) -> np.ndarray:
    """Rows of unit length, float32; where a row is zero, that of `otherwise`."""
    norms = np.linalg.norm(sums.astype(np.float64), axis=1, keepdims=True)
    return np.where(norms > 0, sums / np.where(norms > 0, norms, 1), otherwise).astype(np.float32)
