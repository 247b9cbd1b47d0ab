"""How far what a decoder makes of the codes of images is from them. Section 2.10 of our specification of ClustNet."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxclust.features.extract import Program
from jaxclust.ops.images import WORST


def errors(reconstruct: Program, std: Sequence[float], params: Any, extra: Any, images: jax.Array) -> jax.Array:
    """The mean squared error of the pixels of each image, standardised, as a percentage of `WORST`: [B].

    `reconstruct` is `Method.reconstruct`, `images` are uint8 [B, H, W, C].
    """
    made = reconstruct(params, extra, images)
    difference = (made - images.astype(made.dtype)) / (255.0 * jnp.asarray(std, made.dtype))
    return 100 * jnp.mean(jnp.square(difference), axis=(1, 2, 3)) / WORST
