"""k-means on any device that JAX runs on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxclust.cluster import Clusterer, Clustering, _lloyd
from jaxclust.ops.distances import nearest

_DISTANCES = 1 << 24  # distances held at once (64 MiB of float32)


def make(settings: ConfigDict) -> Clusterer:
    """`kmeans` as `config.cluster` describes it."""
    return _lloyd.bind(kmeans, settings)


def kmeans(
    rows: np.ndarray,
    k: int,
    seed: int,
    *,
    iterations: int = 20,
    runs: int = 1,
    initial_ids: np.ndarray | None = None,
    reseed_empty: str = "split",
) -> Clustering:
    """Exact k-means of rows float32 [N, d] into k clusters; as `kmeans_faiss.kmeans` in every way.

    Compiles once for each (N, d, k). Bit-identical from call to call on one kind of device.
    """
    return _lloyd.run(_engine, rows, k, seed, iterations, runs, initial_ids, reseed_empty)


def assign(rows: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Nearest of centroids [k, d] per row of [N, d]: labels int32 [N], squared distances [N]."""
    return _lloyd.assign(_engine, rows, centroids)


def _engine(rows: np.ndarray, k: int) -> _lloyd.Search:
    size, dim = rows.shape
    pieces = max(-(-size * k // _DISTANCES), 1)
    chunk = max(-(-size // pieces), 1)
    padded = np.zeros((pieces * chunk, dim), np.float32)  # zero rows add nothing to a sum
    padded[:size] = rows
    chunks = jax.device_put(padded.reshape(-1, chunk, dim))

    def search(centroids: np.ndarray) -> _lloyd.Assigned:
        labels, distances, sums = jax.device_get(_search(chunks, centroids))
        return _lloyd.Assigned(labels[:size], distances[:size], sums)

    return search


@jax.jit
def _search(chunks: jax.Array, centroids: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of [m, n, d] rows: labels [m * n], squared distances [m * n], sums of members [k, d]."""

    def step(sums: jax.Array, x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        ids, distances = nearest(x, centroids)
        return sums + _sums(x, ids[:, 0], len(centroids)), (ids[:, 0], distances[:, 0])

    sums, (labels, distances) = jax.lax.scan(step, jnp.zeros_like(centroids), chunks)
    return labels.ravel(), distances.ravel(), sums


def _sums(x: jax.Array, labels: jax.Array, k: int) -> jax.Array:
    """Sums of the rows with each label, [k, d]."""
    # A scatter adds in no fixed order on a GPU and slowly on a TPU; a CPU does it best.
    return jax.lax.platform_dependent(
        x, labels, cpu=functools.partial(_scatter, k=k), default=functools.partial(_product, k=k)
    )


def _scatter(x: jax.Array, labels: jax.Array, k: int) -> jax.Array:
    return jax.ops.segment_sum(x, labels, k)


def _product(x: jax.Array, labels: jax.Array, k: int) -> jax.Array:
    one_hot = jax.nn.one_hot(labels, k, dtype=x.dtype)
    return jnp.matmul(one_hot.T, x, precision=jax.lax.Precision.HIGHEST)
