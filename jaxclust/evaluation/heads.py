"""How good each head of a method with several is, by class labels; the best one by them is an oracle's choice.

No training and no selection sees these figures. There are none without labels, or of a method that predicts no `heads`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from jaxclust.cluster import Chunked
from jaxclust.evaluation import clustering


def measure(
    predictions: Mapping[str, ArrayLike], labels: ArrayLike | None, config: Any, rows: Callable[[], Chunked]
) -> dict[str, float]:
    """ACC, NMI and ARI of each head (`predictions["heads"]` int [N, H]), means, and of `oracle_head`, that with the
    largest ACC, `oracle_acc`, `oracle_nmi` and `oracle_ari`."""
    if labels is None or "heads" not in predictions:
        return {}
    heads = np.asarray(predictions["heads"]).T
    scores = {
        "acc": [clustering.accuracy(head, labels) for head in heads],
        "nmi": [clustering.nmi(head, labels, config.evaluate.nmi_average) for head in heads],
        "ari": [clustering.ari(head, labels) for head in heads],
    }
    each = {f"head{i}_{name}": value for name, of_heads in scores.items() for i, value in enumerate(of_heads)}
    means = {f"heads_{name}": float(np.mean(of_heads)) for name, of_heads in scores.items()}
    best = int(np.argmax(scores["acc"]))
    oracle = {f"oracle_{name}": of_heads[best] for name, of_heads in scores.items()}
    return each | means | oracle | {"oracle_head": float(best)}
