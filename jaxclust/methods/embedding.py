"""A body with a linear last layer, F = X W + b, passed through in small batches (DSCL, sections 5.1 and 5.2 of our
specification).

The feature X is that of `classifier.py`, as it is, so that vectors lose nothing and F is linear in X.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from jaxclust import runtime
from jaxclust.errors import ConfigError
from jaxclust.methods import classifier
from jaxclust.methods.base import Batch
from jaxclust.methods.classifier import Classifier, Extra, Params
from jaxclust.models.layers import dense_init
from jaxclust.runtime import AXIS


def upstream_init(rng: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """U(-2, 2), as published."""
    return jax.random.uniform(rng, shape, dtype, -2, 2)


INITS: dict[str, tuple[Any, Any]] = {
    "normal": (dense_init, nn.initializers.zeros),
    "orthogonal": (nn.initializers.orthogonal(), nn.initializers.zeros),
    "upstream": (upstream_init, upstream_init),
}
"""What draws kernel and bias of the last layer."""


class Net(NamedTuple):
    """The body, the last layer, and how they learn."""

    f: Classifier  # without its own linear classifier
    top: nn.Dense
    settings: ConfigDict  # config.dscl
    seed: int

    @property
    def normed(self) -> bool:
        """Whether batch norm is that of small batches, which must then all be of one size."""
        return self.settings.bn == "small_batch" and not self.f.frozen


class Said(NamedTuple):
    """Of images of a small batch: embeddings with dropout and without, [s, d], and batch statistics after it."""

    dropped: jax.Array
    clean: jax.Array
    stats: Any


def build(config: ConfigDict, f: Classifier, d: int) -> Net:
    """The body f and a layer of `d` numbers, with the settings of `config.dscl`."""
    kernel, bias = INITS[config.dscl.init]
    top = nn.Dense(d, kernel_init=kernel, bias_init=bias, dtype=f.dtype, param_dtype=f.dtype, precision="highest")
    return Net(f, top, config.dscl, config.seed)


def init(net: Net, rng: jax.Array, batch: Batch) -> tuple[Params, Extra]:
    """New parameters of the body, if there is one, and of the last layer."""
    body_rng, top_rng = jax.random.split(rng)
    images = jnp.asarray(batch["views"]["train"][:1])
    made: Any = net.f.body.init(body_rng, classifier.standardized(net.f, images)) if images.ndim > 2 else {}
    params, extra = {"body": made["params"]} if made else {}, {"batch_stats": made.get("batch_stats", {})}
    feature = jax.eval_shape(partial(classifier.embed, net.f), params, extra, images)
    top = net.top.init(top_rng, jnp.zeros(feature.shape, net.f.dtype))["params"]
    return {**params, "top": top}, extra


def last(net: Net, params: Params, feature: jax.Array) -> jax.Array:
    """X W + b."""
    return jnp.asarray(net.top.apply({"params": params["top"]}, feature.astype(net.f.dtype)))


def embed(net: Net, params: Params, extra: Extra, images: jax.Array, layers: tuple[str, ...] = ()) -> Any:
    """The embedding [B, d], which is also the layer "feature", or maps; evaluation mode.

    The layer "body" is the feature X.
    """
    maps = tuple(name for name in layers if name not in ("feature", "body"))
    found = classifier.embed(net.f, params, extra, images, (*maps, "feature"))
    found |= {"feature": last(net, params, found["feature"]), "body": found["feature"]}
    return {name: found[name] for name in layers} if layers else found["feature"]


def forward(
    net: Net, params: Params, stats: Any, rng: jax.Array, images: jax.Array, position: jax.Array, number: jax.Array
) -> Said:
    """Small batch `number`, which batch norm sees alone; otherwise the body is in evaluation mode."""
    if net.normed:
        feature, updated = net.f.body.clone(axis=None).apply(
            {"params": params["body"], "batch_stats": stats},
            classifier.standardized(net.f, images),
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": jax.random.fold_in(rng, number)},
        )
        stats = updated.get("batch_stats", {})
    else:
        feature = classifier.embed(net.f, params, {"batch_stats": stats}, images)
        feature = jax.lax.stop_gradient(feature) if net.f.frozen else feature
    clean = last(net, params, feature)
    if not net.settings.dropout_rate:
        return Said(clean, clean, stats)
    if net.settings.dropout_site == "feature":
        return Said(last(net, params, dropout(net, feature, position)), clean, stats)
    return Said(dropout(net, clean, position), clean, stats)


def dropout(net: Net, rows: jax.Array, position: jax.Array) -> jax.Array:
    """Rows [B, D] of which the numbers are dropped by the position [B] of each."""
    key, kept = runtime.key(net.seed, "dscl", "dropout"), 1 - net.settings.dropout_rate
    draw = jax.vmap(lambda p: jax.random.bernoulli(jax.random.fold_in(key, p), kept, rows.shape[1:]))
    return jnp.where(draw(position), rows / kept, 0)


def in_small_batches(
    net: Net, function: Callable[[jax.Array, jax.Array, jax.Array], Said], images: jax.Array, position: jax.Array
) -> Said:
    """`function` of the images of this device and their positions, by small batch [m, s, ...].

    Each is forgotten once its embeddings are known, and passed through again for its gradient, so that there is memory
    for one. ConfigError where all must have `small_batch_size` images and cannot.
    """
    count, size = len(images), net.settings.small_batch_size
    if (net.normed or net.settings.scope == "small") and count % size:
        raise ConfigError(
            f"config.dscl.small_batch_size={size} must divide the {count} images of config.batch_size that each of "
            f"{jax.lax.axis_size(AXIS)} devices has (config.runtime.devices), since small batches are "
            f"normalised or judged alone (config.dscl.bn={net.settings.bn!r}, .scope={net.settings.scope!r})"
        )
    parts = next(parts for parts in range(-(-count // size), count + 1) if count % parts == 0)
    numbers = jax.lax.axis_index(AXIS) * parts + jnp.arange(parts)
    if parts == 1:
        return jax.tree.map(lambda leaf: leaf[None], function(images, position, numbers[0]))
    split = tuple(x.reshape(parts, -1, *x.shape[1:]) for x in (images, position))
    again = jax.checkpoint(lambda some: function(*some), prevent_cse=False)
    return jax.lax.map(again, (*split, numbers))
