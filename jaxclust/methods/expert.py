"""Experts of ClustNet that are each alone on both groups, from which all of a mixture may start (section 2.11).

`stage.clustnet.init_from=@expert` makes each expert begin as this one, and with `init_noise` as one near it. With
combine="halves" there are two, and the first half of the mixture begins as the first, the second half as the second:
whose maps count with a minus here as there, so that it learns to find N (`init_pos` and `init_neg` as published). They
see all images, through the encoder if there is one, and are moved by `config.optimizer`.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from jaxclust import models
from jaxclust.methods import clustnet, mixture
from jaxclust.methods.base import Aux, Batch, DataInfo, Method, merge
from jaxclust.methods.mixture import Net, Params
from jaxclust.runtime import AXIS

SIGNS = {"sum": (1,), "select": (1,), "halves": (1, -1)}  # of what the experts say, by clustnet.combine


def make(config: ConfigDict, info: DataInfo) -> Method:
    """The expert or experts of `config.clustnet.experts`; ConfigError as ClustNet."""
    clustnet.check(config, info)
    signs = SIGNS[config.clustnet.combine]
    alone = ConfigDict(config.to_dict())
    alone.clustnet.combine = "sum"  # of one
    net = mixture.build(alone)._replace(k=len(signs))
    return Method(
        init=partial(init, net), loss=partial(loss, net, signs), embed=partial(embed, net), labels="group", layers=()
    )


def init(net: Net, rng: jax.Array, batch: Batch) -> tuple[Params, Any]:
    """New parameters {"body" (the encoder), "experts", "top" (the layer that they share)}, as far as there are such."""
    params, extra = mixture.init(net, rng, batch)
    stats = {name: part for name, part in extra["batch_stats"].items() if name != "gate"}
    return {name: part for name, part in params.items() if name != "gate"}, {"batch_stats": stats}


def loss(
    net: Net, signs: tuple[int, ...], params: Params, extra: Any, batch: Batch, rng: jax.Array
) -> tuple[jax.Array, Aux]:
    """Mean negative log-likelihood of the groups, added up over experts, and the share of right ones."""
    # Of each device from here on, so that gradients are summed in this dtype, whatever a layer computes in.
    params, stats = jax.lax.pcast(params, AXIS, to="varying"), extra["batch_stats"]
    body_rng, expert_rng = jax.random.split(rng)
    body = mixture.encode(net, params, stats, batch["views"]["train"], True, body_rng)
    x = mixture.for_experts(net, body.output)
    said = mixture.run_experts(net, params, stats, jnp.broadcast_to(x, (net.k, *x.shape)), True, expert_rng)
    found = mixture.parts(net, said.output)
    found = found * jnp.asarray(signs, found.dtype).reshape(-1, *[1] * (found.ndim - 1))
    log_probs = jax.vmap(partial(mixture.log_probabilities, net, params))(found)  # [experts, B, 2]
    value = jnp.mean(batch["weight"] * clustnet.nll(log_probs, batch["target"]), axis=1).sum()
    right = jnp.mean(jnp.argmax(log_probs, axis=2) == batch["target"])
    return value, Aux(merge(extra, batch_stats=merge(stats, **body.stats, experts=said.stats)), {"accuracy": right})


def embed(net: Net, params: Params, extra: Any, images: jax.Array, layers: tuple[str, ...] = ()) -> Any:
    """What experts are given of images, flat [B, D]: their code, or without an encoder their pixels; "feature" alone
    is a layer."""
    code = mixture.encode(net, params, extra["batch_stats"], images, False, None).output
    return models.asked({"feature": code.reshape(len(code), -1)}, layers, net.dtype)
