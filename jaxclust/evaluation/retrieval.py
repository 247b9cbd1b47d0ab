"""Retrieval: whether the most similar other images of a split are of the same class.

Musgrave, Belongie, Lim, "A Metric Learning Reality Check", ECCV 2020, section 3.2 (MAP@R).
"""

import logging
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxclust import hosts
from jaxclust.errors import DataError
from jaxclust.evaluation._similar import most_similar
from jaxclust.evaluation.suite import Images

_logger = logging.getLogger(__name__)


def compare(images: Images, config: Any) -> dict[str, float]:
    """`retrieval/r@K` for each K of `config.evaluate.recall_at`, and `retrieval/map@r`.

    Each image of the test split, or without such of the training split, asks for all others of it, ordered by cosine;
    of equally similar ones the lower id comes first. R@K: the share of queries with one of their class among the first
    K. An image that is alone in its class finds nothing and does not ask (`retrieval/left_out` says how many, and
    `retrieval/queries` how many ask); an image without a known label is not there at all.
    """
    split = images.test or images.train
    labels, rows = split.labels, split.rows()
    same = np.where(labels >= 0, np.bincount(np.maximum(labels, 0), labels >= 0)[labels].astype(np.int64) - 1, 0)
    asking = int(np.count_nonzero(same))
    alone = int(np.count_nonzero(labels >= 0)) - asking
    if not asking:
        raise DataError(f"none of {rows.shape[0]} images shares its class with another: nothing can be found")
    if alone and hosts.is_first():
        _logger.warning("retrieval: %d images that are alone in their class are left out", alone)
    ks = tuple(int(k) for k in config.evaluate.recall_at)
    num = min(max(*ks, int(same.max())), rows.shape[0])
    sums = np.zeros(len(ks) + 1)
    for found in most_similar(rows, rows, num, labels >= 0, "retrieval"):
        relevant = (labels[found.neighbours] == labels[found.ids, None]) & np.isfinite(found.similarity)
        relevant, r = relevant[same[found.ids] > 0], same[found.ids][same[found.ids] > 0]
        sums += [*(relevant[:, :k].any(axis=1).sum() for k in ks), average_precision(relevant, r).sum()]
    shares = (hosts.total(sums) / asking).tolist()
    recalls = {f"retrieval/r@{k}": share for k, share in zip(ks, shares, strict=False)}
    return recalls | {"retrieval/map@r": shares[-1], "retrieval/queries": asking, "retrieval/left_out": alone}


def average_precision(relevant: NDArray[np.bool_], r: NDArray[np.int64]) -> NDArray[np.float64]:
    """MAP@R's term of each query: (1 / R) sum over i <= R of precision at i where the i-th is relevant.

    Shapes: `relevant` bool [n, num] in the order of similarity, num >= max(r); r [n], how many are relevant at all.
    """
    rank = np.arange(1, relevant.shape[1] + 1)
    precision = np.cumsum(relevant, axis=1) / rank
    counted = relevant & (rank <= r[:, None])
    return np.where(counted, precision, 0).sum(axis=1) / r
