"""How well the clusters are set apart in the space in which they were found; needs no labels.

P. J. Rousseeuw, "Silhouettes: a graphical aid to the interpretation and validation of cluster analysis", 1987.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import silhouette_score

from jaxclust import hosts
from jaxclust.cluster import Chunked, reduce
from jaxclust.errors import DataError
from jaxclust.ops.distances import whiten


def measure(
    predictions: Mapping[str, ArrayLike], labels: ArrayLike | None, config: Any, rows: Callable[[], Chunked]
) -> dict[str, float]:
    """Mean silhouette (b - a) / max(a, b) over a fixed sample of the images, from -1 to 1.

    a: mean Euclidean distance to the images of the own cluster; b: to those of the nearest other one. Features are
    reduced as DeepCluster reduces them before its k-means (`config.cluster`), fitted on all rows. Empty, and without
    a look at the features, where a silhouette says nothing: the sample is of one cluster, or of none with two images.

    Raises:
      DataError: as many rows as clusters are needed; rows that are not finite.
    """
    clusters = np.asarray(predictions["cluster"])
    ids = sample(clusters, config.evaluate.silhouette_sample)
    if not 2 <= len(np.unique(clusters[ids])) < len(ids):
        return {}
    features, c = rows(), config.cluster
    if features.shape[0] != len(clusters):
        raise DataError(
            f"{features.shape[0]} rows of features for {len(clusters)} clusters: each image has one of both"
        )
    whitening, _ = reduce.fit(features, c.pca_dim, power=c.whiten_power if c.whiten else 0.0)
    points = np.asarray(whiten(jnp.asarray(take(features, ids)), *whitening, l2=c.l2))
    return {"silhouette": float(silhouette_score(points, clusters[ids]))}


def sample(clusters: NDArray[Any], size: int) -> NDArray[np.int64]:
    """Rising ids of at most `size` images that have a cluster, the same for every seed and number of clusters.

    A cluster of one image has silhouette 0. One of more images of which a single one was drawn has none that could
    be measured, and is left out.
    """
    ids = np.flatnonzero(clusters >= 0)
    drawn = ids if len(ids) <= size else np.sort(np.random.default_rng(0).choice(ids, size, replace=False))
    _, cluster, in_all = np.unique(clusters[ids], return_inverse=True, return_counts=True)
    cluster = cluster[np.searchsorted(ids, drawn)]
    in_sample = np.bincount(cluster, minlength=len(in_all))
    measurable = (in_sample > 1) | (in_all == 1)
    return drawn[measurable[cluster]]


def take(rows: Chunked, ids: NDArray[np.int64]) -> NDArray[Any]:
    """The rows of rising `ids`, [len(ids), D], on every host."""
    places = np.flatnonzero(ids % hosts.count() == hosts.index())
    mine = np.searchsorted(hosts.own_ids(rows.shape[0]), ids[places])  # which of this host's rows
    taken, start = [np.zeros((0, *rows.shape[1:]), np.float32)], 0
    for chunk in rows.chunks():
        first, last = np.searchsorted(mine, (start, start + len(chunk)))
        taken.append(chunk[mine[first:last] - start])
        start += len(chunk)
    found = np.concatenate(taken)
    everywhere = np.zeros((len(ids), *rows.shape[1:]), found.dtype)
    everywhere[places] = found
    return hosts.total(everywhere)
