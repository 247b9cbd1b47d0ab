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


def ten_crops(images: jax.Array, side: int) -> jax.Array:
    """Four corners, the centre (index 4), and the mirror images of these, of images [B, R, R, C].

    Returns [10, B, side, side, C]. With side = R all five are the whole image.
    """
    slack = images.shape[1] - side
    places = ((0, 0), (0, slack), (slack, 0), (slack, slack), (slack // 2, slack // 2))
    crops = jnp.stack([images[:, top : top + side, left : left + side] for top, left in places])
    return jnp.concatenate([crops, crops[:, :, :, ::-1]])
