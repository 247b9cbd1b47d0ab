"""The small networks of ClustNet: stacks of valid convolutions with dense layers, and the decoder of one.

After the code that the method is named after (section 2.2 of our specification); there is no paper.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from jaxclust.models.layers import RowNorm, batch_norm, conv, max_pool, uniform_dense, uniform_init
from jaxclust.runtime import AXIS

transposed_init = nn.initializers.variance_scaling(1 / 3, "fan_out", "uniform")
"""U(-a, a) with a = 1 / sqrt(k * k * C_out): PyTorch takes this for the fan-in of a transposed convolution."""


class Stack(NamedTuple):
    """Sizes of a stack of convolutions; `layers` 0: there is none, and 1 makes two."""

    layers: int
    channels: int
    kernel: int
    pool: int  # window half way
    pool_out: int  # window at the end
    dropout: float
    bn: bool

    @property
    def depth(self) -> int:
        """How many convolutions there are."""
        return max(self.layers, 2) if self.layers else 0

    def window(self, number: int) -> int:
        """The window of the pooling after convolution `number`, from 1."""
        return {self.depth // 2: self.pool, self.depth: self.pool_out}.get(number, 1)


NO_STACK = Stack(0, 1, 1, 1, 1, 0.0, False)


def stack(section: ConfigDict) -> Stack:
    """The sizes that a section of `config.clustnet` says."""
    return Stack(*(section[name] for name in Stack._fields))


def map_shape(sizes: Stack, image_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of what a stack makes of images [H, W, C]; a side of 0 where a kernel is larger than its map."""
    height, width, channels = image_shape
    for number in range(1, sizes.depth + 1):
        if min(height, width) < sizes.kernel:
            return 0, 0, sizes.channels
        window = sizes.window(number) if min(height, width) >= sizes.window(number) else 1  # as `max_pool`
        height, width, channels = height // window, width // window, sizes.channels
    return height, width, channels


def margin(kernel: int) -> tuple[int, int]:
    """Zeros before and behind a map that bring it back to the size it had before a valid convolution."""
    return (kernel - 1) // 2, kernel // 2


class ConvStack(nn.Module):
    """Images [B, H, W, C] to a map: valid convolutions, each with batch norm, ReLU and a border of zeros.

    A convolution adds what it was given where channels agree. Dropout takes whole channels. With `rows` [B] batch norm
    counts each image so much.
    """

    sizes: Stack
    dtype: Any
    param_dtype: Any
    axis: str | None = AXIS  # of batch norm

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, rows: jax.Array | None = None) -> jax.Array:
        s, border = self.sizes, margin(self.sizes.kernel)
        kinds: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        for number in range(1, s.depth + 1):
            name = f"conv{number}"
            if number > 1:
                x = nn.Dropout(s.dropout, broadcast_dims=(1, 2), deterministic=not train)(x)
            y = conv(s.channels, s.kernel, 1, 0, uniform_init, use_bias=False, name=f"{name}_conv", **kinds)(x)
            if s.bn and train and rows is not None:
                y = RowNorm(axis=self.axis, name=f"{name}_norm", **kinds)(y, rows)
            elif s.bn:
                y = batch_norm(train, axis=self.axis, name=f"{name}_norm", **kinds)(y)
            y = jnp.pad(nn.relu(y), ((0, 0), border, border, (0, 0)))
            x = x + y if x.shape[-1] == s.channels else y
            self.sow("maps", name, x)
            x = max_pool(x, s.window(number), s.window(number))
        return x


