"""FixMatch: a new network learns from the few images that have a label, and from its own sure guesses on all others.

Sohn et al., "FixMatch: Simplifying Semi-Supervised Learning with Consistency and Confidence", NeurIPS 2020; section 8
of our specification, SPICE-Semi, where reliable labels of clusters are the labels. What the network guesses of a weak
view of an image, and is sure of, is what it should say of a strong one. A moving average of its parameters is what
clusters.

A batch is groups of an image that has a label and `unlabelled_ratio` others, drawn from all (sampler "labelled_first").
The network starts anew, or with weights of a torch file: the labels are all that is taken from earlier stages. Its
feature goes to a linear layer as it is, without a further activation. No class label is ever seen.

Departure: batch statistics are of the images of all devices (those of the published code, of each of its four).
"""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxclust import hosts
from jaxclust.cluster import warn_once
from jaxclust.cluster.reduce import Matrix
from jaxclust.data.label_file import read_labels
from jaxclust.errors import ConfigError, DataError
from jaxclust.methods import classifier
from jaxclust.methods.base import Aux, Batch, DataInfo, Method, Refreshed, Targets, TrainState, merge
from jaxclust.methods.classifier import Classifier, Extra, Params
from jaxclust.models.heads import MLP
from jaxclust.models.pretrained import TORCH
from jaxclust.ops.losses import accuracy, weighted_cross_entropy
from jaxclust.ops.prototypes import log_probabilities
from jaxclust.runtime import AXIS

VIEWS = ("weak", "strong")


class Net(NamedTuple):
    """The network f, the linear layer g on its feature, and how they learn."""

    f: Classifier
    g: MLP
    unlabelled: int  # images that follow each one with a label
    threshold: float
    weight: float
    ema: float


def make(config: ConfigDict, info: DataInfo) -> Method:
    """FixMatch on the labels of `config.fixmatch.labels`; ConfigError and DataError for what it cannot work with."""
    _check(config, info)
    if not info.begun and (path := labels_file(config, info)):
        read_labels(path, info.size, config.cluster.k, info.parts, info.fingerprint)  # only to see that they can be had
    fixmatch, f = config.fixmatch, classifier.classifier(config, info)
    g = MLP(1, config.cluster.k, f.dtype)
    net = Net(f, g, config.unlabelled_ratio, fixmatch.threshold, fixmatch.weight, fixmatch.ema)
    return Method(
        init=partial(init, net),
        loss=partial(loss, net),
        embed=partial(embed, net),
        predict=partial(predict, net),
        look=partial(look, net),
        refresh=partial(refresh, config, info),
        after=partial(averaged, net),
        views=VIEWS,
        num_clusters=config.cluster.k,
    )


def _check(config: ConfigDict, info: DataInfo) -> None:
    if len(info.image_shape) == 1 or config.freeze_body:
        raise ConfigError(
            f"config.method={config.method!r} learns from views of images: config.freeze_body must be False, and "
            f"config.data.source={config.data.source!r} images, not vectors"
        )
    if config.sampler != "labelled_first":
        raise ConfigError(
            f"config.sampler={config.sampler!r}, but config.method={config.method!r} needs batches in which an image "
            "with a label comes before config.unlabelled_ratio others; set it to 'labelled_first'"
        )
    if config.init_from and not config.init_from.startswith(TORCH):  # of which its average has a copy
        raise ConfigError(
            f"config.init_from={config.init_from!r}, but config.method={config.method!r} trains a new network; set "
            "that of its stage to '' (config.stage.NAME.init_from), labels of another run are found all the same"
        )
    if config.cluster.k < 2:
        raise ConfigError(f"config.cluster.k={config.cluster.k}: say into how many clusters, at least 2")


def labels_file(config: ConfigDict, info: DataInfo) -> Path | None:
    """The file that has the labels, None if a stage before this one has yet to write it; ConfigError if none will."""
    text = config.fixmatch.labels
    path = Path(text).expanduser()
    if path.suffix in (".npy", ".npz"):
        if not path.is_file():
            raise ConfigError(f"config.fixmatch.labels={text!r}: there is no such file")
        return path
    folder = info.files.get(f"assignments/{text}")
    if folder is None:
        found = [name.partition("/")[2] for name in info.files if name.startswith("assignments/")]
        raise ConfigError(
            f"config.fixmatch.labels={text!r}: no stage of that name comes before this one in config.stages="
            f"{config.stages!r} or has left assignments in the workdir or that of config.init_from (there is: "
            f"{', '.join(found) or 'none'}); train it first, name a run (--config.init_from=WORKDIR), or write "
            "FILE.npz or FILE.npy"
        )
    rounds = [path for path in folder.glob("*.npz") if path.stem.isdigit()]
    return max(rounds, key=lambda path: int(path.stem), default=None)


def init(net: Net, rng: jax.Array, batch: Batch) -> tuple[Params, Extra]:
    """New parameters of f and g, and an average that equals them."""
    f_rng, g_rng = jax.random.split(rng)
    image = classifier.standardized(net.f, batch["views"]["weak"][:1])
    body = net.f.body.init(f_rng, image)
    feature = jax.eval_shape(net.f.body.apply, body, image)
    top = net.g.init(g_rng, jnp.zeros((1, feature.shape[1]), net.f.dtype))
    params = {"body": body["params"], "top": top["params"]}
    return params, {"batch_stats": body.get("batch_stats", {}), "average": params}


