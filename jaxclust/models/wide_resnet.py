"""Wide residual networks with pre-activation and LeakyReLU, as FixMatch and SPICE train them.

Zagoruyko, Komodakis, "Wide Residual Networks", BMVC 2016; Sohn et al., "FixMatch", NeurIPS 2020, section 4. In a block
that changes the shape of the map, batch norm and activation come before both branches; elsewhere the shortcut is the
map as it is. Batch statistics keep 0.999.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
from flax import linen as nn
from ml_collections import ConfigDict

from jaxclust import runtime
from jaxclust.models.layers import Rows, batch_norm, conv, mean_feature, seen


class Groups(NamedTuple):
    """Blocks in each group, the stride of its first block, and the channels of the first group in those of the stem."""

    blocks: tuple[int, ...]
    strides: tuple[int, ...]
    widen: int


NETWORKS = {
    "wrn28_2": Groups((4, 4, 4), (1, 2, 2), 2),
    "wrn28_8": Groups((4, 4, 4), (1, 2, 2), 8),
    "wrn37_2": Groups((4, 4, 4, 4), (2, 2, 2, 2), 2),
}
"""wrn37_2 is for images of 96 pixels, of which it makes a map of 6 x 6."""


class WideResNet(nn.Module):
    """Groups of residual blocks, each of twice the channels of the one before.

    Input [B, H, W, C] standardised, of any size. Output: the mean of the last map over its pixels, [B, channels of the
    last group]; with `dim` a dense layer on it, [B, dim]. The map of a group is what its successor sees, after batch
    norm and LeakyReLU; conv1 is that of the stem.
    """

    groups: Groups
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
        convolve: Callable[..., nn.Conv] = partial(conv, use_bias=False, **kinds)

        def activated(x: jax.Array, name: str) -> jax.Array:
            norm = batch_norm(train, axis=self.axis, momentum=0.999, name=f"{name}_norm", **kinds)
            return nn.leaky_relu(norm(x), 0.1)

        def block(x: jax.Array, y: jax.Array, channels: int, stride: int, name: str) -> jax.Array:
            """The block of a map `x` and of what batch norm and activation make of it, `y`."""
            changes = (stride, channels) != (1, x.shape[-1])
            skip = convolve(channels, 1, stride, name=f"{name}_skip_conv")(y) if changes else x
            y = activated(convolve(channels, 3, stride, name=f"{name}_1_conv")(y), f"{name}_2")
            return skip + convolve(channels, 3, name=f"{name}_2_conv")(y)

        x = convolve(self.width, 3, name="conv1_conv")(seen(x, self.sobel, self.dtype))
        for group, (count, stride) in enumerate(zip(self.groups.blocks, self.groups.strides, strict=True)):
            for i in range(count):
                name = f"conv{group + 2}_{i + 1}"
                y = activated(x, f"{name}_1")
                if i == 0:
                    self.sow("maps", f"conv{group + 1}", y)
                x = block(x, y, self.width * self.groups.widen * 2**group, 1 if i else stride, name)
        x = activated(x, "last")
        self.sow("maps", f"conv{len(self.groups.blocks) + 1}", x)
        return mean_feature(x, self.dim, self.dropout, train, **kinds)


def make(config: ConfigDict) -> WideResNet:
    """The network of `config.model`, in the precision of `config.runtime.dtype`."""
    m = config.model
    kinds = m.sobel, runtime.compute_dtype(config), runtime.param_dtype(config)
    return WideResNet(NETWORKS[m.name], m.width or 16, m.dim, max(m.dropout, 0.0), *kinds)
