"""Few labels: logistic regression on the features of some labelled images.

Assran et al., "Masked Siamese Networks for Label-Efficient Learning", ECCV 2022, evaluate frozen features so: centred,
at unit length, with a fixed L2 penalty.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from jaxclust import hosts
from jaxclust.cluster import Points
from jaxclust.errors import DataError
from jaxclust.evaluation.silhouette import take
from jaxclust.evaluation.suite import Images

PENALTY = 2.5e-4  # of half the squared weights, beside the mean loss
ITERATIONS = 1000

LEARNS_CLASSES = True


def compare(images: Images, config: Any) -> dict[str, float]:
    """`lowlabel/1pct/top1`, and likewise for each share of `config.evaluate.lowlabel_percent`.

    The mean over `lowlabel_draws` draws that take equally many images of each class, and its standard deviation as
    `top1_std`. Judged on the test images; without such on the training images that were not drawn.
    """
    labels, rows = images.train.labels, images.train.rows()
    if len(np.unique(labels[labels >= 0])) < 2:
        raise DataError("all labelled training images are of one class: there is nothing to tell apart")
    centre = mean(rows)
    results: dict[str, float] = {}
    for percent in config.evaluate.lowlabel_percent:
        scores = [top1(images, rows, centre, drawn) for drawn in _draws(labels, percent, config)]
        name = f"lowlabel/{percent:g}pct"
        results |= {f"{name}/top1": float(np.mean(scores)), f"{name}/top1_std": float(np.std(scores))}
    return results


def _draws(labels: NDArray[np.int32], percent: float, config: Any) -> list[NDArray[np.int64]]:
    seeds = ((config.seed, number) for number in range(config.evaluate.lowlabel_draws))
    return [draw(labels, percent / 100, seed) for seed in seeds]


def draw(labels: NDArray[np.int32], share: float, seed: tuple[int, ...]) -> NDArray[np.int64]:
    """Rising ids of about `share` of the labelled images: as many of each class and at least one, or all of a class."""
    rng = np.random.default_rng(seed)
    classes, counts = np.unique(labels[labels >= 0], return_counts=True)
    each = max(1, round(share * counts.sum() / len(classes)))
    chosen = [rng.permutation(np.flatnonzero(labels == c))[:each] for c in classes]
    return np.sort(np.concatenate(chosen))


def top1(images: Images, rows: Points, centre: NDArray[np.float64], drawn: NDArray[np.int64]) -> float:
    """Accuracy of a classifier that learnt from the `drawn` training images, on every host."""
    split = images.test or images.train
    judged = split.labels >= 0
    if split is images.train:
        judged[drawn] = False
    if not judged.any():
        raise DataError(f"all {len(drawn)} labelled training images were drawn, and there is no test split to judge by")
    model = LogisticRegression(C=1 / (PENALTY * len(drawn)), max_iter=ITERATIONS)
    model.fit(_prepared(take(rows, drawn), centre), images.train.labels[drawn])
    hits, ids = 0, hosts.own_ids(len(split.labels))
    for chunk in split.rows().chunks():
        own, ids = ids[: len(chunk)], ids[len(chunk) :]
        guess = model.predict(_prepared(chunk, centre))
        hits += int(np.count_nonzero((guess == split.labels[own]) & judged[own]))
    return float(hosts.total(np.asarray(hits, np.float64)) / np.count_nonzero(judged))


def mean(rows: Points) -> NDArray[np.float64]:
    """The mean row [D] of all hosts."""
    total = np.zeros(rows.shape[1])
    for chunk in rows.chunks():
        total += chunk.sum(axis=0, dtype=np.float64)
    return hosts.total(total) / rows.shape[0]


def _prepared(rows: NDArray[Any], centre: NDArray[np.float64]) -> NDArray[np.float64]:
    x = rows - centre
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
