"""A network f with a linear classifier g on its feature: what methods that learn from (pseudo-)labels share.

The feature is what f gives before its last ReLU; g sees it after. A frozen f runs in evaluation mode without a
gradient, and rows [B, D] of features that it made before pass through it as they are.

In bfloat16 only the layers of f compute. What they are given (the Sobel gradient is a difference of near values), the
feature, g and the loss are float32.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from jaxclust import models, runtime
from jaxclust.errors import ConfigError
from jaxclust.methods.base import Aux, Batch, DataInfo, merge
from jaxclust.models.layers import dense_init
from jaxclust.ops.images import standardize
from jaxclust.ops.losses import accuracy, weighted_cross_entropy
from jaxclust.runtime import AXIS

Params = dict[str, Any]
Extra = dict[str, Any]


class Classifier(NamedTuple):
    """f, whether it is frozen, what it expects of pixels, and the dtype of parameters and of all outside of f."""

    body: nn.Module
    frozen: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]
    dtype: Any


def classifier(config: ConfigDict, info: DataInfo) -> Classifier:
    """f of `config.model`; ConfigError if there are vectors in place of images and f should learn from them."""
    if len(info.image_shape) == 1 and not config.freeze_body:
        raise ConfigError(
            f"config.data.source={config.data.source!r} holds vectors, which no network of config.model.name takes; "
            "with config.freeze_body=True they are taken as the features of a trained one"
        )
    dtype = runtime.param_dtype(config)
    return Classifier(models.get(config), config.freeze_body, config.data.mean, config.data.std, dtype)


def init(c: Classifier, rng: jax.Array, batch: Batch, outputs: int) -> tuple[Params, Extra, int]:
    """New parameters of f and g, the batch statistics of f, and the length of the feature."""
    body_rng, top_rng = jax.random.split(rng)
    images = next(iter(batch["views"].values()))
    if images.ndim == 2:
        return {"top": new_top(c, top_rng, images.shape[1], outputs)}, {"batch_stats": {}}, images.shape[1]
    variables = c.body.init(body_rng, standardized(c, images))
    width = jax.eval_shape(c.body.apply, {**variables}, standardized(c, images)).shape[1]
    params = {"body": variables["params"], "top": new_top(c, top_rng, width, outputs)}
    return params, {"batch_stats": variables.get("batch_stats", {})}, width


def new_top(c: Classifier, rng: jax.Array, width: int, outputs: int) -> Params:
    """A new g: N(0, 0.01^2) and bias 0."""
    top: Params = _top(c, outputs).init(rng, jnp.zeros((1, width), c.dtype))["params"]
    return top


def _top(c: Classifier, outputs: int) -> nn.Dense:
    return nn.Dense(outputs, kernel_init=dense_init, dtype=c.dtype, param_dtype=c.dtype)


def standardized(c: Classifier, images: jax.Array) -> jax.Array:
    """Images as f sees them."""
    return standardize(images, c.mean, c.std, c.dtype)


def embed(c: Classifier, params: Params, extra: Extra, images: jax.Array, layers: tuple[str, ...] = ()) -> Any:
    """The feature before its last ReLU, or the maps of `layers`, "feature" among them; evaluation mode.

    ConfigError, which lists what there is, if a layer does not exist.
    """
    if images.ndim == 2:
        found = {"feature": images}
    else:
        variables = {"params": params["body"], "batch_stats": extra["batch_stats"]}
        feature, captured = c.body.apply(variables, standardized(c, images), mutable=["maps"])
        found = {name: maps[0] for name, maps in captured["maps"].items()} | {"feature": feature}
    return models.asked(found, layers, c.dtype)


def logits(c: Classifier, params: Params, feature: jax.Array) -> jax.Array:
    """g of the feature after its ReLU."""
    outputs = params["top"]["kernel"].shape[1]
    scores: Any = _top(c, outputs).apply({"params": params["top"]}, nn.relu(feature))
    return jnp.asarray(scores)


def loss(c: Classifier, params: Params, extra: Extra, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Aux]:
    """Weighted cross-entropy of the targets, over the first `extra["num_outputs"]` outputs of g."""
    images = batch["views"]["train"]
    feature: Any
    updated: Any = {}
    if c.frozen:
        feature = jax.lax.stop_gradient(embed(c, params, extra, images))
    else:
        # Of each device from here on, so that gradients are summed in this dtype, whatever a layer computes in.
        body = jax.lax.pcast(params["body"], AXIS, to="varying")
        feature, updated = c.body.apply(
            {"params": body, "batch_stats": extra["batch_stats"]},
            standardized(c, images),
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": rng},
        )
    scores = logits(c, params, feature)
    value = weighted_cross_entropy(scores, batch["target"], batch["weight"], extra["num_outputs"])
    hits = accuracy(scores, batch["target"], extra["num_outputs"])
    return value, Aux(merge(extra, **updated), {"accuracy": hits})
