"""MoCo: of an image's query, the key of the same image should be told from keys of others, which a queue keeps.

He, Fan, Wu, Xie, Girshick, "Momentum Contrast for Unsupervised Visual Representation Learning", CVPR 2020; the second
version, Chen, Fan, Girshick, He, arXiv 2003.04297, is settings; section 4 of our specification, SPICE's encoder.

Query and key of an image are z = g(f(x)) / |g(f(x))| of two views, with the network f and the projection g, and for
keys with a slow copy of both. Were an image's query and key normalised by statistics of the same images, these would
tell which belong together: so batch norm is of groups of the batch, and keys are grouped anew at random.

Departures: running statistics are means over the groups (the published code keeps those of its first device); the
learning rate may follow its cosine in every step, not in every epoch; bn "sync" and "ema" (Cai et al., "Exponential
Moving Average Normalization for Self-supervised and Semi-supervised Learning", CVPR 2021).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from jaxclust.cluster import warn_once
from jaxclust.errors import ConfigError
from jaxclust.methods import classifier
from jaxclust.methods.base import Aux, Batch, DataInfo, Method, merge
from jaxclust.methods.classifier import Classifier, Extra, Params
from jaxclust.models.heads import MLP
from jaxclust.ops.distances import normalize
from jaxclust.ops.gather import all_rows
from jaxclust.ops.losses import weighted_cross_entropy
from jaxclust.runtime import AXIS

VIEWS = ("query", "key")


class Net(NamedTuple):
    """f and g, and how queries and keys are made of them and compared."""

    f: Classifier
    g: MLP
    norm: "Norm"
    groups: int
    momentum: float
    temperature: float


class Norm(NamedTuple):
    """How the images of a step are normalised. `query` and `key`: (net, variables of f, images, rng) -> feature [B, D]
    of f, new batch statistics; `averaged`: what of the key encoder moves towards the query's."""

    query: Callable[..., tuple[jax.Array, Any]]
    key: Callable[..., tuple[jax.Array, Any]]
    averaged: tuple[str, ...] = ("body", "projection")


def make(config: ConfigDict, info: DataInfo) -> Method:
    """MoCo with the network, queue and projection of `config`; ConfigError for what it cannot work with."""
    _check(config, info)
    moco = config.moco
    f = classifier.classifier(config, info)
    g = MLP(2 if moco.mlp else 1, moco.dim, f.dtype)
    net = Net(f, g, NORMS[moco.bn], moco.groups, moco.momentum, moco.temperature)
    return Method(
        init=partial(init, net, moco.queue),
        loss=partial(loss, net),
        embed=partial(classifier.embed, f),
        views=VIEWS,
    )


def _check(config: ConfigDict, info: DataInfo) -> None:
    moco, size = config.moco, config.batch_size
    if len(info.image_shape) == 1:
        raise ConfigError(
            f"config.method={config.method!r} learns from views of images, and config.data.source="
            f"{config.data.source!r} has vectors; heads alone learn from these: --config=configs/spice.py:features"
        )
    if config.freeze_body:
        raise ConfigError(f"config.method={config.method!r} learns a body: config.freeze_body must be False")
    if moco.queue % size:
        low = moco.queue // size * size
        nearest = ", ".join(str(n) for n in (low, low + size) if n)
        raise ConfigError(
            f"config.moco.queue={moco.queue} must be a multiple of config.batch_size={size}, whose keys take the place "
            f"of the oldest; nearest: {nearest}"
        )
    if moco.queue >= info.size:
        warn_once(
            f"config.moco.queue={moco.queue} keeps keys of all {info.size:,} images or more: a query is told apart "
            "from keys of its own image, too; less than the images is advised"
        )
    if moco.bn == "group" and size % moco.groups:
        raise ConfigError(f"config.batch_size={size} must divide by config.moco.groups={moco.groups}")


