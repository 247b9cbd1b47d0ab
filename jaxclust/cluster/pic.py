"""Power iteration clustering on a graph of nearest neighbours, which finds the number of clusters itself.

Lin and Cohen, "Power Iteration Clustering", ICML 2010, in the variant of DeepCluster (Caron et al. 2018): the power
iteration gives each image a height, and a cluster is all that climbs to the same peak.
"""

from functools import partial

import numpy as np
from ml_collections import ConfigDict
from scipy import sparse
from scipy.sparse import csgraph

from jaxclust.cluster import Clusterer, Clustering, Nearest, backend, own_distances
from jaxclust.cluster import neighbours as knn
from jaxclust.cluster._on_first import on_first_host


def make(config: ConfigDict, nearest: int = 1) -> Clusterer:
    """`pic` as `config.cluster` describes it, by host 0 for all; the `nearest` are means of its clusters."""
    own = config.cluster.pic
    cluster = partial(
        pic,
        neighbours=own.neighbours,
        sigma=own.sigma,
        alpha=own.alpha,
        iterations=own.iterations,
        merge_singletons=own.merge_singletons,
        backend=backend(config.cluster.backend),
        nearest=nearest,
    )
    return on_first_host(cluster, memory, "pic", config)


def memory(size: int, dim: int, settings: ConfigDict) -> int:
    """Bytes that `pic` needs beside `size` rows of `dim` columns: those of the search, or the graph with the copies
    that sorting it takes."""
    edges = 2 * size * settings.pic.neighbours
    return max(knn.memory(size, dim, settings.pic.neighbours), edges * 72 + size * 64)


def pic(
    rows: np.ndarray,
    seed: int,
    *,
    neighbours: int,
    sigma: float,
    alpha: float,
    iterations: int,
    merge_singletons: bool,
    backend: str,
    nearest: int = 1,
) -> Clustering:
    """Clusters of rows float32 [N, d] by power iteration; nothing is random, so `seed` changes nothing.

    Each row has edges to its `neighbours` nearest rows, searched by `backend` ("faiss" or "jax"), of weight
    exp(-squared distance / sigma^2); `alpha` is the share of the graph in each of the power `iterations`. Clusters are
    numbered by their peaks' ids; centroids are means. `info` also has `components` (of the graph) and `merged`
    (clusters of one row that joined another); `certainty` is that of `agreement`.
    Small `alpha` and few neighbours make many small, pure clusters. With `nearest` > 1 the means are searched once, and
    told are the own one, which need not be the nearest, and the nearest others.
    ConfigError if neighbours >= N, DataError for rows that are not finite.
    """
    rows = np.ascontiguousarray(rows, np.float32)
    found = knn.neighbours(rows, neighbours, backend)
    graph = affinity(found, sigma)
    labels = consecutive(peaks(ascent(graph, power_iteration(graph, alpha, iterations))))
    merged = 0
    if merge_singletons:
        labels, merged = without_singletons(labels, found.ids)
    centroids = means(rows, labels)
    info = {
        "objective": [0.0],  # there is none
        "splits": [],
        "iterations": iterations,
        "empty": 0,
        "components": int(csgraph.connected_components(graph, directed=False, return_labels=False)),
        "merged": merged,
    }
    distances, certainty = own_distances(rows, labels, centroids), agreement(found, sigma, labels)
    others = nearest_means(rows, labels, centroids, nearest, backend) if nearest > 1 else None
    return Clustering(labels, distances, centroids, info, others, certainty)


def nearest_means(rows: np.ndarray, labels: np.ndarray, centroids: np.ndarray, num: int, backend: str) -> Nearest:
    """Of each row the own centroid and the `num` - 1 nearest others, or as many as there are."""
    num = min(num, len(centroids))
    found = knn.among(centroids, rows, num, backend)
    others = np.argsort(found == labels[:, None], axis=1, kind="stable")[:, : num - 1]  # the own one is put last
    ids = np.concatenate([labels[:, None], np.take_along_axis(found, others, axis=1)], axis=1)
    return Nearest(ids, np.stack([own_distances(rows, column, centroids) for column in ids.T], axis=1))


