"""Exact nearest neighbours of each row among all other rows."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from jaxclust.cluster import _faiss, require_finite
from jaxclust.errors import ConfigError
from jaxclust.ops import distances as ops
from jaxclust.progress import progress

_NUMBERS = 1 << 25  # distances or differences held at once
_SPARE = 8  # candidates beyond those needed, since float32 may misplace rows that are almost equally near

Search = Callable[[np.ndarray, int], np.ndarray]
"""(x float32 [n, d], num) -> ids [n, num] of the nearest of the rows that it holds, nearest first."""


class Neighbours(NamedTuple):
    """For each of N rows: `ids` int32 [N, num], nearest first, and `distances` float64 [N, num], squared L2."""

    ids: np.ndarray
    distances: np.ndarray


class Distinct(NamedTuple):
    """Equal rows taken as one: `rows` float32 [U, d] in the order of their first ids, `group` int [N] of each id,
    and `members` int [U, m], the lowest ids of each group, ascending, with -1 where there are no more."""

    rows: np.ndarray
    group: np.ndarray
    members: np.ndarray


def memory(size: int, dim: int, num: int) -> int:
    """Bytes that `neighbours` needs beside `size` rows of `dim` columns: copies to find equal rows by, what is held
    at once, and the result."""
    return size * (6 * dim * 4 + 12 * num + 64) + 16 * _NUMBERS


def neighbours(rows: np.ndarray, num: int, backend: str, *, field: str = "config.cluster.pic.neighbours") -> Neighbours:
    """The `num` nearest other rows of each of rows float32 [N, d]; of equally near ones, the lowest ids.

    A row is never its own neighbour, equal rows are at distance 0. Candidates are searched in float32 by `backend`,
    "faiss" or "jax", then measured and ordered in float64, so keep the data near the origin. Memory beyond the rows
    is bounded. ConfigError, naming `field`, for num >= N; DataError for rows that are not finite.
    """
    rows = np.ascontiguousarray(rows, np.float32)
    size, dim = rows.shape
    if num >= size:
        raise ConfigError(
            f"{field}={num} needs at least {num + 1} images; there are {size}. Lower it or give more images."
        )
    require_finite(rows)
    distinct = group_equal(rows, num + 1)
    search = _BACKENDS[backend](distinct.rows)
    count = min(num + 1 + _SPARE, len(distinct.rows))
    width = max(len(distinct.rows), count * max(dim, distinct.members.shape[1]))
    chunk = min(max(_NUMBERS // width, 1), size)
    found = Neighbours(np.empty((size, num), np.int32), np.empty((size, num)))
    for start in progress(range(0, size, chunk), -(-size // chunk), "nearest neighbours", "chunks"):
        first = min(start, size - chunk)  # chunks of one length, so that JAX compiles once
        part = np.arange(first, first + chunk)
        found.ids[part], found.distances[part] = _closest(rows, part, distinct, search(rows[part], count), num)
    return found


def among(candidates: np.ndarray, rows: np.ndarray, num: int, backend: str) -> np.ndarray:
    """Ids int32 [N, num] of the nearest of `candidates` [K, d] to each of rows [N, d], both float32, nearest first."""
    search, size = _BACKENDS[backend](candidates), len(rows)
    chunk = min(max(_NUMBERS // len(candidates), 1), size)
    ids = np.empty((size, num), np.int32)
    for start in range(0, size, chunk):
        first = min(start, size - chunk)  # chunks of one length, as above
        ids[first : first + chunk] = search(rows[first : first + chunk], num)
    return ids


def group_equal(rows: np.ndarray, limit: int) -> Distinct:
    """Groups of equal rows float32 [N, d], with at most `limit` members listed for each."""
    size, dim = rows.shape
    whole = np.dtype((np.void, dim * rows.itemsize))
    keys = np.ascontiguousarray(rows + 0.0).view(whole)[:, 0]  # adding 0 makes -0 the same bytes as 0
    _, firsts, inverse, counts = np.unique(keys, return_index=True, return_inverse=True, return_counts=True)
    order = np.argsort(firsts)  # groups by first id, so that of tied groups the one with the lowest id is found first
    firsts, counts = firsts[order], counts[order]
    group = np.argsort(order)[inverse]
    ids = np.argsort(group, kind="stable")
    place = np.arange(size) - np.repeat(np.cumsum(counts) - counts, counts)
    members = np.full((len(firsts), min(limit, counts.max())), -1)
    listed = place < limit
    members[group[ids[listed]], place[listed]] = ids[listed]
    return Distinct(rows[firsts], group, members)


def _closest(
    rows: np.ndarray, part: np.ndarray, distinct: Distinct, groups: np.ndarray, num: int
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and squared distances [n, num] of the nearest rows to rows[part] among the members of groups [n, count]."""
    own = distinct.group[part]
    lost = ~(groups == own[:, None]).any(axis=1)
    groups[lost, -1] = own[lost]  # a row's equals are its neighbours, whatever the search's rounding said
    difference = np.subtract(distinct.rows[groups], rows[part, None], dtype=np.float64)
    squared = np.einsum("ncd,ncd->nc", difference, difference)
    ids = distinct.members[groups]  # [n, count, m]
    candidate = (ids >= 0) & (ids != part[:, None, None])
    squared = np.where(candidate, squared[:, :, None], np.inf).reshape(len(part), -1)
    ids = ids.reshape(len(part), -1)
    nearest = np.lexsort((ids, squared))[:, :num]
    return np.take_along_axis(ids, nearest, axis=1), np.take_along_axis(squared, nearest, axis=1)


def _search_faiss(rows: np.ndarray) -> Search:
    return lambda x, num: _faiss.search(x, rows, num)[1]


def _search_jax(rows: np.ndarray) -> Search:
    held = jax.device_put(rows)
    return lambda x, num: np.array(_nearest(x, held, num)[0])


_nearest = jax.jit(ops.nearest, static_argnums=2)
_BACKENDS = {"faiss": _search_faiss, "jax": _search_jax}
