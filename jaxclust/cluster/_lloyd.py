"""Lloyd's algorithm, shared by the k-means back ends, which differ only in who searches.

Source: the k-means of faiss (Johnson, Douze, Jégou, "Billion-scale similarity search with GPUs"),
as DeepCluster uses it: exact, random distinct rows as first centroids, empty clusters repaired
after every update.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from jaxclust.cluster import Clusterer, Clustering, own_distances, require_finite, warn_once
from jaxclust.errors import ConfigError

_NUDGE = 1 / 1024  # how far donor and receiver of a split move, relative to each coordinate
_WALK_SEED = 1234  # every repair draws alike, so that a fixed point is one
_POINTS_PER_CENTROID = 39  # below this faiss too warns that centroids are poorly determined


class Assigned(NamedTuple):
    """One search: labels int [N], squared distances float32 [N], sums of members [k, d]."""

    labels: np.ndarray
    distances: np.ndarray
    sums: np.ndarray


Search = Callable[[np.ndarray], Assigned]
"""Centroids float32 [k, d] -> Assigned, for rows that it already holds."""

Engine = Callable[[np.ndarray, int], Search]
"""(rows float32 [N, d], k) -> Search: puts the rows where the searching is done."""


def bind(kmeans: Callable[..., Clustering], settings: ConfigDict) -> Clusterer:
    """A back end's `kmeans` with the values of `config.cluster`."""

    def cluster(rows: np.ndarray, seed: int) -> Clustering:
        return kmeans(
            rows,
            settings.k,
            seed,
            iterations=settings.iterations,
            runs=settings.runs,
            reseed_empty=settings.reseed_empty,
        )

    return cluster


def run(
    engine: Engine,
    rows: np.ndarray,
    k: int,
    seed: int,
    iterations: int,
    runs: int,
    initial_ids: np.ndarray | None,
    reseed_empty: str,
) -> Clustering:
    """k-means of rows float32 [N, d]; see `kmeans_faiss.kmeans` for the arguments."""
    rows = np.ascontiguousarray(rows, np.float32)
    _check(rows, k, runs, initial_ids, reseed_empty)
    search = engine(rows, k)
    if initial_ids is not None:
        starts = [np.asarray(initial_ids)]
    else:
        starts = [draw_initial_ids(len(rows), k, seed, run) for run in range(runs)]
    results = (_descend(search, rows, ids, iterations, reseed_empty) for ids in starts)
    return min(results, key=lambda result: result.info["objective"][-1])


def draw_initial_ids(size: int, k: int, seed: int, run: int = 0) -> np.ndarray:
    """k distinct row ids out of `size`, int64 [k]: the same for every back end."""
    return np.random.default_rng([seed, run]).choice(size, k, replace=False)


def assign(engine: Engine, rows: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Nearest centroid of each row: labels int32 [N] and squared distances float32 [N]."""
    rows = np.ascontiguousarray(rows, np.float32)
    require_finite(rows)
    return _final(engine(rows, len(centroids)), rows, np.ascontiguousarray(centroids, np.float32))


def _check(rows: np.ndarray, k: int, runs: int, initial_ids: np.ndarray | None, reseed_empty: str) -> None:
    if k < 1:
        raise ConfigError(f"cluster.k={k} must be at least 1.")
    if len(rows) < k:
        raise ConfigError(
            f"cluster.k={k} is more than the {len(rows)} rows there are to cluster; "
            f"set cluster.k to {len(rows)} or less, or give more images."
        )
    if runs < 1:
        raise ConfigError(f"cluster.runs={runs} must be at least 1.")
    if reseed_empty not in _REPAIRS:
        known = ", ".join(_REPAIRS)
        raise ConfigError(f"cluster.reseed_empty={reseed_empty!r} is unknown. There is: {known}.")
    if initial_ids is not None and np.shape(initial_ids) != (k,):
        raise ValueError(f"initial_ids has shape {np.shape(initial_ids)}, not ({k},)")
    require_finite(rows)
    if len(rows) < _POINTS_PER_CENTROID * k:
        warn_once(
            f"{len(rows)} rows for cluster.k={k} clusters: fewer than {_POINTS_PER_CENTROID} for "
            "each, so the centroids are uncertain. Give more images or lower cluster.k."
        )


def _descend(
    search: Search, rows: np.ndarray, initial_ids: np.ndarray, iterations: int, reseed_empty: str
) -> Clustering:
    """One run from the rows `initial_ids`; stops early where nothing would change any more."""
    repair = _REPAIRS[reseed_empty]
    centroids = rows[initial_ids]
    objective, splits = [], []
    for _ in range(iterations):
        found = search(centroids)
        objective.append(float(found.distances.sum(dtype=np.float64)))
        counts = np.bincount(found.labels, minlength=len(centroids))
        means = (found.sums / np.maximum(counts, 1)[:, None]).astype(np.float32)
        splits.append(int(np.count_nonzero(counts == 0)))
        if splits[-1]:
            means, counts = repair(means, counts, rows, found.distances)
        if np.array_equal(means, centroids):
            break
        centroids = means
    labels, distances = _final(search, rows, centroids)
    objective.append(float(distances.sum(dtype=np.float64)))
    empty = int(np.count_nonzero(np.bincount(labels, minlength=len(centroids)) == 0))
    info = {"objective": objective, "splits": splits, "iterations": len(splits), "empty": empty}
    return Clustering(labels, distances, centroids, info)


def _final(search: Search, rows: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Labels of a last search; the distances are those of the differences, free of cancellation."""
    labels = search(centroids).labels.astype(np.int32)
    return labels, own_distances(rows, labels, centroids)


def split(
    centroids: np.ndarray, counts: np.ndarray, rows: np.ndarray, distances: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Fills each empty cluster with half of a donor, as faiss does; returns centroids and counts.

    Walks the clusters cyclically from 0 and stops at donor j with probability (n_j - 1) / (N - k).
    Both copies are nudged apart in alternating directions by 1/1024 of each coordinate.
    """
    centroids, counts = centroids.copy(), counts.copy()
    rng = np.random.default_rng(_WALK_SEED)
    nudge = np.where(np.arange(centroids.shape[1]) % 2 == 0, _NUDGE, -_NUDGE).astype(np.float32)
    room = max(int(counts.sum()) - len(counts), 1)
    for receiver in np.flatnonzero(counts == 0):
        stops = np.array([], int)
        while not len(stops):  # one draw per cluster and lap
            stops = np.flatnonzero(rng.random(len(counts)) < (counts - 1) / room)
        donor = stops[0]
        centroids[receiver] = centroids[donor] * (1 + nudge)
        centroids[donor] *= 1 - nudge
        counts[receiver] = counts[donor] // 2
        counts[donor] -= counts[receiver]
    return centroids, counts


def farthest(
    centroids: np.ndarray, counts: np.ndarray, rows: np.ndarray, distances: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Moves each empty cluster to a row of its own, those farthest from their centroids first."""
    centroids, counts = centroids.copy(), counts.copy()
    empty = np.flatnonzero(counts == 0)
    centroids[empty] = rows[np.argsort(-distances, kind="stable")[: len(empty)]]
    counts[empty] = 1
    return centroids, counts


_REPAIRS = {"split": split, "farthest": farthest}
