"""DeepCluster: cluster the features, then learn to predict the clusters, in rounds.

Caron, Bojanowski, Joulin, Douze, "Deep Clustering for Unsupervised Learning of Visual Features", ECCV 2018.

Departures: clusters are sampled uniformly as the paper says (the published code does not, see
`data/sampler.py`); the head keeps its K outputs and masks the unused ones, so that nothing recompiles; networks,
optimisers and the restarts of k-means are settings.
"""

from typing import Any

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


def make(config: ConfigDict, info: DataInfo) -> Method:
    """DeepCluster with the network, clustering and sizes of `config`; ConfigError if N < k."""
    k = config.cluster.k
    if info.size < k:
        raise ConfigError(f"config.cluster.k={k} clusters need at least {k} images; there are {info.size}. Lower k")
    cluster.backend(config.cluster.backend)  # a missing or doubled wheel is found before any work
    dtype, param_dtype = runtime.compute_dtype(config), runtime.param_dtype(config)
    body = models.get(config)
    top = nn.Dense(k, kernel_init=dense_init, dtype=dtype, param_dtype=param_dtype)

    def standardized(images: jax.Array) -> jax.Array:
        return standardize(images, config.data.mean, config.data.std, dtype)

    def new_top(rng: jax.Array, width: int) -> Params:
        return top.init(rng, jnp.zeros((1, width), param_dtype))["params"]

    def logits_of(params: Params, extra: Extra, feature: jax.Array) -> jax.Array:
        """The head sees the feature after its ReLU; clustering sees it before."""
        return jnp.asarray(top.apply({"params": params["top"]}, nn.relu(feature)), param_dtype)

    def init(rng: jax.Array, batch: Batch) -> tuple[Params, Extra]:
        body_rng, top_rng = jax.random.split(rng)
        images = standardized(next(iter(batch["views"].values())))
        variables = body.init(body_rng, images)
        width = jax.eval_shape(body.apply, {**variables}, images).shape[1]
        dim = reduce.reduced_dim(info.size, width, config.cluster.pca_dim)
        extra = {
            "batch_stats": variables.get("batch_stats", {}),
            "num_outputs": jnp.full((), k, jnp.int32),
            "whitening": Whitening(jnp.zeros(width, jnp.float32), jnp.zeros((width, dim), jnp.float32)),
            "centroids": jnp.zeros((k, dim), jnp.float32),
        }
        return {"body": variables["params"], "top": new_top(top_rng, width)}, extra

    def loss(params: Params, extra: Extra, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Aux]:
        feature, updated = body.apply(
            {"params": params["body"], "batch_stats": extra["batch_stats"]},
            standardized(batch["views"]["train"]),
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": rng},
        )
        logits = logits_of(params, extra, feature)
        value = weighted_cross_entropy(logits, batch["target"], batch["weight"], extra["num_outputs"])
        hits = accuracy(logits, batch["target"], extra["num_outputs"])
        return value, Aux(merge(extra, **updated), {"accuracy": hits})

    def embed(params: Params, extra: Extra, images: jax.Array, layers: tuple[str, ...] = ()) -> Any:
        variables = {"params": params["body"], "batch_stats": extra["batch_stats"]}
        feature, captured = body.apply(variables, standardized(images), mutable=["maps"])
        if layers:
            return {name: captured["maps"][name][0] for name in layers}
        return jnp.asarray(feature, param_dtype)

    def predict(params: Params, extra: Extra, images: jax.Array) -> dict[str, jax.Array]:
        """Nearest centroid; score (d2 - d1) / (d2 + d1) of its squared distance and the next, from 0 (tie) to 1."""
        feature = embed(params, extra, images)
        mean, projection = extra["whitening"]
        point = whiten(feature, mean, projection, l2=config.cluster.l2)
        ids, distances = nearest(point, extra["centroids"], 2)
        own, other = distances[:, 0], distances[:, 1]
        logits = jnp.where(jnp.arange(k) < extra["num_outputs"], logits_of(params, extra, feature), -jnp.inf)
        return {
            "cluster": ids[:, 0],
            "distance": own,
            "score": (other - own) / jnp.maximum(other + own, 1e-12),
            "head": jnp.argmax(logits, axis=1).astype(jnp.int32),
        }

    def refresh(state: TrainState, targets: Targets, rows: Chunked, rng: jax.Array) -> Refreshed:
        cluster_rng, top_rng = jax.random.split(rng)
        whitening, points, metrics = reduced(config, rows)
        found = clustered(config, points, cluster_rng)
        target, num_outputs = contiguous(found.labels)
        # The ids of two clusterings are unrelated, so the head cannot stay.
        params = merge(state.params, top=new_top(top_rng, rows.shape[1]))
        extra = merge(state.extra, num_outputs=np.int32(num_outputs), whitening=whitening, centroids=found.centroids)
        return Refreshed(
            params,
            extra,
            target,
            weight=np.ones(info.size, np.float32),
            ids=np.arange(info.size, dtype=np.int32),
            cluster=found.labels,
            distance=found.distances,
            metrics={**metrics, "clusters/objective": found.info["objective"][-1]},
        )

    return Method(init, loss, embed, predict, refresh, fresh=("top",))


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
