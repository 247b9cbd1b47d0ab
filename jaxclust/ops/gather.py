"""What the devices of a step tell each other."""

import jax
import jax.numpy as jnp

from jaxclust.runtime import AXIS


def all_rows(x: jax.Array) -> jax.Array:
    """The rows [b, ...] of all devices in their order, the same on each: placed by the device's index, then summed.

    Only within a program that is mapped over the mesh.
    """
    index, count = jax.lax.axis_index(AXIS), jax.lax.axis_size(AXIS)
    placed = jnp.zeros((count, *x.shape), x.dtype).at[index].set(x)
    return jax.lax.psum(placed, AXIS).reshape(-1, *x.shape[1:])
