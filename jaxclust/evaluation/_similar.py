"""The most similar of many rows for each of others: exact, in blocks, on several hosts too."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jaxclust import hosts
from jaxclust.cluster import Points, finite_chunks
from jaxclust.progress import progress

_QUERIES = 1024  # rows whose neighbours are found at once
_BANK = 8192  # rows of the bank that they are compared with at once: 32 MiB of similarities


class Found(NamedTuple):
    """Of some queries: their ids int64 [n] and, most similar first and of equal ones the lowest id, the `neighbours`
    int32 [n, num] with their `similarity` float32 [n, num], -inf where there are no more. That is the cosine, or what
    orders by Euclidean distance d: (|query|^2 - d^2) / 2."""

    ids: NDArray[np.int64]
    neighbours: NDArray[np.int32]
    similarity: NDArray[np.float32]


def most_similar(
    queries: Points, bank: Points, num: int, usable: NDArray[np.bool_], title: str, *, cosine: bool = True
) -> Iterator[Found]:
    """The `num` most similar of the `usable` rows of `bank` for each of this host's `queries`, by cosine or distance.

    Shapes: queries [M, D], bank [N, D], usable [N]. If both are the same object, a row is not its own neighbour. A row
    of zeros has cosine 0 to all. Distances are as exact as squared norms, so for them keep the rows near the origin.
    Every host must take every block. DataError for rows that are not finite.
    """
    scaled = _unit if cosine else _float32
    for matrix in {id(matrix): matrix for matrix in (queries, bank)}.values():
        for _ in finite_chunks(matrix):
            pass
    own, most = len(hosts.own_ids(queries.shape[0])), -(-queries.shape[0] // hosts.count())
    starts = range(0, most, size := min(_QUERIES, most))
    for start in progress(starts, len(starts), title, "blocks"):
        count = min(size, max(own - start, 0))
        ids = hosts.own_ids(queries.shape[0])[start : start + count]
        rows = _padded(scaled(queries.read(start, count)), size)
        self_ids = _padded(ids.astype(np.int32) if queries is bank else np.full(count, -1, np.int32), size, fill=-1)
        best: Any = (np.full((size, num), -np.inf, np.float32), np.full((size, num), -1, np.int32))
        for block, block_ids in _blocks(bank, usable, scaled):
            best = _merged(best, rows, self_ids, block, block_ids, cosine=cosine)
        similarity, neighbours = jax.device_get(best)
        yield Found(ids, neighbours[:count], similarity[:count])


def _blocks(
    bank: Points, usable: NDArray[np.bool_], scaled: Callable[[NDArray[Any]], NDArray[np.float32]]
) -> Iterator[tuple[NDArray[Any], NDArray[np.int32]]]:
    """Rows of the bank in blocks of one length, and their ids, -1 where a row may not be found."""
    first, size = 0, min(_BANK, bank.shape[0])
    for chunk in bank.in_order():
        for start in range(0, len(chunk), size):
            rows = chunk[start : start + size]
            ids = np.arange(first + start, first + start + len(rows), dtype=np.int32)
            yield _padded(scaled(rows), size), _padded(np.where(usable[ids], ids, -1), size, fill=-1)
        first += len(chunk)


@partial(jax.jit, donate_argnums=0, static_argnames="cosine")
def _merged(
    best: tuple[jax.Array, jax.Array], rows: jax.Array, self_ids: jax.Array, block: jax.Array, ids: jax.Array, *,
    cosine: bool,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """The best of what was found and of a later block of the bank; top_k takes the first of equal ones."""
    found = jnp.matmul(rows, block.T, precision=jax.lax.Precision.HIGHEST)
    if not cosine:
        found = found - jnp.sum(block * block, axis=1) / 2
    found = jnp.where(found == 0, 0, found)  # -0 would be less than 0
    found = jnp.where((ids < 0) | (ids == self_ids[:, None]), -jnp.inf, found)
    similarity, place = jax.lax.top_k(jnp.concatenate([best[0], found], axis=1), best[0].shape[1])
    known = jnp.concatenate([best[1], jnp.broadcast_to(ids, found.shape)], axis=1)
    return similarity, jnp.take_along_axis(known, place, axis=1)


def _unit(rows: NDArray[Any]) -> NDArray[np.float32]:
    """Rows of unit length, normed in float64; rows of zeros stay."""
    norms = np.sqrt(np.einsum("nd,nd->n", rows, rows, dtype=np.float64))
    return (rows / np.where(norms > 0, norms, 1)[:, None]).astype(np.float32)


def _float32(rows: NDArray[Any]) -> NDArray[np.float32]:
    return np.asarray(rows, np.float32)


def _padded(array: NDArray[Any], size: int, fill: float = 0) -> NDArray[Any]:
    rest = np.full((size - len(array), *array.shape[1:]), fill, array.dtype)
    return np.concatenate([array, rest]) if len(rest) else array
