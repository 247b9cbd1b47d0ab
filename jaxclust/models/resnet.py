"""Residual networks.

He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016, table 1; with the stride of a
bottleneck in its 3 x 3 convolution, as in torchvision. Every batch norm starts with scale 1.

"clusterresnet" is what Niu, Shan, Wang, "SPICE: Semantic Pseudo-Labeling for Image Clustering", IEEE TIP 2022, train on
images of 32 to 96 pixels: a ResNet-34 with the stem "pooled", whose published code draws it uniformly.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
from flax import linen as nn
from ml_collections import ConfigDict

from jaxclust import runtime
from jaxclust.models.layers import Rows, conv_init, conv_norm, max_pool, mean_feature, seen, uniform_init

Layer = Callable[..., jax.Array]
"""conv_norm with all but the input, the sizes and the name."""


def basic(layer: Layer, x: jax.Array, width: int, stride: int, name: str) -> jax.Array:
    """Two 3 x 3 convolutions of `width` channels around the identity."""
    y = nn.relu(layer(x, width, 3, stride, name=f"{name}_1"))
    y = layer(y, width, 3, name=f"{name}_2")
    return nn.relu(y + shortcut(layer, x, width, stride, name))


def bottleneck(layer: Layer, x: jax.Array, width: int, stride: int, name: str) -> jax.Array:
    """A 3 x 3 convolution of `width` channels between two of 1 x 1, the last to four times as many."""
    y = nn.relu(layer(x, width, 1, name=f"{name}_1"))
    y = nn.relu(layer(y, width, 3, stride, name=f"{name}_2"))
    y = layer(y, 4 * width, 1, name=f"{name}_3")
    return nn.relu(y + shortcut(layer, x, 4 * width, stride, name))


def shortcut(layer: Layer, x: jax.Array, channels: int, stride: int, name: str) -> jax.Array:
    """The identity, or a 1 x 1 convolution where the shape changes."""
    return x if (stride, channels) == (1, x.shape[-1]) else layer(x, channels, 1, stride, name=f"{name}_skip")


NETWORKS = {
    "resnet18": (basic, (2, 2, 2, 2)),
    "resnet34": (basic, (3, 4, 6, 3)),
    "resnet50": (bottleneck, (3, 4, 6, 3)),
    "clusterresnet": (basic, (3, 4, 6, 3)),
}
"""The block of each network, and how many there are in each of the four stages."""


class Stem(NamedTuple):
    """What comes before the first block: a convolution, and max pooling (window, stride, padding)."""

    kernel: int
    stride: int
    pool: tuple[int, int, int] | None


STEMS = {"imagenet": Stem(7, 2, (3, 2, 1)), "small": Stem(3, 1, None), "pooled": Stem(3, 1, (2, 2, 1))}


class ResNet(nn.Module):
    """Four stages of residual blocks, each of twice the channels and, but for the first, half the side.

    Input [B, H, W, C] standardised, of any size. Output: the mean of the last map over its pixels, which is not
    negative, [B, 8 * width] (basic) or [B, 32 * width] (bottleneck); with `dim` a dense layer on it, [B, dim].
    """

    block: Callable[..., jax.Array]
    blocks: tuple[int, ...]
    stem: Stem
    kernel_init: Any
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
        settings: dict[str, Any] = {"train": train, "axis": self.axis, "bias": False, "kernel_init": self.kernel_init}
        layer: Layer = partial(conv_norm, **settings, **kinds)
        x = seen(x, self.sobel, self.dtype)
        x = nn.relu(layer(x, self.width, self.stem.kernel, self.stem.stride, name="conv1"))
        self.sow("maps", "conv1", x)
        x = max_pool(x, *self.stem.pool) if self.stem.pool else x
        for stage, count in enumerate(self.blocks):
            for i in range(count):
                stride = 2 if stage and i == 0 else 1
                x = self.block(layer, x, self.width * 2**stage, stride, f"conv{stage + 2}_{i + 1}")
            self.sow("maps", f"conv{stage + 2}", x)
        return mean_feature(x, self.dim, self.dropout, train, **kinds)


def make(config: ConfigDict) -> ResNet:
    """The network of `config.model`, in the precision of `config.runtime.dtype`."""
    m = config.model
    kinds = m.sobel, runtime.compute_dtype(config), runtime.param_dtype(config)
    stem, drawn = ("pooled", uniform_init) if m.name == "clusterresnet" else (m.stem, conv_init)
    return ResNet(*NETWORKS[m.name], STEMS[stem], drawn, m.width or 64, m.dim, max(m.dropout, 0.0), *kinds)
