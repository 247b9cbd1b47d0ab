"""One expert of ClustNet alone on both groups of classes, from which all of a mixture may start (section 2.11).

`stage.clustnet.init_from=@expert` makes each expert begin as this one, and with `init_noise` as one near it. It sees
all images, through the encoder if there is one, and is moved by `config.optimizer`.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from jaxclust import models
from jaxclust.errors import ConfigError
from jaxclust.methods import clustnet, mixture
from jaxclust.methods.base import Aux, Batch, DataInfo, Method, merge
from jaxclust.methods.mixture import Net, Params
from jaxclust.runtime import AXIS


def make(config: ConfigDict, info: DataInfo) -> Method:
    """The expert of `config.clustnet.experts`; ConfigError as ClustNet, and if experts have no answer of their own."""
    clustnet.check(config, info)
    net = mixture.build(config)._replace(k=1)
    if net.top is not None:
        raise ConfigError(
            "config.method='expert' needs an expert with its own answer: config.clustnet.experts.dense_layers is 0"
        )
    return Method(
        init=partial(init, net), loss=partial(loss, net), embed=partial(embed, net), labels="group", layers=()
    )


def init(net: Net, rng: jax.Array, batch: Batch) -> tuple[Params, Any]:
    """New parameters {"body" (the encoder, if there is one), "experts"}, the latter a stack of one."""
    params, extra = mixture.init(net, rng, batch)
    stats = {name: part for name, part in extra["batch_stats"].items() if name != "gate"}
    return {name: part for name, part in params.items() if name != "gate"}, {"batch_stats": stats}


def loss(net: Net, params: Params, extra: Any, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Aux]:
    """Mean negative log-likelihood of the groups, and the share of right ones."""
    # Of each device from here on, so that gradients are summed in this dtype, whatever a layer computes in.
    params, stats = jax.lax.pcast(params, AXIS, to="varying"), extra["batch_stats"]
    body_rng, expert_rng = jax.random.split(rng)
    body = mixture.encode(net, params, stats, batch["views"]["train"], True, body_rng)
    x = mixture.for_experts(net, body.output)
    said = mixture.ask(net, params, stats, x, jnp.ones((len(x), 1)), True, expert_rng)
    value = jnp.mean(batch["weight"] * clustnet.nll(said.output, batch["target"]))
    right = jnp.mean(jnp.argmax(said.output, axis=1) == batch["target"])
    return value, Aux(merge(extra, batch_stats=merge(stats, **body.stats, experts=said.stats)), {"accuracy": right})


def embed(net: Net, params: Params, extra: Any, images: jax.Array, layers: tuple[str, ...] = ()) -> Any:
    """What the expert is given of images, flat [B, D]: their code, or without an encoder their pixels; "feature" alone
    is a layer."""
    code = mixture.encode(net, params, extra["batch_stats"], images, False, None).output
    return models.asked({"feature": code.reshape(len(code), -1)}, layers, net.dtype)
