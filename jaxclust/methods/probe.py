"""Linear probes: a linear classifier on each layer of a frozen network, all of them trained in one pass.

Caron et al. 2018 (DeepCluster), section 4.2 and its published evaluation. A map is averaged over a grid so that it
has about 10,000 numbers, and nothing but the classifiers is trained. They share only the images that they see: the
loss is the sum of theirs.

Departures: the feature itself is a layer too; networks other than AlexNet at 224 x 224 have an adaptive grid.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from jaxclust.methods.base import Aux, Batch, Method
from jaxclust.models.layers import adaptive_mean
from jaxclust.ops.images import ten_crops
from jaxclust.ops.losses import accuracy, weighted_cross_entropy

Params = dict[str, Any]
Extra = dict[str, Any]

SIZE = 10_000  # numbers that a pooled map has at most
CENTRE = 4  # which of ten crops is the centre


class Pool(NamedTuple):
    """Means over windows of `side` x `side` without overlap, `padding` zeros around the map counted in."""

    side: int
    padding: int = 0


ALEXNET = {
    ("conv1", 55, 96): Pool(6, 3),
    ("conv2", 27, 256): Pool(4),
    ("conv3", 13, 384): Pool(3, 1),
    ("conv4", 13, 384): Pool(3, 1),
    ("conv5", 13, 256): Pool(2),
}
"""The published pooling of AlexNet's maps at 224 x 224, by name, side and channels."""


class Probe(NamedTuple):
    """What is probed: `embed` of a method, its layers with the length of each when pooled, and how it is judged."""

    embed: Callable[..., Any]
    widths: Mapping[str, int]
    num_classes: int
    crop_side: int  # of each of ten crops; 0: the image is judged as it is


def method(p: Probe, frozen: Extra, settings: ConfigDict) -> Method:
    """The method that trains the probes, with `config.evaluate.linear` as `settings`.

    `frozen` {"params", "extra"} are shapes of the arrays of the network, which stay in `extra` as they are put there
    before the first step. In place of images it takes rows [B, D], pooled before and joined by `joined`.
    """
    return Method(
        init=partial(init, p, frozen),
        loss=partial(loss, p),
        embed=partial(joined, p),
        optimizer=partial(optimizer, settings),
        views=("probe",),
        labels="class",
    )


def init(p: Probe, frozen: Extra, rng: jax.Array, batch: Batch) -> tuple[Params, Extra]:
    """New classifiers, and zeros in place of the network's arrays."""
    keys = jax.random.split(rng, len(p.widths))
    heads = {name: new_head(key, p.widths[name], p.num_classes) for name, key in zip(p.widths, keys, strict=True)}
    return {"heads": heads}, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), frozen)


def new_head(rng: jax.Array, width: int, outputs: int) -> Params:
    """A dense layer, kernel [D, C] and bias [C], from U(-1/sqrt(D), 1/sqrt(D))."""
    kernel_rng, bias_rng = jax.random.split(rng)
    limit = 1 / math.sqrt(width)
    return {
        "kernel": jax.random.uniform(kernel_rng, (width, outputs), minval=-limit, maxval=limit),
        "bias": jax.random.uniform(bias_rng, (outputs,), minval=-limit, maxval=limit),
    }


def optimizer(settings: ConfigDict) -> optax.GradientTransformation:
    """SGD with momentum 0.9, a decay of 10**wd on every parameter (wd 0: none), and the rate of `schedule`."""
    decay = 10.0**settings.wd if settings.wd else 0.0
    return optax.chain(
        optax.add_decayed_weights(decay), optax.trace(0.9), optax.scale_by_learning_rate(schedule(settings.lr, decay))
    )


def schedule(lr: float, decay: float) -> Callable[[Any], Any]:
    """lr / sqrt(1 + lr * decay * t) at step t, counted over all epochs."""
    return lambda step: lr / jnp.sqrt(1 + lr * decay * step)


