"""Weighted nearest neighbours: the classes of the most similar training images vote for that of a test image.

Wu, Xiong, Yu, Lin, "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", CVPR 2018, section 3.4.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxclust import hosts
from jaxclust.errors import DataError
from jaxclust.evaluation._similar import Found, most_similar
from jaxclust.evaluation.suite import Images

LEARNS_CLASSES = True


def compare(images: Images, config: Any) -> dict[str, float]:
    """`knn/top1` and `knn/top5` of the test images; without such each training image is classified by the others.

    `config.evaluate.knn_k` neighbours by cosine vote with exp(similarity / `knn_temperature`). Images without a known
    label neither vote nor count. Of equal classes the lower one wins, of equally similar images that of lower id. A
    class that nobody votes for is no guess.
    """
    bank, queries = images.train, images.test or images.train
    known = bank.labels >= 0
    if bank is queries and np.count_nonzero(known) < 2:
        raise DataError("one training image with a label has no neighbours; give more, or a test split")
    num = min(config.evaluate.knn_k, bank.rows().shape[0])
    sums = np.zeros(3)
    for found in most_similar(queries.rows(), bank.rows(), num, known, "nearest neighbours"):
        own = queries.labels[found.ids]
        hits = ranked(found, bank.labels, config.evaluate.knn_temperature) == own[:, None]
        sums += hits[own >= 0, 0].sum(), hits[own >= 0].any(axis=1).sum(), np.count_nonzero(own >= 0)
    top1, top5, count = hosts.total(sums)
    return {"knn/top1": top1 / count, "knn/top5": top5 / count}


def ranked(found: Found, labels: NDArray[np.int32], temperature: float) -> NDArray[np.int64]:
    """The five classes with most votes for each query, [n, 5], -1 where fewer have one; `labels` [N] of the bank."""
    classes = max(int(labels.max()) + 1, 5)
    voting = np.isfinite(found.similarity)
    # The largest similarity is taken off, which leaves the order as it is, so that no power overflows.
    power = np.where(voting, found.similarity - found.similarity.max(axis=1, keepdims=True), 0).astype(np.float64)
    rows, places = np.nonzero(voting)
    of = rows, labels[found.neighbours[rows, places]]
    votes = np.full((len(voting), classes), -1.0)
    votes[of] = 0
    np.add.at(votes, of, np.exp(power / temperature)[voting])
    order = np.argsort(-votes, axis=1, kind="stable")[:, :5]
    return np.where(np.take_along_axis(votes, order, axis=1) >= 0, order, -1)
