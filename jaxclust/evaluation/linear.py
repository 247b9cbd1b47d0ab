"""Linear classifiers on frozen layers: how much of the classes each of them shows.

Caron et al. 2018 (DeepCluster), table 1; `methods/probe.py` is what is trained.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxclust.evaluation.suite import Images

LEARNS_CLASSES = True


def compare(images: Images, config: Any) -> dict[str, float]:
    """For each layer `linear/<layer>/top1`, `top5` and `loss` after the last epoch, and `top1_best` of `best_epoch`.

    The best epoch is chosen by the accuracy on the test images themselves, as the field reports it.
    """
    results: dict[str, float] = {}
    for layer, epochs in images.probes().items():
        accuracy = [epoch["top1"] for epoch in epochs]
        best = {"top1_best": max(accuracy), "best_epoch": float(np.argmax(accuracy) + 1)}
        results |= {f"linear/{layer}/{name}": value for name, value in {**epochs[-1], **best}.items()}
    return results


def hits(log_probabilities: NDArray[Any], labels: NDArray[Any]) -> NDArray[np.float64]:
    """(right, among the best five, sum of -log p) over the rows [n, C] whose label [n] is known.

    Of equally probable classes the lower one comes first.
    """
    known = labels >= 0
    rows, labels = log_probabilities[known].astype(np.float64), labels[known, None]
    own = np.take_along_axis(rows, labels, axis=1)
    before = (rows > own) | ((rows == own) & (np.arange(rows.shape[1]) < labels))
    rank = before.sum(axis=1)
    return np.array([np.count_nonzero(rank < 1), np.count_nonzero(rank < 5), -own.sum()])
