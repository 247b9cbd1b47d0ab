"""The searches of k-means on all devices of all hosts: each has some of the rows, and only sums go around."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxclust import runtime
from jaxclust.cluster import Nearest, _race
from jaxclust.cluster._lloyd import Found
from jaxclust.ops.distances import nearest

_DISTANCES = 1 << 24  # distances held at once by a device (64 MiB of float32)
_ROWS = 1 << 11  # rows whose members are added up one by one, in float32


class Placed(NamedTuple):
    """Rows on the devices in chunks, float32 [m, n, d], and their ids int32 [m, n], -1 where there is no row.

    Split over the devices along m. `size` rows are of this host.
    """

    rows: jax.Array
    ids: jax.Array
    size: int


def place(rows: np.ndarray, ids: np.ndarray, k: int, most: int) -> Placed:
    """This host's rows float32 [n, d] with these ids on its devices; no host may have more than `most`.

    Shapes depend on `most`, d and k alone.
    """
    devices = jax.local_device_count()
    each = max(-(-most // devices), 1)
    pieces = -(-each // min(max(_DISTANCES // max(k, 1), 1), _ROWS))
    chunk = -(-each // pieces)
    padded = np.zeros((devices * pieces, chunk, rows.shape[1]), np.float32)
    numbers = np.full((devices * pieces, chunk), -1, np.int32)
    padded.reshape(-1, rows.shape[1])[: len(rows)] = rows
    numbers.reshape(-1)[: len(rows)] = ids
    on_devices, their_ids = runtime.put_batch((padded, numbers), _mesh())
    return Placed(on_devices, their_ids, len(rows))


def search(placed: Placed, centroids: np.ndarray) -> Found:
    """The nearest of centroids float32 [k, d] for each row."""
    labels, distances, *of_all = _programs(_mesh()).search(placed.rows, placed.ids, _everywhere(centroids))
    objectives, counts, sums = jax.device_get(of_all)

    def own() -> tuple[np.ndarray, np.ndarray]:
        labels_there, distances_there = runtime.local_rows((labels, distances))
        return labels_there.ravel()[: placed.size], distances_there.ravel()[: placed.size]

    return Found(float(objectives.sum(dtype=np.float64)), counts, sums, own)


def rank(placed: Placed, centroids: np.ndarray, num: int) -> Nearest:
    """The `num` nearest of centroids float32 [k, d] for each row of this host, [n, num]."""
    found = _rank(_mesh(), num)(placed.rows, _everywhere(centroids))
    ids, distances = (part.reshape(-1, num)[: placed.size] for part in runtime.local_rows(found))
    return Nearest(ids, distances)


def spread(placed: Placed, keys: np.ndarray) -> np.ndarray:
    """The rows that k-means++ draws with `keys` uint32 [k], [k, d]."""
    chosen = _programs(_mesh()).spread(placed.rows, placed.ids, _everywhere(keys))
    return np.asarray(jax.device_get(chosen))


class _Programs(NamedTuple):
    search: Callable[..., Any]
    spread: Callable[..., Any]


@functools.cache
def _programs(mesh: Mesh) -> _Programs:
    split, whole = P(runtime.AXIS), P()
    rows = (split, split, whole)
    return _Programs(
        search=jax.jit(jax.shard_map(_search, mesh=mesh, in_specs=rows, out_specs=(split, split, whole, whole, whole))),
        spread=jax.jit(jax.shard_map(_spread, mesh=mesh, in_specs=rows, out_specs=whole)),
    )


@functools.cache
def _rank(mesh: Mesh, num: int) -> Callable[..., Any]:
    def program(rows: jax.Array, centroids: jax.Array) -> Any:
        return lax.map(lambda x: nearest(x, centroids, num), rows)

    split = P(runtime.AXIS)
    return jax.jit(jax.shard_map(program, mesh=mesh, in_specs=(split, P()), out_specs=split))


def _mesh() -> Mesh:
    """All devices, those of a host together."""
    return Mesh(np.array(sorted(jax.devices(), key=lambda device: device.process_index)), (runtime.AXIS,))


def _everywhere(array: np.ndarray) -> Any:
    return runtime.put_replicated(array, _mesh())


def _search(rows: jax.Array, ids: jax.Array, centroids: jax.Array) -> tuple[jax.Array, ...]:
    """Of a device's rows: labels and squared distances [m, n]; of all: objective of each chunk [m], counts, sums."""
    k = len(centroids)

    def step(total: tuple[jax.Array, jax.Array], piece: tuple[jax.Array, jax.Array]) -> tuple[Any, Any]:
        x, id = piece
        labels, distances = (of_nearest[:, 0] for of_nearest in nearest(x, centroids))
        distances = jnp.where(id >= 0, distances, 0)
        found = _members(x, jnp.where(id >= 0, labels, k), k)  # cluster k is no cluster: dropped
        return jax.tree.map(jnp.add, total, found), (labels, distances, distances.sum())

    zeros = jnp.zeros(k, jnp.int32), jnp.zeros_like(centroids)
    total, (labels, distances, objectives) = lax.scan(step, lax.pcast(zeros, runtime.AXIS, to="varying"), (rows, ids))
    return labels, distances, *lax.psum((objectives, *total), runtime.AXIS)


def _members(x: jax.Array, labels: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """How many rows have each label, int32 [k], and their sums [k, d]; label k does not count."""
    # A scatter adds in no fixed order on a GPU and slowly on a TPU; a CPU does it best.
    found: tuple[jax.Array, jax.Array] = lax.platform_dependent(
        x, labels, cpu=functools.partial(_scatter, k=k), default=functools.partial(_product, k=k)
    )
    return found


def _scatter(x: jax.Array, labels: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    return jax.ops.segment_sum(jnp.ones_like(labels), labels, k), jax.ops.segment_sum(x, labels, k)


def _product(x: jax.Array, labels: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    one_hot = jax.nn.one_hot(labels, k, dtype=x.dtype)
    sums = jnp.matmul(one_hot.T, x, precision=lax.Precision.HIGHEST)
    return one_hot.sum(axis=0).astype(jnp.int32), sums


def _spread(rows: jax.Array, ids: jax.Array, keys: jax.Array) -> jax.Array:
    """k-means++ over the rows of all devices: one pass of distances to the newest centroid for each draw."""
    x, ids = rows.reshape(-1, rows.shape[-1]), ids.ravel()
    squares = jnp.sum(x * x, axis=1)

    def draw(number: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        closest, chosen = state
        arrivals = _race.arrivals(jnp, ids.astype(jnp.uint32), keys[number], closest)
        first = jnp.argmin(arrivals)
        earliest = lax.pmin(arrivals[first], runtime.AXIS)
        id = lax.pmin(jnp.where(arrivals[first] == earliest, ids[first], jnp.iinfo(jnp.int32).max), runtime.AXIS)
        row = lax.psum(jnp.where(ids[first] == id, x[first], 0), runtime.AXIS)
        products = jnp.matmul(x, row, precision=lax.Precision.HIGHEST)
        closest = jnp.minimum(closest, jnp.maximum(squares - 2 * products + row @ row, 0))
        return jnp.where(ids == id, -1, closest), chosen.at[number].set(row)

    start = jnp.where(ids < 0, -1, jnp.full_like(squares, jnp.inf))
    return lax.fori_loop(0, len(keys), draw, (start, jnp.zeros((len(keys), x.shape[1]), x.dtype)))[1]
