"""Images as networks see them."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def standardize(images: jax.Array, mean: Sequence[float], std: Sequence[float], dtype: jnp.dtype) -> jax.Array:
    """uint8 [B, H, W, C] to (x / 255 - mean) / std in `dtype`; vectors of floats only change dtype."""
    if images.dtype != jnp.uint8:
        return images.astype(dtype)
    scale = 1.0 / (255.0 * jnp.asarray(std, dtype))
    return images.astype(dtype) * scale - jnp.asarray(mean, dtype) / jnp.asarray(std, dtype)
