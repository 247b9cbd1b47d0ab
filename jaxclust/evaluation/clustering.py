"""Agreement of clusters with labels, health of a clustering without them.

Clusters and labels are integer vectors indexed by image id. A negative entry means unknown; the
images it belongs to are left out of every comparison.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse
from scipy.sparse.csgraph import min_weight_full_bipartite_matching
from sklearn import metrics as sklearn_metrics

from jaxclust.errors import DataError

Ids = NDArray[np.int64]
Average = Literal["arithmetic", "geometric"]

POINTS_PER_CLUSTER = 39  # below this many points per centroid faiss warns that they are poorly determined; so do we
AMI_CELLS = 100_000  # clusters x classes; a million of them takes scikit-learn 40 s, in which nothing else runs
IMAGES_PER_FOUND_CLUSTER = 10  # a clustering that finds its number and gives each fewer has fallen to pieces
MANY_SKIPPED = 0.5  # of the steps of a round
LEAST_SPREAD = 0.1  # of embeddings that have not collapsed
ROUNDS_TO_LEARN = 3  # a new head starts at ln k, so the loss is judged only after a few rounds


class Contingency(NamedTuple):
    """Counts of images by cluster (rows) and class (columns), for the ids that occur."""

    table: sparse.csr_array  # int64 [clusters, classes]: 10,000 clusters against the 10,000 before hold few pairs
    clusters: Ids
    classes: Ids


def contingency(clusters: ArrayLike, labels: ArrayLike) -> Contingency:
    """Counts how many images of each class are in each cluster.

    Args:
      clusters: int [N], negative where unknown.
      labels: int [N], negative where unknown.

    Raises:
      DataError: the lengths differ, or no image has both a cluster and a label.
    """
    clusters, labels = _known(clusters, labels)
    rows, row = np.unique(clusters, return_inverse=True)
    columns, column = np.unique(labels, return_inverse=True)
    ones = np.ones(len(row), np.int64)
    table = sparse.coo_array((ones, (row, column)), shape=(len(rows), len(columns))).tocsr()
    return Contingency(table, rows, columns)


def pair(table: ArrayLike | sparse.sparray) -> tuple[Ids, Ids]:
    """One-to-one pairs (rows, columns) of largest total count, the assignment problem on a sparse table.

    The table need not be square. Pairs that share no image are left out, since nothing speaks for them.
    """
    counts = sparse.csr_array(table)
    if counts.shape[0] > counts.shape[1]:
        columns, rows = pair(counts.T)
        order = np.argsort(rows)
        return rows[order], columns[order]
    size, width = counts.shape
    # Each row may also stay alone, for less than any image weighs even when all do.
    alone = sparse.eye_array(size) / (2 * size)
    rows, columns = min_weight_full_bipartite_matching(sparse.hstack([counts, alone]).tocsr(), maximize=True)
    found = columns < width
    return rows[found].astype(np.int64), columns[found].astype(np.int64)


def match(clusters: ArrayLike, labels: ArrayLike) -> dict[int, int]:
    """The class that stands for each cluster, one to one; clusters left over are absent."""
    table, cluster_ids, class_ids = contingency(clusters, labels)
    rows, columns = pair(table)
    pairs = zip(cluster_ids[rows], class_ids[columns], strict=True)
    return {int(cluster): int(label) for cluster, label in pairs}


def accuracy(clusters: ArrayLike, labels: ArrayLike) -> float:
    """Share of images whose cluster stands for their class under the best one-to-one matching.

    Any number of clusters is allowed; images in clusters without a class, and of classes without
    a cluster, count as errors (Yang et al., CVPR 2010, "ACC").
    """
    table = contingency(clusters, labels).table
    return float(table[pair(table)].sum() / table.sum())


def purity(clusters: ArrayLike, labels: ArrayLike) -> float:
    """Share of images that belong to the commonest class of their cluster."""
    table = contingency(clusters, labels).table
    return float(table.max(axis=1).sum() / table.sum())


def nmi(a: ArrayLike, b: ArrayLike, average: Average = "arithmetic") -> float:
    """Mutual information over the mean of both entropies: 1 if both are 0, 0 if only one is.

    Papers before about 2019 report the geometric mean, later ones mostly the arithmetic mean.
    """
    a, b = _known(a, b)
    score = sklearn_metrics.normalized_mutual_info_score(a, b, average_method=average)
    return float(np.clip(score, 0.0, 1.0))


def ami(a: ArrayLike, b: ArrayLike, average: Average = "arithmetic") -> float:
    """Mutual information adjusted for chance (Vinh, Epps and Bailey, JMLR 2010)."""
    a, b = _known(a, b)
    return float(sklearn_metrics.adjusted_mutual_info_score(a, b, average_method=average))


def ari(a: ArrayLike, b: ArrayLike) -> float:
    """Rand index adjusted for chance (Hubert and Arabie, 1985)."""
    return float(sklearn_metrics.adjusted_rand_score(*_known(a, b)))


def confusion(clusters: ArrayLike, labels: ArrayLike, k: int, num_classes: int) -> Ids:
    """Counts int64 [k, num_classes] of images by cluster and class, empty ones included.

    Raises:
      DataError: a cluster is not below k or a label is not below num_classes.
    """
    table, cluster_ids, class_ids = contingency(clusters, labels)
    if cluster_ids[-1] >= k or class_ids[-1] >= num_classes:
        raise DataError(
            f"cluster {cluster_ids[-1]} of {k} and class {class_ids[-1]} of {num_classes}: "
            "ids must lie below their number; are predictions and labels of the same run?"
        )
    full = np.zeros((k, num_classes), np.int64)
    full[np.ix_(cluster_ids, class_ids)] = table.toarray()
    return full


def scores(clusters: ArrayLike, labels: ArrayLike, nmi_average: Average = "arithmetic") -> dict[str, float]:
    """All measures of agreement with the labels, each at most 1; without `ami` where it would take minutes."""
    values = {
        "acc": accuracy(clusters, labels),
        "nmi": nmi(clusters, labels, nmi_average),
        "ari": ari(clusters, labels),
    }
    if np.prod(contingency(clusters, labels)[0].shape) <= AMI_CELLS:
        values["ami"] = ami(clusters, labels)
    return {**values, "purity": purity(clusters, labels)}


def changed(previous: ArrayLike, current: ArrayLike) -> float:
    """Share of images that left their cluster, after the best matching of the two numberings."""
    return 1.0 - accuracy(current, previous)


def sizes(clusters: ArrayLike, k: int | None) -> dict[str, float]:
    """How evenly the images spread over k clusters; entropy in nats, sizes of non-empty ones.

    With k None, where the number is not known beforehand, no cluster counts as empty.

    Raises:
      DataError: no image has a cluster.
    """
    ids = np.asarray(clusters)
    counts = np.unique(ids[ids >= 0], return_counts=True)[1]
    if not len(counts):
        raise DataError("no image has a cluster: there is nothing to evaluate")
    share = counts / counts.sum()
    return {
        "clusters/found": float(len(counts)),
        "clusters/empty": float(max((k or 0) - len(counts), 0)),
        "clusters/largest_share": float(share.max()),
        "clusters/entropy": max(0.0, float(-(share * np.log(share)).sum())),
        "clusters/size_min": float(counts.min()),
        "clusters/size_median": float(np.median(counts)),
        "clusters/size_max": float(counts.max()),
    }


def judged_loss(record: Mapping[str, float], round_: float) -> float | None:
    """The loss of a training in the record of a round, None where it has none or it is too early to judge it."""
    return record.get("train/loss") if round_ >= ROUNDS_TO_LEARN else None


def outputs(record: Mapping[str, float], before: float, k: int | None) -> int | None:
    """Among how many clusters the loss in a record is; None: not known, or it is about none.

    A head that is asked for clusters found, of which there were `before` in the record before, tells its accuracy;
    another loss is of all k outputs.
    """
    return k if "train/accuracy" not in record else int(before) or None


def warnings(
    metrics: Mapping[str, float],
    n: int,
    k: int | None,
    loss: float | None = None,
    num_outputs: int | None = None,
) -> list[str]:
    """Says in words what is suspicious about a clustering of n images into k clusters, or about a training.

    Args:
      metrics: as from `sizes`, MoCo's "train/spread" and DSCL's "train/skipped"; what is absent is not judged.
      k: clusters asked for; None: the clustering finds their number itself.
      loss: mean cross-entropy of the round in nats; None: too early to judge what is learnt.
      num_outputs: number of clusters the head tells apart.
    """
    found = metrics.get("clusters/found")
    share = metrics.get("clusters/largest_share", 0.0)
    words = []
    if found is not None and found < 2:
        words.append(
            "The clustering has collapsed: all images are in one cluster, so the network has "
            "nothing left to learn. Try a lower optimizer.body.lr (of SPICE's heads spice.lr), cluster.whiten=True, "
            "with ClustNet clustnet.group_diversity=1 or a lower clustnet.lr_gate, or check that the images differ."
        )
    elif share > 0.5:
        more = "larger cluster.k" if k is not None else "smaller cluster.pic.neighbours or cluster.pic.alpha"
        words.append(
            f"One cluster holds {share:.0%} of the images: the features are collapsing towards a "
            f"single answer. Try a {more}, a lower optimizer.body.lr, or, where clusters are what is learnt, "
            "sampler=uniform_cluster."
        )
    if loss is not None and num_outputs is not None and num_outputs > 1:
        guessing = math.log(num_outputs)
        if loss >= 0.99 * guessing:
            words.append(
                f"The loss is {loss:.3f}, and guessing alone gives ln {num_outputs} = {guessing:.3f}: the network does "
                "not learn its clusters. Try a lower optimizer.body.lr (of SPICE's heads spice.lr), weaker "
                "augmentation under views, or more steps between two clusterings."
            )
    words += of_training(metrics, loss is not None)
    if k is None and found is not None and n < IMAGES_PER_FOUND_CLUSTER * found:
        words.append(
            f"{found:,.0f} clusters of {n:,} images are small pieces: the graph has too few neighbours to join them. "
            "Try cluster.pic.neighbours=15 or more with cluster.pic.alpha=0.9."
        )
    if k and n < POINTS_PER_CLUSTER * k:
        fewer = n // POINTS_PER_CLUSTER
        words.append(
            f"{n:,} images for {k:,} clusters are fewer than {POINTS_PER_CLUSTER} per cluster: "
            "centres rest on few images and change from seed to seed. "
            f"Try {f'cluster.k={fewer} or ' if fewer > 1 else ''}more images."
        )
    return words


def of_training(metrics: Mapping[str, float], learnt: bool) -> list[str]:
    """Says in words what is suspicious of MoCo's embeddings, if they should be `learnt`, and of skipped steps."""
    words = []
    spread = metrics.get("train/spread", 1.0)
    if learnt and spread < LEAST_SPREAD:
        words.append(
            f"Embeddings of all images are nearly the same (their spread is {spread:.3f} of 1): MoCo has collapsed, "
            "even if its loss still moves. Try a lower optimizer.body.lr, a higher moco.temperature, or a "
            "moco.momentum nearer to 1."
        )
    skipped = metrics.get("train/skipped", 0.0)
    if skipped >= MANY_SKIPPED:
        words.append(
            f"{skipped:.0%} of the steps were skipped, and nothing is learnt by them: they were not finite, or over "
            "dscl.max_grad_norm or dscl.loss_skip_threshold. Try a lower optimizer.body.lr and optimizer.top.lr."
        )
    return words


