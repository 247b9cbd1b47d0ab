"""PCA-whitening of rows that need not fit in memory (DeepCluster, Caron et al. 2018, section 3)."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, Self

import jax
import numpy as np
from scipy import linalg

from jaxclust import hosts
from jaxclust.cluster import Chunked, Points, finite_chunks, warn_once
from jaxclust.errors import DataError
from jaxclust.ops import distances

_FLOOR = 1e-7  # smallest eigenvalue that is divided by, relative to the largest
_ZERO = 1e-24  # squared norm below which a row counts as zero


class Fillable(Points, Protocol):
    """Points that are still to come."""

    def append(self, chunk: np.ndarray) -> None:
        """Adds rows [n, d]."""

    def finish(self) -> Self:
        """Declares them complete."""


class Kept(Chunked, Protocol):
    """Rows that know where as many others should be kept."""

    def like(self, row_shape: tuple[int, ...], dtype: Any) -> Fillable:
        """A matrix without rows, to be filled with as many."""


class Matrix(Points, Kept, Protocol):
    """All that `features.rows.Rows` offers to who reads it."""


class Whitening(NamedTuple):
    """Rows become (row - mean) @ projection; `mean` float32 [D], `projection` float32 [D, d]."""

    mean: Any
    projection: Any


def reduced_dim(size: int, width: int, dim: int) -> int:
    """Columns that `fit` keeps of [size, width] rows."""
    return min(dim, width, size - 1) if dim else width


def fit(rows: Chunked, dim: int, *, power: float = 1.0) -> tuple[Whitening, dict[str, Any]]:
    """Fits the first min(dim, D, N - 1) principal components, divided by their standard deviation to the `power`.

    Power 1 whitens (equal variances), 0 only rotates.

    `dim` 0 only subtracts the mean. The shapes depend on (N, D, dim) alone, never on the values.
    `info`: `variance` (share kept), `dim`, `floored` (components whose variance was too small to
    divide by). DataError for N < 2 and for rows that are not finite. Reads the rows once, in
    float64, and holds min(N, D)^2 numbers besides. Every host must call it, and gets the same.
    """
    size, width = rows.shape
    if size < 2:
        raise DataError(f"{size} rows are too few to whiten: at least 2 images are needed.")
    if dim == 0:
        mean, _ = _moments(rows, scatter=False)
        projection = np.eye(width, dtype=np.float32)
        return Whitening(mean.astype(np.float32), projection), _info(1.0, width, 0)
    kept = reduced_dim(size, width, dim)
    if kept < dim:
        warn_once(
            f"cluster.pca_dim={dim} is reduced to {kept}: {size} rows of {width} features have no more components."
        )
    mean, values, vectors, total = _principal(rows, kept)
    floor = _FLOOR * values[0]
    scale = np.maximum(values, floor) ** (-power / 2)
    vectors *= np.where(np.take_along_axis(vectors, _peaks(vectors), axis=0) < 0, -scale, scale)
    floored = int(np.count_nonzero(values < floor))
    share = float(values.sum() / total)
    whitening = Whitening(mean.astype(np.float32), _of_first(vectors.astype(np.float32)))
    return whitening, _info(share, kept, floored)


def transform(rows: Kept, whitening: Whitening, *, l2: bool) -> tuple[Points, int]:
    """Whitens this host's rows, with unit rows if `l2`; see `mapped`."""
    mean, projection = jax.device_put(tuple(whitening))
    return mapped(rows, lambda chunk: _whiten(chunk, mean, projection, l2))


def mapped(rows: Kept, function: Callable[[Any], Any]) -> tuple[Points, int]:
    """`function` of this host's rows [n, D], by chunks: float32 [N, d] kept as `rows` are, and how many of the rows
    of all hosts became zero. DataError for rows that are not finite.
    """
    width = jax.eval_shape(function, jax.ShapeDtypeStruct((1, rows.shape[1]), np.float32)).shape[1]
    out, zeros = rows.like((width,), np.float32), 0
    for chunk in finite_chunks(rows):
        points = np.asarray(function(chunk))
        zeros += int(np.count_nonzero(np.einsum("nd,nd->n", points, points) < _ZERO))
        out.append(points)
    return out.finish(), int(hosts.total(np.asarray(zeros)))


_whiten = jax.jit(distances.whiten, static_argnames="l2")


def _info(variance: float, dim: int, floored: int) -> dict[str, Any]:
    return {"variance": variance, "dim": dim, "floored": floored}


def _moments(rows: Chunked, *, scatter: bool) -> tuple[np.ndarray, np.ndarray]:
    """Mean [D] and scatter [D, D] (0 unless asked for), merged over chunks and hosts (Chan et al. 1979)."""
    size, width = rows.shape
    count, mean, total = 0, np.zeros(width), np.zeros((width, width) if scatter else ())
    for chunk in finite_chunks(rows):
        x = chunk.astype(np.float64)
        n, shift = len(x), x.mean(axis=0) - mean
        if scatter:
            x -= mean + shift
            total += x.T @ x
            total += np.outer(shift, shift * (count * n / (count + n)))
        count += n
        mean += shift * (n / count)
    if hosts.count() == 1:
        return mean, total
    overall = hosts.total(mean * (count / size))
    if scatter:
        total += np.outer(mean - overall, (mean - overall) * count)
    return overall, hosts.total(total)


def _principal(rows: Chunked, kept: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Mean [D], largest variances [kept], their directions [D, kept], total variance."""
    size, width = rows.shape
    if size < width:  # the rows, in float64, are smaller than their D x D scatter
        own = np.concatenate([np.empty((0, width)), *finite_chunks(rows)])
        centred = hosts.whole(own, size)
        mean = centred.mean(axis=0)
        centred -= mean
        square = centred @ centred.T / size
    else:
        mean, scatter = _moments(rows, scatter=True)
        square = scatter / size
    total = float(np.trace(square))
    # Differences that are mere float32 rounding of the mean are no variance: constant features
    # then map to zero instead of to amplified noise.
    if total <= np.finfo(np.float32).eps ** 2 * float(mean @ mean):
        return mean, np.ones(kept), np.zeros((width, kept)), 1.0
    top = [len(square) - kept, len(square) - 1]
    values, vectors = linalg.eigh(square, subset_by_index=top)
    values, vectors = np.maximum(values[::-1], 0), vectors[:, ::-1]
    if size < width:
        lengths = np.sqrt(size * np.maximum(values, _FLOOR * values[0]))
        vectors = centred.T @ vectors / lengths
    return mean, values, np.ascontiguousarray(vectors), total


def _peaks(vectors: np.ndarray) -> np.ndarray:
    """Row of each column's largest absolute entry, [1, d]: made positive, it fixes the sign."""
    return np.argmax(np.abs(vectors), axis=0)[None]


def _of_first(array: np.ndarray) -> np.ndarray:
    """The array of host 0 on every host: another processor may round differently, and turn equal variances."""
    return hosts.total(array if hosts.is_first() else np.zeros_like(array))