def loss(net: Net, params: Params, extra: Extra, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Aux]:
    """l_s + weight * l_u of the paper, its equations 3 and 4; all views pass in one, and share batch statistics.

    l_u is the mean over all unlabelled images, of which those count 0 whose guess is below the threshold; no gradient
    flows through the guess.
    """
    weak, strong = batch["views"]["weak"], batch["views"]["strong"]
    _check_batch(net, weak, strong)
    _, strong = apart(net, strong)
    scores, batch_stats = _trained(net, params, extra, jnp.concatenate([weak, strong]), rng)
    labelled, unlabelled = apart(net, scores[: len(weak)])
    target, weight = (apart(net, batch[name])[0] for name in ("target", "weight"))
    supervised = weighted_cross_entropy(labelled, target, weight)
    guess = jax.lax.stop_gradient(jax.nn.softmax(unlabelled))
    sure = (jnp.max(guess, axis=1) >= net.threshold).astype(guess.dtype)
    consistency = weighted_cross_entropy(scores[len(weak) :], jnp.argmax(guess, axis=1), sure)
    metrics = {
        "loss/labelled": supervised,
        "loss/unlabelled": consistency,
        "sure": jnp.mean(sure),
        "labelled_accuracy": accuracy(labelled, target),
    }
    return supervised + net.weight * consistency, Aux(merge(extra, batch_stats=batch_stats), metrics)


def _check_batch(net: Net, weak: jax.Array, strong: jax.Array) -> None:
    if len(weak) % (1 + net.unlabelled):
        devices = jax.lax.axis_size(AXIS)
        raise ConfigError(
            f"config.batch_size={devices * len(weak)} on {devices} devices (config.runtime.devices) gives each "
            f"{len(weak)} images, which must be a multiple of {1 + net.unlabelled}: one with a label and "
            f"config.unlabelled_ratio={net.unlabelled} others"
        )
    if weak.shape != strong.shape:
        raise ConfigError(
            f"config.views.weak makes images {weak.shape[1:]} and config.views.strong {strong.shape[1:]}, and they "
            "must be alike (size, number)"
        )


def apart(net: Net, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rows [B, ...] of a batch as those of the images with a label, [G, ...], and of the others, [B - G, ...]."""
    groups = rows.reshape(-1, 1 + net.unlabelled, *rows.shape[1:])
    return groups[:, 0], groups[:, 1:].reshape(-1, *rows.shape[1:])


def _trained(net: Net, params: Params, extra: Extra, images: jax.Array, rng: jax.Array) -> tuple[jax.Array, Any]:
    """Logits [B, K] of images in training mode, and new batch statistics."""
    # Of each device from here on, so that gradients are summed in this dtype, whatever a layer computes in.
    body = jax.lax.pcast(params["body"], AXIS, to="varying")
    feature, updated = net.f.body.apply(
        {"params": body, "batch_stats": extra["batch_stats"]},
        classifier.standardized(net.f, images),
        train=True,
        mutable=["batch_stats"],
        rngs={"dropout": rng},
    )
    return _top(net, params, feature), updated.get("batch_stats", {})


def _top(net: Net, params: Params, feature: jax.Array) -> jax.Array:
    return jnp.asarray(net.g.apply({"params": params["top"]}, feature.astype(net.f.dtype)))


def averaged(net: Net, params: Params, extra: Extra) -> Extra:
    """The average of the parameters one step on; batch statistics are the network's own."""
    average = jax.tree.map(lambda old, new: net.ema * old + (1 - net.ema) * new, extra["average"], params)
    return merge(extra, average=average)


def embed(net: Net, params: Params, extra: Extra, images: jax.Array, layers: tuple[str, ...] = ()) -> Any:
    """The feature [B, D] of the average, or maps of it; evaluation mode."""
    return classifier.embed(net.f, extra["average"], extra, images, layers)


def look(net: Net, params: Params, extra: Extra, images: jax.Array) -> jax.Array:
    """The log-probability of each cluster by the average, [B, K]; evaluation mode."""
    return log_probabilities(_top(net, extra["average"], embed(net, params, extra, images)))


def predict(net: Net, params: Params, extra: Extra, images: jax.Array) -> dict[str, jax.Array]:
    """The most probable cluster, its probability as `score`, and `log_probs` of all."""
    logs = look(net, params, extra, images)
    best = jnp.argmax(logs, axis=1).astype(jnp.int32)
    return {"cluster": best, "score": jnp.exp(jnp.max(logs, axis=1)), "log_probs": logs}


def refresh(
    config: ConfigDict, info: DataInfo, state: TrainState, targets: Targets, rows: Matrix, rng: jax.Array
) -> Refreshed:
    """The labels as targets, which the first refresh reads, and the most probable cluster of each image.

    A network that has not learnt yet has no clusters. A warning if a cluster has no label.
    """
    logs = hosts.whole(rows.array(), rows.shape[0])
    target = targets.target if targets.refreshed_at >= 0 else _labels(config, info)
    without = np.setdiff1d(np.arange(config.cluster.k), target)
    if len(without):
        warn_once(
            f"config.fixmatch.labels={config.fixmatch.labels!r} has no label of {len(without)} of {config.cluster.k} "
            f"clusters, such as {without[0]}: they will stay empty"
        )
    return Refreshed(
        params=state.params,
        extra=state.extra,
        target=target,
        weight=np.ones(info.size, np.float32),
        ids=np.arange(info.size, dtype=np.int32),
        cluster=np.argmax(logs, axis=1).astype(np.int32) if state.step else None,
        distance=1 - np.exp(logs.max(axis=1)).astype(np.float32),
        metrics={"labels/count": float(np.count_nonzero(target >= 0))},
    )


def _labels(config: ConfigDict, info: DataInfo) -> np.ndarray:
    path = labels_file(config, info)
    if path is None:
        raise DataError(f"config.fixmatch.labels={config.fixmatch.labels!r}: that stage has left no assignment")
    return read_labels(path, info.size, config.cluster.k, info.parts, info.fingerprint)
