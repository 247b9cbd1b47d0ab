"""The Sobel operator: the gradient of the grey image in place of its colours."""

import jax
import jax.numpy as jnp


def sobel(images: jax.Array) -> jax.Array:
    """Horizontal and vertical gradient of the mean of the channels, not scaled, with zeros beyond the border.

    Cross-correlation with Gx = [[1, 0, -1], [2, 0, -2], [1, 0, -1]] and Gy, its transpose (the published code of
    Caron et al. 2018). Shapes: images [B, H, W, C] -> [B, H, W, 2], same dtype. No parameters.
    """
    grey = jnp.pad(images.mean(axis=-1), ((0, 0), (1, 1), (1, 1)))
    # Smoothed along one axis, then the difference along the other: exactly zero where the image is constant.
    down = grey[:, :-2] + 2 * grey[:, 1:-1] + grey[:, 2:]
    across = grey[:, :, :-2] + 2 * grey[:, :, 1:-1] + grey[:, :, 2:]
    return jnp.stack([down[:, :, :-2] - down[:, :, 2:], across[:, :-2] - across[:, 2:]], axis=-1)
