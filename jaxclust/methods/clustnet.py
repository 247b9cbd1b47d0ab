"""ClustNet: a gate learns to share images out among experts too weak to tell two groups of classes apart alone.

The only labels are the groups, P or N; which expert an image is given to comes to agree with its class. There is no
paper: the source is the code of TristanGomez44/clustNet, by our specification, whose sections are named here. The
network is in `mixture.py`, how the gate chooses in `gate.py`, who moves in a step in `turns.py`.

Departures: training batches are always full; batch norm can be switched off; terms of the loss have the signs that they
are meant to have, and maps count where an expert was chosen; separated training asks experts in evaluation mode.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from jaxclust import runtime
from jaxclust.cluster import warn_once
from jaxclust.data.groups import groups_of
from jaxclust.errors import ConfigError
from jaxclust.methods import gate, mixture, terms, turns
from jaxclust.methods.base import Aux, Batch, DataInfo, Method, merge
from jaxclust.methods.mixture import Net, Params, Stats
from jaxclust.models.experts import map_shape, stack
from jaxclust.runtime import AXIS

LAYERED = ("filter_similarity", "map_entropy", "map_spread")  # terms of convolutions


class Learnt(NamedTuple):
    """What a step found: its loss on this device, batch statistics, and of each image logits and log-probabilities."""

    loss: jax.Array
    stats: Stats
    logits: jax.Array
    log_probs: jax.Array


def make(config: ConfigDict, info: DataInfo) -> Method:
    """ClustNet with the networks and settings of `config.clustnet`; ConfigError for what it cannot work with."""
    check(config, info)
    net, steps = mixture.build(config), turns.epoch(config, info)
    learn = partial(separated, net, steps) if config.clustnet.mode == "separated" else partial(joint, net)
    return Method(
        init=partial(mixture.init, net),
        loss=partial(loss, learn),
        embed=partial(mixture.embed, net),
        predict=partial(predict, net),
        optimizer=partial(turns.optimizer, config, info),
        labels="group",
        num_clusters=net.k,
        experts=partial(experts, net),
        layers=mixture.layer_names(net),
    )


def check(config: ConfigDict, info: DataInfo) -> None:
    """ConfigError for groups, sizes and settings that cannot be worked with."""
    s, k = config.clustnet, config.cluster.k
    if info.num_classes is None:
        raise ConfigError(
            f"config.method={config.method!r} learns which of two groups of classes an image is of, and "
            f"config.data.source={config.data.source!r} has no classes; class folders are labels"
        )
    groups_of(config.groups, info.num_classes)
    if k < 2:
        raise ConfigError(f"config.cluster.k={k} is the number of experts, of which the gate needs at least 2")
    if config.evaluate.metric_groups == "upstream" and (info.num_classes != 10 or k > 9):
        raise ConfigError(
            "config.evaluate.metric_groups='upstream' judges by ten classes in an order of the published code, of "
            f"which the experts take the first: config.data.source={config.data.source!r} has {info.num_classes} "
            f"classes, and config.cluster.k={k} must be below 10"
        )
    if s.mode == "separated" and not s.period:
        raise ConfigError("config.clustnet.mode='separated' moves in turns: config.clustnet.period must be at least 1")
    if s.combine == "halves" and (k % 2 or s.experts.dense_layers or s.mode == "separated"):
        raise ConfigError(
            "config.clustnet.combine='halves' adds up maps of two halves of the experts, all at once: it needs an even "
            f"config.cluster.k (it is {k}), config.clustnet.experts.dense_layers=0 ({s.experts.dense_layers}) and "
            f"config.clustnet.mode='joint' ({s.mode!r})"
        )
    if s.mode == "separated" and s.best_share[0] > s.best_share[-1]:
        warn_once(
            f"config.clustnet.best_share={s.best_share} falls: the gate follows the best expert less and less, as "
            "published and probably not as meant; (0.1, 0.5, 0.9) rises"
        )
    turns.rates(config)
    _check_sizes(config, info)


def _check_sizes(config: ConfigDict, info: DataInfo) -> None:
    """ConfigError for networks that cannot see what they are given."""
    s, shape = config.clustnet, info.image_shape
    if config.freeze_body and len(shape) > 1 and not s.encoder.layers:
        raise ConfigError("config.freeze_body=True keeps the codes of an encoder: config.clustnet.encoder.layers is 0")
    if s.encoder.layers and s.encoder.gradient == "none" and len(shape) > 1 and not config.init_from:
        warn_once("config.clustnet.encoder.gradient='none' without config.init_from: the encoder stays as it was drawn")
    seen = "images"
    for name in ("encoder", "gate", "experts"):
        sizes, field = stack(s[name]), f"config.clustnet.{name}"
        hidden = s[name].get("dense_layers", 1) - 1
        if sizes.depth and len(shape) == 1:
            instead = "" if name == "encoder" else f", and {field}.dense_layers to what is needed"
            raise ConfigError(
                f"{field}.layers={sizes.layers} are convolutions of {seen}, which are vectors; set it to 0{instead}"
            )
        if sizes.depth and len(shape) > 1 and 0 in map_shape(sizes, shape):
            raise ConfigError(
                f"{field}: {sizes.depth} convolutions with kernel={sizes.kernel}, pool={sizes.pool} and pool_out="
                f"{sizes.pool_out} leave nothing of {shape[1]} x {shape[0]} pixels; lower them, or raise "
                "config.data.image_size"
            )
        if name == "encoder" and sizes.depth:
            shape, seen = (s.encoder.dim,), "codes of the encoder (config.clustnet.encoder)"
        elif hidden > 0 and len(s[name].dense_size) not in (1, hidden):
            raise ConfigError(
                f"{field}.dense_size={s[name].dense_size} must be one number, or one for each of the "
                f"{hidden} hidden layers of {field}.dense_layers={hidden + 1}"
            )
    missing = [f"config.clustnet.{name}={s[name]}" for name in LAYERED if s[name]]
    missing += [] if s.experts.dense_layers else ["config.clustnet.experts.dense_layers=0"]
    if missing and not s.experts.layers:
        raise ConfigError(f"{missing[0]} needs convolutions of the experts: config.clustnet.experts.layers is 0")


def loss(
    learn: Callable[[Params, Stats, Batch, jax.Array], Learnt],
    params: Params,
    extra: Any,
    batch: Batch,
    rng: jax.Array,
) -> tuple[jax.Array, Aux]:
    """What `learn` finds, with the share of right groups and the entropies of the gate."""
    # Of each device from here on, so that gradients are summed in this dtype, whatever a layer computes in.
    found = learn(jax.lax.pcast(params, AXIS, to="varying"), extra["batch_stats"], batch, rng)
    p = jax.nn.softmax(found.logits)
    metrics = {
        "accuracy": jnp.mean(jnp.argmax(found.log_probs, axis=1) == batch["target"]),
        "gate_entropy": terms.gate_entropy(p),
        "usage_entropy": terms.usage_entropy(p),
    }
    rows = {"gate": p, "groups": found.log_probs}
    return found.loss, Aux(merge(extra, batch_stats=found.stats), metrics, rows)


def nll(log_probs: jax.Array, target: jax.Array) -> jax.Array:
    """-ln P of the target [B], of log-probabilities [..., B, 2]: [..., B]."""
    return -jnp.where(target == 1, log_probs[..., 1], log_probs[..., 0])


def joint(net: Net, params: Params, stats: Stats, batch: Batch, rng: jax.Array) -> Learnt:
    """Mean negative log-likelihood of the groups, with the chosen terms (section 2.5)."""
    noise = gate.noise(_key(net, "gate"), batch["position"], net.k)
    said = mixture.forward(net, params, stats, batch["views"]["train"], noise, True, rng)
    value = jnp.mean(batch["weight"] * nll(said.log_probs, batch["target"]))
    return Learnt(value + added(net, params, said, batch), said.stats, said.logits, said.log_probs)


def added(net: Net, params: Params, said: mixture.Said, batch: Batch) -> jax.Array:
    """The sum of the terms that have a weight."""

    def member() -> jax.Array:
        return terms.sets(said.maps, said.choice, batch["target"])

    def similarity() -> jax.Array:
        last = params["experts"]["stack"][f"conv{net.expert.sizes.depth}_conv"]["kernel"]
        return terms.filter_similarity(last, jax.random.fold_in(_key(net, "filters"), batch["step"]))

    found = {
        "filter_similarity": similarity,
        "map_entropy": lambda: terms.map_entropy(said.maps, member()),
        "map_spread": lambda: terms.map_spread(said.maps, member()),
    }
    of_gate = terms.of_gate(net.settings, said.logits, batch["target"])
    return of_gate + terms.weighted(net.settings, found, said.logits.dtype)


def separated(net: Net, epoch: int, params: Params, stats: Stats, batch: Batch, rng: jax.Array) -> Learnt:
    """In the experts' turn as together, in the gate's turn which expert is best (section 2.6)."""
    return jax.lax.cond(
        turns.is_first(batch["step"], epoch, net.settings.period),
        lambda: joint(net, params, stats, batch, rng),
        lambda: gate_alone(net, epoch, params, stats, batch, rng),
    )


def gate_alone(net: Net, epoch: int, params: Params, stats: Stats, batch: Batch, rng: jax.Array) -> Learnt:
    """Cross-entropy of the gate to the best expert of each image, or to any, as often as `best_share` says, with the
    terms of the gate."""
    body_rng, gate_rng = jax.random.split(rng)
    body = mixture.encode(net, params, stats, batch["views"]["train"], True, body_rng)
    decided = mixture.run(net.gate, params["gate"], stats["gate"], body.output, True, gate_rng)
    said = mixture.forced(net, params, stats, jax.lax.stop_gradient(body.output))
    best = jnp.argmin(nll(said, batch["target"]), axis=0)
    target = followed(net, best, batch["position"], batch["step"] // epoch + 1)
    log_gate = jax.nn.log_softmax(decided.output)
    picked = jnp.take_along_axis(log_gate, target[:, None], axis=1)[:, 0]
    now = jnp.argmax(decided.output, axis=1)
    new = merge(stats, **body.stats, gate=decided.stats)
    value = terms.of_gate(net.settings, decided.output, batch["target"]) - jnp.mean(batch["weight"] * picked)
    return Learnt(value, new, decided.output, said[now, jnp.arange(len(now))])


def followed(net: Net, best: jax.Array, positions: jax.Array, epoch: jax.Array) -> jax.Array:
    """The expert int [B] that each image should go to: the `best` [B], as often as the epoch's share, else any of K.

    Epochs count from 1 (section 2.8), and `best_share` begins with epoch 0, as published.
    """
    shares = jnp.asarray(net.settings.best_share, jnp.float32)
    share = jnp.interp(epoch.astype(jnp.float32), jnp.arange(len(shares), dtype=jnp.float32), shares)

    def draw(position: jax.Array) -> tuple[jax.Array, jax.Array]:
        coin, number = jax.random.split(jax.random.fold_in(_key(net, "expert"), position))
        return jax.random.bernoulli(coin, share), jax.random.randint(number, (), 0, net.k)

    follows, other = jax.vmap(draw)(positions)
    return jnp.where(follows, best, other)


def predict(net: Net, params: Params, extra: Any, images: jax.Array) -> dict[str, jax.Array]:
    """The likeliest expert as `cluster`, its probability as `score`, and `log_probs` [B, K] of all.

    ln P of N and of P as `groups` [B, 2], and the likelier of these as `binary`, 1 for P.
    """
    said = mixture.forward(net, params, extra["batch_stats"], images, _noise(net, images), False, jax.random.key(0))
    logs = jax.nn.log_softmax(said.logits)
    return {
        "cluster": jnp.argmax(logs, axis=1).astype(jnp.int32),
        "score": jnp.exp(jnp.max(logs, axis=1)),
        "log_probs": logs,
        "groups": said.log_probs,
        "binary": jnp.argmax(said.log_probs, axis=1).astype(jnp.int32),
    }


def experts(net: Net, params: Params, extra: Any, images: jax.Array) -> dict[str, jax.Array]:
    """What the experts are given in evaluation mode, and their maps (`Method.experts`)."""
    return mixture.experts(net, params, extra, images, _noise(net, images))


def _noise(net: Net, images: jax.Array) -> jax.Array:
    """What is drawn by in evaluation, the same for an image in any batch."""
    return gate.noise(_key(net, "evaluation"), gate.fingerprint(images), net.k)


def _key(net: Net, name: str) -> jax.Array:
    return runtime.key(net.seed, "clustnet", name)
