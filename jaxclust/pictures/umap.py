"""UMAP of the features. McInnes, Healy, Melville, "UMAP: Uniform Manifold Approximation and Projection", 2018."""

import warnings

import numpy as np

from jaxclust.errors import ConfigError
from jaxclust.pictures import Draw, Seen
from jaxclust.pictures._embedding import Array, drawing

NEIGHBOURS = 15


def prepare(seen: Seen) -> Draw:
    """ConfigError without the package, else checks that the images are there."""
    try:
        import umap  # noqa: F401
    except ImportError:
        raise ConfigError("config.report.pictures: umap needs umap-learn: pip install 'jaxclust[umap]'") from None
    return drawing(seen, "umap", "UMAP of the features", flatten)


def flatten(rows: Array, seed: int) -> Array:
    """Points [n, 2] of unit rows [n, D]."""
    from umap import UMAP

    neighbours = min(NEIGHBOURS, len(rows) - 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on threads, of which a seed allows one, and of its own dependencies
        points = UMAP(neighbours, metric="cosine", random_state=seed, n_jobs=1).fit_transform(rows)
    return np.asarray(points, np.float32)
