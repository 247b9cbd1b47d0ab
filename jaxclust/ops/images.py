"""Images as networks see them."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

WORST = 3.2457  # squared error of a standardised pixel that ClustNet's published code counts as 100 %


def standardize(images: jax.Array, mean: Sequence[float], std: Sequence[float], dtype: jnp.dtype) -> jax.Array:
    """uint8 [B, H, W, C] to (x / 255 - mean) / std in `dtype`; vectors of floats only change dtype."""
    if images.dtype != jnp.uint8:
        return images.astype(dtype)
    scale = 1.0 / (255.0 * jnp.asarray(std, dtype))
    return images.astype(dtype) * scale - jnp.asarray(mean, dtype) / jnp.asarray(std, dtype)


def pixels(x: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """The images [B, H, W, C], from 0 to 255, that `standardize` makes x of."""
    return 255.0 * (x * jnp.asarray(std, x.dtype) + jnp.asarray(mean, x.dtype))


def ten_crops(images: jax.Array, side: int) -> jax.Array:
    """Four corners, the centre (index 4), and the mirror images of these, of images [B, R, R, C].

    Returns [10, B, side, side, C]. With side = R all five are the whole image.
    """
    slack = images.shape[1] - side
    places = ((0, 0), (0, slack), (slack, 0), (slack, slack), (slack // 2, slack // 2))
    crops = jnp.stack([images[:, top : top + side, left : left + side] for top, left in places])
    return jnp.concatenate([crops, crops[:, :, :, ::-1]])


def gaussian_blur(images: jax.Array, sigma: float) -> jax.Array:
    """Images [..., H, W, C] blurred over H and W, `sigma` in pixels; the kernel ends at 4 sigma, edges are mirrored.

    What scipy.ndimage.gaussian_filter does by default.
    """
    radius = int(4 * sigma + 0.5)
    if not radius:
        return images
    offsets = np.arange(-radius, radius + 1)
    weights = np.exp(-0.5 * (offsets / sigma) ** 2)
    weights /= weights.sum()
    for axis in (images.ndim - 3, images.ndim - 2):
        size, widths = images.shape[axis], [(0, 0)] * images.ndim
        widths[axis] = (radius, radius)
        padded = jnp.pad(images, widths, mode="symmetric")
        shifted = [jax.lax.slice_in_dim(padded, i, i + size, axis=axis) for i in range(len(weights))]
        images = sum((float(w) * x for w, x in zip(weights, shifted, strict=True)), jnp.zeros_like(images))
    return images
