"""Clustering: arrays in, arrays out.

A clustering is a public module here with two functions: one of the form
`(rows [N, D] float32, k, seed) -> Clustering`, and `assign(rows, centroids)`, which gives new rows
the labels and distances that the first would have given them.
"""

import functools
import importlib.metadata
import importlib.util
import logging
import re
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from jaxclust import plugins
from jaxclust.errors import ConfigError, DataError

_logger = logging.getLogger(__name__)
_SQUARABLE = 1e37  # squared norms above this may overflow float32 in a distance


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


def get(name: str) -> ModuleType:
    """The clustering module `name`, such as "kmeans_jax"; ConfigError lists what there is."""
    return plugins.load(__name__, name, "cluster.method", provides="assign")


@functools.cache
def backend(name: str) -> str:
    """The k-means back end, "faiss" or "jax", that `cluster.backend` means on this machine.

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
    warn_once(f"faiss is not installed, so k-means runs in JAX. For faiss: {remedy}.")
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
