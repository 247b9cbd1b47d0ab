"""The linear layer of the least DSCL loss, in closed form (section 5.2 of our specification).

Of rows x with an appended 1, X [N, D + 1], the least L of F = X W is K_b minus the d largest generalised eigenvalues of
(X^T C X, X^T X), and W their eigenvectors: linear discriminant analysis of rows that are not centred.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from jaxclust import hosts

_ZERO = 1e-12  # eigenvalues of X^T X below this share of the largest have no direction


class Moments(NamedTuple):
    """Sums over all rows, float64: X^T X [D + 1, D + 1], of each class sum of x [K, D + 1], and its size [K]."""

    products: NDArray[np.float64]
    sums: NDArray[np.float64]
    sizes: NDArray[np.float64]


class Optimum(NamedTuple):
    """The layer x @ kernel + bias, [D, d] and [d], its loss L, and how many directions the rows X have."""

    kernel: NDArray[np.float64]
    bias: NDArray[np.float64]
    loss: float
    rank: int


def moments(chunks: Iterable[tuple[NDArray[np.floating], NDArray[np.int32]]], dim: int, classes: int) -> Moments:
    """Of this host's rows [n, dim] and their classes [n], negative where a row does not count; every host gets all.

    `chunks` are read once.
    """
    products, sums, sizes = np.zeros((dim + 1, dim + 1)), np.zeros((classes, dim + 1)), np.zeros(classes)
    for rows, labels in chunks:
        known = labels >= 0
        x = np.column_stack([rows[known], np.ones(np.count_nonzero(known))]).astype(np.float64)
        products += x.T @ x
        np.add.at(sums, labels[known], x)
        sizes += np.bincount(labels[known], minlength=classes)
    return Moments(hosts.total(products), hosts.total(sums), hosts.total(sizes))


def optimum(m: Moments, d: int, ridge: float = 0.0) -> Optimum:
    """The layer to `d` numbers of the least L; with a `ridge` that share of its mean diagonal is added to X^T X.

    X W is then of unit length on average and its columns are orthogonal (but for the ridge). L is that of the layer
    without a ridge, and of X^T X + lam I with it. More numbers than X has directions are zero.
    """
    count = m.sizes.sum()
    scale = np.sqrt(np.maximum(np.diag(m.products), 0))  # columns may be of very different length
    scale[scale == 0] = 1
    within = m.products + ridge * np.trace(m.products) / len(scale) * np.eye(len(scale))
    values, vectors = linalg.eigh(within / np.outer(scale, scale))
    kept = values > _ZERO * values[-1]
    whitening = vectors[:, kept] / np.sqrt(values[kept]) / scale[:, None]
    inside = (m.sums / np.sqrt(np.maximum(m.sizes, 1))[:, None]) @ whitening  # J^T X (X^T X)^(-1/2)
    _, s, directions = linalg.svd(inside)  # all directions, of which s tells the first
    loss = np.count_nonzero(m.sizes) - float(np.sum(s[:d] ** 2))
    weights = np.zeros((len(scale), d))
    found = whitening @ directions[:d].T * np.sqrt(count / d)
    weights[:, : found.shape[1]] = found
    return Optimum(weights[:-1], weights[-1], loss, int(kept.sum()))