def measure(predictions: Mapping[str, ArrayLike], labels: ArrayLike | None, config: Any, rows: Any) -> dict[str, float]:
    """Cluster sizes, and with labels the scores: the evaluation that `suite` runs."""
    clusters = predictions["cluster"]
    found = sizes(clusters, None)
    if labels is None:
        return found
    values = scores(clusters, labels, config.evaluate.nmi_average) | found
    if "certainty" in predictions:
        values |= certainty_auc(clusters, predictions["certainty"], labels)
    return values


def certainty_auc(clusters: ArrayLike, certainty: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """How well certainty [N] tells images of their cluster's most frequent class from others: the area under the ROC
    curve, 0.5 for guessing. Empty where all are of it, or none is."""
    labels, clusters = np.asarray(labels), np.asarray(clusters)
    known = (labels >= 0) & (clusters >= 0)
    table, _, classes = contingency(clusters, labels)
    cluster_ids = np.unique(clusters[known], return_inverse=True)[1]
    majority = classes[np.asarray(table.argmax(axis=1)).ravel()]
    right = majority[cluster_ids] == labels[known]
    if right.all() or not right.any():
        return {}
    return {"certainty_auc": float(sklearn_metrics.roc_auc_score(right, np.asarray(certainty)[known]))}


def _known(a: ArrayLike, b: ArrayLike) -> tuple[Ids, Ids]:
    """Both vectors without the images that are unknown in either."""
    left, right = np.asarray(a), np.asarray(b)
    if left.shape != right.shape or left.ndim != 1:
        raise DataError(
            f"clusters and labels have shapes {left.shape} and {right.shape}: "
            "both must be vectors with one entry per image"
        )
    known = (left >= 0) & (right >= 0)
    if not known.any():
        raise DataError("no image has both a cluster and a known label: nothing to compare")
    return left[known], right[known]
