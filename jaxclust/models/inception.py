"""Inception v3, without its auxiliary classifier.

Szegedy, Vanhoucke, Ioffe, Shlens, Wojna, "Rethinking the Inception Architecture for Computer Vision", CVPR 2016, with
the sizes of torchvision, whose names of blocks stand beside ours; kernels are drawn as those of our other networks.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from jaxclust import runtime
from jaxclust.errors import ConfigError
from jaxclust.models.layers import Rows, conv_norm, max_pool, mean_feature, seen

NETWORKS = ("inception_v3",)

SMALLEST = 75
"""The smallest side in pixels of which every block leaves a map."""

Layer = Callable[..., jax.Array]
"""(x, channels, kernel, stride=1, padding=None, *, name): convolution, batch norm, ReLU; channels at full width."""

ROW, COLUMN = (1, 7), (7, 1)


def chain(layer: Layer, x: jax.Array, name: str, *convs: tuple[Any, ...]) -> jax.Array:
    """Convolutions (channels, kernel, …) one after the other, <name>_1 and so on."""
    for number, conv in enumerate(convs, 1):
        x = layer(x, *conv, name=f"{name}_{number}")
    return x


def fork(layer: Layer, x: jax.Array, name: str) -> list[jax.Array]:
    """1 x 3 and 3 x 1 side by side."""
    return [layer(x, 384, (1, 3), name=f"{name}a"), layer(x, 384, (3, 1), name=f"{name}b")]


def pooled(layer: Layer, x: jax.Array, channels: int, name: str) -> jax.Array:
    """Means of 3 x 3 places, of which those beyond the border count as zeros, and a 1 x 1 convolution."""
    mean = nn.avg_pool(x, (3, 3), padding=((1, 1), (1, 1)))
    return layer(mean, channels, 1, name=f"{name}_pool")


def a(layer: Layer, x: jax.Array, name: str, pool: int) -> list[jax.Array]:
    """Branches of 1 x 1, 5 x 5 and twice 3 x 3 (Mixed_5b to 5d)."""
    return [
        layer(x, 64, 1, name=f"{name}_1x1"),
        chain(layer, x, f"{name}_5x5", (48, 1), (64, 5)),
        chain(layer, x, f"{name}_3x3dbl", (64, 1), (96, 3), (96, 3)),
        pooled(layer, x, pool, name),
    ]


def b(layer: Layer, x: jax.Array, name: str) -> list[jax.Array]:
    """From 35 to 17 a side (Mixed_6a)."""
    return [
        layer(x, 384, 3, 2, 0, name=f"{name}_3x3"),
        chain(layer, x, f"{name}_3x3dbl", (64, 1), (96, 3), (96, 3, 2, 0)),
        max_pool(x, 3, 2),
    ]


def c(layer: Layer, x: jax.Array, name: str, width: int) -> list[jax.Array]:
    """7 x 7 as a row and a column, once and twice (Mixed_6b to 6e)."""
    twice = ((width, 1), (width, COLUMN), (width, ROW), (width, COLUMN), (192, ROW))
    return [
        layer(x, 192, 1, name=f"{name}_1x1"),
        chain(layer, x, f"{name}_7x7", (width, 1), (width, ROW), (192, COLUMN)),
        chain(layer, x, f"{name}_7x7dbl", *twice),
        pooled(layer, x, 192, name),
    ]


def d(layer: Layer, x: jax.Array, name: str) -> list[jax.Array]:
    """From 17 to 8 a side (Mixed_7a)."""
    return [
        chain(layer, x, f"{name}_3x3", (192, 1), (320, 3, 2, 0)),
        chain(layer, x, f"{name}_7x7x3", (192, 1), (192, ROW), (192, COLUMN), (192, 3, 2, 0)),
        max_pool(x, 3, 2),
    ]


def e(layer: Layer, x: jax.Array, name: str) -> list[jax.Array]:
    """Branches that end in forks (Mixed_7b and 7c)."""
    once = chain(layer, x, f"{name}_3x3", (384, 1))
    twice = chain(layer, x, f"{name}_3x3dbl", (448, 1), (384, 3))
    return [
        layer(x, 320, 1, name=f"{name}_1x1"),
        *fork(layer, once, f"{name}_3x3_2"),
        *fork(layer, twice, f"{name}_3x3dbl_3"),
        pooled(layer, x, 192, name),
    ]


Block = Callable[[Layer, jax.Array, str], list[jax.Array]]

BLOCKS: dict[str, tuple[Block, ...]] = {
    "conv3": (partial(a, pool=32), partial(a, pool=64), partial(a, pool=64)),
    "conv4": (b, partial(c, width=128), partial(c, width=160), partial(c, width=160), partial(c, width=192)),
    "conv5": (d, e, e),
}
"""The blocks behind the stem: <stage>_1 and so on, whose branches are put side by side."""


class Inception(nn.Module):
    """Five convolutions, of which conv1 and conv2 are the maps before pooling, and three stages of Inception blocks.

    Input [B, H, W, C] standardised, of any size from 75 x 75 (299 x 299 as published). Output: the mean of the last map
    over its pixels, which is not negative, [B, 64 * width]; with `dim` a dense layer on it, [B, dim]. ConfigError
    below 75 x 75.
    """

    width: int  # channels of the first convolution, 32 as published; all others in proportion
    dim: int
    dropout: float
    sobel: bool
    dtype: Any
    param_dtype: Any
    axis: Rows = runtime.AXIS  # of batch norm

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        _check(x)
        kinds: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        settings: dict[str, Any] = {"train": train, "axis": self.axis, "bias": False, "epsilon": 1e-3, **kinds}

        def layer(x: jax.Array, channels: int, *conv: Any, name: str) -> jax.Array:
            return nn.relu(conv_norm(x, max(1, channels * self.width // 32), *conv, name=name, **settings))

        x = seen(x, self.sobel, self.dtype)
        x = chain(layer, x, "conv1", (32, 3, 2, 0), (32, 3, 1, 0), (64, 3))
        self.sow("maps", "conv1", x)
        x = chain(layer, max_pool(x, 3, 2), "conv2", (80, 1), (192, 3, 1, 0))
        self.sow("maps", "conv2", x)
        x = max_pool(x, 3, 2)
        for stage, blocks in BLOCKS.items():
            for number, block in enumerate(blocks, 1):
                x = jnp.concatenate(block(layer, x, f"{stage}_{number}"), axis=-1)
            self.sow("maps", stage, x)
        return mean_feature(x, self.dim, self.dropout, train, **kinds)


def _check(x: jax.Array) -> None:
    height, width = x.shape[1:3]
    if min(height, width) < SMALLEST:
        raise ConfigError(
            f"config.model.name='inception_v3' needs images of {SMALLEST} x {SMALLEST} pixels or more, and these are "
            f"{height} x {width}. Raise config.data.image_size (299 as published) or take another config.model.name"
        )


def make(config: ConfigDict) -> Inception:
    """The network of `config.model`, in the precision of `config.runtime.dtype`."""
    m = config.model
    kinds = m.sobel, runtime.compute_dtype(config), runtime.param_dtype(config)
    return Inception(m.width or 32, m.dim, max(m.dropout, 0.0), *kinds)
