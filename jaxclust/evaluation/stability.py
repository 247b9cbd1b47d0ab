"""How much clusterings of the same images agree with each other; needs no labels."""

import itertools
from collections.abc import Sequence
from statistics import fmean

from numpy.typing import ArrayLike

from jaxclust.evaluation import clustering


def stability(assignments: Sequence[ArrayLike]) -> float | None:
    """Mean adjusted Rand index over all pairs of assignments int [N]: 1 if all are equal, about 0 if unrelated.

    How clusters are numbered does not matter. None for fewer than two assignments.

    Raises:
      DataError: the assignments differ in length.
    """
    pairs = list(itertools.combinations(assignments, 2))
    return fmean(clustering.ari(a, b) for a, b in pairs) if pairs else None
