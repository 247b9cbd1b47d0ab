"""DeepCluster: cluster the features, then learn to predict the clusters, in rounds.

Caron, Bojanowski, Joulin, Douze, "Deep Clustering for Unsupervised Learning of Visual Features", ECCV 2018.

Departures: clusters are sampled uniformly as the paper says (the published code does not, see
`data/sampler.py`); the head keeps its K outputs and masks the unused ones, so that nothing recompiles; networks,
optimisers, the restarts of k-means and partial whitening are settings.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

from jaxclust import cluster, models, runtime
from jaxclust.cluster import reduce
from jaxclust.cluster.reduce import Chunked, Whitening
from jaxclust.errors import CollapseError, ConfigError
from jaxclust.methods.base import Aux, Batch, DataInfo, Method, Refreshed, Targets, TrainState, contiguous, merge
from jaxclust.models.layers import dense_init
from jaxclust.ops.distances import nearest, whiten
from jaxclust.ops.images import standardize
from jaxclust.ops.losses import accuracy, weighted_cross_entropy

Params = dict[str, Any]
Extra = dict[str, Any]


class Networks(NamedTuple):
    """The convnet f and the classifier g of the paper's Eq. 1, and their dtypes."""

    body: nn.Module
    top: nn.Dense
    dtype: Any
    param_dtype: Any


def make(config: ConfigDict, info: DataInfo) -> Method:
    """DeepCluster with the network, clustering and sizes of `config`; ConfigError if N < k."""
    k = config.cluster.k
    if info.size < k:
        raise ConfigError(f"config.cluster.k={k} clusters need at least {k} images; there are {info.size}. Lower k")
    cluster.backend(config.cluster.backend)  # a missing or doubled wheel is found before any work
    dtype, param_dtype = runtime.compute_dtype(config), runtime.param_dtype(config)
    top = nn.Dense(k, kernel_init=dense_init, dtype=dtype, param_dtype=param_dtype)
    nets = Networks(models.get(config), top, dtype, param_dtype)
    return Method(
        init=partial(init, config, info, nets),
        loss=partial(loss, config, nets),
        embed=partial(embed, config, nets),
        predict=partial(predict, config, nets),
        refresh=partial(refresh, config, nets),
        fresh=("top",),
    )


def init(config: ConfigDict, info: DataInfo, nets: Networks, rng: jax.Array, batch: Batch) -> tuple[Params, Extra]:
    """New parameters; `extra` has the batch statistics, and what the last clustering found."""
    body_rng, top_rng = jax.random.split(rng)
    images = standardized(config, nets, next(iter(batch["views"].values())))
    variables = nets.body.init(body_rng, images)
    width = jax.eval_shape(nets.body.apply, {**variables}, images).shape[1]
    dim = reduce.reduced_dim(info.size, width, config.cluster.pca_dim)
    extra = {
        "batch_stats": variables.get("batch_stats", {}),
        "num_outputs": jnp.full((), config.cluster.k, jnp.int32),
        "whitening": Whitening(jnp.zeros(width, jnp.float32), jnp.zeros((width, dim), jnp.float32)),
        "centroids": jnp.zeros((config.cluster.k, dim), jnp.float32),
    }
    return {"body": variables["params"], "top": new_top(nets, top_rng, width)}, extra


def new_top(nets: Networks, rng: jax.Array, width: int) -> Params:
    """A new classifier, N(0, 0.01^2) and bias 0."""
    top: Params = nets.top.init(rng, jnp.zeros((1, width), nets.param_dtype))["params"]
    return top


def standardized(config: ConfigDict, nets: Networks, images: jax.Array) -> jax.Array:
    """Images as the body sees them."""
    return standardize(images, config.data.mean, config.data.std, nets.dtype)


def logits_of(nets: Networks, params: Params, feature: jax.Array) -> jax.Array:
    """The classifier sees the feature after its ReLU; clustering sees it before."""
    return jnp.asarray(nets.top.apply({"params": params["top"]}, nn.relu(feature)), nets.param_dtype)


