"""Which images a round trains on, in which order (DeepCluster, section 2.6 of its specification)."""

import logging
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from jaxclust.errors import DataError

Ids = NDArray[np.int32]


POOLS = ("resample", "partition", "fixed")  # the kinds whose batches each hold distinct images


def draw(
    kind: str,
    ids: Ids,
    targets: Ids,
    length: int,
    seed: int | Sequence[int],
    batch_size: int = 1,
    *,
    first_batch: int = 0,
    unlabelled: int = 7,
    per_class: int = 4,
) -> Ids:
    """Draws `length` of `ids` [M] with replacement only where needed; int32 [length].

    `targets` [N] is the cluster of every image. `kind` is "uniform_image" (every image equally
    often), "uniform_cluster" (every non-empty cluster equally often) or "upstream", which is what
    the published code does: it means to be uniform over clusters and is nearly so over images.

    Three more are of SPICE (section 6.4 of its specification), whose batches are pools: "resample" (each the first
    images of a new permutation), "partition" (chunks of one permutation, then of another, without its remainder) and
    "fixed" (chunk number i, from `first_batch` on, always has the same images, in their order; the remainder has none).

    "labelled_first" is FixMatch's: of every 1 + `unlabelled` images the first has a target that is not negative, the
    others are any; all with replacement. DataError if no target of `ids` is.

    "pk" is for methods that learn from classes: each batch has `per_class` images or more of each of its classes, which
    are all of them where the batch is large enough, else taken in turn. Images of a class are taken in turn as well.
    """
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(seed)))
    ids = np.asarray(ids, np.int32)
    if not len(ids) or length < 0:
        raise ValueError(f"cannot draw {length} of {len(ids)} ids")
    if kind == "uniform_image":
        return _uniform_image(ids, length, rng)
    if kind in POOLS:
        return _pools(kind, ids, length, rng, batch_size, first_batch)
    if kind == "labelled_first":
        return _labelled_first(ids, targets, length, rng, unlabelled)
    by_cluster, ends = _by_cluster(ids, targets)
    if kind == "pk":
        return _classes(np.split(by_cluster, ends[:-1]), length, rng, batch_size, per_class)
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
    known = ("uniform_image", "uniform_cluster", "upstream", *POOLS, "labelled_first", "pk")
    raise ValueError(f"sampler {kind!r} is none of {', '.join(known)}")


def _uniform_image(ids: Ids, length: int, rng: np.random.Generator) -> Ids:
    passes = [rng.permutation(ids) for _ in range(-(-length // len(ids)))]
    return np.concatenate(passes)[:length] if passes else ids[:0]


def _pools(kind: str, ids: Ids, length: int, rng: np.random.Generator, size: int, first: int) -> Ids:
    chunks = len(ids) // size
    if not chunks:
        raise DataError(
            f"config.batch_size={size}, but config.sampler={kind!r} makes batches of distinct images, and there are "
            f"{len(ids)} to train on; lower batch_size"
        )
    count = -(-length // size)
    if kind == "fixed":
        places = (first + np.arange(count)) % chunks * size + np.arange(size)[:, None]
        return np.sort(ids)[places.T.reshape(-1)[:length]]
    of_one = 1 if kind == "resample" else chunks  # batches of one permutation
    orders = [rng.permutation(ids)[: of_one * size] for _ in range(-(-count // of_one))]
    return np.concatenate([ids[:0], *orders])[:length]


def _labelled_first(ids: Ids, targets: Ids, length: int, rng: np.random.Generator, unlabelled: int) -> Ids:
    labelled = ids[targets[ids] >= 0]
    if not len(labelled):
        raise DataError(
            f"config.sampler='labelled_first' draws images with a label, and none of {len(ids)} has one (a target that "
            "is not negative)"
        )
    groups = rng.choice(ids, (-(-length // (1 + unlabelled)), 1 + unlabelled))
    groups[:, 0] = rng.choice(labelled, len(groups))
    return groups.reshape(-1)[:length]


def _classes(members: Sequence[Ids], length: int, rng: np.random.Generator, size: int, per_class: int) -> Ids:
    """Batches of `size`, each of as many classes of which it can have `per_class` images, shuffled."""
    if size < per_class:
        raise DataError(
            f"config.batch_size={size}, but config.sampler='pk' takes config.images_per_class={per_class} images of "
            "each class for a batch; raise the first or lower the second"
        )
    chosen = min(len(members), size // per_class)
    classes = _in_turn(np.arange(len(members), dtype=np.int32), rng)
    images = [_in_turn(of_class, rng) for of_class in members]
    batches = []
    for _ in range(-(-length // size)):
        # Those that have one image more than the others come first.
        counts = size // chosen + (np.arange(chosen) < size % chosen)
        picked = [images[c](n) for c, n in zip(classes(chosen), counts, strict=True)]
        batches.append(rng.permutation(np.concatenate(picked)))
    return np.concatenate([members[0][:0], *batches])[:length]


def _in_turn(values: Ids, rng: np.random.Generator) -> Callable[[int], Ids]:
    """A function that takes the next so many of `values`, one permutation of them after the other.

    At most all of them are taken without a repetition, also where two permutations meet.
    """
    waiting = values[:0]

    def take(count: int) -> Ids:
        nonlocal waiting
        taken, waiting = waiting[:count], waiting[count:]
        while (missing := count - len(taken)) > 0:
            order = rng.permutation(values)
            again = np.isin(order, taken)
            order = np.concatenate([order[~again], order[again]])
            taken, waiting = np.concatenate([taken, order[:missing]]), order[missing:]
        return taken

    return take


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
