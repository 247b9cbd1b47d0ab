"""t-SNE of the features. van der Maaten, Hinton, "Visualizing Data using t-SNE", JMLR 2008."""

import numpy as np
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits

from jaxclust.pictures import Draw, Seen
from jaxclust.pictures._embedding import Array, drawing

PERPLEXITY = 30.0


def prepare(seen: Seen) -> Draw:
    """Checks that the images are there."""
    return drawing(seen, "tsne", "t-SNE of the features", flatten)


def flatten(rows: Array, seed: int) -> Array:
    """Points [n, 2] of unit rows [n, D], whose squared distances are twice one less the cosine."""
    perplexity = min(PERPLEXITY, (len(rows) - 1) / 3)
    start = "pca" if rows.shape[1] > 1 else "random"
    with threadpool_limits(1):  # sums over threads come in any order
        points = TSNE(2, perplexity=perplexity, init=start, random_state=seed, n_jobs=1).fit_transform(rows)
    return np.asarray(points, np.float32)