def init(net: Net, length: int, rng: jax.Array, batch: Batch) -> tuple[Params, Extra]:
    """New parameters of f and g, a key encoder that equals them, and a queue of random unit vectors."""
    f_rng, g_rng, queue_rng = jax.random.split(rng, 3)
    image = classifier.standardized(net.f, batch["views"]["query"][:1])
    body = net.f.body.init(f_rng, image)
    feature = jax.eval_shape(net.f.body.apply, body, image)
    projection = net.g.init(g_rng, jnp.zeros((1, feature.shape[1]), net.f.dtype))
    params = {"body": body["params"], "projection": projection["params"]}
    batch_stats = body.get("batch_stats", {})
    return params, {
        "batch_stats": batch_stats,
        "key": {**params, "batch_stats": batch_stats},
        "queue": normalize(jax.random.normal(queue_rng, (length, net.g.dim), net.f.dtype)),
    }


def loss(net: Net, params: Params, extra: Extra, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Aux]:
    """Mean cross-entropy of each query's own key among that and the queue, by similarity / temperature.

    The queue has no key of this step: these take the place of the oldest ones after it. Its places are taken in turn,
    so that nothing moves; the order of negatives does not matter.
    """
    order_rng, query_rng, key_rng = jax.random.split(_of_first_device(rng), 3)
    of_query = {**params, "batch_stats": extra["batch_stats"]}
    query, batch_stats = embedding(net, net.norm.query, of_query, batch["views"]["query"], query_rng)
    of_key = moved(net, extra["key"], jax.lax.stop_gradient(of_query))
    keys, key_stats = _keys(net, of_key, batch["views"]["key"], order_rng, key_rng)
    scores = compared(query, _of_this_device(keys, len(query)), extra["queue"]) / net.temperature
    before = jnp.sum(scores > scores[:, :1], axis=1)  # how many negatives are more similar than the own key
    place = batch["step"] % (len(extra["queue"]) // len(keys)) * len(keys)
    changes = {
        "batch_stats": batch_stats,
        "key": merge(of_key, batch_stats=key_stats),
        "queue": jax.lax.dynamic_update_slice_in_dim(extra["queue"], keys, place, axis=0),
    }
    value = weighted_cross_entropy(scores, jnp.zeros(len(query), jnp.int32), batch["weight"])
    metrics = {"top1": jnp.mean(before < 1), "top5": jnp.mean(before < 5), "spread": spread(query)}
    return value, Aux(merge(extra, **changes), metrics)


def spread(query: jax.Array) -> jax.Array:
    """1 - |mean z|^2 of unit vectors z [B, D], over all devices: 1 if they point everywhere, 0 if all are the same.

    Then the loss may still fall, and each key be found, by nothing but the queue's keys being older.
    """
    return 1 - jnp.sum(jnp.square(jax.lax.pmean(jnp.mean(query, axis=0), AXIS)))


def compared(query: jax.Array, own: jax.Array, queue: jax.Array) -> jax.Array:
    """Similarity of each query [B, D] to its own key [B, D], in the first column, and to the queue's [K, D]."""
    others = jnp.matmul(query, queue.T, precision="highest")  # accelerators round factors otherwise
    return jnp.concatenate([jnp.sum(query * own, axis=1, keepdims=True), others], axis=1)


def moved(net: Net, of_key: Params, of_query: Params) -> Params:
    """The key encoder a step nearer to the query's, which is that before this step's update."""
    m = net.momentum
    averaged = {
        name: jax.tree.map(lambda k, q: m * k + (1 - m) * q, of_key[name], of_query[name]) for name in net.norm.averaged
    }
    return merge(of_key, **averaged)


def embedding(
    net: Net, features: Callable[..., tuple[jax.Array, Any]], of: Params, images: jax.Array, rng: jax.Array
) -> tuple[jax.Array, Any]:
    """z [B, dim] of images [B, H, W, C] with the parameters and statistics `of` an encoder, and its new statistics."""
    # Of each device from here on, so that gradients are summed in this dtype, whatever a layer computes in.
    body = jax.lax.pcast(of["body"], AXIS, to="varying")
    feature, batch_stats = features(net, {"params": body, "batch_stats": of["batch_stats"]}, images, rng)
    projected = net.g.apply({"params": of["projection"]}, jax.nn.relu(feature.astype(net.f.dtype)))
    return normalize(jnp.asarray(projected)), batch_stats


def _keys(net: Net, of_key: Params, images: jax.Array, order_rng: jax.Array, rng: jax.Array) -> tuple[jax.Array, Any]:
    """The keys of all devices' images, in the images' order, and new statistics; no gradient.

    The images of all devices are shuffled, so that a group of keys has other images than a group of queries.
    """
    whole = jax.lax.all_gather(images, AXIS, tiled=True)
    order = jax.random.permutation(order_rng, len(whole))
    shuffled = whole[_of_this_device(order, len(images))]
    keys, batch_stats = embedding(net, net.norm.key, of_key, shuffled, rng)
    return jax.lax.stop_gradient(all_rows(keys)[jnp.argsort(order)]), batch_stats


def in_groups(net: Net, variables: Params, images: jax.Array, rng: jax.Array) -> tuple[jax.Array, Any]:
    """Each group of consecutive images has batch statistics of its own; the running ones are means over groups.

    ConfigError if the groups cannot be dealt out evenly to the devices.
    """
    devices = jax.lax.axis_size(AXIS)
    if net.groups % devices:
        raise ConfigError(
            f"config.moco.groups={net.groups} must be a multiple of the number of devices, which is {devices} "
            f"(config.runtime.devices): set config.moco.groups={-(-net.groups // devices) * devices}"
        )
    grouped = net.f._replace(body=net.f.body.clone(axis=net.groups // devices))
    feature, batch_stats = _trained(grouped, variables, rng, images, jax.lax.axis_index(AXIS))
    return feature, jax.tree.map(lambda leaf: jax.lax.pmean(leaf, AXIS), batch_stats)


def together(net: Net, variables: Params, images: jax.Array, rng: jax.Array) -> tuple[jax.Array, Any]:
    """Batch statistics of the images of all devices."""
    return _trained(net.f, variables, rng, images, jax.lax.axis_index(AXIS))


def _trained(
    f: Classifier, variables: Params, rng: jax.Array, images: jax.Array, number: jax.Array
) -> tuple[jax.Array, Any]:
    """f in training mode, whose dropout is of the device with a number."""
    found: Any = f.body.apply(
        variables,
        classifier.standardized(f, images),
        train=True,
        mutable=["batch_stats"],
        rngs={"dropout": jax.random.fold_in(rng, number)},
    )
    return found[0], found[1].get("batch_stats", {})


def as_they_are(net: Net, variables: Params, images: jax.Array, rng: jax.Array) -> tuple[jax.Array, Any]:
    """Running statistics, which stay; evaluation mode."""
    feature: Any = net.f.body.apply(variables, classifier.standardized(net.f, images))
    return feature, variables["batch_stats"]


NORMS = {
    "group": Norm(in_groups, in_groups),
    "sync": Norm(together, together),
    "ema": Norm(together, as_they_are, ("body", "projection", "batch_stats")),
}


def _of_this_device(rows: jax.Array, count: int) -> jax.Array:
    """This device's `count` of the rows of all devices."""
    return jax.lax.dynamic_slice_in_dim(rows, jax.lax.axis_index(AXIS) * count, count)


def _of_first_device(rng: jax.Array) -> jax.Array:
    """The key that the first device was given, on every device."""
    data = jax.random.key_data(rng)
    first = jax.lax.psum(jnp.where(jax.lax.axis_index(AXIS) == 0, data, 0), AXIS)
    return jax.random.wrap_key_data(first, impl=jax.random.key_impl(rng))
