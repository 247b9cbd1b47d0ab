"""SPICE-Self: heads on a network that stays as it is learn prototype pseudo-labels, by expectation and maximisation.

Niu, Shan, Wang, "SPICE: Semantic Pseudo-Labeling for Image Clustering", arXiv 2103.09382 (IEEE TIP 2022); section 6 of
our specification. A step has a pool of `batch_size` images and does one E and one M step. E: each head labels the
images most similar to the mean of those that it is surest of (`ops/prototypes.py`), by embeddings of the images as they
are and scores of weakly augmented ones. M: `num_repeat` passes in minibatches over these labels, with features of
strongly augmented ones, one view of each for all passes, move the heads by Adam.

The body comes from `init_from` and never learns; of vectors the direction counts. A refresh judges the heads by the
loss of their own pseudo-labels of all images, without class labels, and selects the best one so far (`heads.py`).

With mstep_bn "batch" the batch statistics drift in the M step, which scores see, while embeddings keep those that the
body came with; `extra["drift"]` is the difference. Departures: "frozen" is the default, which published runs are not;
sizes are static, so that with a course of `ratio` or overlap "best" minibatches hold rows that do not count.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from jaxclust import hosts
from jaxclust.errors import ConfigError
from jaxclust.methods import classifier, heads, pools
from jaxclust.methods.base import Aux, Batch, DataInfo, Method, TrainState, merge
from jaxclust.methods.classifier import Extra, Params
from jaxclust.methods.heads import Heads
from jaxclust.models.heads import MLP
from jaxclust.ops import prototypes
from jaxclust.ops.gather import all_rows
from jaxclust.ops.losses import double_softmax, weighted_cross_entropy
from jaxclust.ops.prototypes import PseudoLabels, Rule

VIEWS = ("original", "weak", "strong")
LOSSES = {"double_softmax": double_softmax, "single_softmax": weighted_cross_entropy}


class Net(NamedTuple):
    """Body and heads, and how a pool is labelled and learnt."""

    heads: Heads
    settings: ConfigDict  # config.spice
    rule: Rule
    course: np.ndarray  # int32 [E, 2]: how much of the rule's numbers each epoch uses; the last one stays
    epoch: int  # steps in one
    adam: optax.GradientTransformation


class Carry(NamedTuple):
    """What moves in the M step."""

    heads: Params
    moments: Any
    drift: Any


def make(config: ConfigDict, info: DataInfo) -> Method:
    """SPICE-Self with the sizes of `config.spice`; ConfigError where a cluster would get no image."""
    pools.check(config, info)
    net = net_of(config, info)
    h, adam, k = net.heads, net.adam, config.cluster.k
    top, members = prototypes.sizes(info.size, k, config.spice.center_ratio, [1.0])[0].tolist()
    program = jax.jit(partial(heads.judge, net.rule._replace(top=top, members=members)))

    def judged(embeddings: np.ndarray, log_probs: np.ndarray) -> dict[str, np.ndarray]:
        """On host 0, which decides for all: last bits may differ between hosts."""
        return hosts.from_first(
            lambda: jax.device_get(program(embeddings, log_probs)), "judging the heads", config.runtime.deadline
        )

    return Method(
        init=partial(init, net),
        loss=partial(loss, net),
        embed=partial(classifier.embed, h.f),
        predict=partial(heads.predict, h),
        look=partial(heads.look, h),
        refresh=partial(heads.refresh, h, judged),
        update=partial(update, net),
        optimizer=lambda: optax.GradientTransformation(lambda params: adam.init(params["heads"]), adam.update),
        views=VIEWS,
        fresh=("selected", "whitening"),
        num_clusters=k,
    )


def net_of(config: ConfigDict, info: DataInfo) -> Net:
    """What `config` makes of heads, pools and steps."""
    s, course = config.spice, pools.course(config)
    top, members = np.maximum(course.max(axis=0), 1).tolist()  # a step is traced where there is none, too
    rule = Rule(top, members, s.overlap, s.assignment)
    adam = optax.chain(optax.add_decayed_weights(s.weight_decay), optax.adam(s.lr))
    return Net(heads_of(config, info), s, rule, course, max(1, info.size // config.batch_size), adam)


def heads_of(config: ConfigDict, info: DataInfo) -> Heads:
    """The body and heads of `config`."""
    f = classifier.classifier(config, info)
    return Heads(f, MLP(2, config.cluster.k, f.dtype), config.spice.num_head, config.spice.whiten_power)


def init(net: Net, rng: jax.Array, batch: Batch) -> tuple[Params, Extra]:
    """New parameters of the body, and of the heads, each with its own key; nothing has drifted or is selected."""
    f, (body_rng, heads_rng) = net.heads.f, jax.random.split(rng)
    image = jnp.asarray(batch["views"]["original"][:1])
    variables: Any = f.body.init(body_rng, classifier.standardized(f, image)) if image.ndim > 2 else {}
    params, stats = {"body": variables["params"]} if variables else {}, variables.get("batch_stats", {})
    rows = jax.eval_shape(partial(classifier.embed, f), params, {"batch_stats": stats}, image)
    zeros = jnp.zeros(rows.shape, f.dtype)
    made = jax.vmap(lambda key: net.heads.head.init(key, zeros)["params"])(
        jax.random.split(heads_rng, net.heads.number)
    )
    if net.settings.mstep_bn == "batch" and not stats:
        raise ConfigError(
            "config.spice.mstep_bn='batch' moves statistics of batch norm in the M step, and here are none (vectors, "
            "or a network without batch norm): set it to 'frozen'"
        )
    drift = jax.tree.map(jnp.zeros_like, stats) if net.settings.mstep_bn == "batch" else {}
    selected, whitening = heads.nobody(made, drift), heads.unfitted(net.heads, rows.shape[1])
    extra = {"batch_stats": stats, "drift": drift, "selected": selected, "whitening": whitening}
    return {**params, "heads": made}, extra


def e_step(net: Net, params: Params, extra: Extra, batch: Batch) -> PseudoLabels:
    """What each head labels of the pool of all devices, [H, n], the same on each device; no gradient."""
    h, views, size = net.heads, batch["views"], net.settings.target_sub_batch_size

    def weak(images: jax.Array) -> jax.Array:
        return heads.all_scores(h, params["heads"], heads.feature(h, params, extra, extra["drift"], images))

    embeddings = all_rows(heads.in_chunks(partial(heads.embedding, h, params, extra), views["original"], size))
    logs = prototypes.log_probabilities(all_rows(heads.in_chunks(weak, views["weak"], size)))
    used = None
    if (net.course != net.course[0]).any():
        now = jnp.asarray(net.course)[jnp.minimum(batch["step"] // net.epoch, len(net.course) - 1)]
        used = now[0], now[1]
    labelled = partial(prototypes.pseudo_labels, embeddings, rule=net.rule, used=used)
    return jax.lax.stop_gradient(jax.lax.map(labelled, jnp.swapaxes(logs, 0, 1)))


def head_losses(net: Net, params: Params, rows: jax.Array, label: jax.Array, kept: jax.Array) -> jax.Array:
    """The mean loss [H] of each head over those of its features [H, m, D] that count."""

    def one(head: Params, rows: jax.Array, label: jax.Array, kept: jax.Array) -> jax.Array:
        weight = kept * (len(kept) / jnp.maximum(jnp.sum(kept), 1)).astype(rows.dtype)
        return LOSSES[net.settings.loss](heads.scores(net.heads, head, rows), label, weight)

    return jax.vmap(one)(params, rows, label, kept)


def loss(net: Net, params: Params, extra: Extra, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Aux]:
    """The mean loss of the heads over all rows that the E step labels; `update` descends it for the heads alone."""
    found = e_step(net, params, extra, batch)
    strong = all_rows(heads.feature(net.heads, params, extra, extra["drift"], batch["views"]["strong"]))
    return jnp.mean(head_losses(net, params["heads"], strong[found.image], found.label, found.kept)), Aux(extra)


def update(net: Net, state: TrainState, batch: Batch, rng: jax.Array) -> tuple[TrainState, Aux]:
    """An E and an M step, the same on every device: the heads move and, in mode "batch", statistics drift."""
    params, extra, strong = state.params, state.extra, batch["views"]["strong"]
    found = e_step(net, params, extra, batch)
    if not extra["drift"]:
        trunk = partial(heads.feature, net.heads, params, extra, {})
        strong = heads.in_chunks(trunk, strong, net.settings.target_sub_batch_size)
    pool, start = all_rows(strong), Carry(params["heads"], state.opt_state, extra["drift"])
    end, losses = m_step(net, params, extra, start, found, pool, rng)
    overlap, covered = jax.vmap(lambda one: prototypes.coverage(one, len(pool)))(found)
    metrics = {"loss": jnp.mean(losses), "overlap": jnp.mean(overlap), "coverage": jnp.mean(covered)}
    metrics |= {f"loss/head{h}": jnp.mean(losses[:, h]) for h in range(net.heads.number)}
    new = state._replace(
        params=merge(params, heads=end.heads), extra=merge(extra, drift=end.drift), opt_state=end.moments
    )
    return new, Aux(None, metrics)


def m_step(
    net: Net, params: Params, extra: Extra, start: Carry, found: PseudoLabels, pool: jax.Array, rng: jax.Array
) -> tuple[Carry, jax.Array]:
    """What `start` becomes as all heads learn `found` [H, n] in minibatches, and their losses [steps, H].

    `pool` [B, ...] is features, or in mode "batch" images.
    """
    trained = bool(extra["drift"])

    def step(carry: Carry, chosen: tuple[jax.Array, jax.Array]) -> tuple[Carry, jax.Array]:
        places, key = chosen
        image, label, kept = (part[:, places] for part in found)
        rows, drift = _trained(net, params, extra, carry.drift, pool[image], key) if trained else (pool[image], {})

        def objective(params: Params) -> tuple[jax.Array, jax.Array]:
            losses = head_losses(net, params, rows, label, kept)
            return jnp.mean(losses), losses

        gradient, losses = jax.grad(objective, has_aux=True)(carry.heads)
        changes, moments = net.adam.update(gradient, carry.moments, carry.heads)
        return Carry(optax.apply_updates(carry.heads, changes), moments, drift), losses

    end, losses = jax.lax.scan(step, start, minibatches(net, found.image.shape[1], rng))
    return end, losses


def minibatches(net: Net, count: int, rng: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Which of `count` labelled rows each gradient step of all heads takes, [steps, m], and a key [steps] for each.

    Each repeat is one permutation, of which the remainder is dropped.
    """
    s = net.settings
    orders = jax.vmap(lambda key: jax.random.permutation(key, count))(jax.random.split(rng, s.num_repeat))
    steps, size = count // s.train_sub_batch_size, s.train_sub_batch_size
    places = orders[:, : steps * size].reshape(s.num_repeat * steps, size)
    return places, jax.random.split(jax.random.fold_in(rng, s.num_repeat), len(places))


def _trained(
    net: Net, params: Params, extra: Extra, drift: Any, images: jax.Array, rng: jax.Array
) -> tuple[jax.Array, Any]:
    """Features [H, m, D] of images [H, m, ...] in training mode, all in one batch, and the drift after it."""
    f, stats = net.heads.f, heads.drifted(extra, drift)
    feature, updated = f.body.clone(axis=None).apply(  # every device has the same images
        {"params": params["body"], "batch_stats": stats},
        classifier.standardized(f, images.reshape(-1, *images.shape[2:])),
        train=True,
        mutable=["batch_stats"],
        rngs={"dropout": rng},
    )
    moved = jax.tree.map(jnp.subtract, updated["batch_stats"], extra["batch_stats"])
    return heads.seen(extra, feature.astype(f.dtype)).reshape(*images.shape[:2], -1), moved
