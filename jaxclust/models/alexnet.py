"""AlexNet in one tower, without local response normalisation.

"alexnet": Krizhevsky, Sutskever, Hinton, "ImageNet Classification with Deep Convolutional Neural Networks", NIPS 2012,
with batch norm, as Caron et al. 2018 (DeepCluster) train it. "alexnet_owt": Krizhevsky, "One weird trick for
parallelizing convolutional neural networks", 2014, without batch norm, which is torchvision's AlexNet.
"""

from typing import Any, NamedTuple

import jax
from flax import linen as nn
from ml_collections import ConfigDict

from jaxclust import runtime
from jaxclust.errors import ConfigError
from jaxclust.models.layers import Rows, adaptive_mean, conv, conv_norm, dense_init, max_pool, seen


class Conv(NamedTuple):
    """One convolution."""

    kernel: int
    stride: int
    padding: int
    pooled: bool  # by 3 x 3 with stride 2


class Kind(NamedTuple):
    """Channels of the convolutions as published, and whether batch norm follows each."""

    channels: tuple[int, int, int, int, int]
    norm: bool


CONVS = (
    Conv(11, 4, 2, True),
    Conv(5, 1, 2, True),
    Conv(3, 1, 1, False),
    Conv(3, 1, 1, False),
    Conv(3, 1, 1, True),
)
NETWORKS = {
    "alexnet": Kind((96, 256, 384, 384, 256), norm=True),
    "alexnet_owt": Kind((64, 192, 384, 256, 256), norm=False),
}
SMALLEST = CONVS[0].kernel - 2 * CONVS[0].padding
"""The smallest side in pixels that the first convolution gives an output for."""

SIDE = 6
"""Of the map that the first dense layer sees."""


class AlexNet(nn.Module):
    """Five convolutions and two dense layers, of which the second is the feature before its ReLU.

    Input [B, H, W, C] standardised, of any size from 7 x 7; output [B, dim]. The last map is pooled to 6 x 6, which
    it is at 224 x 224; on small images a pooling that would leave no pixel is skipped. ConfigError below 7 x 7.
    """

    kind: Kind
    width: int
    dim: int
    dropout: float
    sobel: bool
    dtype: Any
    param_dtype: Any
    axis: Rows = runtime.AXIS  # of batch norm

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        height, width = x.shape[1:3]
        if min(height, width) < SMALLEST:
            name = next(name for name, kind in NETWORKS.items() if kind == self.kind)
            raise ConfigError(
                f"config.model.name={name!r} needs images of {SMALLEST} x {SMALLEST} pixels or more, and these are "
                f"{height} x {width}. Raise config.data.image_size or take config.model.name=convnet"
            )
        kinds: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = seen(x, self.sobel, self.dtype)
        for number, (c, channels) in enumerate(zip(CONVS, self.kind.channels, strict=True), 1):
            shape = round(self.width * channels / self.kind.channels[0]), c.kernel, c.stride, c.padding
            if self.kind.norm:
                x = conv_norm(x, *shape, name=f"conv{number}", train=train, axis=self.axis, **kinds)
            else:
                x = conv(*shape, name=f"conv{number}_conv", **kinds)(x)
            x = nn.relu(x)
            self.sow("maps", f"conv{number}", x)
            x = max_pool(x, 3, 2) if c.pooled else x
        x = adaptive_mean(x, SIDE).reshape(x.shape[0], -1)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        x = nn.relu(nn.Dense(self.dim, kernel_init=dense_init, name="dense", **kinds)(x))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.dim, kernel_init=dense_init, name="feature", **kinds)(x)


def make(config: ConfigDict) -> AlexNet:
    """The network of `config.model`, in the precision of `config.runtime.dtype`."""
    m = config.model
    kinds = m.sobel, runtime.compute_dtype(config), runtime.param_dtype(config)
    kind = NETWORKS[m.name]
    return AlexNet(kind, m.width or kind.channels[0], m.dim or 4096, m.dropout if m.dropout >= 0 else 0.5, *kinds)