def pool(name: str, layer: jax.Array) -> jax.Array:
    """A map [B, H, W, C] as vectors [B, g * g * C]: AlexNet's table, elsewhere g = floor(sqrt(10,000 / C)) cells.

    No finer than the map. Vectors [B, D] stay.
    """
    if layer.ndim == 2:
        return layer
    _, height, width, channels = layer.shape
    table = ALEXNET.get((name, height, channels)) if height == width else None
    if table is None:
        grid = max(1, min(math.isqrt(SIZE // channels), height, width))
        pooled = adaptive_mean(layer, grid)
    else:
        pooled = window_mean(layer, table)
    return pooled.reshape(len(layer), -1)


def window_mean(layer: jax.Array, window: Pool) -> jax.Array:
    """[B, H, W, C] to [B, g, g, C] with g = floor((H + 2 padding) / side); what is past the last window drops."""
    side, padding = window
    padded = jnp.pad(layer, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    grid = padded.shape[1] // side
    cut = padded[:, : grid * side, : grid * side]
    return cut.reshape(len(layer), grid, side, grid, side, -1).mean(axis=(2, 4))


def vectors(p: Probe, extra: Extra, images: jax.Array) -> dict[str, jax.Array]:
    """What each classifier sees of images, or of rows that `joined` made, {layer: [B, D]}."""
    if images.ndim == 2:
        ends = [sum(list(p.widths.values())[: i + 1]) for i in range(len(p.widths))]
        return dict(zip(p.widths, jnp.split(images, ends[:-1], axis=1), strict=True))
    maps = p.embed(extra["params"], extra["extra"], images, layers=tuple(p.widths))
    return {name: pool(name, maps[name]) for name in p.widths}


def joined(p: Probe, params: Params, extra: Extra, images: jax.Array, layers: tuple[str, ...] = ()) -> Any:
    """The pooled layers of images side by side, [B, sum of widths]; or those of `layers` by name."""
    found = vectors(p, extra, images)
    return {name: found[name] for name in layers} if layers else jnp.concatenate(list(found.values()), axis=1)


def logits(p: Probe, params: Params, extra: Extra, images: jax.Array) -> dict[str, jax.Array]:
    """What each classifier says, {layer: [B, C]}."""
    return {
        name: jnp.matmul(x, head["kernel"], precision=jax.lax.Precision.HIGHEST) + head["bias"]
        for name, x in vectors(p, extra, images).items()
        for head in [params["heads"][name]]
    }


def loss(p: Probe, params: Params, extra: Extra, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Aux]:
    """The sum of the cross-entropies of all classifiers."""
    scores = logits(p, params, extra, batch["views"]["probe"])
    target, weight = batch["target"], batch["weight"]
    losses = {f"{name}/loss": weighted_cross_entropy(x, target, weight) for name, x in scores.items()}
    hits = {f"{name}/accuracy": accuracy(x, target) for name, x in scores.items()}
    return sum(losses.values(), jnp.zeros(())), Aux(extra, losses | hits)


def log_probabilities(p: Probe, params: Params, extra: Extra, images: jax.Array) -> dict[str, jax.Array]:
    """Log-probabilities [B, C] of the classes by each layer.

    Of ten crops it is the mean of their probabilities, and "<layer>/centre" is that of the centre alone.
    """

    def one(crop: jax.Array) -> dict[str, jax.Array]:
        return {name: jax.nn.log_softmax(x) for name, x in logits(p, params, extra, crop).items()}

    if not p.crop_side or images.ndim == 2:
        return one(images)
    of_crops = jax.lax.map(one, ten_crops(images, p.crop_side))  # one after the other, to bound memory
    means = {name: jax.nn.logsumexp(x, axis=0) - math.log(len(x)) for name, x in of_crops.items()}
    return means | {f"{name}/centre": x[CENTRE] for name, x in of_crops.items()}
