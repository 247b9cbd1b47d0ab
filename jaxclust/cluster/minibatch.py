"""Mini-batch k-means of points that need not fit in memory, on all devices of all hosts.

Sculley, "Web-scale k-means clustering", WWW 2010: every row moves its nearest centroid towards itself by 1 / the
number of rows that the centroid has met, which makes it their mean. Departures: a batch is made of short runs of rows,
since single ones are slow to read; every pass takes each run once, in another order; centroids without rows are drawn
anew.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from jaxclust import hosts
from jaxclust.cluster import (
    Clusterer,
    Clustering,
    Nearest,
    Points,
    _lloyd,
    _race,
    _sharded,
    require_finite_everywhere,
)  # fmt: skip
from jaxclust.progress import progress

_RUN = 64  # ids of a run at most
_RUNS = 256  # runs of a batch at least, if it has so many rows: files are often in the order of classes
_PATIENCE = 10  # rows for each cluster, in the mean, after which one that got none is drawn anew
_SAMPLE = 3  # rows for each cluster at least of which k-means++ draws


class Runs(NamedTuple):
    """N ids in `number` runs of `length`, the last one shorter; `batch` of them make a batch.

    The same on any number of hosts, each of which has its own ids of every run.
    """

    size: int
    length: int
    number: int
    batch: int

    def most(self, batch: int) -> int:
        """Rows that a host has at most of so many runs."""
        return batch * -(-self.length // hosts.count())


def make(config: ConfigDict, nearest: int = 1) -> Clusterer:
    """`minibatch` as `config.cluster` describes it."""
    c = config.cluster

    def run(points: Points, seed: int) -> Clustering:
        return minibatch(points, c.k, seed, passes=c.iterations, batch_rows=c.batch_rows, init=c.init, nearest=nearest)

    return run


def minibatch(
    points: Points, k: int, seed: int, *, passes: int, batch_rows: int, init: str = "rows", nearest: int = 1
) -> Clustering:
    """Clusters the points float32 [N, d] of all hosts in `passes` over them, in batches of about `batch_rows` rows.

    In memory are a batch, the centroids, and labels and distances [N]. `init` draws k distinct "rows", or those of
    "kmeans++" from a first sample. `info["objective"]` has the sum of squared distances in each pass, while centroids
    move, and then of the result; `info["splits"]` the centroids drawn anew in each pass. ConfigError for N < k,
    DataError for rows that are not finite.
    """
    _lloyd.check_size(points.shape[0], k)
    runs = _runs(points.shape[0], batch_rows)
    rng = np.random.default_rng(seed)
    centroids = _first(points, runs, k, seed, init).astype(np.float64)  # small steps are lost in float32
    weights, met = np.zeros(k, np.int64), np.zeros(k, np.int64)  # rows of each centroid, and lately
    objective, splits = [], []
    for number in progress(range(passes), passes, "mini-batch k-means", "passes"):
        objective.append(0.0)
        splits.append(0)
        for batch in _batches(runs, rng):
            found = _sharded.search(_placed(points, runs, batch, k, runs.batch), centroids.astype(np.float32))
            objective[-1] += found.objective
            weights += found.counts
            met += found.counts
            centroids += (found.sums - found.counts[:, None] * centroids) / np.maximum(weights, 1)[:, None]
            if met.sum() >= _PATIENCE * k and number < passes - 1:
                lost = np.flatnonzero(met == 0)
                centroids[lost], weights[lost] = _take(points, rng.choice(runs.size, len(lost), replace=False)), 0
                splits[-1] += len(lost)
                met[:] = 0
    near = _assigned(points, runs, centroids.astype(np.float32), min(nearest, k))
    labels, distances = near.ids[:, 0], near.distances[:, 0]
    objective.append(float(distances.sum(dtype=np.float64)))
    empty = int(np.count_nonzero(np.bincount(labels, minlength=k) == 0))
    info = {"objective": objective, "splits": splits, "iterations": passes, "empty": empty}
    return Clustering(labels, distances, centroids.astype(np.float32), info, near if nearest > 1 else None)


def _runs(size: int, batch_rows: int) -> Runs:
    length = min(max(batch_rows // _RUNS, 1), _RUN)
    number = -(-size // length)
    return Runs(size, length, number, min(max(batch_rows // length, 1), number))


def _batches(runs: Runs, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Every run once, in batches of numbers that rise, so that files are read forwards."""
    order = rng.permutation(runs.number)
    for start in range(0, runs.number, runs.batch):
        yield np.sort(order[start : start + runs.batch])


def _placed(points: Points, runs: Runs, batch: np.ndarray, k: int, room: int) -> _sharded.Placed:
    """This host's rows of the runs `batch` on the devices, with room for `room` runs; DataError as for all."""
    count, index = hosts.count(), hosts.index()
    starts = batch * runs.length
    ends = np.minimum(starts + runs.length, runs.size)
    # Of the ids below an end, the first (end - index) / count, rounded up, are this host's.
    firsts, lasts = (-(-(edges - index) // count) for edges in (starts, ends))
    spans = [(first, last) for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True) if first < last]
    none = np.empty((0, points.shape[1]), np.float32)
    rows = np.concatenate([none, *(points.read(first, last - first) for first, last in spans)])
    ids = index + count * np.concatenate([np.empty(0, int), *(np.arange(first, last) for first, last in spans)])
    require_finite_everywhere(rows, ids)
    return _sharded.place(rows, ids, k, runs.most(room))


def _first(points: Points, runs: Runs, k: int, seed: int, init: str) -> np.ndarray:
    """The first centroids, [k, d]."""
    if init == "rows":
        return _take(points, _lloyd.draw_initial_ids(runs.size, k, seed))
    wanted = min(max(runs.batch, -(-_SAMPLE * k // runs.length)), runs.number)
    sample = np.sort(np.random.default_rng([seed, 0]).permutation(runs.number)[:wanted])
    return _sharded.spread(_placed(points, runs, sample, k, wanted), _race.keys(k, seed, 0))


def _take(points: Points, ids: np.ndarray) -> np.ndarray:
    """The points `ids` [m], whichever hosts have them, [m, d]."""
    taken = np.zeros((len(ids), points.shape[1]), np.float32)
    for place in np.flatnonzero(ids % hosts.count() == hosts.index()):
        taken[place] = points.read(int(ids[place]) // hosts.count(), 1)[0]
    return hosts.total(taken)


def _assigned(points: Points, runs: Runs, centroids: np.ndarray, num: int) -> Nearest:
    """The `num` nearest centroids of all points, by id."""
    ids, step = hosts.own_ids(runs.size), runs.most(runs.batch)
    found = Nearest(np.empty((len(ids), num), np.int32), np.empty((len(ids), num), np.float32))
    for start in range(0, -(-runs.size // hosts.count()), step):  # as often on every host
        own = ids[start : start + step]
        rows = points.read(start, len(own))
        require_finite_everywhere(rows, own)
        part = slice(start, start + len(own))
        placed = _sharded.place(rows, own, len(centroids), step)
        found.ids[part], found.distances[part] = _lloyd.ranked(_sharded.rank(placed, centroids, num), rows, centroids)
    return Nearest(hosts.whole(found.ids, runs.size), hosts.whole(found.distances, runs.size))
