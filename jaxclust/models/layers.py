"""The pieces that networks share, so that each constant stands in one place."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxclust.runtime import AXIS

conv_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
"""N(0, sqrt(2 / (k * k * C_out))) (He et al. 2015, fan-out)."""

dense_init = nn.initializers.normal(0.01)
"""N(0, 0.01^2), as DeepCluster draws every dense layer."""


def halve(x: jax.Array) -> jax.Array:
    """Max pooling 2 x 2 with stride 2 of [B, H, W, C]; an odd last row or column is dropped.

    As maxima of strided slices: the gradient of a windowed maximum is 13 times as slow on a CPU. Equal maxima, which
    after a ReLU are zeros, share the gradient.
    """
    _, height, width, _ = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    rows = jnp.maximum(x[:, ::2], x[:, 1::2])
    return jnp.maximum(rows[:, :, ::2], rows[:, :, 1::2])


def batch_norm(train: bool, **kwargs: Any) -> nn.BatchNorm:
    """Batch norm over all devices; epsilon 1e-5, running statistics keep 0.9 (PyTorch's 0.1)."""
    return nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5, axis_name=AXIS, **kwargs)
