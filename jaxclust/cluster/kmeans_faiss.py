"""k-means on the host, with the search of faiss."""

import numpy as np
from ml_collections import ConfigDict
from scipy import sparse

from jaxclust.cluster import Clusterer, Clustering, Nearest, _faiss, _lloyd, _race, require_finite
from jaxclust.cluster._on_first import on_first_host

_CHUNK = 1 << 14  # members are summed in float32 by chunks, and the chunks in float64


def make(config: ConfigDict, nearest: int = 1) -> Clusterer:
    """`kmeans` as `config.cluster` describes it, by host 0 for all."""
    cluster = _lloyd.bind(kmeans, config.cluster, nearest)
    return on_first_host(cluster, memory, "kmeans with cluster.backend=faiss", config)


def memory(size: int, dim: int, settings: ConfigDict) -> int:
    """Bytes that `kmeans` needs beside `size` rows of `dim` columns: labels, distances and some sets of centroids."""
    return size * 32 + settings.k * dim * 64


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
    """Exact k-means of rows float32 [N, d] into k clusters, on all rows, not spherical.

    Each of `runs` starts from its own k rows, drawn from (seed, run), or all from the rows `initial_ids` int [k]; the
    lowest objective is kept. `init` draws distinct "rows" or those of "kmeans++", each with a probability in
    proportion to its squared distance to the nearest row drawn before (Arthur and Vassilvitskii 2007). An empty
    cluster takes half of another (`reseed_empty` "split") or the row farthest from its centroid ("farthest").
    `nearest` is how many centroids the last search tells for each row (at most k), which costs no further one.
    ConfigError for k < 1 or N < k, DataError for rows that are not finite. Source: DeepCluster, Caron et al. 2018.
    """
    return _lloyd.run(engine, rows, k, seed, iterations, runs, init, initial_ids, reseed_empty, nearest)


def assign(rows: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Nearest of centroids [k, d] per row of [N, d]: labels int32 [N], squared distances [N]."""
    return _lloyd.assign(engine, rows, centroids)


def engine(rows: np.ndarray, k: int) -> _lloyd.Engine:
    """The rows float32 [N, d], searched by faiss for k centroids."""
    require_finite(rows)

    def search(centroids: np.ndarray) -> _lloyd.Found:
        nearest, ids = _faiss.search(rows, centroids, 1)
        labels, distances = ids[:, 0], nearest[:, 0]
        counts = np.bincount(labels, minlength=k)
        objective = float(distances.sum(dtype=np.float64))
        return _lloyd.Found(objective, counts, _sums(rows, labels, k), lambda: (labels, distances))

    def rank(centroids: np.ndarray, num: int) -> Nearest:
        distances, ids = _faiss.search(rows, centroids, num)
        return Nearest(ids, distances)

    return _lloyd.Engine(
        size=len(rows),
        search=search,
        rank=rank,
        take=lambda ids: rows[ids],
        spread=lambda keys: _spread(rows, keys),
        whole=lambda values: values,
    )


def _sums(rows: np.ndarray, labels: np.ndarray, k: int) -> np.ndarray:
    """Sums of the members of each cluster, float64 [k, d]."""
    sums = np.zeros((k, rows.shape[1]))
    for start in range(0, len(rows), _CHUNK):
        part, members = rows[start : start + _CHUNK], labels[start : start + _CHUNK]
        one_hot = (np.ones(len(part), np.float32), members, np.arange(len(part) + 1))
        sums += sparse.csr_array(one_hot, shape=(len(part), k)).T @ part
    return sums


def _spread(rows: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """The rows that k-means++ draws with `keys` uint32 [k], [k, d]."""
    ids = np.arange(len(rows), dtype=np.uint32)
    squares = np.einsum("nd,nd->n", rows, rows)
    closest = np.full(len(rows), np.inf, np.float32)
    chosen = []
    for key in keys:
        chosen.append(new := int(np.argmin(_race.arrivals(np, ids, key, closest))))
        distances = np.maximum(squares - 2 * (rows @ rows[new]) + squares[new], 0)
        closest = np.minimum(closest, distances)
        closest[new] = -1
    return rows[chosen]
