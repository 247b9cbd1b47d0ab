"""DeepCluster: cluster the features, then learn to predict the clusters, in rounds.

Caron, Bojanowski, Joulin, Douze, "Deep Clustering for Unsupervised Learning of Visual Features", ECCV 2018.

Departures: clusters are sampled uniformly as the paper says (the published code does not, see
`data/sampler.py`); the head keeps its K outputs and masks the unused ones, so that nothing recompiles; networks,
optimisers, the restarts of k-means and partial whitening are settings.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxclust import cluster
from jaxclust.cluster import Points, reduce
from jaxclust.cluster.reduce import Matrix, Whitening
from jaxclust.errors import CollapseError, ConfigError
from jaxclust.methods import classifier
from jaxclust.methods.base import Batch, DataInfo, Method, Refreshed, Targets, TrainState, contiguous, merge
from jaxclust.methods.classifier import Classifier, Extra, Params
from jaxclust.ops.distances import nearest, whiten

FAR = 1e9  # where unused centroids lie: further from every row than any used one


def make(config: ConfigDict, info: DataInfo) -> Method:
    """DeepCluster with the network, clustering and sizes of `config`; ConfigError if N < k."""
    k, neighbours = cluster.asked(config.cluster), config.cluster.pic.neighbours
    if k is not None and info.size < k:
        raise ConfigError(f"config.cluster.k={k} clusters need at least {k} images; there are {info.size}. Lower k")
    if k is None and info.size <= neighbours:
        raise ConfigError(
            f"config.cluster.pic.neighbours={neighbours} must be less than the number of images, which is {info.size}"
        )
    cluster.get(config)  # a missing or doubled wheel is found before any work
    c = classifier.classifier(config, info)
    return Method(
        init=partial(init, config, info, c),
        loss=partial(classifier.loss, c),  # Eq. 1, with pseudo-labels as targets
        embed=partial(classifier.embed, c),
        predict=partial(predict, config, c),
        refresh=partial(refresh, config, c),
        fresh=("top", "centroids"),
        num_clusters=k,
    )


def init(config: ConfigDict, info: DataInfo, c: Classifier, rng: jax.Array, batch: Batch) -> tuple[Params, Extra]:
    """New parameters; `extra` has the batch statistics, and what the last clustering found."""
    outputs = num_outputs(config, 1)
    params, extra, width = classifier.init(c, rng, batch, outputs)
    dim = reduce.reduced_dim(info.size, width, config.cluster.pca_dim)
    return params, merge(
        extra,
        num_outputs=jnp.full((), outputs, jnp.int32),
        whitening=Whitening(jnp.zeros(width, jnp.float32), jnp.zeros((width, dim), jnp.float32)),
        centroids=jnp.zeros((outputs, dim), jnp.float32),
    )


def num_outputs(config: ConfigDict, found: int) -> int:
    """Width of the head: k, or what was found rounded up to a bucket, so that another number seldom recompiles."""
    bucket = config.cluster.pic.bucket
    return cluster.asked(config.cluster) or max(2, -(-found // bucket) * bucket)


def predict(config: ConfigDict, c: Classifier, params: Params, extra: Extra, images: jax.Array) -> dict[str, jax.Array]:
    """Nearest centroid; score (d2 - d1) / (d2 + d1) of its squared distance and the next, from 0 (tie) to 1."""
    feature = classifier.embed(c, params, extra, images)
    mean, projection = extra["whitening"]
    ids, distances = nearest(whiten(feature, mean, projection, l2=config.cluster.l2), extra["centroids"], 2)
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
    config: ConfigDict, c: Classifier, state: TrainState, targets: Targets, rows: Matrix, rng: jax.Array
) -> Refreshed:
    """Clusters the features and makes each image's cluster its pseudo-label."""
    cluster_rng, top_rng = jax.random.split(rng)
    whitening, points, metrics = reduced(config, rows)
    found = clustered(config, points, cluster_rng)
    target, used = contiguous(found.labels)
    outputs = num_outputs(config, len(found.centroids))
    centroids = np.full((outputs, points.shape[1]), FAR, np.float32)
    centroids[: len(found.centroids)] = found.centroids
    return Refreshed(
        # The ids of two clusterings are unrelated, so the classifier cannot stay.
        params=merge(state.params, top=classifier.new_top(c, top_rng, rows.shape[1], outputs)),
        extra=merge(state.extra, num_outputs=np.int32(used), whitening=whitening, centroids=centroids),
        target=target,
        weight=np.ones(len(target), np.float32),
        ids=np.arange(len(target), dtype=np.int32),
        cluster=found.labels,
        distance=found.distances,
        metrics={**metrics, "clusters/objective": found.info["objective"][-1]},
    )


def reduced(config: ConfigDict, rows: Matrix) -> tuple[Whitening, Points, dict[str, float]]:
    """PCA-whitening of the features, fitted anew, and the points it gives (the paper's implementation details)."""
    c = config.cluster
    whitening, info = reduce.fit(rows, c.pca_dim, power=c.whiten_power if c.whiten else 0.0)
    points, zero_rows = reduce.transform(rows, whitening, l2=c.l2)
    return whitening, points, {"features/kept_variance": info["variance"], "features/zero_rows": float(zero_rows)}


def clustered(config: ConfigDict, points: Points, rng: jax.Array) -> cluster.Clustering:
    """The clustering of all points, k-means (Eq. 2) or PIC; CollapseError if fewer than two clusters hold images."""
    seed = config.cluster.seed if config.cluster.seed >= 0 else int(jax.random.randint(rng, (), 0, 2**31 - 1))
    found = cluster.get(config)(points, seed)
    if len(np.unique(found.labels)) < 2:
        raise CollapseError(
            f"all {points.shape[0]:,} images fell into one cluster: the features are constant. Likely causes: "
            "identical images, a learning rate that is too high (config.optimizer.body.lr), too strong augmentation"
        )
    return found
