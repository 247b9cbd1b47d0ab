"""The convolution of every network, whose kernel's gradient is several times as fast on a CPU as XLA's.

XLA takes that gradient as a convolution with windows as large as the maps, for which CPUs have no fast code. Here it is
a matrix product, 2.5 to 7 times as fast for 3 x 3 kernels on maps of 16 x 16 pixels and more. Accelerators and small
maps keep XLA's, which compiles in half the time.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Pair = tuple[int, int]

MOST_PLACES = 9  # of a kernel; with more, products gain less
FEW_PIXELS = 144  # of a map; with fewer they gain little
IMAGES = 16  # of a product at most, so that what is copied for it stays in the cache


def conv(
    x: jax.Array,
    kernel: jax.Array,
    strides: Sequence[int],
    padding: Sequence[Pair],
    lhs_dilation: Sequence[int] = (1, 1),
    rhs_dilation: Sequence[int] = (1, 1),
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    precision: Any = None,
) -> jax.Array:
    """x [B, H, W, C] convolved by a kernel [h, w, C, D], [B, H', W', D]; with the arguments of `nn.Conv`.

    ValueError for dilations and groups.
    """
    if {*lhs_dilation, *rhs_dilation, feature_group_count} != {1}:
        raise ValueError(f"no convolution here has {lhs_dilation=}, {rhs_dilation=} or {feature_group_count=}")
    settings: tuple[Any, ...] = tuple(strides), tuple(map(tuple, padding)), precision
    if kernel.shape[0] * kernel.shape[1] > MOST_PLACES:
        return _plain(x, kernel, *settings)
    return _conv(*_on_the_same_devices(x, kernel), *settings)


def _plain(x: jax.Array, kernel: jax.Array, strides: Pair, pads: tuple[Pair, Pair], precision: Any) -> jax.Array:
    layout = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, strides, pads, dimension_numbers=layout, precision=precision)


_conv = jax.custom_vjp(_plain, nondiff_argnums=(2, 3, 4))


def _forward(x: jax.Array, kernel: jax.Array, *settings: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _plain(x, kernel, *settings), (x, kernel)


def _backward(
    strides: Pair, pads: tuple[Pair, Pair], precision: Any, seen: tuple[jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = seen
    settings = strides, pads, precision
    (of_x,) = jax.linear_transpose(lambda x: _plain(x, kernel, *settings), x)(g)

    def as_xla(x: jax.Array, g: jax.Array) -> jax.Array:
        (gradient,) = jax.linear_transpose(lambda kernel: _plain(x, kernel, *settings), kernel)(g)
        return gradient

    if g.shape[1] * g.shape[2] < FEW_PIXELS:
        return of_x, as_xla(x, g)
    by_products = partial(_by_products, kernel.shape, *settings)
    return of_x, lax.platform_dependent(x, g, cpu=by_products, default=as_xla)


_conv.defvjp(_forward, _backward)


def _by_products(
    shape: tuple[int, ...], strides: Pair, pads: tuple[Pair, Pair], precision: Any, x: jax.Array, g: jax.Array
) -> jax.Array:
    """The kernel's gradient: what each of its places has seen of x times what came of it, over images and pixels."""
    together = min(IMAGES, len(x))
    missing = 0, -len(x) % together
    padded, g = jnp.pad(x, (missing, *pads, (0, 0))), jnp.pad(g, (missing, (0, 0), (0, 0), (0, 0)))
    spans = [(size - 1) * stride + 1 for size, stride in zip(g.shape[1:3], strides, strict=True)]

    def product(x: jax.Array, g: jax.Array) -> jax.Array:
        places = [
            x[:, i : i + spans[0] : strides[0], j : j + spans[1] : strides[1]]
            for i in range(shape[0])
            for j in range(shape[1])
        ]
        seen = jnp.concatenate(places, axis=-1)
        kind = jnp.promote_types(g.dtype, jnp.float32)
        return jnp.einsum("bhwc,bhwd->cd", seen, g, precision=precision, preferred_element_type=kind)

    parts = [array.reshape(-1, together, *array.shape[1:]) for array in (padded, g)]
    total = jnp.sum(lax.map(lambda some: product(*some), parts), axis=0)
    return total.astype(g.dtype).reshape(shape)


def _on_the_same_devices(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both as arrays of each device, if one of them is: gradients of the other are summed over devices."""
    axes = [jax.typeof(array).manual_axis_type.varying for array in (x, kernel)]

    def everywhere(array: jax.Array, own: frozenset[Any]) -> jax.Array:
        missing = tuple(frozenset().union(*axes) - own)
        return lax.pcast(array, missing, to="varying") if missing else array

    return everywhere(x, axes[0]), everywhere(kernel, axes[1])
