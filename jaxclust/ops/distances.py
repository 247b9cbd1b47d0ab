"""Squared Euclidean distances and what goes with them, at full matrix-product precision."""

import jax
import jax.numpy as jnp


def squared_distances(x: jax.Array, c: jax.Array) -> jax.Array:
    """Squared Euclidean distances |x|^2 - 2 x.c + |c|^2 between all rows of `x` and of `c`.

    Shapes: x [n, d], c [k, d] -> [n, k], in the dtype of `x`, never negative. The error is that of
    the squared norms, not of the distance, so keep the data near the origin.
    """
    products = jnp.matmul(x, c.T, precision=jax.lax.Precision.HIGHEST)
    squares = jnp.sum(x * x, axis=-1)[:, None] + jnp.sum(c * c, axis=-1)
    return jnp.maximum(squares - 2 * products, 0)


def nearest(x: jax.Array, centroids: jax.Array, num: int = 1) -> tuple[jax.Array, jax.Array]:
    """The `num` nearest centroids of each row, nearest first; the lowest index wins a tie.

    Shapes: x [n, d], centroids [k, d] -> ids [n, num] int32, squared distances [n, num].
    Holds n * k distances at once: callers cut `x` into chunks.
    """
    distances = squared_distances(x, centroids)
    if num == 1:  # an arg-min is much cheaper than a partial sort
        ids = jnp.argmin(distances, axis=-1, keepdims=True).astype(jnp.int32)
        return ids, jnp.take_along_axis(distances, ids, axis=-1)
    negated, ids = jax.lax.top_k(-distances, num)
    return ids.astype(jnp.int32), jnp.abs(negated)  # the sign would make -0 of 0


def normalize(x: jax.Array, eps: float = 1e-12) -> jax.Array:
    """Rows scaled to unit L2 norm; a row with norm below `eps` becomes exactly zero.

    Shapes: x [..., d] -> [..., d], same dtype. The gradient is finite everywhere, also at zero.
    """
    squared = jnp.sum(x * x, axis=-1, keepdims=True)
    usable = squared > max(eps * eps, float(jnp.finfo(x.dtype).tiny))
    # The inner `where` keeps the square root away from zero, where its slope is infinite.
    return jnp.where(usable, x / jnp.sqrt(jnp.where(usable, squared, 1)), 0)


def whiten(x: jax.Array, mean: jax.Array, projection: jax.Array, l2: bool) -> jax.Array:
    """(x - mean) @ projection, then unit rows if `l2`.

    Shapes: x [n, D], mean [D], projection [D, d] -> [n, d].
    """
    rows = jnp.matmul(x - mean, projection, precision=jax.lax.Precision.HIGHEST)
    return normalize(rows) if l2 else rows
