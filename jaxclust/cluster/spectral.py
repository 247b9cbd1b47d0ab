"""Read-outs of features by eigenvectors: rows whose directions are clusters.

`normalised` is the one of Law, Urtasun and Zemel, "Deep Spectral Clustering Learning", ICML 2017 (section 7 of our
specification); `ng_jordan_weiss` that of "On Spectral Clustering: Analysis and an algorithm", NIPS 2001, on a sparse
graph. Both see all rows that are to be compared, and no labels.
"""

from typing import NamedTuple

import numpy as np
from scipy import linalg, sparse
from scipy.sparse.linalg import ArpackNoConvergence, eigsh

from jaxclust import hosts
from jaxclust.cluster import Chunked, Points, _memory, finite_chunks
from jaxclust.cluster import neighbours as knn
from jaxclust.cluster._on_first import gathered
from jaxclust.cluster.reduce import Kept, Matrix
from jaxclust.errors import ConfigError, DataError

RTOL = 1e-5  # singular values of float32 features below this share of the largest are rounding
LOCAL = 7  # the neighbour whose distance is the local scale (Zelnik-Manor and Perona, NIPS 2004)
DENSE = 1000  # rows up to which all of a graph's eigenvectors are found at once
FIELD = "config.evaluate.njw_neighbours"

_TINY = 1e-12  # lengths below this are zero


class Basis(NamedTuple):
    """Rows F [n, d] become (F - mean) @ projection = U_r, orthonormal columns; float64 [d] and [d, r]."""

    mean: np.ndarray
    projection: np.ndarray


def normalised(rows: Kept, *, center: bool = False, rtol: float = RTOL) -> Points:
    """Rows of the left singular vectors U_r of F [N, d] at unit length: float32 [N, r], kept as `rows` are.

    The dot product of two rows depends on the column space of F alone, so F A gives the same for any invertible A. A
    row of zeros stays one. `center` takes the mean of all rows off first. `rtol`: see `fit`. Every host must call it.
    """
    basis = fit(rows, center=center, rtol=rtol)
    out = rows.like((basis.projection.shape[1],), np.float32)
    for chunk in rows.chunks():
        out.append(unit((chunk - basis.mean) @ basis.projection).astype(np.float32))
    return out.finish()


def fit(rows: Chunked, *, center: bool = False, rtol: float = RTOL) -> Basis:
    """The map of F [N, d] to its left singular vectors, by QR and the SVD of the small factor, in float64.

    Columns are scaled to unit length first, which does not change their space; directions with a singular value below
    `rtol` of the largest are left out (sections 4 and 7). DataError for rows that are not finite, and if all are zero.
    Reads the rows once, or twice to centre them. Every host must call it, and gets the same.
    """
    size, width = rows.shape
    mean = np.zeros(width)
    if center:
        mean = hosts.total(sum((chunk.sum(axis=0, dtype=np.float64) for chunk in finite_chunks(rows)), mean)) / size
    factor = np.zeros((width, width))
    for chunk in finite_chunks(rows):
        factor = _triangle(np.concatenate([factor, chunk - mean]))
    if hosts.count() > 1:
        every = np.zeros((hosts.count(), width, width))
        every[hosts.index()] = factor
        factor = _triangle(hosts.total(every).reshape(-1, width))
    lengths = np.linalg.norm(factor, axis=0)
    rounding = np.finfo(np.float32).eps * np.sqrt(size) * np.abs(mean)  # what a constant column leaves when centred
    lengths[lengths <= rounding] = np.inf  # such a column is zero
    _, values, right = linalg.svd(factor / lengths)
    rank = int(np.count_nonzero(values > rtol * values[0]))
    if not rank:
        raise DataError(f"all {size} rows are {'the same' if center else 'zero'}: they span no space")
    return Basis(mean, right[:rank].T / values[:rank] / lengths[:, None])


def _triangle(rows: np.ndarray) -> np.ndarray:
    """R [d, d] of the QR decomposition of rows [n >= d, d]."""
    return np.asarray(np.linalg.qr(rows, mode="r"))


