"""Clustering: arrays in, arrays out.

A clustering is a public module here with `make(config, nearest) -> Clusterer`. Those of k-means also have
`kmeans(rows, k, seed)` and `assign(rows, centroids)`, which gives new rows the labels and distances
that the first would have given them.
"""

import functools
import importlib.metadata
import importlib.util
import logging
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
from ml_collections import ConfigDict

from jaxclust import hosts, plugins
from jaxclust.errors import ConfigError, DataError

_logger = logging.getLogger(__name__)
_SQUARABLE = 1e37  # squared norms above this may overflow float32 in a distance
_CHUNK = 1 << 14  # rows per pass of host arithmetic


class Nearest(NamedTuple):
    """The r centroids that are nearest to each of N rows: `ids` int32 and squared `distances` float32, both [N, r]
    and nearest first."""

    ids: np.ndarray
    distances: np.ndarray


class Clustering(NamedTuple):
    """N rows in k clusters.

    `labels` int32 [N]; `distances` float32 [N], squared L2 to the own centroid; `centroids`
    float32 [k, d]; `info` has `objective` (the sum of squared distances at each search; the last
    entry belongs to the returned labels), `splits` (empty clusters repaired, per iteration),
    `iterations` (run before a fixed point or the limit) and `empty` (clusters without a row). `nearest`: what the
    search that gave the labels found, where more than one centroid was asked for. `certainty` float64 [N], from 0 to 1:
    what a clustering without centroids says of each row.
    """

    labels: np.ndarray
    distances: np.ndarray
    centroids: np.ndarray
    info: dict[str, Any]
    nearest: Nearest | None = None
    certainty: np.ndarray | None = None


class Chunked(Protocol):
    """A matrix [N, D] in pieces: every call of `chunks` yields this host's rows [n_i, D] in the order of ids."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def chunks(self) -> Iterator[np.ndarray]: ...


class Points(Chunked, Protocol):
    """What is clustered, float32 [N, d], of which each host has the rows of its own ids (`features.rows.Rows`)."""

    @property
    def in_memory(self) -> bool: ...

    def array(self) -> np.ndarray:
        """This host's rows in memory."""

    def read(self, start: int, count: int) -> np.ndarray:
        """`count` of this host's rows from row `start` on."""

    def in_order(self) -> Iterator[np.ndarray]:
        """Blocks of the rows of all hosts by id; every host must take every block."""


Clusterer = Callable[[Points, int], Clustering]
"""(this host's points, seed) -> Clustering of the points of all hosts, the same on each; every host must call it."""


def get(config: ConfigDict, nearest: int = 1) -> Clusterer:
    """The clustering that `config.cluster` describes; ConfigError lists what there is.

    Those with centroids tell the `nearest` ones of each row.
    """
    c = config.cluster
    name = f"kmeans_{kmeans_backend(c.backend)}" if c.method == "kmeans" else c.method
    made: Clusterer = plugins.load(__name__, name, "config.cluster.method", provides="make").make(config, nearest)
    return made


def asked(settings: ConfigDict) -> int | None:
    """The number of clusters that `config.cluster` asks for, None where the clustering finds it."""
    return None if settings.method == "pic" else settings.k


def kmeans_backend(name: str) -> str:
    """`backend` for k-means: faiss needs all points on one host, so "auto" takes JAX where there are several."""
    return "jax" if name == "auto" and hosts.count() > 1 else backend(name)


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


def require_finite(rows: np.ndarray) -> None:
    """DataError naming the first of `rows` [N, d] that holds NaN, infinity or an unsquarable value."""
    bad = _unusable(rows)
    if len(bad):
        raise _refusal(bad[0], len(bad), len(rows))


def require_finite_everywhere(rows: np.ndarray, ids: np.ndarray) -> None:
    """`require_finite` for rows [n, d] with these rising ids, on every host if one of them has such a row.

    Every host must call it.
    """
    bad = ids[_unusable(rows)]
    found = np.zeros((hosts.count(), 3), np.int64)
    found[hosts.index()] = bad[0] if len(bad) else 0, len(bad), len(rows)
    firsts, counts, sizes = hosts.total(found).T
    if counts.any():
        raise _refusal(firsts[counts > 0].min(), counts.sum(), sizes.sum())


def finite_chunks(rows: Chunked) -> Iterator[np.ndarray]:
    """This host's chunks of `rows`, then DataError on every host if one of them has a row that is not finite.

    Every host must take every chunk.
    """
    done, bad = 0, np.empty((0, rows.shape[1]), np.float32)
    for chunk in rows.chunks():
        if len(_unusable(chunk)):
            bad = chunk
            break
        done += len(chunk)
        yield chunk
    require_finite_everywhere(bad, hosts.index() + hosts.count() * np.arange(done, done + len(bad)))


def _unusable(rows: np.ndarray) -> np.ndarray:
    """Places of the rows [n, d] that cannot be clustered."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.flatnonzero(~(np.einsum("nd,nd->n", rows, rows) < _SQUARABLE))  # NaN is never less


def _refusal(first: int, count: int, size: int) -> DataError:
    return DataError(
        f"the features of row {first} hold NaN, infinity or a value too large to square ({count} such rows of {size}); "
        "clustering needs finite rows. The training has most likely diverged: lower optimizer.body.lr."
    )


def own_distances(rows: np.ndarray, labels: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Squared L2 of each row [N, d] to its centroid of [k, d], float32 [N], from differences: free of cancellation."""
    distances = np.empty(len(rows), np.float32)
    for start in range(0, len(rows), _CHUNK):
        part = slice(start, start + _CHUNK)
        difference = rows[part] - centroids[labels[part]]
        distances[part] = np.einsum("nd,nd->n", difference, difference)
    return distances
