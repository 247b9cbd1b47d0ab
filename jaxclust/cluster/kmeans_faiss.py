"""k-means on the host, with the search of faiss."""

import numpy as np
from ml_collections import ConfigDict
from scipy import sparse

from jaxclust.cluster import Clusterer, Clustering, _faiss, _lloyd

_CHUNK = 1 << 14  # members are summed in float32 by chunks, and the chunks in float64


def make(settings: ConfigDict) -> Clusterer:
    """`kmeans` as `config.cluster` describes it."""
    return _lloyd.bind(kmeans, settings)


def kmeans(
    rows: np.ndarray,
    k: int,
    seed: int,
    *,
    iterations: int = 20,
    runs: int = 1,
    initial_ids: np.ndarray | None = None,
    reseed_empty: str = "split",
) -> Clustering:
    """Exact k-means of rows float32 [N, d] into k clusters, on all rows, not spherical.

    Each of `runs` starts from its own k distinct rows, drawn from (seed, run), or all from the rows
    `initial_ids` int [k]; the lowest objective is kept. An empty cluster takes half of another
    (`reseed_empty` "split") or the row farthest from its centroid ("farthest"). ConfigError for
    k < 1 or N < k, DataError for rows that are not finite. Source: DeepCluster, Caron et al. 2018.
    """
    return _lloyd.run(_engine, rows, k, seed, iterations, runs, initial_ids, reseed_empty)


def assign(rows: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Nearest of centroids [k, d] per row of [N, d]: labels int32 [N], squared distances [N]."""
    return _lloyd.assign(_engine, rows, centroids)


def _engine(rows: np.ndarray, k: int) -> _lloyd.Search:
    def search(centroids: np.ndarray) -> _lloyd.Assigned:
        distances, labels = _faiss.search(rows, centroids, 1)
        labels = labels[:, 0]
        return _lloyd.Assigned(labels, distances[:, 0], _sums(rows, labels, k))

    return search


def _sums(rows: np.ndarray, labels: np.ndarray, k: int) -> np.ndarray:
    """Sums of the members of each cluster, float64 [k, d]."""
    sums = np.zeros((k, rows.shape[1]))
    for start in range(0, len(rows), _CHUNK):
        part, members = rows[start : start + _CHUNK], labels[start : start + _CHUNK]
        one_hot = (np.ones(len(part), np.float32), members, np.arange(len(part) + 1))
        sums += sparse.csr_array(one_hot, shape=(len(part), k)).T @ part
    return sums
