"""DSCL: embeddings whose column space should hold the classes, so that images of new classes are found by them.

Law, Urtasun, Zemel, "Deep Spectral Clustering Learning", ICML 2017; our specification, whose sections are named here.
The loss and its gradient are in `ops/spectral.py`, the network in `embedding.py`: a linear last layer on a body, which
is frozen (`freeze_body`, the last layer alone) or learns too (end to end).

A batch, of `batch_size` images on all devices, is passed through in small batches. With scope "large" it is one
problem, whose gradient is handed on to each small batch in a second pass; with scope "small", as published, each small
batch is a problem of its own.

Departures: "large" is the default; what is logged is L without dropout, not <G, F>, which is rounding noise (3.4);
dropout is drawn for each image by its position, so that neither devices nor small batches change it; batch norm may be
of small batches.
"""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxclust import hosts
from jaxclust.cluster import warn_once
from jaxclust.cluster.reduce import Matrix
from jaxclust.errors import ConfigError
from jaxclust.methods import classifier, closed_form, embedding
from jaxclust.methods.base import Aux, Batch, DataInfo, Method, Metrics, Refreshed, Targets, TrainState, merge
from jaxclust.methods.classifier import Extra, Params
from jaxclust.methods.embedding import Net
from jaxclust.ops import spectral
from jaxclust.ops.gather import all_rows
from jaxclust.runtime import AXIS

MEASURED = ("loss", "reference", "rank", "effective_rank", "condition")


def make(config: ConfigDict, info: DataInfo) -> Method:
    """DSCL with the network and settings of `config`; ConfigError for what it cannot work with."""
    if info.num_classes is None:
        raise ConfigError(
            f"config.method={config.method!r} learns from class labels, and config.data.source={config.data.source!r} "
            "has none; two class folders or more are labels, or choose another method"
        )
    f = classifier.classifier(config, info)
    d = config.dscl.vector_size or info.num_classes
    _check(config, info, d)
    if config.freeze_body and len(info.image_shape) == 3 and not (config.init_from or info.files or info.begun):
        warn_once(
            f"config.freeze_body=True and config.init_from='': the frozen {config.model.name} is drawn at random, and "
            "the last layer learns from what it happens to see. Give it weights, config.init_from=torch:FILE "
            "(docs/pretrained.md) or a workdir"
        )
    net = embedding.build(config, f, d)
    solved = solves(config)
    return Method(
        init=partial(embedding.init, net),
        loss=partial(loss, net, info.num_classes),
        embed=partial(embedding.embed, net),
        look=partial(classifier.embed, f) if solved else None,
        refresh=partial(refresh, config, net, info.num_classes) if solved else None,
        accept=partial(accept, net),
        labels="class",
        class_size=2,
        class_count=2,
        body=partial(classifier.embed, f),
    )


def solves(config: ConfigDict) -> bool:
    """Whether the last layer is solved for, without a step."""
    return bool(config.dscl.solver == "closed_form")


def _check(config: ConfigDict, info: DataInfo, d: int) -> None:
    """ConfigError for settings that do not go together, or a loss of too few images (section 3.5)."""
    s, size, small = config.dscl, config.batch_size, config.dscl.small_batch_size
    if s.solver == "closed_form" and (not config.freeze_body or config.rounds or config.steps):
        raise ConfigError(
            "config.dscl.solver='closed_form' solves for the last layer alone, without steps: set config.freeze_body="
            f"True (it is {config.freeze_body}), config.rounds=0 and config.steps=0 ({config.rounds}, {config.steps})"
        )
    if s.scope == "small" and size % small:
        raise ConfigError(
            f"config.batch_size={size} must be a multiple of config.dscl.small_batch_size={small}, of which each is a "
            "loss of its own (config.dscl.scope='small')"
        )
    n, what = (small, "config.dscl.small_batch_size=") if s.scope == "small" else (size, "config.batch_size=")
    n, what = (info.size, "all of the ") if s.solver == "closed_form" else (n, what)
    same = config.freeze_body and not config.frozen_views  # an image that is there again says nothing new
    n, what = (info.size, f"{what}{n}, but only ") if same and info.size < n else (n, what)
    what = f"{what}{n} images share a loss, and an embedding has config.dscl.vector_size={d} numbers"
    if n <= d and not s.allow_degenerate:
        raise ConfigError(
            f"{what}: with no more images than numbers the loss is zero whatever the embeddings are, and its gradient "
            "too. Raise the first, lower the second, or use config.dscl.scope='large'; "
            "config.dscl.allow_degenerate=True goes on all the same"
        )
    if n < 4 * d:
        warn_once(f"{what}: with fewer than four times as many images much of the loss is chance")
    if small <= d < n and s.solver == "gradient":
        warn_once(
            f"config.dscl.small_batch_size={small} and config.dscl.vector_size={d}: a loss of a small batch alone "
            "(config.dscl.scope='small', as published) would be degenerate: zero, with a gradient of rounding noise. "
            f"Trained is with config.dscl.scope='large', one loss of all {n} images of a step"
        )
    top = config.optimizer.top
    if s.init == "upstream" and top.name == "sgd" and top.lr < 1e-2 and s.solver == "gradient":
        warn_once(
            f"config.optimizer.top.lr={top.lr:g} of plain SGD and config.dscl.init='upstream', as published: the "
            "gradient falls as the weights grow, and of weights from -2 to 2 it is so small that this rate leaves them "
            "as they are. What learns is --config.optimizer.top.name=adam --config.optimizer.top.lr=0.001 "
            "--config.dscl.init=normal"
        )