def affinity(found: knn.Neighbours, sigma: float) -> sparse.csr_array:
    """W = A + A^T, float64 [N, N] sparse, where A_ij = exp(-D_ij / sigma^2) for the neighbours j of i.

    Mutual neighbours thus have the sum of both. A weight too small for float64 is no edge.
    """
    size, num = found.ids.shape
    with np.errstate(over="ignore"):  # of D / sigma^2, whose exponential is then 0, as it should be
        weights = np.exp(-(found.distances / sigma / sigma))
    starts = np.arange(0, size * num + 1, num)
    directed = sparse.csr_array((weights.ravel(), found.ids.ravel(), starts), shape=(size, size))
    graph = sparse.csr_array(directed + directed.T)
    graph.eliminate_zeros()
    graph.sort_indices()
    return graph


def agreement(found: knn.Neighbours, sigma: float, labels: np.ndarray) -> np.ndarray:
    """Share of each row's weights exp(-D / sigma^2) that is to neighbours in its own cluster, float64 [N]; 0 of 0."""
    with np.errstate(over="ignore"):
        weights = np.exp(-(found.distances / sigma / sigma))
    own = np.where(labels[found.ids] == labels[:, None], weights, 0).sum(axis=1)
    whole = weights.sum(axis=1)
    return np.divide(own, whole, out=np.zeros_like(whole), where=whole > 0)


def power_iteration(graph: sparse.csr_array, alpha: float, iterations: int) -> np.ndarray:
    """Heights float64 [N]: N v less a constant, of v <- alpha W^T v + (1 - alpha) / N, v <- v / sum(v), v^0 = 1 / N.

    With a small alpha, v is 1 / N plus a tiny term, whose differences would be lost in rounding. Hence N v is kept in
    two parts, N v = base + height: the base is the same for all images, and the heights are sums of positive terms,
    each as precise as float64 is, however small.
    """
    base, height = 1.0, np.zeros(graph.shape[0])
    for _ in range(iterations):
        flow = alpha * (graph @ (base + height))  # W is symmetric
        total = 1 - alpha + flow.mean()  # the sum of v, by which both parts are divided
        if total == 0:  # alpha is 1 and there is no edge: v stays as it is
            break
        base, height = (1 - alpha) / total, flow / total
    return height


def ascent(graph: sparse.csr_array, height: np.ndarray) -> np.ndarray:
    """Pointers p int [N]: p(i) = argmax_j W_ij (height_j - height_i) if that is positive, else i, a peak.

    Of tied neighbours the one with the lowest id is taken. Heights rise along pointers, so there are no cycles.
    """
    ids = np.arange(graph.shape[0])
    source, target = np.repeat(ids, np.diff(graph.indptr)), graph.indices
    slope = graph.data * (height[target] - height[source])
    up = np.flatnonzero(slope > 0)
    up = up[np.lexsort((-slope[up], source[up]))]  # steepest first; being stable, it keeps ties in column order
    climbers, steepest = np.unique(source[up], return_index=True)
    ids[climbers] = target[up[steepest]]
    return ids


def peaks(pointers: np.ndarray) -> np.ndarray:
    """Where each path of pointers int [N] ends, int [N], by doubling its length until nothing moves."""
    while not np.array_equal(further := pointers[pointers], pointers):
        pointers = further
    return pointers


def consecutive(names: np.ndarray) -> np.ndarray:
    """Labels int32 [N] from 0 on, in increasing order of names int [N]."""
    return np.unique(names, return_inverse=True)[1].astype(np.int32)


def without_singletons(labels: np.ndarray, neighbours: np.ndarray) -> tuple[np.ndarray, int]:
    """Moves each cluster of one row to that of its nearest neighbour in a larger one; returns how many moved.

    Shapes: labels int32 [N], neighbours int [N, num], nearest first -> labels int32 [N]. Larger means before any move,
    so a singleton among singletons stays.
    """
    sizes = np.bincount(labels)
    alone = np.flatnonzero(sizes[labels] == 1)
    near = labels[neighbours[alone]]
    larger = sizes[near] > 1
    moves = larger.any(axis=1)
    moved = labels.copy()
    moved[alone[moves]] = near[moves, larger[moves].argmax(axis=1)]
    return consecutive(moved), int(np.count_nonzero(moves))


def means(rows: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Mean of the rows float32 [N, d] of each label, float32 [K, d], summed in float64; no label may be unused."""
    order = np.argsort(labels, kind="stable")
    counts = np.bincount(labels)
    sums = np.add.reduceat(rows[order], np.cumsum(counts) - counts, axis=0, dtype=np.float64)
    return (sums / counts[:, None]).astype(np.float32)
