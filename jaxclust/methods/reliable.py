"""Reliable labels: of SPICE's clusters the images whose neighbours agree, from which a new network may learn.

Niu, Shan, Wang, arXiv 2103.09382, "local consistency"; section 7 of our specification. A stage of its own without steps
(rounds 0), whose `init_from` is the stage that trained the heads. Its refresh asks the selected head and keeps an image
if enough of its nearest ones have its cluster and the head is sure, equally many of each cluster. All others have the
cluster -1 in assignments/<stage>/0.npz.

Departure: what neighbours must agree with is the cluster of the image itself, which where images are equal need not be
the first of its neighbours.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxclust import cluster
from jaxclust.cluster.neighbours import neighbours
from jaxclust.cluster.reduce import Matrix
from jaxclust.errors import ConfigError, DataError
from jaxclust.methods import heads, spice
from jaxclust.methods.base import DataInfo, Method, Refreshed, Targets, TrainState
from jaxclust.methods.heads import Heads

Select = Callable[[TrainState, Targets, Matrix, jax.Array], Refreshed]


def make(config: ConfigDict, info: DataInfo) -> Method:
    """SPICE-Self whose refresh tells reliable labels; ConfigError for more neighbours than images."""
    number = config.reliable.num_neighbor
    if number > info.size:
        raise ConfigError(f"config.reliable.num_neighbor={number} is more than the {info.size} images; lower it")
    method = spice.make(config, info)
    assert method.refresh is not None
    select = partial(refresh, config, spice.heads_of(config, info), method.refresh)
    # The head that was selected there is the one that is asked.
    return method._replace(refresh=select, fresh=(), given=("heads", "drift", "selected", "whitening"))


def refresh(
    config: ConfigDict,
    h: Heads,
    select: Select,
    state: TrainState,
    targets: Targets,
    rows: Matrix,
    rng: jax.Array,
) -> Refreshed:
    """The clusters of the head that `select` selects, -1 where they are not reliable; the rest as it is.

    ConfigError if no head has been selected before.
    """
    if state.extra["selected"]["index"] < 0:
        raise ConfigError(
            f"config.method={config.method!r} asks the head that SPICE-Self selected, and config.init_from="
            f"{config.init_from!r} brings none; set it to a stage that trained heads, such as '@self', or to its run"
        )
    found = select(state, targets, rows, rng)
    assert found.distance is not None
    embeddings, _ = heads.parts(h, rows)
    agreement = agreeing(
        embeddings, found.target, config.reliable.num_neighbor, cluster.backend(config.cluster.backend)
    )
    kept = reliable(agreement, 1 - found.distance, config)
    labels = balanced(found.target, kept, h.head.dim, config, int(jax.random.randint(rng, (), 0, 2**31 - 1)))
    metrics = {
        "reliable/agreement": float(agreement.mean()) / config.reliable.num_neighbor,
        "reliable/kept": float(np.count_nonzero(kept)),
        "reliable/labelled": float(np.count_nonzero(labels >= 0)),
    }
    return found._replace(target=labels, cluster=labels, metrics={**found.metrics, **metrics})


def agreeing(embeddings: np.ndarray, clusters: np.ndarray, number: int, backend: str) -> np.ndarray:
    """Of the `number` most similar of the unit rows [N, D], the row itself among them, how many have its cluster.

    Returns int [N]. Memory beside the rows is bounded; ConfigError for number > N.
    """
    others = neighbours(embeddings, number - 1, backend, field="config.reliable.num_neighbor (less one)")
    return 1 + np.count_nonzero(clusters[others.ids] == clusters[:, None], axis=1)


def reliable(agreement: np.ndarray, score: np.ndarray, config: ConfigDict) -> np.ndarray:
    """Which images are kept, bool [N]: so many neighbours agree, and the score is larger than the threshold."""
    r = config.reliable
    least = math.ceil(r.num_neighbor * r.ratio_confident - 1e-6)  # of a whole number the product may lie above
    return (agreement >= least) & (score > r.score)


def balanced(clusters: np.ndarray, kept: np.ndarray, k: int, config: ConfigDict, seed: int) -> np.ndarray:
    """The clusters int32 [N] of equally many kept images of each, drawn at random, and -1 for all others.

    DataError, with what there is of each cluster, if one has none, or with `balance` "cap" if all have none.
    """
    r = config.reliable
    counts = np.bincount(clusters[kept], minlength=k)
    filled = counts[counts > 0]
    each = int(counts.min()) if r.balance == "min" else int(filled.min(initial=len(clusters))) * bool(len(filled))
    if not each:
        raise DataError(
            f"no reliable image in {np.count_nonzero(counts == 0)} of {k} clusters: {counts.tolist()} images are "
            f"reliable, of {np.bincount(clusters, minlength=k).tolist()} in each cluster. Needed are "
            f"{r.ratio_confident:g} of {r.num_neighbor} neighbours (config.reliable.ratio_confident, num_neighbor) and "
            f"a score over {r.score:g} (config.reliable.score): lower them, leave empty clusters out with "
            "config.reliable.balance='cap', or train the heads longer (of another stage they come by init_from). "
            "--config.stage.reliable.reliable.score=0.9 and the like, of this stage, may be added to the command"
        )
    rng, labels = np.random.default_rng(seed), np.full(len(clusters), -1, np.int32)
    for c in np.flatnonzero(counts):
        chosen = rng.choice(np.flatnonzero(kept & (clusters == c)), each, replace=False)
        labels[chosen] = c
    return labels
