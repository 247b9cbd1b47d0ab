"""Lloyd's algorithm, shared by the k-means back ends, which differ only in who searches, and by spherical k-means.

Source: the k-means of faiss (Johnson, Douze, Jégou, "Billion-scale similarity search with GPUs"),
as DeepCluster uses it: exact, random distinct rows as first centroids, empty clusters repaired
after every update.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from jaxclust.cluster import Clustering, Nearest, _race, own_distances
from jaxclust.errors import ConfigError

_NUDGE = 1 / 1024  # how far donor and receiver of a split move, relative to each coordinate
_WALK_SEED = 1234  # every repair draws alike, so that a fixed point is one


class Found(NamedTuple):
    """One search. Of all rows: `objective`, the sum of squared distances, and of each cluster's members `counts`
    int [k] and `sums` [k, d]. `own()` gives labels int [n] and squared distances float32 [n] of this host's rows."""

    objective: float
    counts: np.ndarray
    sums: np.ndarray
    own: Callable[[], tuple[np.ndarray, np.ndarray]]


class Engine(NamedTuple):
    """Rows float32 [N, d] where the searching is done, those of all hosts if a back end works on several.

    Every host must then call the same functions.
    """

    size: int  # N
    search: Callable[[np.ndarray], Found]  # of centroids float32 [k, d]
    rank: Callable[[np.ndarray, int], Nearest]  # (centroids, num) -> the nearest of them to this host's rows [n, num]
    take: Callable[[np.ndarray], np.ndarray]  # ids int [m] -> rows [m, d]
    spread: Callable[[np.ndarray], np.ndarray]  # keys of `_race` uint32 [k] -> k rows far from each other [k, d]
    whole: Callable[[np.ndarray], np.ndarray]  # values of this host's rows [n] -> of all rows by id [N]


MakeEngine = Callable[[np.ndarray, int], Engine]
"""(this host's rows float32 [n, d], k) -> Engine; DataError for rows that are not finite."""

Update = Callable[[Engine, Found, np.ndarray], tuple[np.ndarray, int]]
"""(engine, what a search found, the centroids it was of) -> the next centroids, how many of them had no rows."""


def bind(
    kmeans: Callable[..., Clustering], settings: ConfigDict, nearest: int
) -> Callable[[np.ndarray, int], Clustering]:
    """A back end's `kmeans` with the values of `config.cluster`."""

    def cluster(rows: np.ndarray, seed: int) -> Clustering:
        return kmeans(
            rows,
            settings.k,
            seed,
            iterations=settings.iterations,
            runs=settings.runs,
            init=settings.init,
            reseed_empty=settings.reseed_empty,
            nearest=nearest,
        )

    return cluster


def run(
    make_engine: MakeEngine,
    rows: np.ndarray,
    k: int,
    seed: int,
    iterations: int,
    runs: int,
    init: str,
    initial_ids: np.ndarray | None,
    reseed_empty: str,
    nearest: int,
) -> Clustering:
    """k-means of rows float32 [N, d]; see `kmeans_faiss.kmeans` for the arguments."""
    _check(runs, init, reseed_empty)
    rows = np.ascontiguousarray(rows, np.float32)
    engine = make_engine(rows, k)
    check_size(engine.size, k)
    if initial_ids is None:
        starts = [partial(_INITS[init], engine, k, seed, run) for run in range(runs)]
    elif np.shape(initial_ids) == (k,):
        starts = [partial(engine.take, np.asarray(initial_ids))]
    else:
        raise ValueError(f"initial_ids has shape {np.shape(initial_ids)}, not ({k},)")
    return lowest(engine, rows, starts, iterations, partial(means, _REPAIRS[reseed_empty]), min(nearest, k))


def lowest(
    engine: Engine,
    rows: np.ndarray,
    starts: Sequence[Callable[[], np.ndarray]],
    iterations: int,
    update: Update,
    num: int,
) -> Clustering:
    """The clustering of lowest objective, of those that descend from the centroids that `starts` make."""
    results = (_descend(engine, rows, start(), iterations, update, num) for start in starts)
    return min(results, key=lambda result: result.info["objective"][-1])


def draw_initial_ids(size: int, k: int, seed: int, run: int = 0) -> np.ndarray:
    """k distinct row ids out of `size`, int64 [k]: the same for every back end."""
    return np.random.default_rng([seed, run]).choice(size, k, replace=False)


def _distinct(engine: Engine, k: int, seed: int, run: int) -> np.ndarray:
    return engine.take(draw_initial_ids(engine.size, k, seed, run))


