"""Metrics against slow doubles, their invariances, and the suite that runs them."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import silhouette_samples, silhouette_score

from jaxclust.errors import ConfigError, DataError
from jaxclust.evaluation import clustering, silhouette, suite
from jaxclust.evaluation.stability import agreement

pairs_of_ids = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=40)


def columns(pairs):
    clusters, labels = np.array(pairs).T
    return clusters, labels


def config(names="clustering", sample=2000, **reduction):
    cluster = SimpleNamespace(**{"pca_dim": 0, "whiten": True, "whiten_power": 1.0, "l2": False, **reduction})
    evaluate = SimpleNamespace(suite=names, nmi_average="arithmetic", silhouette_sample=sample)
    return SimpleNamespace(evaluate=evaluate, cluster=cluster)


def no_rows():
    raise AssertionError("nobody asked for features")


class Matrix:
    """Rows in pieces of 7, and how often they were read."""

    def __init__(self, rows):
        self.rows, self.shape, self.passes = rows, rows.shape, 0

    def __call__(self):
        self.passes += 1
        return self

    def chunks(self):
        return (self.rows[i : i + 7] for i in range(0, len(self.rows), 7))


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
        (10, 0.2, 390, math.log(10) * 0.991, ["ln 10"]),
        (10, 0.2, 390, math.log(10) * 1.5, ["ln 10"]),
        (10, 0.2, 390, math.log(10) * 0.98, []),
        (1, 1.0, 100, math.log(10), ["collapsed", "ln 10", "fewer than 39"]),
    ],
)
def test_warnings_say_what_is_wrong(found, share, n, loss, words):
    metrics = {"clusters/found": found, "clusters/largest_share": share}
    got = clustering.warnings(metrics, n, 10, loss=loss, num_outputs=10)
    assert len(got) == len(words)
    assert all(word in text and "ry " in text for word, text in zip(words, got, strict=True))


def test_fewer_clusters_are_advised_only_where_there_are_images_for_two():
    for n, advice in ((77, "Try more images."), (78, "Try cluster.k=2 or more images.")):
        (words,) = clustering.warnings({}, n, 3)
        assert words.endswith(advice)


def test_of_a_clustering_that_finds_its_number_nobody_asks_for_another_k():
    (words,) = clustering.warnings({"clusters/found": 5, "clusters/largest_share": 0.6}, 1000, None)
    assert "cluster.pic.neighbours" in words and "cluster.k" not in words


def test_a_loss_is_judged_by_the_clusters_of_the_record_before_and_not_too_early():
    record = {"train/loss": 1.6, "train/accuracy": 0.3, "clusters/found": 4.0}
    assert clustering.outputs(record, 20.0, 10) == 20 and clustering.outputs(record, 0.0, 10) is None
    assert clustering.outputs({"train/loss": 1.6}, 20.0, 10) == 10
    assert [clustering.judged_loss(record, round_) for round_ in (2, 3)] == [None, 1.6]


@pytest.mark.parametrize(("spread", "loss", "warned"), [(0.05, 7.0, True), (0.3, 7.0, False), (0.05, None, False)])
def test_embeddings_that_are_all_the_same_are_warned_of(spread, loss, warned):
    got = clustering.warnings({"train/spread": spread}, 1000, None, loss=loss)
    assert [f"{spread:.3f} of 1" in text and "moco.temperature" in text for text in got] == [True] * warned


def test_ami_is_left_out_where_it_would_take_minutes():
    ids = np.arange(400)
    assert "ami" not in clustering.scores(ids, ids) and clustering.scores(ids, ids)["nmi"] == 1
    assert clustering.scores(ids // 2, ids)["ami"] <= 1


def test_suite_without_labels_gives_what_needs_none():
    predictions = {"cluster": np.array([0, 0, 1, 2])}
    labelled = suite.evaluate(predictions, np.array([1, 1, 0, 0]), config(), no_rows)
    assert labelled["acc"] == 0.75 and labelled["clusters/found"] == 3
    for labels in (None, np.full(4, -1)):
        got = suite.evaluate(predictions, labels, config(), no_rows)
        assert got == clustering.sizes([0, 0, 1, 2], None)


def test_suite_refuses_unknown_names_and_lists_the_known():
    with pytest.raises(ConfigError, match="did you mean 'clustering'"):
        suite.evaluate({"cluster": [0]}, None, config("clustering, clustring"), no_rows)
    with pytest.raises(ConfigError, match="evaluate.suite='suite' is unknown"):
        suite.evaluate({"cluster": [0]}, None, config("suite"), no_rows)


def test_suite_names_the_evaluation_that_failed(monkeypatch):
    with pytest.raises(DataError, match="evaluation 'clustering': clusters and labels"):
        suite.evaluate({"cluster": [0, 1]}, [0], config(), no_rows)
    monkeypatch.setattr(clustering, "measure", lambda *_: 1 / 0)
    with pytest.raises(RuntimeError, match="'clustering' failed: ZeroDivisionError"):
        suite.evaluate({"cluster": [0, 1]}, None, config(), no_rows)


def blobs(n=90, dim=5, k=3, spread=1.0):
    """Rows around k centres, and which centre."""
    rng = np.random.default_rng(0)
    clusters = np.arange(n) % k
    centres = 4 * rng.standard_normal((k, dim))
    return (centres[clusters] + spread * rng.standard_normal((n, dim))).astype(np.float32), clusters


def slow_silhouette(points, clusters):
    """Rousseeuw's s(i), image by image."""
    scores = []
    for i, own in enumerate(clusters):
        distance = np.sqrt(((points - points[i]) ** 2).sum(axis=1))
        mates = (clusters == own) & (np.arange(len(points)) != i)
        others = [distance[clusters == c].mean() for c in set(clusters.tolist()) - {own}]
        a, b = distance[mates].mean() if mates.any() else 0.0, min(others)
        scores.append((b - a) / max(a, b) if mates.any() else 0.0)
    return np.mean(scores)


