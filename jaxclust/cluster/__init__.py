"""Clustering: arrays in, arrays out.

A clustering is a public module here with `make(settings) -> Clusterer`, where `settings` is
`config.cluster`. Those of k-means also have `kmeans(rows, k, seed)` and `assign(rows, centroids)`,
which gives new rows the labels and distances that the first would have given them.
"""

import functools
import importlib.metadata
import importlib.util
import logging
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from jaxclust import plugins
from jaxclust.errors import ConfigError, DataError

_logger = logging.getLogger(__name__)
_SQUARABLE = 1e37  # squared norms above this may overflow float32 in a distance
_CHUNK = 1 << 14  # rows per pass of host arithmetic


class Clustering(NamedTuple):
    """N rows in k clusters.

    `labels` int32 [N]; `distances` float32 [N], squared L2 to the own centroid; `centroids`
    float32 [k, d]; `info` has `objective` (the sum of squared distances at each search; the last
    entry belongs to the returned labels), `splits` (empty clusters repaired, per iteration),
    `iterations` (run before a fixed point or the limit) and `empty` (clusters without a row).
    """

    labels: np.ndarray
    distances: np.ndarray
    centroids: np.ndarray
    info: dict[str, Any]


Clusterer = Callable[[np.ndarray, int], Clustering]
"""(rows float32 [N, d], seed) -> Clustering."""


def get(settings: ConfigDict) -> Clusterer:
    """The clustering that `config.cluster` describes; ConfigError lists what there is."""
    name = f"kmeans_{backend(settings.backend)}" if settings.method == "kmeans" else settings.method
    made: Clusterer = plugins.load(__name__, name, "config.cluster.method", provides="make").make(settings)
    return made


def asked(settings: ConfigDict) -> int | None:
    """The number of clusters that `config.cluster` asks for, None where the clustering finds it."""
    return settings.k if settings.method == "kmeans" else None


@functools.cache
def backend(name: str) -> str:
    """The back end of searches, "faiss" or "jax", that `cluster.backend` means on this machine.

    "auto" prefers faiss and says once when it is missing. ConfigError when faiss is asked for but
    missing, and when two faiss wheels, which overwrite each other's files, are installed.
    """
    found = [d.metadata["Name"] or "" for d in importlib.metadata.distributions()]
    return choose_backend(name, found, importlib.util.find_spec("faiss") is not None)


def choose_backend(name: str, distributions: list[str], importable: bool) -> str:
    """`backend` for a machine with these distributions installed and faiss importable or not."""
    if name not in ("auto", "faiss", "jax"):
        raise ConfigError(f"cluster.backend={name!r} is unknown. There is: auto, faiss, jax.")
    if name == "jax":
        return name
    canonical = {d.lower().replace("_", "-") for d in distributions}
    wheels = sorted(d for d in canonical if re.fullmatch(r"faiss(-cpu.*|-gpu.*)?", d))
    if len(wheels) > 1:
        raise ConfigError(
            f"cluster.backend={name!r}: {' and '.join(wheels)} are both installed and overwrite "
            f"each other's files. Run: pip uninstall -y {' '.join(wheels)}, then install one again."
        )
    if importable:
        return "faiss"
    remedy = "pip install 'jaxclust[cpu]' or 'jaxclust[tpu]' (which bring faiss-cpu) or 'jaxclust[cuda12]' (faiss-gpu)"
    if name == "faiss":
        raise ConfigError(f"cluster.backend='faiss', but faiss is not installed: {remedy}, or set cluster.backend=jax.")
    warn_once(f"faiss is not installed, so clustering runs in JAX. For faiss: {remedy}.")
    return "jax"


@functools.cache
def warn_once(message: str) -> None:
    """Logs a warning the first time this process meets it: rounds would repeat it endlessly."""
    _logger.warning(message)


def require_finite(rows: np.ndarray, first_id: int = 0) -> None:
    """DataError naming the first of `rows` [n, d] that holds NaN, infinity or an unsquarable value.

    `first_id` is the id of row 0.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        fine = np.einsum("nd,nd->n", rows, rows) < _SQUARABLE  # False for NaN too
    if not fine.all():
        raise DataError(
            f"the features of row {first_id + int(np.argmin(fine))} hold NaN, infinity or a value "
            f"too large to square ({np.count_nonzero(~fine)} such rows of {len(rows)}); clustering "
            "needs finite rows. The training has most likely diverged: lower optimizer.body.lr."
        )


def own_distances(rows: np.ndarray, labels: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Squared L2 of each row [N, d] to its centroid of [k, d], float32 [N], from differences: free of cancellation."""
    distances = np.empty(len(rows), np.float32)
    for start in range(0, len(rows), _CHUNK):
        part = slice(start, start + _CHUNK)
        difference = rows[part] - centroids[labels[part]]
        distances[part] = np.einsum("nd,nd->n", difference, difference)
    return distances
