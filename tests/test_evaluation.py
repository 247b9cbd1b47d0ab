"""Metrics against slow doubles, their invariances, and the suite that runs them."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxclust.errors import ConfigError, DataError
from jaxclust.evaluation import clustering, suite

pairs_of_ids = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=40)


def columns(pairs):
    clusters, labels = np.array(pairs).T
    return clusters, labels


def config(names="clustering", k=5, average="arithmetic"):
    return SimpleNamespace(evaluate=SimpleNamespace(suite=names, nmi_average=average), cluster=SimpleNamespace(k=k))


def slow_nmi(a, b, average):
    """Mutual information and entropies term by term, in float64."""
    n = len(a)
    joint = {(i, j): np.mean((a == i) & (b == j)) for i in set(a) for j in set(b)}
    marginal_a = {i: np.sum(a == i) / n for i in set(a)}
    marginal_b = {j: np.sum(b == j) / n for j in set(b)}
    information = sum(p * math.log(p / (marginal_a[i] * marginal_b[j])) for (i, j), p in joint.items() if p > 0)
    entropies = [-sum(p * math.log(p) for p in m.values()) for m in (marginal_a, marginal_b)]
    if max(entropies) < 1e-12:
        return 1.0
    if min(entropies) < 1e-12:
        return 0.0
    norm = sum(entropies) / 2 if average == "arithmetic" else math.sqrt(math.prod(entropies))
    return information / norm


@given(pairs_of_ids)
def test_accuracy_is_the_best_over_all_permutations(pairs):
    clusters, labels = columns(pairs)
    best = max(np.mean(np.array(p)[clusters] == labels) for p in itertools.permutations(range(5)))
    assert clustering.accuracy(clusters, labels) == pytest.approx(best)


@given(pairs_of_ids, st.permutations(range(5)), st.sampled_from(["arithmetic", "geometric"]))
def test_scores_do_not_depend_on_how_clusters_are_numbered(pairs, permutation, average):
    clusters, labels = columns(pairs)
    renamed = np.array(permutation)[clusters] * 7  # gaps in the numbering are fine too
    before = clustering.scores(clusters, labels, average)
    assert clustering.scores(renamed, labels, average) == pytest.approx(before)


@given(pairs_of_ids, st.sampled_from(["arithmetic", "geometric"]))
def test_nmi_equals_the_slow_double(pairs, average):
    a, b = columns(pairs)
    assert clustering.nmi(a, b, average) == pytest.approx(slow_nmi(a, b, average), abs=1e-9)
    assert clustering.nmi(a, b, average) == pytest.approx(clustering.nmi(b, a, average), abs=1e-9)


@given(pairs_of_ids, st.integers(1, 20))
def test_unknown_labels_are_ignored(pairs, unknown):
    clusters, labels = columns(pairs)
    more = np.r_[clusters, np.arange(unknown) % 5]
    with_unknown = np.r_[labels, np.full(unknown, -1)]
    assert clustering.scores(more, with_unknown) == clustering.scores(clusters, labels)


def test_nmi_at_its_corners():
    ids = np.arange(1000) % 10
    assert clustering.nmi(ids, ids) == 1.0
    assert clustering.nmi(np.zeros(9, int), np.ones(9, int)) == 1.0
    assert clustering.nmi(np.zeros(9, int), np.arange(9)) == 0.0
    coarse = ids // 5
    assert clustering.nmi(ids, coarse, "geometric") > clustering.nmi(ids, coarse) + 0.01


def test_independent_labels_score_near_nothing():
    rng = np.random.default_rng(0)
    clusters, labels = rng.integers(10, size=(2, 10_000))
    score = clustering.scores(clusters, labels)
    assert score["nmi"] < 0.05 and abs(score["ari"]) < 0.01 and abs(score["ami"]) < 0.01
    assert 0.1 <= score["acc"] < 0.13 and 0.1 <= score["purity"] < 0.13


def test_clusters_left_over_are_errors_and_so_are_classes():
    labels = np.repeat([0, 1], 50)
    four = np.repeat([0, 1, 2, 3], 25)
    assert clustering.accuracy(four, labels) == 0.5
    assert clustering.purity(four, labels) == 1.0
    assert clustering.accuracy(labels, four) == 0.5  # two clusters, four classes
    assert clustering.match(four, labels).keys() <= {0, 1, 2, 3}
    assert sorted(clustering.match(four, labels).values()) == [0, 1]


def test_match_leaves_out_pairs_without_an_image():
    assert clustering.match([3, 3, 3, 5], [0, 0, 1, 0]) in ({3: 0}, {3: 1, 5: 0})
    assert clustering.match([3, 3, 5], [0, 1, 0]) == {3: 1, 5: 0}
    assert clustering.match([0, 0, 0, 1], [0, 0, 0, 0]) == {0: 0}


def test_confusion_has_a_row_for_every_cluster():
    table = clustering.confusion([0, 2, 2, 1], [1, 0, 0, -1], k=4, num_classes=3)
    assert table.dtype == np.int64
    np.testing.assert_array_equal(table, [[0, 1, 0], [0, 0, 0], [2, 0, 0], [0, 0, 0]])
    with pytest.raises(DataError, match="cluster 2 of 2"):
        clustering.confusion([0, 2], [0, 0], k=2, num_classes=1)


def test_changed_counts_images_not_numbers():
    previous = np.repeat([0, 1, 2], 4)
    assert clustering.changed(previous, (previous + 1) % 3) == 0.0
    moved = previous.copy()
    moved[0] = 1
    assert clustering.changed(previous, moved) == pytest.approx(1 / 12)


def test_sizes_of_an_uneven_clustering():
    got = clustering.sizes([0] * 6 + [2] * 2 + [4] * 2 + [-1], k=6)
    assert got["clusters/found"] == 3 and got["clusters/empty"] == 3
    assert got["clusters/largest_share"] == 0.6
    assert (got["clusters/size_min"], got["clusters/size_median"]) == (2, 2)
    assert got["clusters/size_max"] == 6
    expected = -(0.6 * math.log(0.6) + 2 * 0.2 * math.log(0.2))
    assert got["clusters/entropy"] == pytest.approx(expected)
    assert clustering.sizes([7, 7], k=10)["clusters/entropy"] == 0.0


def test_mismatched_or_unknown_input_is_refused():
    with pytest.raises(DataError, match=r"\(3,\) and \(2,\)"):
        clustering.accuracy([0, 1, 2], [0, 1])
    with pytest.raises(DataError, match="known label"):
        clustering.scores([0, 1], [-1, -1])
    with pytest.raises(DataError, match="no image has a cluster"):
        clustering.sizes([-1], k=2)


@pytest.mark.parametrize(
    ("found", "share", "n", "loss", "words"),
    [
        (10, 0.2, 1000, 1.2, []),
        (1, 1.0, 1000, 1.2, ["collapsed"]),
        (10, 0.51, 1000, 1.2, ["51% of the images"]),
        (10, 0.2, 389, 1.2, ["389 images for 10 clusters"]),
        (10, 0.2, 390, math.log(10) * 1.009, ["ln 10"]),
        (10, 0.2, 390, math.log(10) * 1.02, []),
        (1, 1.0, 100, math.log(10), ["collapsed", "ln 10", "fewer than 39"]),
    ],
)
def test_warnings_say_what_is_wrong(found, share, n, loss, words):
    metrics = {"clusters/found": found, "clusters/largest_share": share}
    got = clustering.warnings(metrics, n, 10, loss=loss, num_outputs=10)
    assert len(got) == len(words)
    assert all(word in text and "ry " in text for word, text in zip(words, got, strict=True))


def test_suite_without_labels_gives_what_needs_none():
    predictions = {"cluster": np.array([0, 0, 1, 2])}
    labelled = suite.evaluate(predictions, np.array([1, 1, 0, 0]), config())
    assert labelled["acc"] == 0.75 and labelled["clusters/found"] == 3
    for labels in (None, np.full(4, -1)):
        got = suite.evaluate(predictions, labels, config())
        assert set(got) == set(clustering.sizes([0], 1)) and got["clusters/empty"] == 2


def test_suite_refuses_unknown_names_and_lists_the_known():
    with pytest.raises(ConfigError, match="did you mean 'clustering'"):
        suite.evaluate({"cluster": [0]}, None, config("clustering, clustring"))
    with pytest.raises(ConfigError, match="evaluate.suite='suite' is unknown"):
        suite.evaluate({"cluster": [0]}, None, config("suite"))


def test_suite_names_the_evaluation_that_failed(monkeypatch):
    with pytest.raises(DataError, match="evaluation 'clustering': clusters and labels"):
        suite.evaluate({"cluster": [0, 1]}, [0], config())
    monkeypatch.setattr(clustering, "measure", lambda *_: 1 / 0)
    with pytest.raises(RuntimeError, match="'clustering' failed: ZeroDivisionError"):
        suite.evaluate({"cluster": [0, 1]}, None, config())
