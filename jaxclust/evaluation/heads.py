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
    """ACC and NMI of each head (`predictions["heads"]` int [N, H]), their means, and `oracle_acc`, the largest ACC."""
    if labels is None or "heads" not in predictions:
        return {}
    heads = np.asarray(predictions["heads"]).T
    acc = [clustering.accuracy(head, labels) for head in heads]
    nmi = [clustering.nmi(head, labels, config.evaluate.nmi_average) for head in heads]
    each = {f"head{i}_{name}": value for name, of in (("acc", acc), ("nmi", nmi)) for i, value in enumerate(of)}
    best = int(np.argmax(acc))
    means = {"heads_acc": float(np.mean(acc)), "heads_nmi": float(np.mean(nmi))}
    return each | means | {"oracle_acc": acc[best], "oracle_head": float(best)}
