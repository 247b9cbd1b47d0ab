"""t-SNE of the features. van der Maaten, Hinton, "Visualizing Data using t-SNE", JMLR 2008."""

from functools import partial

import numpy as np
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits

from jaxclust.pictures import Draw, Seen
from jaxclust.pictures._embedding import Array, drawing

PERPLEXITY = 30.0


def prepare(seen: Seen) -> Draw:
    """Checks that layer and images are there."""
    how = seen.stage.config.report.tsne
    title = "t-SNE of the features" if how.layer == "feature" else f"t-SNE of {how.layer}"
    return drawing(seen, "tsne", title, partial(flatten, rate=how.rate), how.layer)


def flatten(rows: Array, seed: int, rate: float = 0.0) -> Array:
    """Points [n, 2] of unit rows [n, D], whose squared distances are twice one less the cosine.

    `rate` is the learning rate; 0: by their number.
    """
    perplexity = min(PERPLEXITY, (len(rows) - 1) / 3)
    start = "pca" if rows.shape[1] > 1 else "random"
    with threadpool_limits(1):  # sums over threads come in any order
        flat = TSNE(2, perplexity=perplexity, learning_rate=rate or "auto", init=start, random_state=seed, n_jobs=1)
        points = flat.fit_transform(rows)
    return np.asarray(points, np.float32)