def test_the_silhouette_of_all_rows_is_rousseeuws():
    rows, clusters = blobs()
    clusters[7] = 3  # alone in its cluster
    got = silhouette.measure({"cluster": clusters}, None, config(), Matrix(rows))["silhouette"]
    assert got == pytest.approx(silhouette_score(rows, clusters), abs=1e-5)
    assert got == pytest.approx(slow_silhouette(rows.astype(np.float64), clusters), abs=1e-5)


def test_the_silhouette_is_measured_in_the_space_of_the_clustering():
    rows, clusters = blobs()
    rows = rows * np.array([1, 1, 100, 1, 1], np.float32)
    x = rows.astype(np.float64) - rows.mean(axis=0, dtype=np.float64)
    values, vectors = np.linalg.eigh(x.T @ x / len(x))
    for power in (1.0, 0.5, 0.0):
        points = x @ vectors[:, ::-1][:, :2] * values[::-1][:2] ** (-power / 2)
        points /= np.linalg.norm(points, axis=1, keepdims=True)
        reduction = {"pca_dim": 2, "whiten": power > 0, "whiten_power": power or 1.0, "l2": True}
        got = silhouette.measure({"cluster": clusters}, None, config(**reduction), Matrix(rows))["silhouette"]
        assert got == pytest.approx(silhouette_score(points, clusters), abs=1e-4)


def test_the_sample_is_fixed_and_its_score_near_that_of_all():
    rows, clusters = blobs(2000)
    ids = silhouette.sample(clusters, 300)
    assert len(ids) == 300 and (np.diff(ids) > 0).all()
    np.testing.assert_array_equal(ids, silhouette.sample(clusters[::-1], 300))
    np.testing.assert_array_equal(silhouette.take(Matrix(rows), ids), rows[ids])
    part, whole = (
        silhouette.measure({"cluster": clusters}, None, config(sample=n), Matrix(rows))["silhouette"]
        for n in (300, 2000)
    )
    assert part != whole and part == pytest.approx(whole, abs=0.05)
    expected = silhouette_samples(rows[ids], clusters[ids]).mean()
    assert part == pytest.approx(expected, abs=1e-5)


def test_a_cluster_of_which_one_image_was_drawn_is_left_out_of_the_silhouette():
    clusters = np.repeat([0, 1, 2], [500, 500, 20])
    alone = next(n for n in range(20, 400) if (clusters[np.sort(drawn(1020, n))] == 2).sum() == 1)
    ids = silhouette.sample(clusters, alone)
    assert len(ids) == alone - 1 and set(clusters[ids]) == {0, 1}
    unknown = np.where(clusters == 1, -1, clusters)
    assert set(unknown[silhouette.sample(unknown, 5000)]) == {0, 2}


def drawn(n, size):
    return np.random.default_rng(0).choice(np.arange(n), size, replace=False)


@pytest.mark.parametrize("clusters", [np.zeros(20, int), np.arange(20), np.full(20, -1), np.array([3])], ids=str)
def test_without_two_clusters_and_a_pair_there_is_no_silhouette_and_no_feature_pass(clusters):
    assert silhouette.measure({"cluster": clusters}, None, config(), no_rows) == {}


def test_features_are_made_once_and_only_for_who_needs_them(monkeypatch):
    rows, clusters = blobs()
    matrix = Matrix(rows)
    got = suite.evaluate({"cluster": clusters}, clusters, config("clustering,silhouette"), matrix)
    assert got["acc"] == 1 and 0 < got["silhouette"] <= 1 and matrix.passes == 1
    monkeypatch.setattr(
        clustering, "measure", lambda predictions, labels, config, rows: {"rows": float(len(rows().rows))}
    )
    suite.evaluate({"cluster": clusters}, None, config("clustering,silhouette"), matrix)
    assert matrix.passes == 2
    with pytest.raises(DataError, match="evaluation 'silhouette': 90 rows of features for 89 clusters"):
        suite.evaluate({"cluster": clusters[1:]}, None, config("silhouette"), matrix)


def slow_ari(a, b):
    """Adjusted Rand index by counting pairs of images."""
    pairs = list(itertools.combinations(range(len(a)), 2))
    same_a = np.array([a[i] == a[j] for i, j in pairs])
    same_b = np.array([b[i] == b[j] for i, j in pairs])
    expected = same_a.sum() * same_b.sum() / len(pairs)
    return ((same_a & same_b).sum() - expected) / ((same_a.sum() + same_b.sum()) / 2 - expected)


def test_agreement_is_the_mean_ari_with_the_others():
    rng = np.random.default_rng(0)
    a = rng.integers(4, size=60)
    b = np.where(rng.random(60) < 0.3, rng.integers(4, size=60), a)
    c = np.where(rng.random(60) < 0.6, rng.integers(4, size=60), a)
    ab, ac, bc = slow_ari(a, b), slow_ari(a, c), slow_ari(b, c)
    assert agreement([a, (a + 1) % 4, 9 - a]) == [1.0, 1.0, 1.0]
    assert agreement([a, b, c]) == pytest.approx([(ab + ac) / 2, (ab + bc) / 2, (ac + bc) / 2])
    assert np.abs(agreement(rng.integers(10, size=(3, 5000)))).max() < 0.01
    assert agreement([a]) == agreement([]) == []
    with pytest.raises(DataError, match="shapes"):
        agreement([a, a[1:]])
