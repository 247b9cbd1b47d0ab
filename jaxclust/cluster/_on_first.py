"""Clusterings of all points on one host: the first gathers them, clusters and tells the others."""

from collections.abc import Callable
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from jaxclust import hosts
from jaxclust.cluster import Clusterer, Clustering, Nearest, Points, _memory, finite_chunks

_INFO, _NEAREST = "info.", "nearest."


def on_first_host(
    cluster: Callable[[np.ndarray, int], Clustering],
    memory: Callable[[int, int, ConfigDict], int],
    name: str,
    config: ConfigDict,
) -> Clusterer:
    """A clustering of rows float32 [N, d] in memory as one of the points of all hosts.

    `memory(N, d, config.cluster)` are the bytes that it needs beside the rows: ConfigError where they are not to be
    had. HostError where host 0 fails, or takes longer than `config.runtime.deadline` seconds.
    """

    def run(points: Points, seed: int) -> Clustering:
        size, dim = points.shape
        held = hosts.count() == 1 and points.in_memory
        needed = memory(size, dim, config.cluster) + (0 if held else size * dim * 4)
        _memory.require(needed, f"{name} of {size:,} points with {dim} columns")
        for _ in finite_chunks(points):  # so that every host says it, with the exit code of bad data
            pass
        rows = gathered(points)
        made = hosts.from_first(lambda: _packed(cluster(rows, seed)), "the clustering", config.runtime.deadline)
        return _unpacked(made)

    return run


def gathered(points: Points) -> np.ndarray:
    """The points of all hosts by id, on host 0; nothing elsewhere."""
    if hosts.count() == 1:
        return points.array()
    rows, done = np.empty(points.shape if hosts.is_first() else (0, points.shape[1]), np.float32), 0
    for block in points.in_order():
        if hosts.is_first():
            rows[done : done + len(block)] = block
        done += len(block)
    return rows


def _packed(found: Clustering) -> dict[str, np.ndarray]:
    info = {_INFO + name: np.asarray(value) for name, value in found.info.items()}
    arrays = {"labels": found.labels, "distances": found.distances, "centroids": found.centroids, **info}
    if found.nearest is not None:
        arrays |= {_NEAREST + name: value for name, value in found.nearest._asdict().items()}
    return arrays if found.certainty is None else arrays | {"certainty": found.certainty}


def _unpacked(arrays: dict[str, np.ndarray]) -> Clustering:
    info: dict[str, Any] = {
        name.removeprefix(_INFO): value.tolist() for name, value in arrays.items() if name.startswith(_INFO)
    }
    nearest = {name.removeprefix(_NEAREST): value for name, value in arrays.items() if name.startswith(_NEAREST)}
    return Clustering(
        arrays["labels"],
        arrays["distances"],
        arrays["centroids"],
        info,
        Nearest(**nearest) if nearest else None,
        arrays.get("certainty"),
    )
