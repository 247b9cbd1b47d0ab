"""Toy methods, one of every shape that the contract must carry; a linear body is enough for each."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxclust.methods.base import Aux, Method, Refreshed, merge
from jaxclust.ops.distances import normalize
from jaxclust.ops.gather import all_rows
from jaxclust.ops.images import standardize
from jaxclust.ops.losses import weighted_cross_entropy
from jaxclust.runtime import AXIS
from jaxclust.train.optim import group_labels

DIM, K = 8, 4


def body(params, images):
    pixels = standardize(images, (0.5,), (0.5,), jnp.float32)
    return pixels.reshape(len(pixels), -1) @ params["body"]["kernel"]


def embed(params, extra, images, layers=()):
    features = body(params, images)
    return {name: features for name in layers} if layers else features


def predict(params, extra, images):
    logits = body(params, images) @ params["head"]["kernel"]
    return {"cluster": jnp.argmax(logits, axis=1).astype(jnp.int32), "score": jax.nn.softmax(logits).max(axis=1)}


def new_kernel(rng, rows, columns):
    return {"kernel": 0.1 * jax.random.normal(rng, (rows, columns))}


def plain(config, info):
    """A loss and nothing else: predicts the given targets."""

    def init(rng, batch):
        width = int(np.prod(info.image_shape))
        first, second = jax.random.split(rng)
        return {"body": new_kernel(first, width, DIM), "head": new_kernel(second, DIM, K)}, {}

    def loss(params, extra, batch, rng):
        logits = body(params, batch["views"]["train"]) @ params["head"]["kernel"]
        return weighted_cross_entropy(logits, batch["target"] % K, batch["weight"]), Aux(extra, {"one": 1.0})

    return Method(init, loss, embed, predict)


def supervised(config, info):
    """Labels may reach the loss because the method says so."""
    return plain(config, info)._replace(labels="class")


def refreshed(config, info):
    """Refresh picks targets, weights and a subset of ids, and renews a head whose width changes from round to round."""
    base = plain(config, info)

    def refresh(state, targets, rows, rng):
        features = np.concatenate(list(rows.chunks()))
        width = K + int(jax.random.randint(rng, (), 0, 3))
        target = np.digitize(features[:, 0], np.quantile(features[:, 0], np.linspace(0, 1, K + 1)[1:-1]))
        params = merge(state.params, head=new_kernel(rng, DIM, width))
        ids = np.arange(0, info.size, 2, dtype=np.int32)
        weight = np.linspace(0.5, 1.5, info.size, dtype=np.float32)
        target = target.astype(np.int32)
        return Refreshed(params, state.extra, target, weight, ids, target, np.zeros(info.size, np.float32))

    return base._replace(refresh=refresh, fresh=("head",))


def own_update(config, info):
    """Replaces the gradient step: plain descent with a moving average of the body in `extra`."""
    base = plain(config, info)

    def init(rng, batch):
        params, _ = base.init(rng, batch)
        return params, {"average": params["body"]}

    def update(state, batch, rng):
        def objective(params):
            return jax.lax.pmean(base.loss(params, {}, batch, rng)[0], AXIS)

        value, gradient = jax.value_and_grad(objective)(state.params)
        params = jax.tree.map(lambda w, g: w - 0.1 * g, state.params, gradient)
        average = jax.tree.map(lambda a, w: 0.9 * a + 0.1 * w, state.extra["average"], params["body"])
        return state._replace(params=params, extra={"average": average}), Aux(None, {"loss": value})

    def average_embed(params, extra, images, layers=()):
        return embed({"body": extra["average"]}, extra, images, layers)

    return base._replace(init=init, update=update, embed=average_embed)


def averaged(config, info):
    """A moving average of the parameters after each gradient step clusters."""
    base = plain(config, info)

    def init(rng, batch):
        params, _ = base.init(rng, batch)
        return params, {"average": params}

    def after(params, extra):
        return {"average": jax.tree.map(lambda a, w: 0.75 * a + 0.25 * w, extra["average"], params)}

    def average_embed(params, extra, images, layers=()):
        return embed(extra["average"], extra, images, layers)

    def average_predict(params, extra, images):
        return predict(extra["average"], extra, images)

    return base._replace(init=init, after=after, embed=average_embed, predict=average_predict)


def two_optimizers(config, info):
    """Body and head move in turns."""

    def every_other(first):
        return optax.chain(
            optax.trace(0.5),
            optax.scale_by_schedule(lambda count: jnp.where(count % 2 == first, -0.1, 0.0)),
        )

    def optimizer():
        groups = {"body": every_other(0), "head": every_other(1)}
        return optax.partition(groups, group_labels)

    return plain(config, info)._replace(optimizer=optimizer)


def row_outputs(config, info):
    """Draws a gate for each image from its position, and reports it."""
    base = plain(config, info)

    def loss(params, extra, batch, rng):
        value, aux = base.loss(params, extra, batch, rng)
        key = jax.random.key(config.seed)
        gates = jax.vmap(lambda p: jax.random.randint(jax.random.fold_in(key, p), (), 0, K))(batch["position"])
        return value, aux._replace(rows={"gate": gates, "target": batch["target"]})

    return base._replace(loss=loss)


def two_views(config, info):
    """Two views of each image, one key encoder and a queue in `extra`, as contrastive methods have."""

    def init(rng, batch):
        width = int(np.prod(info.image_shape))
        params = {"body": new_kernel(rng, width, DIM)}
        queue = normalize(jax.random.normal(jax.random.fold_in(rng, 1), (16 * config.batch_size, DIM)))
        return params, {"key": params["body"], "queue": queue}

    def loss(params, extra, batch, rng):
        moved = jax.tree.map(lambda k, q: 0.9 * k + 0.1 * q, extra["key"], jax.lax.stop_gradient(params["body"]))
        query = normalize(body(params, batch["views"]["query"]))
        key = normalize(body({"body": moved}, batch["views"]["key"]))
        logits = jnp.concatenate([jnp.sum(query * key, axis=1, keepdims=True), query @ extra["queue"].T], axis=1) / 0.2
        value = weighted_cross_entropy(logits, jnp.zeros(len(logits), jnp.int32), batch["weight"])
        keys = all_rows(key)
        queue = jnp.concatenate([extra["queue"][len(keys) :], keys])
        return value, Aux({"key": moved, "queue": queue})

    return Method(init, loss, embed, views=("query", "key"))


SHAPES = (plain, supervised, refreshed, own_update, averaged, two_optimizers, row_outputs, two_views)
TOYS = {f.__name__: f for f in SHAPES}
