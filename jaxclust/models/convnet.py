"""A small convolutional network for small images: blocks of conv, batch norm, ReLU and pooling."""

from typing import Any

import jax
from flax import linen as nn
from ml_collections import ConfigDict

from jaxclust import runtime
from jaxclust.models.layers import batch_norm, conv_init, halve


class ConvNet(nn.Module):
    """`blocks` blocks of a 3x3 convolution, each block half the side and twice the channels; a dense feature.

    Input [B, H, W, C] standardised; output [B, dim]. A side of 1 is no longer halved.
    """

    width: int
    blocks: int
    dim: int
    dropout: float
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        kinds: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = x.astype(self.dtype)
        for block in range(self.blocks):
            x = nn.Conv(self.width * 2**block, (3, 3), kernel_init=conv_init, name=f"block{block + 1}_conv", **kinds)(x)
            x = nn.relu(batch_norm(train, name=f"block{block + 1}_norm", **kinds)(x))
            self.sow("maps", f"conv{block + 1}", x)
            if min(x.shape[1:3]) > 1:
                x = halve(x)
        x = x.reshape(x.shape[0], -1)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.dim, name="feature", **kinds)(x)


def make(config: ConfigDict) -> ConvNet:
    """The network of `config.model`, in the precision of `config.runtime.dtype`."""
    m = config.model
    return ConvNet(m.width, m.blocks, m.dim, m.dropout, runtime.compute_dtype(config), runtime.param_dtype(config))
