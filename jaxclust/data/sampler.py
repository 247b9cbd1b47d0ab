"""Which images a round trains on, in which order (DeepCluster, section 2.6 of its specification)."""

import logging
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int32]


def draw(kind: str, ids: Ids, targets: Ids, length: int, seed: int | Sequence[int]) -> Ids:
    """Draws `length` of `ids` [M] with replacement only where needed; int32 [length].

    `targets` [N] is the cluster of every image. `kind` is "uniform_image" (every image equally
    often), "uniform_cluster" (every non-empty cluster equally often) or "upstream", which is what
    the published code does: it means to be uniform over clusters and is nearly so over images.
    """
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(seed)))
    ids = np.asarray(ids, np.int32)
    if not len(ids) or length < 0:
        raise ValueError(f"cannot draw {length} of {len(ids)} ids")
    if kind == "uniform_image":
        return _uniform_image(ids, length, rng)
    by_cluster, ends = _by_cluster(ids, targets)
    if length < len(ends):
        logging.getLogger(__name__).warning(
            "a round of %d images cannot show all of %d clusters; make it longer or lower cluster.k",
            length,
            len(ends),
        )
    if kind == "uniform_cluster":
        return _uniform_cluster(by_cluster, ends, length, rng)
    if kind == "upstream":
        # The defect: drawn ids index the list that is ordered cluster by cluster.
        drawn = _uniform_cluster(by_cluster, ends, length, rng)
        return by_cluster[np.searchsorted(np.sort(ids), drawn)]
    raise ValueError(f"sampler {kind!r} is none of uniform_image, uniform_cluster, upstream")


def _uniform_image(ids: Ids, length: int, rng: np.random.Generator) -> Ids:
    passes = [rng.permutation(ids) for _ in range(-(-length // len(ids)))]
    return np.concatenate(passes)[:length] if passes else ids[:0]


def _uniform_cluster(by_cluster: Ids, ends: NDArray[np.intp], length: int, rng: np.random.Generator) -> Ids:
    quota = length // len(ends) + 1
    chosen = [rng.choice(members, quota, replace=len(members) <= quota) for members in np.split(by_cluster, ends[:-1])]
    return rng.permutation(np.concatenate(chosen))[:length]


def _by_cluster(ids: Ids, targets: Ids) -> tuple[Ids, NDArray[np.intp]]:
    """`ids` cluster by cluster, in each ascending, and the end of each non-empty cluster."""
    ids = np.sort(ids)
    clusters = targets[ids]
    order = np.argsort(clusters, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(clusters[order])) + 1, len(ids))
    return ids[order], ends
