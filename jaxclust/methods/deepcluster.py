"""DeepCluster: cluster the features, then learn to predict the clusters, in rounds.

Caron, Bojanowski, Joulin, Douze, "Deep Clustering for Unsupervised Learning of Visual Features", ECCV 2018.

Departures: clusters are sampled uniformly as the paper says (the published code does not, see
`data/sampler.py`); the head keeps its K outputs and masks the unused ones, so that nothing recompiles; networks,
optimisers, the restarts of k-means and partial whitening are settings.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxclust import cluster
from jaxclust.cluster import Clusterer, Clustering, Points, reduce
from jaxclust.cluster.reduce import Matrix, Whitening
from jaxclust.errors import CollapseError, ConfigError
from jaxclust.methods import classifier
from jaxclust.methods.base import Batch, DataInfo, Method, Refreshed, Targets, TrainState, contiguous, merge
from jaxclust.methods.classifier import Classifier, Extra, Params
from jaxclust.ops.distances import nearest, whiten

FAR = 1e9  # where unused centroids lie: further from every row than any used one


class Space(NamedTuple):
    """Where images are clustered. Here: the space of features, PCA-whitened."""

    look: Callable[[Params, Extra, jax.Array], jax.Array] | None  # (params, extra, images) -> rows [B, D]; None: f
    first: Callable[[int, int, int], Any]  # (N, D, length of the feature) -> what `fit` gives, of zeros
    fit: Callable[[Matrix, int], tuple[Any, Points, dict[str, float]]]
    """(rows [N, D], length of the feature) -> what is fitted, the points [N, d], metrics; anew in every round."""
    project: Callable[[Any, jax.Array], jax.Array]  # (what is fitted, rows [B, D]) -> points [B, d]


class Weighed(NamedTuple):
    """What images weigh in the loss: `weight` float32 [N] with mean 1, metrics, and arrays [N] to be recorded."""

    weight: np.ndarray
    metrics: Mapping[str, float] = {}
    record: Mapping[str, np.ndarray] = {}


def make(config: ConfigDict, info: DataInfo) -> Method:
    """DeepCluster with the network, clustering and sizes of `config`; ConfigError if N < k."""
    c = classifier.classifier(config, info)
    return build(config, info, c, space(config), alike)


def build(
    config: ConfigDict,
    info: DataInfo,
    c: Classifier,
    space: Space,
    weigh: Callable[[Clustering, int], Weighed],
    nearest: int = 1,
) -> Method:
    """The method that clusters in `space`, and asks `weigh` (clustering, number of the round) what images weigh.

    The clustering tells the `nearest` centroids of each image.
    """
    check_size(config, info)
    clusterer = cluster.get(config, nearest)  # a missing or doubled wheel is found before any work
    return Method(
        init=partial(init, config, info, c, space),
        loss=partial(classifier.loss, c),  # Eq. 1, with pseudo-labels as targets
        embed=partial(classifier.embed, c),
        look=space.look,
        predict=partial(predict, c, space),
        refresh=partial(refresh, config, c, space, clusterer, weigh),
        fresh=("top", "centroids", "rounds", "counted_at"),
        num_clusters=cluster.asked(config.cluster),
        points=lambda state: (1, state.extra["centroids"].shape[1]),
    )


def check_size(config: ConfigDict, info: DataInfo) -> None:
    """ConfigError if there are fewer images than clusters, or than PIC has neighbours."""
    k, neighbours = cluster.asked(config.cluster), config.cluster.pic.neighbours
    if k is not None and info.size < k:
        raise ConfigError(f"config.cluster.k={k} clusters need at least {k} images; there are {info.size}. Lower k")
    if k is None and info.size <= neighbours:
        raise ConfigError(
            f"config.cluster.pic.neighbours={neighbours} must be less than the number of images, which is {info.size}"
        )


def space(config: ConfigDict) -> Space:
    """The feature, PCA-whitened as `config.cluster` says (the paper's implementation details)."""
    settings = config.cluster

    def first(size: int, width: int, feature: int) -> Whitening:
        dim = reduce.reduced_dim(size, width, settings.pca_dim)
        return Whitening(jnp.zeros(width, jnp.float32), jnp.zeros((width, dim), jnp.float32))

    def fit(rows: Matrix, feature: int) -> tuple[Whitening, Points, dict[str, float]]:
        power = settings.whiten_power if settings.whiten else 0.0
        whitening, info = reduce.fit(rows, settings.pca_dim, power=power)
        points, zero_rows = reduce.transform(rows, whitening, l2=settings.l2)
        return whitening, points, {"features/kept_variance": info["variance"], "features/zero_rows": float(zero_rows)}

    def project(whitening: Whitening, rows: jax.Array) -> jax.Array:
        return whiten(rows, *whitening, l2=settings.l2)

    return Space(None, first, fit, project)


def alike(found: Clustering, round_: int) -> Weighed:
    """Every image weighs 1."""
    return Weighed(np.ones(len(found.labels), np.float32))


def init(
    config: ConfigDict, info: DataInfo, c: Classifier, space: Space, rng: jax.Array, batch: Batch
) -> tuple[Params, Extra]:
    """New parameters; `extra` has the batch statistics, what the last clustering found, and how many there were."""
    outputs = num_outputs(config, 1)
    params, extra, feature = classifier.init(c, rng, batch, outputs)
    images = next(iter(batch["views"].values()))
    rows = jax.eval_shape(space.look or partial(classifier.embed, c), params, extra, images)
    fitted = space.first(info.size, rows.shape[1], feature)
    dim = jax.eval_shape(space.project, fitted, rows).shape[1]
    return params, merge(
        extra,
        num_outputs=jnp.full((), outputs, jnp.int32),
        space=fitted,
        centroids=jnp.zeros((outputs, dim), jnp.float32),
        rounds=jnp.zeros((), jnp.int32),
        counted_at=jnp.full((), -1, jnp.int32),
    )


def num_outputs(config: ConfigDict, found: int) -> int:
    """Width of the head: k, or what was found rounded up to a bucket, so that another number seldom recompiles."""
    bucket = config.cluster.pic.bucket
    return cluster.asked(config.cluster) or max(2, -(-found // bucket) * bucket)


def predict(c: Classifier, space: Space, params: Params, extra: Extra, images: jax.Array) -> dict[str, jax.Array]:
    """Nearest centroid; score (d2 - d1) / (d2 + d1) of its squared distance and the next, from 0 (tie) to 1."""
    feature = classifier.embed(c, params, extra, images)
    # XLA sees that both are of one pass through f.
    rows = space.look(params, extra, images) if space.look else feature
    point = space.project(extra["space"], rows)
    ids, distances = nearest(point, extra["centroids"], 2)
    own, other = distances[:, 0], distances[:, 1]
    logits = classifier.logits(c, params, feature)
    used = jnp.arange(logits.shape[1]) < extra["num_outputs"]
    return {
        "cluster": ids[:, 0],
        "distance": own,
        "score": (other - own) / jnp.maximum(other + own, 1e-12),
        "head": jnp.argmax(jnp.where(used, logits, -jnp.inf), axis=1).astype(jnp.int32),
    }


def refresh(
    config: ConfigDict,
    c: Classifier,
    space: Space,
    clusterer: Clusterer,
    weigh: Callable[[Clustering, int], Weighed],
    state: TrainState,
    targets: Targets,
    rows: Matrix,
    rng: jax.Array,
) -> Refreshed:
    """Clusters the images and makes the cluster of each its pseudo-label."""
    cluster_rng, top_rng = jax.random.split(rng)
    feature = state.params["top"]["kernel"].shape[0]
    # A run that goes on clusters once more where it had ended, which is the same round.
    again = int(state.extra["counted_at"]) == int(state.step)
    rounds = int(state.extra["rounds"]) + (not again)
    fitted, points, metrics = space.fit(rows, feature)
    found = clustered(clusterer, points, seed(config, cluster_rng))
    target, used = contiguous(found.labels)
    outputs = num_outputs(config, len(found.centroids))
    centroids = np.full((outputs, points.shape[1]), FAR, np.float32)
    centroids[: len(found.centroids)] = found.centroids
    weighed = weigh(found, rounds - 1)
    return Refreshed(
        # The ids of two clusterings are unrelated, so the classifier cannot stay.
        params=merge(state.params, top=classifier.new_top(c, top_rng, feature, outputs)),
        extra=merge(
            state.extra,
            num_outputs=np.int32(used),
            space=fitted,
            centroids=centroids,
            rounds=np.int32(rounds),
            counted_at=np.int32(state.step),
        ),
        target=target,
        weight=weighed.weight,
        ids=np.arange(len(target), dtype=np.int32),
        cluster=found.labels,
        distance=found.distances,
        metrics={**metrics, "clusters/objective": found.info["objective"][-1], **weighed.metrics},
        record=weighed.record,
    )


def seed(config: ConfigDict, rng: jax.Array, number: int = 0) -> int:
    """The seed of a round's clustering, or of one of several by its number."""
    if config.cluster.seed >= 0:
        return int(config.cluster.seed) + number
    return int(jax.random.randint(rng, (), 0, 2**31 - 1))


def clustered(clusterer: Clusterer, points: Points, seed: int) -> Clustering:
    """The clustering of all points, k-means (Eq. 2) or PIC; CollapseError if fewer than two clusters hold images."""
    found = clusterer(points, seed)
    if len(np.unique(found.labels)) < 2:
        raise CollapseError(
            f"all {points.shape[0]:,} images fell into one cluster: the features are constant. Likely causes: "
            "identical images, a learning rate that is too high (config.optimizer.body.lr), too strong augmentation"
        )
    return found
