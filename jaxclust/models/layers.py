"""The pieces that networks share, so that each constant stands in one place."""

from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxclust.ops.conv import conv as convolve
from jaxclust.ops.sobel import sobel
from jaxclust.runtime import AXIS

conv_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
"""N(0, sqrt(2 / (k * k * C_out))) (He et al. 2015, fan-out)."""

uniform_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
"""U(-1 / sqrt(fan-in), 1 / sqrt(fan-in)), as PyTorch draws every layer that nobody draws otherwise."""

dense_init = nn.initializers.normal(0.01)
"""N(0, 0.01^2), as DeepCluster draws every dense layer."""


def seen(images: jax.Array, gradients: bool, dtype: Any) -> jax.Array:
    """What a first convolution sees: images [B, H, W, C], or their Sobel `gradients` [B, H, W, 2], in `dtype`."""
    return (sobel(images) if gradients else images).astype(dtype)


def conv(
    features: int,
    kernel: int | tuple[int, int],
    stride: int = 1,
    padding: int | None = None,
    kernel_init: Any = conv_init,
    **kwargs: Any,
) -> nn.Conv:
    """The convolution of every network: square unless its height and width are said, zero padding of half of each
    unless said."""
    sides = (kernel, kernel) if isinstance(kernel, int) else kernel
    pads = [(side // 2, side // 2) for side in sides] if padding is None else padding
    return nn.Conv(features, sides, stride, pads, kernel_init=kernel_init, conv_general_dilated=convolve, **kwargs)


Rows = str | int | None
"""Whose rows make the statistics of a batch norm: those of all devices along an axis, of so many groups of consecutive
rows of this device, each alone, or of this device (None)."""


def batch_norm(
    train: bool,
    param_dtype: Any = jnp.float32,
    axis: Rows = AXIS,
    momentum: float = 0.9,
    epsilon: float = 1e-5,
    **kwargs: Any,
) -> nn.Module:
    """Batch norm with statistics of the rows of `axis`, by default of all devices.

    Epsilon 1e-5; running statistics keep 0.9 (PyTorch's 0.1) unless said.
    """
    settings = {"momentum": momentum, "epsilon": epsilon, "param_dtype": param_dtype, **kwargs}
    if train and isinstance(axis, int):
        return GroupedNorm(groups=axis, **settings)
    return nn.BatchNorm(
        use_running_average=not train,
        axis_name=axis if isinstance(axis, str) else None,
        force_float32_reductions=param_dtype == jnp.float32,  # statistics in float64 where parameters are
        **settings,
    )


def _of_norm(
    module: nn.Module, shape: tuple[int, ...], kind: Any
) -> tuple[jax.Array, jax.Array, dict[str, nn.Variable[jax.Array]]]:
    """Scale and bias of a batch norm, and its running statistics "mean" and "var", by the names of `nn.BatchNorm`."""
    scale = module.param("scale", nn.initializers.ones, shape, kind)
    bias = module.param("bias", nn.initializers.zeros, shape, kind)
    mean = module.variable("batch_stats", "mean", jnp.zeros, shape, kind)
    var = module.variable("batch_stats", "var", jnp.ones, shape, kind)
    return scale, bias, {"mean": mean, "var": var}


class GroupedNorm(nn.Module):
    """Batch norm of rows [B, ..., C] in training, each of `groups` of consecutive rows by its own statistics.

    Running statistics are means over the groups. Parameters, constants and evaluation are those of `batch_norm`. (Under
    a vmap over groups the gradients of kernels would be of each group, and several times as slow.)
    """

    groups: int
    momentum: float
    epsilon: float
    param_dtype: Any
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape, kind = x.shape[-1:], self.param_dtype
        scale, bias, running = _of_norm(self, shape, kind)
        rows = x.astype(kind).reshape(self.groups, -1, *shape)
        mean = rows.mean(axis=1, keepdims=True)
        found = {"mean": mean, "var": jnp.mean(jnp.square(rows - mean), axis=1, keepdims=True)}
        for name, variable in running.items():
            of_all = found[name].mean(axis=(0, 1))
            variable.value = self.momentum * variable.value + (1 - self.momentum) * of_all
        normed = (rows - mean) * (jax.lax.rsqrt(found["var"] + self.epsilon) * scale) + bias
        return normed.reshape(x.shape).astype(self.dtype)


class RowNorm(nn.Module):
    """Batch norm of maps [B, H, W, C] in training, whose statistics are of the rows that count, on all devices.

    `rows` [B] are weights; where none counts, the running statistics stay and are used instead. Parameters,
    constants and evaluation are those of `batch_norm`. (Flax's mask is wrong where devices have unequally many.)
    """

    param_dtype: Any = jnp.float32
    dtype: Any = jnp.float32
    axis: str | None = AXIS

    @nn.compact
    def __call__(self, x: jax.Array, rows: jax.Array) -> jax.Array:
        shape, kind = x.shape[-1:], self.param_dtype
        scale, bias, running = _of_norm(self, shape, kind)
        x, weight = x.astype(kind), rows.astype(kind)[:, None, None, None]

        def total(values: jax.Array) -> jax.Array:
            of_device = jnp.sum(weight * values, axis=(0, 1, 2))
            return jax.lax.psum(of_device, self.axis) if self.axis else of_device

        count = total(jnp.ones_like(x))
        mean = total(x) / jnp.maximum(count, 1e-6)
        found = {"mean": mean, "var": total(jnp.square(x - mean)) / jnp.maximum(count, 1e-6)}
        for name, variable in running.items():
            found[name] = jnp.where(count > 0, found[name], variable.value)
            variable.value = 0.9 * variable.value + 0.1 * found[name]
        return ((x - found["mean"]) * jax.lax.rsqrt(found["var"] + 1e-5) * scale + bias).astype(self.dtype)


def conv_norm(
    x: jax.Array,
    features: int,
    kernel: int | tuple[int, int],
    stride: int = 1,
    padding: int | None = None,
    *,
    name: str,
    train: bool,
    axis: Rows,
    bias: bool = True,
    kernel_init: Any = conv_init,
    epsilon: float = 1e-5,
    **kinds: Any,
) -> jax.Array:
    """A convolution and its batch norm, `<name>_conv` and `<name>_norm` of the module that calls."""
    x = conv(features, kernel, stride, padding, kernel_init, use_bias=bias, name=f"{name}_conv", **kinds)(x)
    normed: jax.Array = batch_norm(train, axis=axis, epsilon=epsilon, name=f"{name}_norm", **kinds)(x)
    return normed


def uniform_dense(x: jax.Array, features: int, *, name: str, **kinds: Any) -> jax.Array:
    """A dense layer of the module that calls, [B, D] to [B, features]; weights and biases start with
    U(-1 / sqrt(D), 1 / sqrt(D)), as in PyTorch."""
    fan_in = x.shape[-1]

    def bias(rng: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return jax.random.uniform(rng, shape, dtype, -1, 1) / jnp.sqrt(fan_in)

    return nn.Dense(features, kernel_init=uniform_init, bias_init=bias, name=name, **kinds)(x)


def mean_feature(x: jax.Array, dim: int, dropout: float, train: bool, **kinds: Any) -> jax.Array:
    """The mean of a map [B, H, W, C] over its pixels, after dropout; with `dim` the dense layer `feature` of it."""
    x = nn.Dropout(dropout, deterministic=not train)(x.mean(axis=(1, 2)))
    return nn.Dense(dim, kernel_init=dense_init, name="feature", **kinds)(x) if dim else x


def max_pool(x: jax.Array, window: int, stride: int, padding: int = 0) -> jax.Array:
    """Max pooling of [B, H, W, C]; a map smaller than the window stays as it is, cells past the last window drop.

    As maxima of strided slices, rows and columns in turn: the gradient of a windowed maximum takes 3 times (window 3)
    to 30 times (window 2) as long on a CPU. Equal maxima, which after a ReLU are zeros, share the gradient.
    """
    if min(x.shape[1:3]) + 2 * padding < window:
        return x
    if padding:
        x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)), constant_values=-jnp.inf)
    for axis in (1, 2):
        span = (x.shape[axis] - window) // stride * stride + 1  # from the first window's start to the last one's
        shifted = [jax.lax.slice_in_dim(x, i, i + span, stride, axis) for i in range(window)]
        x = reduce(jnp.maximum, shifted)
    return x


def adaptive_mean(x: jax.Array, side: int) -> jax.Array:
    """Means of [B, H, W, C] over `side` x `side` cells of nearly equal size, [B, side, side, C].

    Cell i covers the rows from floor(i H / side) to ceil((i + 1) H / side) - 1, as in PyTorch: neighbours may share a
    row, and those of a map smaller than the grid repeat it.
    """
    _, height, width, _ = x.shape
    if height == width == side:
        return x
    rows, columns = jnp.asarray(cells(height, side), x.dtype), jnp.asarray(cells(width, side), x.dtype)
    return jnp.einsum("ih,jw,bhwc->bijc", rows, columns, x, precision=jax.lax.Precision.HIGHEST)


def cells(size: int, side: int) -> np.ndarray:
    """Weight of each of `size` positions in each of `side` cells, [side, size]."""
    cell, position = np.arange(side)[:, None], np.arange(size)
    inside = (position >= cell * size // side) & (position < -(-(cell + 1) * size // side))
    return inside / inside.sum(axis=1, keepdims=True)
