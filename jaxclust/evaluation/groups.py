"""How well ClustNet tells the two groups of `config.groups` apart, and its experts the classes of each group.

Section 2.7 of our specification. Of a method without a gate there are no such figures, nor without labels.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from jaxclust.cluster import Chunked
from jaxclust.data.groups import classes
from jaxclust.evaluation import clustering


def measure(
    predictions: Mapping[str, ArrayLike], labels: ArrayLike | None, config: Any, rows: Callable[[], Chunked]
) -> dict[str, float]:
    """`binary`, the share of right groups, and `nll`, the mean of -ln P of the group.

    `acc_p` and `acc_n`: the share of a group's images whose expert stands for their class, under the best pairing of
    experts with the classes of that group; all images with one expert give the share of the largest class. `nmi_p` and
    `nmi_n` likewise. Of the gate: `gate_entropy`, the mean over images, `usage_entropy` of its mean, and the
    share of each expert, `usage0` and so on.
    """
    if labels is None or "groups" not in predictions:
        return {}
    labels, cluster = np.asarray(labels), np.asarray(predictions["cluster"])
    of_groups, gate = np.asarray(predictions["groups"]), np.exp(np.asarray(predictions["log_probs"], np.float64))
    known, positive = labels >= 0, np.isin(labels, classes(config.groups)[0])
    if not known.any():
        return {}
    right = of_groups[np.arange(len(labels)), positive.astype(int)]
    values = {
        "binary": float(np.mean(np.asarray(predictions["binary"])[known] == positive[known])),
        "nll": float(-right[known].mean()),
        "gate_entropy": float(_entropy(gate).mean()),
        "usage_entropy": float(_entropy(gate.mean(axis=0))),
    }
    values |= {f"usage{k}": float(np.mean(cluster == k)) for k in range(gate.shape[1])}
    for name, group in zip(("p", "n"), judged(config), strict=True):
        of = np.isin(labels, group)
        if of.any():
            values[f"acc_{name}"] = clustering.accuracy(cluster[of], labels[of])
            values[f"nmi_{name}"] = clustering.nmi(cluster[of], labels[of], config.evaluate.nmi_average)
    return values


def judged(config: Any) -> tuple[list[int], list[int]]:
    """The classes that `acc_p` and `acc_n` are about: those of P and N.

    With evaluate.metric_groups="upstream" those that the published code took for them: the first K of ten classes in an
    order shuffled by the seed, and the others. Its published curves are of these.
    """
    if config.evaluate.metric_groups == "true":
        return classes(config.groups)
    order = list(range(10))
    np.random.RandomState(config.seed).shuffle(order)
    first = order[: config.cluster.k]
    return first, sorted(set(order) - set(first))


def _entropy(p: np.ndarray) -> np.ndarray:
    return -(p * np.log(np.maximum(p, 1e-300))).sum(axis=-1)
