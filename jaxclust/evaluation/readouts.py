"""Read-outs of the features of a split: retrieval and clusters of each, as metric learning is judged.

Sections 7 and 8 of the specification of DSCL: Law, Urtasun, Zemel, "Deep Spectral Clustering Learning", ICML 2017.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict
from numpy.typing import NDArray

from jaxclust import cluster
from jaxclust.cluster import Points, reduce, spectral, warn_once
from jaxclust.cluster.reduce import Matrix
from jaxclust.errors import ConfigError
from jaxclust.evaluation import clustering, retrieval
from jaxclust.evaluation.suite import Images
from jaxclust.hints import did_you_mean
from jaxclust.ops.distances import normalize

MAIN = "l2"  # whose figures have plain names where nothing else is called so
ITERATIONS = 100  # of k-means, which has mostly come to a fixed point before

_unit = jax.jit(normalize)


class ReadOut(NamedTuple):
    """`make(rows, k, config)` gives the points of the features [N, D] of a split with k classes; nearness of these is
    by cosine, or by Euclidean distance."""

    make: Callable[[Matrix, int, ConfigDict], Points]
    cosine: bool = True


def compare(images: Images, config: ConfigDict) -> dict[str, float]:
    """`<split>/<read-out>/r@K`, `…/map@r`, `…/r-precision` and `…/nmi` for each of `config.evaluate.readouts`.

    Of the test split, or without such of the training split, whose name begins the keys. NMI is of k-means in as many
    clusters as there are classes: k-means++, the best of `config.evaluate.nmi_runs` (0: no NMI). Also
    `<split>/queries` and `<split>/left_out` as in `retrieval.scores`. ConfigError for an unknown read-out.
    """
    name, split = ("test", images.test) if images.test else ("train", images.train)
    rows, results = split.rows(), dict[str, float]()
    k = max(2, len(np.unique(split.labels[split.labels >= 0])))
    for called, readout in asked(config).items():
        points = readout.make(rows, k, config)
        found = retrieval.scores(points, split.labels, config.evaluate.recall_at, cosine=readout.cosine)
        results |= {f"{name}/{score}": found.pop(score) for score in ("queries", "left_out")}
        if config.evaluate.nmi_runs:
            found["nmi"] = nmi(points, split.labels, k, config)
        results |= {f"{name}/{called}/{score}": value for score, value in found.items()}
    return results


def asked(config: ConfigDict) -> dict[str, ReadOut]:
    """The read-outs of `config.evaluate.readouts` by name; ConfigError if one is unknown."""
    text = config.evaluate.readouts
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in READOUTS:
            hint = did_you_mean(name, READOUTS)
            raise ConfigError(
                f"config.evaluate.readouts={text!r}: {name!r} is unknown{hint} There is: {', '.join(READOUTS)}."
            )
    return {name: READOUTS[name] for name in names}


def nmi(points: Points, labels: NDArray[np.int32], k: int, config: ConfigDict) -> float:
    """NMI with the labels of the best of several k-means of the points [N, d] in k clusters."""
    own = ConfigDict(config.to_dict())
    c = own.cluster
    c.method, c.k, c.init, c.runs, c.iterations = "kmeans", k, "kmeans++", config.evaluate.nmi_runs, ITERATIONS
    found = cluster.get(own)(points, c.seed if c.seed >= 0 else config.seed)
    return clustering.nmi(found.labels, labels, config.evaluate.nmi_average)


def raw(rows: Matrix, k: int, config: ConfigDict) -> Points:
    """The features themselves, moved to have a mean of zero, which leaves their distances."""
    return reduce.transform(rows, reduce.fit(rows, 0)[0], l2=False)[0]


def l2(rows: Matrix, k: int, config: ConfigDict) -> Points:
    """The features at unit length."""
    return reduce.mapped(rows, _unit)[0]


def normalised(rows: Matrix, k: int, config: ConfigDict) -> Points:
    """Rows of the left singular vectors at unit length (`spectral.normalised`)."""
    points = spectral.normalised(rows, center=config.evaluate.spectral_center)
    size, rank = points.shape
    if size < 4 * rank:
        warn_once(
            f"the spectral read-out of {size} images has {rank} dimensions: with fewer than 4 images for each it says "
            "little, and nothing from as many dimensions as images on. Judge more images, or a shorter feature."
        )
    return points


def njw(rows: Matrix, k: int, config: ConfigDict) -> Points:
    """The spectral clustering of Ng, Jordan and Weiss, before its k-means (`spectral.ng_jordan_weiss`)."""
    return spectral.ng_jordan_weiss(
        rows,
        k,
        neighbours=config.evaluate.njw_neighbours,
        scale=config.evaluate.njw_scale,
        backend=cluster.backend(config.cluster.backend),
        seed=config.seed,
        deadline=config.runtime.deadline,
    )


READOUTS = {"raw": ReadOut(raw, cosine=False), MAIN: ReadOut(l2), "spectral": ReadOut(normalised), "njw": ReadOut(njw)}
