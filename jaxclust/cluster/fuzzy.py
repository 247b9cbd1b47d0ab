"""How certain each image's cluster is, from distances to centroids, and what it then weighs (UAD, section 2.4).

Fuzzy c-means: Bezdek, "Pattern Recognition with Fuzzy Objective Function Algorithms", 1981; possibilistic form:
Krishnapuram and Keller, "A possibilistic approach to clustering", 1993. All distances are squared L2.
"""

import logging
from collections.abc import Callable

import numpy as np
from scipy.special import softmax
from scipy.stats import rankdata

from jaxclust.errors import DataError

EPSILON = 1e-6  # added to squared distances of unit rows, whose rounding is of this order
NO_SPREAD = 1e-8  # mean of q below which there is nothing to weigh by
_logger = logging.getLogger(__name__)

Certainty = Callable[[np.ndarray, np.ndarray, float], np.ndarray]
"""(squared distances [N, r] to the nearest centroids, ascending; labels int [N]; fuzzifier m) -> c [N] in [0, 1]."""


def memberships(distances: np.ndarray, fuzzifier: float) -> np.ndarray:
    """u_il = (d_il + eps)^(-1/(m-1)) / sum_t (d_it + eps)^(-1/(m-1)), float64 [N, r]; infinitely far is 0."""
    with np.errstate(divide="ignore"):
        scores = -np.log(np.asarray(distances, np.float64) + EPSILON) / (fuzzifier - 1)
    u: np.ndarray = softmax(scores, axis=1)
    return u


def fcm(distances: np.ndarray, labels: np.ndarray, fuzzifier: float) -> np.ndarray:
    """(r u_i1 - 1) / (r - 1): 0 where all centroids are equally far, 1 on the own one."""
    r = distances.shape[1]
    return (r * memberships(distances, fuzzifier)[:, 0] - 1) / (r - 1)


def fcm_entropy(distances: np.ndarray, labels: np.ndarray, fuzzifier: float) -> np.ndarray:
    """1 - H(u_i) / log r."""
    u = memberships(distances, fuzzifier)
    logs = np.log(u, out=np.zeros_like(u), where=u > 0)
    return 1 + (u * logs).sum(axis=1) / np.log(u.shape[1])


def possibilistic(distances: np.ndarray, labels: np.ndarray, fuzzifier: float) -> np.ndarray:
    """1 / (1 + (d_i / eta)^(1/(m-1))), eta the mean distance in the own cluster, or in all where that says nothing."""
    own = distances[:, 0].astype(np.float64)
    counts = np.bincount(labels)
    scale = np.bincount(labels, weights=own) / np.maximum(counts, 1)
    scale = np.where((counts < 2) | (scale < EPSILON), max(own.mean(), EPSILON), scale)
    return 1 / (1 + (own / scale[labels]) ** (1 / (fuzzifier - 1)))


def gauss(distances: np.ndarray, labels: np.ndarray, fuzzifier: float) -> np.ndarray:
    """exp(-d_i / (2 s^2)), s^2 the mean distance."""
    own = distances[:, 0].astype(np.float64)
    return np.exp(-own / (2 * max(own.mean(), EPSILON)))


def rank(distances: np.ndarray, labels: np.ndarray, fuzzifier: float) -> np.ndarray:
    """1 - (rank of d_i within its cluster - 1/2) / n_k, ties at their average rank."""
    own = distances[:, 0]
    order = np.lexsort((own, labels))
    counts = np.bincount(labels)
    ends = np.cumsum(counts)
    c = np.empty(len(labels))
    for start, end in zip(ends - counts, ends, strict=True):
        members = order[start:end]
        if len(members):
            c[members] = 1 - (rankdata(own[members]) - 0.5) / len(members)
    return c


FORMS: dict[str, Certainty] = {
    "fcm": fcm,
    "fcm_entropy": fcm_entropy,
    "possibilistic": possibilistic,
    "gauss": gauss,
    "rank": rank,
}
COMPARING = ("fcm", "fcm_entropy")  # forms that look at other centroids than the own one


def certainty(form: str, distances: np.ndarray, labels: np.ndarray, fuzzifier: float) -> np.ndarray | None:
    """c [N] of one of FORMS from squared `distances` [N, r], ascending; None, said once, where it is undefined.

    Undefined is a comparison with a single centroid. DataError names the first image whose distance is no number.
    """
    finite = np.isfinite(distances[:, 0]) & ~np.isnan(distances).any(axis=1)
    if not finite.all():
        raise DataError(f"the distance of image {int(np.argmin(finite))} to its centroid is no number")
    if form in COMPARING and distances.shape[1] < 2:
        _logger.warning("uncertainty %s compares two centroids and there is one; every image weighs 1", form)
        return None
    return np.clip(FORMS[form](distances, labels, fuzzifier), 0, 1)


def capped(c: np.ndarray, labels: np.ndarray, smallest: int) -> np.ndarray:
    """c [N] with that of images in clusters of fewer than `smallest` at most the median: alone, all look certain."""
    small = np.bincount(labels)[labels] < smallest
    return np.where(small, np.minimum(c, np.median(c)), c)


def weights(c: np.ndarray, *, strength: float, power: float, largest: float, direction: str) -> np.ndarray:
    """w_i = (1 - lambda) + lambda q_i / mean(q), clipped at `largest` and divided by its mean; float32 [N], mean 1.

    q is c^power where certain images are to count more (`direction` "certain"), (1 - c)^power for "uncertain".
    The division by the mean keeps the relative spread: in many dimensions all c are small and alike.
    """
    q = (c if direction == "certain" else 1 - c) ** power
    mean = q.mean()
    if mean < NO_SPREAD:
        _logger.warning("all images are equally near to several centroids; every image weighs 1")
        return np.ones(len(c), np.float32)
    w = np.minimum((1 - strength) + strength * q / mean, largest)
    return (w / w.mean()).astype(np.float32)


def sampler_scale(w: np.ndarray, labels: np.ndarray) -> float:
    """Expected weight of an image drawn uniformly over clusters: the mean over clusters of their mean weight."""
    counts = np.bincount(labels)
    used = counts > 0
    return float((np.bincount(labels, weights=w)[used] / counts[used]).mean())
