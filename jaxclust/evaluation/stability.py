"""How much clusterings of the same images agree with each other; needs no labels."""

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from jaxclust.evaluation import clustering


def agreement(assignments: Sequence[ArrayLike]) -> list[float]:
    """Of each assignment int [N] the mean adjusted Rand index with the others: 1 if all are equal, about 0 if none are.

    How clusters are numbered does not matter. The mean of what is returned is that over all pairs; it is empty for
    fewer than two assignments.

    Raises:
      DataError: the assignments differ in length.
    """
    n = len(assignments)
    pairs = np.zeros((n, n))
    for i, j in itertools.combinations(range(n), 2):
        pairs[i, j] = pairs[j, i] = clustering.ari(assignments[i], assignments[j])
    return [float(row.sum() / (n - 1)) for row in pairs] if n > 1 else []
