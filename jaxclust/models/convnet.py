"""A small convolutional network for small images: blocks of conv, batch norm, ReLU and pooling."""

from typing import Any

import jax
from flax import linen as nn
from ml_collections import ConfigDict

from jaxclust import runtime
from jaxclust.models.layers import Rows, conv_norm, max_pool, seen


class ConvNet(nn.Module):
    """`blocks` blocks of a 3x3 convolution, each block half the side and twice the channels; a dense feature.

    Input [B, H, W, C] standardised; output [B, dim]. A side of 1 is no longer halved.
    """

    width: int
    blocks: int
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
        for block in range(self.blocks):
            settings: dict[str, Any] = {"name": f"block{block + 1}", "train": train, "axis": self.axis, **kinds}
            x = nn.relu(conv_norm(x, self.width * 2**block, 3, **settings))
            self.sow("maps", f"conv{block + 1}", x)
            x = max_pool(x, 2, 2)
        x = x.reshape(x.shape[0], -1)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.dim, name="feature", **kinds)(x)


def make(config: ConfigDict) -> ConvNet:
    """The network of `config.model`, in the precision of `config.runtime.dtype`."""
    m = config.model
    kinds = m.sobel, runtime.compute_dtype(config), runtime.param_dtype(config)
    return ConvNet(m.width or 32, m.blocks, m.dim or 128, max(m.dropout, 0.0), *kinds)
