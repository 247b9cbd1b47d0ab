"""UAD: DeepCluster on low and high features together, with images weighted by how certain their cluster is.

There is no paper; the source is our specification, whose sections are named here. Two things differ from DeepCluster:
where images are clustered (`fusion.py`; the classifier still sees the high feature alone), and what each weighs in
the loss (`cluster/fuzzy.py`). Mode "baseline" is DeepCluster itself.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxclust.cluster import Clustering, fuzzy
from jaxclust.errors import ConfigError
from jaxclust.methods import classifier, deepcluster, fusion
from jaxclust.methods.base import Aux, Batch, DataInfo, Method
from jaxclust.methods.classifier import Classifier, Extra, Params
from jaxclust.methods.deepcluster import Weighed
from jaxclust.runtime import AXIS

PLACES = ("min", "p10", "p20", "p30", "p40", "median", "p60", "p70", "p80", "p90", "max")


def make(config: ConfigDict, info: DataInfo) -> Method:
    """DeepCluster with the parts of `config.uad.mode` replaced; ConfigError for settings that exclude each other."""
    mode = config.uad.mode
    c = classifier.classifier(config, info)
    fused, weighted = mode in ("fusion", "full"), mode in ("uncertainty", "full")
    if fused and len(info.image_shape) == 1:
        raise ConfigError(
            f"config.uad.mode={mode!r} looks at maps of images, and config.data.source={config.data.source!r} holds "
            "vectors; choose baseline or uncertainty"
        )
    if weighted:
        _check(config)
    space = fusion.space(config, c, info) if fused else deepcluster.space(config)
    weigh = partial(weighed, config) if weighted else deepcluster.alike
    method = deepcluster.build(config, info, c, space, weigh, nearest=_nearest(config) if weighted else 1)
    if weighted and config.uad.loss_norm == "batch":
        method = method._replace(loss=partial(loss, c))
    return method


def _check(config: ConfigDict) -> None:
    u, pic = config.uad, config.cluster.method == "pic"
    if pic and u.uncertainty not in ("graph", "none") and not u.pic_centroids:
        raise ConfigError(
            f"config.uad.uncertainty={u.uncertainty!r} measures distances to centroids, which cluster.method='pic' "
            "does not have; choose graph, or uad.pic_centroids=True to take the means of its clusters"
        )
    if not pic and u.uncertainty == "graph":
        raise ConfigError("config.uad.uncertainty='graph' needs the graph of config.cluster.method='pic'")


def _nearest(config: ConfigDict) -> int:
    """How many centroids the last search tells the distances to: all that the certainty looks at."""
    return int(config.uad.num_nearest) if config.uad.uncertainty in fuzzy.COMPARING else 1


def weighed(config: ConfigDict, found: Clustering, round_: int) -> Weighed:
    """Certainty c and weight w of each image from the distances of the clustering's last search (section 2.4)."""
    u = config.uad
    c = _certainty(config, found)
    if c is None:
        return deepcluster.alike(found, round_)
    c = fuzzy.capped(c, found.labels, u.min_cluster_for_certainty)
    strength = u.weight_strength * min(1.0, (round_ + 1) / (u.weight_warmup + 1))
    w = fuzzy.weights(c, strength=strength, power=u.weight_power, largest=u.weight_max, direction=u.weight_direction)
    if u.loss_norm == "sampler":  # of images drawn uniformly over clusters the mean weight is then 1
        w = (w / fuzzy.sampler_scale(w, found.labels)).astype(np.float32)
    record = {"certainty": c.astype(np.float32)}
    if u.uncertainty in fuzzy.COMPARING:
        record["membership"] = fuzzy.memberships(_distances(config, found), u.fuzzifier)[:, 0].astype(np.float32)
    return Weighed(w, _statistics(c, w, found.labels), record)


def _certainty(config: ConfigDict, found: Clustering) -> np.ndarray | None:
    u = config.uad
    if u.uncertainty == "none":
        return None
    if u.uncertainty == "graph":
        return found.certainty
    return fuzzy.certainty(u.uncertainty, _distances(config, found), found.labels, u.fuzzifier)


def _distances(config: ConfigDict, found: Clustering) -> np.ndarray:
    """Squared distances to the nearest centroids, [N, r], infinite for those of empty clusters if they do not count."""
    if found.nearest is None:
        return found.distances[:, None]
    if not config.uad.ignore_empty_centroids:
        return found.nearest.distances
    used = np.bincount(found.labels, minlength=len(found.centroids)) > 0
    return np.where(used[found.nearest.ids], found.nearest.distances, np.inf)


def _statistics(c: np.ndarray, w: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Mean and deciles of c and w, and how c goes with the size of its cluster."""
    values: dict[str, float] = {}
    for name, array in (("certainty", c), ("weight", w)):
        deciles = np.percentile(array, range(0, 101, 10))
        values |= {f"{name}/{place}": float(value) for place, value in zip(PLACES, deciles, strict=True)}
        values[f"{name}/mean"] = float(array.mean())
    sizes = np.bincount(labels)[labels]
    if c.std() > 0 and sizes.std() > 0:
        values["certainty/size_correlation"] = float(np.corrcoef(c, sizes)[0, 1])
    return values


def loss(c: Classifier, params: Params, extra: Extra, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Aux]:
    """sum w CE / sum w over the batch of all devices (section 2.5, `loss_norm` "batch")."""
    mean = jax.lax.pmean(jnp.mean(batch["weight"]), AXIS)
    weight = batch["weight"] / jnp.maximum(mean, 1e-8)
    return classifier.loss(c, params, extra, {**batch, "weight": weight}, rng)