def ng_jordan_weiss(
    rows: Matrix, k: int, *, neighbours: int, scale: str, backend: str, seed: int, deadline: float
) -> Points:
    """`embedding` of the rows F [N, d] of all hosts, made on the first: float32 [N, k], kept as `rows` are.

    Every host must call it; HostError if host 0 has not done it after `deadline` seconds.
    """
    size, dim = rows.shape
    graph, vectors = 72 * 2 * size * neighbours, 8 * size * (4 * k + 40)  # of ARPACK some 2 k, and what is made of them
    needed = max(knn.memory(size, dim, neighbours), graph + vectors) + 2 * size * dim * 4
    _memory.require(needed, f"spectral clustering of {size:,} rows with {neighbours} neighbours each")
    for _ in finite_chunks(rows):
        pass
    held = gathered(rows)
    made = hosts.from_first(
        lambda: {"rows": embedding(held, k, neighbours=neighbours, scale=scale, backend=backend, seed=seed)},
        "the spectral clustering", deadline,
    )  # fmt: skip
    out = rows.like((k,), np.float32)
    out.append(made["rows"][hosts.own_ids(size)])
    return out.finish()


def embedding(rows: np.ndarray, k: int, *, neighbours: int, scale: str, backend: str, seed: int) -> np.ndarray:
    """The k top eigenvectors of the normalised graph of F [N, d], its rows at unit length: float32 [N, k].

    Ng, Jordan and Weiss 2001 with the affinity of `affinity` between the unit rows of F, where each has edges to its
    `neighbours` nearest, searched by `backend`. Vectors start from `seed`. ConfigError if there are not more rows than
    `neighbours` and than k; DataError if the eigenvectors are not found.
    """
    size = len(rows)
    if k >= size:
        raise ConfigError(f"spectral clustering into {k} clusters needs more rows; there are {size}")
    nearest = knn.neighbours(unit(rows).astype(np.float32), neighbours, backend, field=FIELD)
    graph = affinity(nearest, scale)
    roots = sparse.diags_array(1 / np.sqrt(np.maximum(graph.sum(axis=1), _TINY)))
    normal = roots @ graph @ roots
    if size <= DENSE:
        return unit(linalg.eigh(normal.toarray(), subset_by_index=[size - k, size - 1])[1]).astype(np.float32)
    try:
        start = np.random.default_rng(seed).standard_normal(size)
        return unit(eigsh(normal, k, which="LA", v0=start)[1]).astype(np.float32)
    except ArpackNoConvergence as error:
        raise DataError(
            f"the graph of {size} rows has too many nearly equal eigenvalues ({error}); try a larger {FIELD}"
        ) from error


def affinity(found: knn.Neighbours, scale: str) -> sparse.csr_array:
    """A [N, N], sparse, symmetric and with a diagonal of 0: an edge where either row is a neighbour of the other.

    With squared distances D of unit rows its weight is for `scale` "local" exp(-D / (s_i s_j)), s_i the distance of row
    i to its 7th neighbour; for "median" exp(-D / (2 s^2)), s the median distance of neighbours; for "cosine"
    max(0, 1 - D / 2).
    """
    size, num = found.ids.shape
    distances = np.sqrt(found.distances)
    if scale == "cosine":
        weights = np.maximum(1 - found.distances / 2, 0)
    elif scale == "median":
        weights = np.exp(-found.distances / (2 * max(float(np.median(distances)), _TINY) ** 2))
    else:
        own = np.maximum(distances[:, min(LOCAL, num) - 1], _TINY)
        weights = np.exp(-(distances / own[:, None]) * (distances / own[found.ids]))
    starts = np.arange(0, size * num + 1, num)
    directed = sparse.csr_array((weights.ravel(), found.ids.ravel(), starts), shape=(size, size))
    return sparse.csr_array(directed.maximum(directed.T))


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows [n, d] at unit length; one of zeros stays."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(lengths > _TINY, lengths, 1)