def loss(net: Net, classes: int, params: Params, extra: Extra, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Aux]:
    """L of the whole batch, the same on each device, or the mean of L of this device's small batches (section 5.2)."""
    # Of each device from here on, so that gradients are summed in this dtype, whatever a layer computes in.
    varying = jax.lax.pcast(params, AXIS, to="varying")
    function = partial(embedding.forward, net, varying, extra["batch_stats"], rng)
    said = embedding.in_small_batches(net, function, batch["views"]["train"], batch["position"])
    y = jax.nn.one_hot(batch["target"], classes, dtype=net.f.dtype).reshape(*said.dropped.shape[:2], classes)
    found, size = measured(net, said.dropped, y)
    value = jnp.mean(found.loss) / (size if net.settings.mean_gradient else 1)
    shown = measured(net, jax.lax.stop_gradient(said.clean), y)[0] if net.settings.dropout_rate else found
    metrics = {name: jnp.mean(getattr(shown, name)) for name in MEASURED}
    metrics["surrogate"] = jnp.mean(found.surrogate) / size
    stats = extra["batch_stats"]
    if net.normed:
        stats = jax.tree.map(lambda leaf: jax.lax.pmean(leaf.mean(axis=0), AXIS), said.stats)
    return value, Aux(merge(extra, batch_stats=stats), metrics)


def measured(net: Net, f: jax.Array, y: jax.Array) -> tuple[spectral.Found, int]:
    """What embeddings [m, s, d] of this device and indicators [m, s, K] say: of all devices together, [1], or of each
    small batch, [m]; and of how many images."""
    s = net.settings
    if s.scope == "large":
        f, y = (all_rows(x.reshape(-1, x.shape[-1]))[None] for x in (f, y))
    rule = spectral.Rule(s.grad_scale, s.rtol, s.ridge, s.row_normalize)
    return jax.vmap(partial(spectral.dscl_loss, rule=rule))(f, y), f.shape[1]


def accept(net: Net, value: jax.Array, gradient: Params, metrics: Metrics) -> tuple[jax.Array, Metrics]:
    """Whether all is finite, the gradient not too long, and |<G, F>| per image not over the threshold (section 5.3).

    What is not finite, which only skipped steps have, is logged as 0, and L as that of random embeddings.
    """
    s, length = net.settings, jnp.sqrt(sum(jnp.vdot(g, g) for g in jax.tree.leaves(gradient)))
    seen = {**metrics, "gradient_norm": length.astype(jnp.float32)}
    taken = jnp.all(jnp.isfinite(jnp.stack([value.astype(jnp.float32), *seen.values()])))
    taken &= jnp.abs(metrics["surrogate"]) <= s.loss_skip_threshold
    taken &= (length <= s.max_grad_norm) if s.max_grad_norm else True
    finite = {name: jnp.where(jnp.isfinite(one), one, 0) for name, one in seen.items()}
    finite["loss"] = jnp.where(jnp.isfinite(metrics["loss"]), metrics["loss"], metrics["reference"])
    return taken, {**finite, "skipped": 1 - taken.astype(jnp.float32)}


def refresh(
    config: ConfigDict, net: Net, classes: int, state: TrainState, targets: Targets, rows: Matrix, rng: jax.Array
) -> Refreshed:
    """The last layer of the least loss over all training images, whose features are `rows` (section 5.2)."""
    own = targets.target[hosts.own_ids(rows.shape[0])]

    def chunks() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        start = 0
        for chunk in rows.chunks():
            yield chunk, own[start : start + len(chunk)]
            start += len(chunk)

    m, d = closed_form.moments(chunks(), rows.shape[1], classes), net.top.features

    def solved() -> dict[str, np.ndarray]:
        return {
            name: np.asarray(part) for name, part in closed_form.optimum(m, d, net.settings.ridge)._asdict().items()
        }

    found = hosts.from_first(solved, "solving for the last layer", config.runtime.deadline)
    known, ridge = int(m.sizes.sum()), net.settings.ridge
    if not ridge and known < 4 * (rank := int(found["rank"])):
        warn_once(
            f"config.dscl.ridge=0: features of {known:,} images have {rank:,} directions, bias included, so that the "
            "last layer of the closed form learns the images by heart (with as many directions as images the loss is "
            "zero whatever the classes are), and other classes are found badly. Set config.dscl.ridge=0.01, say"
        )
    reference = float(spectral.expected(float(np.count_nonzero(m.sizes)), known, d, ridge))
    top = {name: found[name].astype(net.f.dtype) for name in ("kernel", "bias")}
    return Refreshed(
        params=merge(state.params, top=top),
        extra=state.extra,
        target=targets.target,
        weight=targets.weight,
        ids=targets.ids,
        metrics={"loss": float(found["loss"]), "reference": reference},
    )