def _spread(engine: Engine, k: int, seed: int, run: int) -> np.ndarray:
    return engine.spread(_race.keys(k, seed, run))


def assign(make_engine: MakeEngine, rows: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Nearest centroid of each row: labels int32 [N] and squared distances float32 [N]."""
    rows = np.ascontiguousarray(rows, np.float32)
    return final(make_engine(rows, len(centroids)), rows, np.ascontiguousarray(centroids, np.float32), 1)[:2]


def check_size(size: int, k: int) -> None:
    """ConfigError unless `size` rows make k clusters."""
    if k < 1:
        raise ConfigError(f"cluster.k={k} must be at least 1.")
    if size < k:
        raise ConfigError(
            f"cluster.k={k} is more than the {size} rows there are to cluster; "
            f"set cluster.k to {size} or less, or give more images."
        )


def _check(runs: int, init: str, reseed_empty: str) -> None:
    if runs < 1:
        raise ConfigError(f"cluster.runs={runs} must be at least 1.")
    if init not in _INITS:
        raise ConfigError(f"cluster.init={init!r} is unknown. There is: {', '.join(_INITS)}.")
    if reseed_empty not in _REPAIRS:
        raise ConfigError(f"cluster.reseed_empty={reseed_empty!r} is unknown. There is: {', '.join(_REPAIRS)}.")


def _descend(
    engine: Engine, rows: np.ndarray, centroids: np.ndarray, iterations: int, update: Update, num: int
) -> Clustering:
    """One run from these centroids; stops early where nothing would change any more."""
    objective, splits = [], []
    for _ in range(iterations):
        found = engine.search(centroids)
        objective.append(found.objective)
        moved, empty = update(engine, found, centroids)
        splits.append(empty)
        if np.array_equal(moved, centroids):
            break
        centroids = moved
    labels, distances, nearest = final(engine, rows, centroids, num)
    objective.append(float(distances.sum(dtype=np.float64)))
    empty = int(np.count_nonzero(np.bincount(labels, minlength=len(centroids)) == 0))
    info = {"objective": objective, "splits": splits, "iterations": len(splits), "empty": empty}
    return Clustering(labels, distances, centroids, info, nearest)


def means(repair: Callable[..., Any], engine: Engine, found: Found, centroids: np.ndarray) -> tuple[np.ndarray, int]:
    """The update of k-means: the mean of each cluster's members, empty ones repaired."""
    moved = (found.sums / np.maximum(found.counts, 1)[:, None]).astype(np.float32)
    empty = int(np.count_nonzero(found.counts == 0))
    if empty:
        moved, _ = repair(moved, found.counts, engine, found)
    return moved, empty


def final(
    engine: Engine, rows: np.ndarray, centroids: np.ndarray, num: int
) -> tuple[np.ndarray, np.ndarray, Nearest | None]:
    """Labels and distances of a last search, and the `num` nearest centroids if there are more than the own one."""
    found = ranked(engine.rank(centroids, num), rows, centroids)
    nearest = Nearest(engine.whole(found.ids), engine.whole(found.distances))
    return nearest.ids[:, 0], nearest.distances[:, 0], nearest if num > 1 else None


def ranked(found: Nearest, rows: np.ndarray, centroids: np.ndarray) -> Nearest:
    """What a search found, the distance to the nearest one from the difference, free of cancellation, and none of the
    others below it."""
    ids = np.ascontiguousarray(found.ids, np.int32)
    own = own_distances(rows, ids[:, 0], centroids)[:, None]
    return Nearest(ids, np.concatenate([own, np.maximum(found.distances[:, 1:], own)], axis=1))


def split(centroids: np.ndarray, counts: np.ndarray, engine: Engine, found: Found) -> tuple[np.ndarray, np.ndarray]:
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


def farthest(centroids: np.ndarray, counts: np.ndarray, engine: Engine, found: Found) -> tuple[np.ndarray, np.ndarray]:
    """Moves each empty cluster to a row of its own, those farthest from their centroids first."""
    centroids, counts = centroids.copy(), counts.copy()
    empty = np.flatnonzero(counts == 0)
    distances = engine.whole(found.own()[1])
    centroids[empty] = engine.take(np.argsort(-distances, kind="stable")[: len(empty)])
    counts[empty] = 1
    return centroids, counts


_INITS = {"rows": _distinct, "kmeans++": _spread}
_REPAIRS = {"split": split, "farthest": farthest}
