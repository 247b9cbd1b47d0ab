"""VGG with batch norm.

Simonyan, Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR 2015, table 1 (D);
dense layers as Caron et al. 2018 (DeepCluster) train them.
"""

from itertools import count
from typing import Any

import jax
from flax import linen as nn
from ml_collections import ConfigDict

from jaxclust import runtime
from jaxclust.models.layers import Rows, adaptive_mean, conv_norm, dense_init, max_pool, seen

NETWORKS = {"vgg16": (2, 2, 3, 3, 3)}
"""Convolutions in each of the five blocks."""

LOW_LAYERS = ("conv2", "conv4")
"""Where its first two blocks end."""

MULTIPLES = (1, 2, 4, 8, 8)
"""Channels of each block, in those of the first."""

SIDE = 7
"""Of the map that the first dense layer sees."""


class VGG(nn.Module):
    """Five blocks of 3 x 3 convolutions, each at half the side, and two dense layers.

    Input [B, H, W, C] standardised, of any size; output [B, dim], the second dense layer before its ReLU. The last
    map is pooled to 7 x 7, which it is at 224 x 224; a map of side 1 is no longer halved.
    """

    blocks: tuple[int, ...]
    width: int
    dim: int
    dropout: float
    sobel: bool
    dtype: Any
    param_dtype: Any
    axis: Rows = runtime.AXIS  # of batch norm

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        kinds: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = seen(x, self.sobel, self.dtype)
        numbers = count(1)
        for convs, multiple in zip(self.blocks, MULTIPLES, strict=True):
            for _ in range(convs):
                name = f"conv{next(numbers)}"
                x = nn.relu(conv_norm(x, self.width * multiple, 3, name=name, train=train, axis=self.axis, **kinds))
                self.sow("maps", name, x)
            x = max_pool(x, 2, 2)
        x = adaptive_mean(x, SIDE).reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(self.dim, kernel_init=dense_init, name="dense", **kinds)(x))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.dim, kernel_init=dense_init, name="feature", **kinds)(x)


def make(config: ConfigDict) -> VGG:
    """The network of `config.model`, in the precision of `config.runtime.dtype`."""
    m = config.model
    kinds = m.sobel, runtime.compute_dtype(config), runtime.param_dtype(config)
    return VGG(NETWORKS[m.name], m.width or 64, m.dim or 4096, m.dropout if m.dropout >= 0 else 0.5, *kinds)