def loss(
    config: ConfigDict, nets: Networks, params: Params, extra: Extra, batch: Batch, rng: jax.Array
) -> tuple[jax.Array, Aux]:
    """Eq. 1: cross-entropy of the pseudo-labels."""
    feature, updated = nets.body.apply(
        {"params": params["body"], "batch_stats": extra["batch_stats"]},
        standardized(config, nets, batch["views"]["train"]),
        train=True,
        mutable=["batch_stats"],
        rngs={"dropout": rng},
    )
    logits = logits_of(nets, params, feature)
    value = weighted_cross_entropy(logits, batch["target"], batch["weight"], extra["num_outputs"])
    hits = accuracy(logits, batch["target"], extra["num_outputs"])
    return value, Aux(merge(extra, **updated), {"accuracy": hits})


def embed(
    config: ConfigDict, nets: Networks, params: Params, extra: Extra, images: jax.Array, layers: tuple[str, ...] = ()
) -> Any:
    """The feature before its last ReLU, or the maps of `layers`."""
    variables = {"params": params["body"], "batch_stats": extra["batch_stats"]}
    feature, captured = nets.body.apply(variables, standardized(config, nets, images), mutable=["maps"])
    if layers:
        return {name: captured["maps"][name][0] for name in layers}
    return jnp.asarray(feature, nets.param_dtype)


def predict(
    config: ConfigDict, nets: Networks, params: Params, extra: Extra, images: jax.Array
) -> dict[str, jax.Array]:
    """Nearest centroid; score (d2 - d1) / (d2 + d1) of its squared distance and the next, from 0 (tie) to 1."""
    feature = embed(config, nets, params, extra, images)
    mean, projection = extra["whitening"]
    ids, distances = nearest(whiten(feature, mean, projection, l2=config.cluster.l2), extra["centroids"], 2)
    own, other = distances[:, 0], distances[:, 1]
    logits = logits_of(nets, params, feature)
    used = jnp.arange(logits.shape[1]) < extra["num_outputs"]
    return {
        "cluster": ids[:, 0],
        "distance": own,
        "score": (other - own) / jnp.maximum(other + own, 1e-12),
        "head": jnp.argmax(jnp.where(used, logits, -jnp.inf), axis=1).astype(jnp.int32),
    }


def refresh(
    config: ConfigDict, nets: Networks, state: TrainState, targets: Targets, rows: Chunked, rng: jax.Array
) -> Refreshed:
    """Clusters the features and makes each image's cluster its pseudo-label."""
    cluster_rng, top_rng = jax.random.split(rng)
    whitening, points, metrics = reduced(config, rows)
    found = clustered(config, points, cluster_rng)
    target, num_outputs = contiguous(found.labels)
    return Refreshed(
        # The ids of two clusterings are unrelated, so the classifier cannot stay.
        params=merge(state.params, top=new_top(nets, top_rng, rows.shape[1])),
        extra=merge(state.extra, num_outputs=np.int32(num_outputs), whitening=whitening, centroids=found.centroids),
        target=target,
        weight=np.ones(len(target), np.float32),
        ids=np.arange(len(target), dtype=np.int32),
        cluster=found.labels,
        distance=found.distances,
        metrics={**metrics, "clusters/objective": found.info["objective"][-1]},
    )


def reduced(config: ConfigDict, rows: Chunked) -> tuple[Whitening, np.ndarray, dict[str, float]]:
    """PCA-whitening of the features, fitted anew, and the points it gives (the paper's implementation details)."""
    c = config.cluster
    whitening, info = reduce.fit(rows, c.pca_dim, power=c.whiten_power if c.whiten else 0.0)
    points, zero_rows = reduce.transform(rows, whitening, l2=c.l2)
    return whitening, points, {"features/kept_variance": info["variance"], "features/zero_rows": float(zero_rows)}


def clustered(config: ConfigDict, points: np.ndarray, rng: jax.Array) -> cluster.Clustering:
    """k-means of the points with a new seed (Eq. 2); CollapseError if fewer than two clusters hold images."""
    c = config.cluster
    seed = int(jax.random.randint(rng, (), 0, np.iinfo(np.int32).max))
    kmeans = cluster.get(f"{c.method}_{cluster.backend(c.backend)}").kmeans
    found: cluster.Clustering = kmeans(
        points, c.k, seed, iterations=c.iterations, runs=c.runs, reseed_empty=c.reseed_empty
    )
    if len(np.unique(found.labels)) < 2:
        raise CollapseError(
            f"all {len(points):,} images fell into one of {c.k} clusters: the features are constant. Likely causes: "
            "identical images, a learning rate that is too high (config.optimizer.body.lr), too strong augmentation"
        )
    return found
