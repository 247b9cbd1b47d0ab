"""Heads that stand on a network's feature."""

from typing import Any

import jax
from flax import linen as nn

from jaxclust.models.layers import batch_norm, uniform_dense


class Projection(nn.Module):
    """A hidden layer with batch norm and ReLU, then a dense layer: [B, D] to [B, dim] (Chen et al. 2020, SimCLR)."""

    hidden: int
    dim: int
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        kinds: dict[str, Any] = {"dtype": self.param_dtype, "param_dtype": self.param_dtype}
        x = nn.Dense(self.hidden, use_bias=False, name="hidden", **kinds)(x)  # the norm takes a bias away
        x = nn.relu(batch_norm(train, name="hidden_norm", **kinds)(x))
        return nn.Dense(self.dim, name="embedding", **kinds)(x)


class MLP(nn.Module):
    """`layers` dense layers with ReLU in between, hidden ones as wide as the input: [B, D] to [B, dim].

    Kernels and biases start with U(-1 / sqrt(fan-in), 1 / sqrt(fan-in)), as in PyTorch.
    """

    layers: int
    dim: int
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kinds: dict[str, Any] = {"dtype": self.param_dtype, "param_dtype": self.param_dtype}
        width = x.shape[-1]
        for number in range(1, self.layers):
            x = nn.relu(uniform_dense(x, width, name=f"hidden{number}", **kinds))
        return uniform_dense(x, self.dim, name="embedding", **kinds)
