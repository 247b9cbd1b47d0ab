"""Retrieval: whether the most similar other images of a split are of the same class.

Musgrave, Belongie, Lim, "A Metric Learning Reality Check", ECCV 2020, section 3.2 (MAP@R and R-precision).
"""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxclust import hosts
from jaxclust.cluster import Points
from jaxclust.errors import DataError
from jaxclust.evaluation._similar import most_similar
from jaxclust.evaluation.suite import Images

_logger = logging.getLogger(__name__)


def compare(images: Images, config: Any) -> dict[str, float]:
    """`retrieval/r@K` for each K of `config.evaluate.recall_at`, `retrieval/map@r` and so on by cosine (see `scores`).

    Of the test split, or without such of the training split.
    """
    split = images.test or images.train
    found = scores(split.rows(), split.labels, config.evaluate.recall_at)
    return {f"retrieval/{name}": value for name, value in found.items()}


def scores(
    rows: Points, labels: NDArray[np.int32], recall_at: Sequence[int], *, cosine: bool = True
) -> dict[str, float]:
    """`r@K` for each K of `recall_at`, `map@r` and `r-precision` of features [N, D] with labels [N].

    Each image asks for all others, ordered by cosine, or by Euclidean distance; of equally similar ones the lower id
    comes first. r@K: the share of queries with one of their class among the first K. With R other images of the class
    of a query, R-precision is the share of these among the first R. An image that is alone in its class finds nothing
    and does not ask (`left_out` says how many, and `queries` how many ask); one without a known label is not there at
    all. DataError if none can ask.
    """
    same = np.where(labels >= 0, np.bincount(np.maximum(labels, 0), labels >= 0)[labels].astype(np.int64) - 1, 0)
    asking = int(np.count_nonzero(same))
    alone = int(np.count_nonzero(labels >= 0)) - asking
    if not asking:
        raise DataError(f"none of {rows.shape[0]} images shares its class with another: nothing can be found")
    if alone and hosts.is_first():
        _logger.warning("retrieval: %d images that are alone in their class are left out", alone)
    ks = tuple(int(k) for k in recall_at)
    num = min(max(*ks, int(same.max())), rows.shape[0])
    sums = np.zeros(len(ks) + 2)
    for found in most_similar(rows, rows, num, labels >= 0, "retrieval", cosine=cosine):
        relevant = (labels[found.neighbours] == labels[found.ids, None]) & np.isfinite(found.similarity)
        relevant, r = relevant[same[found.ids] > 0], same[found.ids][same[found.ids] > 0]
        recalled = (relevant[:, :k].any(axis=1).sum() for k in ks)
        sums += [*recalled, average_precision(relevant, r).sum(), r_precision(relevant, r).sum()]
    names = [*(f"r@{k}" for k in ks), "map@r", "r-precision"]
    shares = dict(zip(names, (hosts.total(sums) / asking).tolist(), strict=True))
    return shares | {"queries": asking, "left_out": alone}


def average_precision(relevant: NDArray[np.bool_], r: NDArray[np.int64]) -> NDArray[np.float64]:
    """MAP@R's term of each query: (1 / R) sum over i <= R of precision at i where the i-th is relevant.

    Shapes: `relevant` bool [n, num] in the order of similarity, num >= max(r); r [n], how many are relevant at all.
    """
    rank = np.arange(1, relevant.shape[1] + 1)
    precision = np.cumsum(relevant, axis=1) / rank
    counted = relevant & (rank <= r[:, None])
    return np.where(counted, precision, 0).sum(axis=1) / r


def r_precision(relevant: NDArray[np.bool_], r: NDArray[np.int64]) -> NDArray[np.float64]:
    """The share of the first R that are relevant, of each query; shapes as in `average_precision`."""
    return (relevant & (np.arange(1, relevant.shape[1] + 1) <= r[:, None])).sum(axis=1) / r


def index_table(rows: Points, labels: NDArray[np.int32], num: int, *, cosine: bool = True) -> NDArray[np.int32]:
    """The ids of each image itself and of the `num` most similar others with a known label, int32 [N, num + 1].

    -1 where there are no more. On every host, which all must call it.
    """
    found = [np.empty((0, num), np.int32)]
    for block in most_similar(rows, rows, min(num, rows.shape[0]), labels >= 0, "neighbours", cosine=cosine):
        ids = np.where(np.isfinite(block.similarity), block.neighbours, -1)
        found.append(np.pad(ids, ((0, 0), (0, num - ids.shape[1])), constant_values=-1))
    others = hosts.whole(np.concatenate(found), rows.shape[0])
    return np.column_stack([np.arange(rows.shape[0], dtype=np.int32), others])
