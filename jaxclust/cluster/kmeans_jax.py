"""k-means on any devices that JAX runs on, those of several hosts too; rows stay where they are."""

from functools import partial

import numpy as np
from ml_collections import ConfigDict

from jaxclust import hosts
from jaxclust.cluster import Clusterer, Clustering, Points, _lloyd, _sharded, require_finite_everywhere


def make(config: ConfigDict, nearest: int = 1) -> Clusterer:
    """`kmeans` as `config.cluster` describes it."""
    cluster = _lloyd.bind(kmeans, config.cluster, nearest)

    def run(points: Points, seed: int) -> Clustering:
        return cluster(points.array(), seed)

    return run


def kmeans(
    rows: np.ndarray,
    k: int,
    seed: int,
    *,
    iterations: int = 20,
    runs: int = 1,
    init: str = "rows",
    initial_ids: np.ndarray | None = None,
    reseed_empty: str = "split",
    nearest: int = 1,
) -> Clustering:
    """Exact k-means of rows float32 [N, d] into k clusters; as `kmeans_faiss.kmeans` in every way.

    On several hosts `rows` [n, d] are those of this one's ids, and the clustering is that of all N. Compiles once for
    each (N, d, k), or less often. Bit-identical from call to call on the same devices.
    """
    return _lloyd.run(engine, rows, k, seed, iterations, runs, init, initial_ids, reseed_empty, nearest)


def assign(rows: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Nearest of centroids [k, d] per row of [N, d]: labels int32 [N], squared distances [N]."""
    return _lloyd.assign(engine, rows, centroids)


def engine(rows: np.ndarray, k: int) -> _lloyd.Engine:
    """The rows float32 [n, d] of this host on the devices of all, for searches of k centroids."""
    size = int(hosts.total(np.asarray(len(rows))))
    ids = hosts.own_ids(size)
    require_finite_everywhere(rows, ids)
    placed = _sharded.place(rows, ids, k, most=-(-size // hosts.count()))
    return _lloyd.Engine(
        size=size,
        search=partial(_sharded.search, placed),
        rank=partial(_sharded.rank, placed),
        take=partial(_take, rows),
        spread=partial(_sharded.spread, placed),
        whole=partial(hosts.whole, size=size),
    )


def _take(rows: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """The rows `ids` [m], whichever hosts have them, [m, d]."""
    taken, own = np.zeros((len(ids), rows.shape[1]), np.float32), ids % hosts.count() == hosts.index()
    taken[own] = rows[ids[own] // hosts.count()]
    return hosts.total(taken)