class CNN(nn.Module):
    """A stack, flattened, and dense layers with ReLU between them: [B, H, W, C] or [B, D] to [B, outputs].

    With `outputs` 0 the map of the stack [B, H', W', C']. Weights and biases start with U(-1 / sqrt(fan-in),
    1 / sqrt(fan-in)), as in PyTorch. The maps "last", of the stack, and "feature", before the last layer, are recorded.
    """

    sizes: Stack
    hidden: tuple[int, ...]
    outputs: int
    dtype: Any
    param_dtype: Any
    axis: str | None = AXIS

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, rows: jax.Array | None = None) -> jax.Array:
        kinds: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = x.astype(self.dtype)
        if self.sizes.depth:
            x = ConvStack(self.sizes, axis=self.axis, name="stack", **kinds)(x, train, rows)
            self.sow("maps", "last", x)
        if not self.outputs:
            return x
        x = x.reshape(x.shape[0], -1)
        for number, width in enumerate(self.hidden, 1):
            x = nn.relu(uniform_dense(x, width, name=f"hidden{number}", **kinds))
        self.sow("maps", "feature", x)
        return uniform_dense(x, self.outputs, name="output", **kinds)


class Decoder(nn.Module):
    """The mirror of a stack: a code [B, D] and where the maxima of its two poolings were (`peaks`) to images.

    `shape` is that of the stack's last map; the images are [B, H, W, channels]. The last convolution is linear, or with
    `last_relu` like the others.
    """

    sizes: Stack
    shape: tuple[int, int, int]
    channels: int  # of the images
    last_relu: bool
    dtype: Any
    param_dtype: Any
    axis: str | None = AXIS

    @nn.compact
    def __call__(self, code: jax.Array, places: tuple[jax.Array, jax.Array], train: bool = False) -> jax.Array:
        s, half, (before, behind) = self.sizes, self.sizes.depth // 2, margin(self.sizes.kernel)
        kinds: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = uniform_dense(code, self.shape[0] * self.shape[1] * self.shape[2], name="dense", **kinds)
        x = x.reshape(-1, *self.shape)
        for number in range(s.depth):
            if number == 0:
                x = unpool(x, places[1], s.pool_out)
            elif number == half:
                x = unpool(x, places[0], s.pool)
            width, last = (self.channels, True) if number == s.depth - 1 else (s.channels, False)
            y = nn.ConvTranspose(
                width, (s.kernel, s.kernel), padding="VALID", use_bias=False, kernel_init=transposed_init,
                name=f"conv{number + 1}_conv", **kinds,
            )(x)  # fmt: skip
            if not last or self.last_relu:
                y = batch_norm(train, axis=self.axis, name=f"conv{number + 1}_norm", **kinds)(y) if s.bn else y
                y = nn.relu(y)
            y = y[:, before : y.shape[1] - behind, before : y.shape[2] - behind]
            x = x + y if x.shape[-1] == width else y
        return x


def peaks(x: jax.Array, window: int) -> jax.Array:
    """Where the maximum of each window of maps [B, H, W, C] is, ones among zeros of that shape.

    Of equal maxima the first in row-major order; pixels behind the last whole window are in none. Maps smaller than the
    window are not pooled, so that each pixel is its own maximum.
    """
    batch, height, width, channels = x.shape
    if min(height, width) < window:
        return jnp.ones_like(x)
    rows, columns = height // window, width // window
    cells = x[:, : rows * window, : columns * window].reshape(batch, rows, window, columns, window, channels)
    cells = cells.transpose(0, 1, 3, 5, 2, 4).reshape(batch, rows, columns, channels, window * window)
    first = jax.nn.one_hot(jnp.argmax(cells, axis=-1), window * window, dtype=x.dtype)
    first = first.reshape(batch, rows, columns, channels, window, window).transpose(0, 1, 4, 2, 5, 3)
    whole = first.reshape(batch, rows * window, columns * window, channels)
    return jnp.pad(whole, ((0, 0), (0, height - rows * window), (0, width - columns * window), (0, 0)))


def unpool(x: jax.Array, places: jax.Array, window: int) -> jax.Array:
    """Maxima [B, h, w, C] at their `places` [B, H, W, C], which `peaks` found with the same window; zeros elsewhere."""
    height, width = places.shape[1:3]
    if min(height, width) < window:
        return x * places
    spread = x.repeat(window, axis=1).repeat(window, axis=2)
    rest = ((0, 0), (0, height - spread.shape[1]), (0, width - spread.shape[2]), (0, 0))
    return jnp.pad(spread, rest) * places
