"""DeepCluster-v2: clusters what the network said of the images while it learnt the clusters before, on several heads.

Caron, Misra, Mairal, Goyal, Bojanowski, Joulin, "Unsupervised Learning of Visual Features by Contrasting Cluster
Assignments", NeurIPS 2020 (arXiv 2006.09882), which names it; section 2.13 of our specification.

Of each image there are crops of two kinds, `views.large` and `views.small`. The embedding of a crop x is
z = g(f(x)) / |g(f(x))| with the network f and the projection g. Head h scores it by its prototypes, C_h z, which are
centroids of a memory bank: the embeddings that each image had in the round before, a bank for each large crop.

Departures: the first bank is of the evaluation crops, in evaluation mode; the published code takes a standard deviation
of 0.228 for red, where all others take 0.229; f keeps the batch statistics of large crops alone, which are like the
images that are evaluated.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxclust import cluster, hosts, models
from jaxclust.cluster import Clusterer, reduce
from jaxclust.cluster.reduce import Matrix
from jaxclust.data import view as view_lib
from jaxclust.errors import ConfigError
from jaxclust.methods import classifier, deepcluster
from jaxclust.methods.base import Aux, Batch, DataInfo, Method, Refreshed, Targets, TrainState, merge
from jaxclust.methods.classifier import Classifier, Extra, Params
from jaxclust.models.heads import Projection
from jaxclust.ops.distances import normalize
from jaxclust.ops.losses import accuracy, weighted_cross_entropy
from jaxclust.runtime import AXIS

VIEWS = ("large", "small")


class Net(NamedTuple):
    """f, g, and how embeddings are scored."""

    f: Classifier  # without its own linear classifier
    g: Projection
    temperature: float
    heads: int
    banks: int  # large crops of an image, each with a bank of its own


def make(config: ConfigDict, info: DataInfo) -> Method:
    """DeepCluster-v2 with the network, clustering and crops of `config`; ConfigError for what it cannot work with."""
    _check(config, info)
    v2 = config.deepcluster_v2
    f = classifier.classifier(config, info)
    net = Net(f, Projection(v2.hidden, v2.dim, f.dtype), v2.temperature, v2.heads, _number(config))
    return Method(
        init=partial(init, net, config.cluster.k),
        loss=partial(loss, net),
        embed=partial(classifier.embed, f),  # the feature of f: g is there for the clusters alone
        predict=partial(predict, net),
        look=partial(look, net),
        refresh=partial(refresh, config, net, cluster.get(config)),
        views=VIEWS,
        copies=True,
        fresh=("prototypes",),
        num_clusters=config.cluster.k,
        target_shape=(v2.heads,),
        memory="embeddings",
        points=lambda state: (v2.heads, v2.dim),
    )


def _check(config: ConfigDict, info: DataInfo) -> None:
    if len(info.image_shape) == 1 or config.freeze_body:
        raise ConfigError(
            f"config.method={config.method!r} learns from crops of images: config.freeze_body must be False, and "
            f"config.data.source={config.data.source!r} images, not vectors"
        )
    if config.cluster.method == "pic":
        raise ConfigError(
            "config.cluster.method='pic' makes no centroids, and config.method='deepcluster_v2' takes them as "
            "prototypes; choose spherical"
        )
    deepcluster.check_size(config, info)
    sides = {
        name: view_lib.shape(view_lib.make_view(config.views[name]), info.image_shape)
        for name in VIEWS
        if name in config.views
    }
    shapes = {name: models.parameter_shapes(config, side) for name, side in sides.items()}
    if len(shapes) == 2 and shapes["large"] != shapes["small"]:
        raise ConfigError(
            f"config.model.name={config.model.name!r} has another number of weights for crops of "
            f"{sides['small'][0]} pixels (config.views.small.size) than for those of {sides['large'][0]}; choose a "
            "network that averages its last map, such as resnet18, or one size for both"
        )


def _number(config: ConfigDict) -> int:
    return view_lib.make_view(config.views["large"]).number if "large" in config.views else 1


def init(net: Net, k: int, rng: jax.Array, batch: Batch) -> tuple[Params, Extra]:
    """New parameters of f and g, k random prototypes for each head, and batch statistics."""
    f_rng, g_rng, *head_rngs = jax.random.split(rng, 2 + net.heads)
    shape = batch["views"]["large"].shape[-3:]  # of one crop: a whole batch of them is much for an initialisation
    image = classifier.standardized(net.f, jnp.zeros((1, *shape), jnp.uint8))
    body = net.f.body.init(f_rng, image)
    feature = jax.eval_shape(net.f.body.apply, body, image)
    projection = net.g.init(g_rng, jnp.zeros((1, feature.shape[1]), net.f.dtype))
    drawn = [jax.random.normal(head_rng, (k, net.g.dim), net.f.dtype) for head_rng in head_rngs]
    params = {
        "body": body["params"],
        "projection": projection["params"],
        "prototypes": {f"head{h}": normalize(rows).T for h, rows in enumerate(drawn)},
    }
    return params, {"batch_stats": body.get("batch_stats", {}), "projection": projection["batch_stats"]}


def _in_a_row(crops: jax.Array) -> jax.Array:
    """Crops [B, n, S, S, C] as [B n, S, S, C]."""
    return crops.reshape(-1, *crops.shape[-3:])


def loss(net: Net, params: Params, extra: Extra, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Aux]:
    """Mean over heads, crops and images of the cross-entropy of C_h z / temperature and the image's cluster.

    An image that was not in the bank has the target -1, and does not count.
    """
    feature, batch_stats = _features(net, params, extra, batch, rng)
    images, crops, width = feature.shape
    projected, updated = net.g.apply(
        {"params": params["projection"], "batch_stats": extra["projection"]},
        jax.nn.relu(feature).reshape(-1, width),
        train=True,
        mutable=["batch_stats"],
    )
    z = normalize(projected)
    known = batch["target"][:, 0] >= 0  # for all heads alike
    share = jax.lax.pmean(jnp.mean(known, dtype=z.dtype), AXIS)
    weight = jnp.repeat(batch["weight"] * known / jnp.maximum(share, 1e-8), crops)
    target = jnp.repeat(batch["target"], crops, axis=0)  # the same for all crops
    scores = [_scores(net, params, h, z) for h in range(net.heads)]
    losses = [weighted_cross_entropy(scores[h], target[:, h], weight) for h in range(net.heads)]
    own = jax.lax.stop_gradient(z).reshape(images, crops, -1)[:, : net.banks]  # the large crops come first
    return jnp.mean(jnp.stack(losses)), Aux(
        merge(extra, batch_stats=batch_stats, projection=updated["batch_stats"]),
        {"accuracy": accuracy(scores[0], target[:, 0]) / jnp.maximum(share, 1e-8)},  # of those that have a target
        {"embeddings": own.reshape(images, -1)},
    )


def _features(net: Net, params: Params, extra: Extra, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Any]:
    """f of all crops, the large ones first, [B, n, D], and its batch statistics; one pass for each size of crop."""
    body = jax.lax.pcast(params["body"], AXIS, to="varying")  # as in classifier.loss
    features: list[jax.Array] = []
    batch_stats: Any = {}
    for i, name in enumerate(VIEWS):
        crops = batch["views"][name]
        feature, updated = net.f.body.apply(
            {"params": body, "batch_stats": extra["batch_stats"]},
            classifier.standardized(net.f, _in_a_row(crops)),
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": jax.random.fold_in(rng, i)},
        )
        batch_stats = batch_stats or updated.get("batch_stats", {})
        features.append(feature.astype(net.f.dtype).reshape(len(crops), -1, feature.shape[1]))
    return jnp.concatenate(features, axis=1), batch_stats


def _scores(net: Net, params: Params, head: int, z: jax.Array) -> jax.Array:
    """C_h z / temperature, [B, k]."""
    return z @ params["prototypes"][f"head{head}"] / net.temperature


def embedding(net: Net, params: Params, extra: Extra, images: jax.Array) -> jax.Array:
    """z of images [B, S, S, C], [B, dim]; evaluation mode."""
    feature = classifier.embed(net.f, params, extra, images)
    variables = {"params": params["projection"], "batch_stats": extra["projection"]}
    return normalize(jnp.asarray(net.g.apply(variables, jax.nn.relu(feature))))


def look(net: Net, params: Params, extra: Extra, images: jax.Array) -> jax.Array:
    """The first banks, side by side: z in each, [B, banks dim]."""
    return jnp.tile(embedding(net, params, extra, images), (1, net.banks))


def predict(net: Net, params: Params, extra: Extra, images: jax.Array) -> dict[str, jax.Array]:
    """The cluster that the first head finds most probable, its probability as `score`, and |z - c|^2."""
    z = embedding(net, params, extra, images)
    scores = _scores(net, params, 0, z)
    ids = jnp.argmax(scores, axis=1).astype(jnp.int32)
    own = jnp.asarray(params["prototypes"]["head0"]).T[ids]
    return {
        "cluster": ids,
        "distance": jnp.sum(jnp.square(z - own), axis=1),
        "score": jnp.max(jax.nn.softmax(scores), axis=1),
    }


def refresh(
    config: ConfigDict,
    net: Net,
    clusterer: Clusterer,
    state: TrainState,
    targets: Targets,
    rows: Matrix,
    rng: jax.Array,
) -> Refreshed:
    """Clusters a bank for each head, head h bank h mod banks, and makes the centroids its prototypes."""
    banks = [reduce.mapped(rows, partial(_of_bank, net, b))[0] for b in range(net.banks)]
    head_rngs = jax.random.split(rng, net.heads)
    found = [
        deepcluster.clustered(clusterer, banks[h % net.banks], deepcluster.seed(config, head_rngs[h], h))
        for h in range(net.heads)
    ]
    own = [np.zeros(0, bool), *(chunk.any(axis=1) for chunk in rows.chunks())]
    known = hosts.whole(np.concatenate(own), rows.shape[0])
    target = np.where(known[:, None], np.stack([one.labels for one in found], axis=1), -1).astype(np.int32)
    dtype = state.params["prototypes"]["head0"].dtype
    return Refreshed(
        params=merge(
            state.params, prototypes={f"head{h}": one.centroids.T.astype(dtype) for h, one in enumerate(found)}
        ),
        extra=state.extra,
        target=target,
        weight=np.ones(len(target), np.float32),
        ids=np.arange(len(target), dtype=np.int32),
        cluster=target[:, 0],
        distance=found[0].distances,
        metrics={
            "clusters/objective": float(np.mean([one.info["objective"][-1] for one in found])),
            "bank/missing": float(np.count_nonzero(~known)),
        },
    )


def _of_bank(net: Net, bank: int, rows: np.ndarray) -> np.ndarray:
    """The part of rows [n, banks dim] that is of one bank, [n, dim]."""
    return rows[:, bank * net.g.dim : (bank + 1) * net.g.dim]
