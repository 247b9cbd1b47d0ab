"""What judges features by labels: nearest neighbours, retrieval, k-means and few labels, each against a slow double."""

import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small import with_settings

from jaxclust import config as config_lib
from jaxclust.errors import ConfigError, DataError
from jaxclust.evaluation import _similar, kmeans, knn, linear, lowlabel, retrieval, suite
from jaxclust.evaluation.suite import Images, Seen
from jaxclust.features.rows import Rows
from jaxclust.jobs import evaluate


def seen(rows, labels, folder="/nowhere"):
    """A split of rows in memory."""
    filled = Rows(len(rows), (rows.shape[1],), np.dtype(np.float32), 10**9, folder)
    filled.append(np.asarray(rows, np.float32))
    return Seen(lambda: filled.finish(), np.asarray(labels, np.int32))


def no_probes():
    raise AssertionError("nobody asked for probes")


def images(train, test=None):
    return Images(seen(*train), test and seen(*test), no_probes)


def config(**overrides):
    return with_settings(config_lib.base(), **overrides)


def unit(rows):
    rows = np.asarray(rows, np.float64)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norms > 0, norms, 1)


def slow_order(query, bank, labels, own):
    """Ids of labelled bank rows by falling cosine and rising id, without the query itself."""
    similarity = unit(bank) @ unit(query[None])[0]
    ids = [i for i in range(len(bank)) if labels[i] >= 0 and i != own]
    return sorted(ids, key=lambda i: (-similarity[i], i)), similarity


def slow_knn(train, test, k, temperature):
    """Votes image by image, in float64."""
    (bank, bank_labels), (queries, labels) = train, test or train
    hits = []
    for number, (query, label) in enumerate(zip(queries, labels, strict=True)):
        if label < 0:
            continue
        order, similarity = slow_order(query, bank, bank_labels, None if test else number)
        votes = {}
        for i in order[:k]:
            votes[bank_labels[i]] = votes.get(bank_labels[i], 0) + np.exp(similarity[i] / temperature)
        guesses = sorted(votes, key=lambda c: (-votes[c], c))[:5]
        hits.append((guesses[:1] == [label], label in guesses))
    return np.mean(hits, axis=0)


def slow_retrieval(rows, labels, ks):
    """R@K, MAP@R and R-precision as they are defined, query by query."""
    recalls, precisions, shares = [], [], []
    for number, label in enumerate(labels):
        r = int(np.sum(labels == label)) - 1
        if label < 0 or r == 0:
            continue
        order, _ = slow_order(rows[number], rows, labels, number)
        right = [labels[i] == label for i in order]
        recalls.append([any(right[:k]) for k in ks])
        precisions.append(sum(np.mean(right[: i + 1]) for i in range(r) if right[i]) / r)
        shares.append(np.mean(right[:r]))
    return np.mean(recalls, axis=0), np.mean(precisions), np.mean(shares)


def clouds(n=60, dim=6, classes=4, seed=0):
    """Rows about a centre for each class, and the classes."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    centres = np.random.default_rng(99).standard_normal((classes, dim))
    return centres[labels] + 0.8 * rng.standard_normal((n, dim)), labels


# Signed axes have exact products, so equal similarities are equal in every precision.
axes = st.lists(st.tuples(st.integers(-3, 3), st.integers(-1, 3)), min_size=3, max_size=25)


def rows_on_axes(pairs):
    places, labels = np.array(pairs).T
    rows = np.zeros((len(places), 3))
    used = places != 0  # 0 is a row of zeros
    rows[np.flatnonzero(used), np.abs(places[used]) - 1] = np.sign(places[used])
    return rows, labels


@pytest.mark.parametrize("k", [1, 7, 500])
def test_knn_is_that_of_the_slow_double(k):
    train, test = clouds(), clouds(31, seed=1)
    test[1][3] = -1
    train[1][[0, 5]] = -1
    for others in (test, None):
        got = knn.compare(images(train, others), config(evaluate__knn_k=k))
        assert (got["knn/top1"], got["knn/top5"]) == pytest.approx(tuple(slow_knn(train, others, k, 0.07)))
    assert got["knn/top1"] > 0.5


def test_knn_takes_little_from_far_neighbours_at_a_low_temperature():
    bank = np.array([[1, 0], [0.6, 0.8], [0.6, 0.8]]), np.array([0, 1, 1])
    query = np.array([[1, 0]]), np.array([0])
    low, high = (knn.compare(images(bank, query), config(evaluate__knn_temperature=t))["knn/top1"] for t in (0.1, 10.0))
    assert (low, high) == (1, 0)
    assert knn.compare(images(bank, query), config(evaluate__knn_temperature=1e-6))["knn/top1"] == 1


@settings(max_examples=40)
@given(axes, st.integers(1, 6))
def test_ties_of_neighbours_go_to_the_lower_id(pairs, k):
    train = rows_on_axes(pairs)
    if np.sum(train[1] >= 0) < 2:
        return
    got = knn.compare(images(train), config(evaluate__knn_k=k))
    assert (got["knn/top1"], got["knn/top5"]) == pytest.approx(tuple(slow_knn(train, None, k, 0.07)))


@settings(max_examples=40)
@given(axes)
def test_retrieval_is_that_of_the_slow_double_ties_included(pairs):
    rows, labels = rows_on_axes(pairs)
    known = labels[labels >= 0]
    if not (np.unique(known, return_counts=True)[1] > 1).any():
        with pytest.raises(DataError, match="none of .* images shares its class"):
            retrieval.compare(images((rows, labels)), config())
        return
    recalls, precision, share = slow_retrieval(rows, labels, (1, 2, 4, 8))
    got = retrieval.compare(images((rows, labels)), config())
    assert [got[f"retrieval/r@{k}"] for k in (1, 2, 4, 8)] == pytest.approx(recalls.tolist())
    assert (got["retrieval/map@r"], got["retrieval/r-precision"]) == pytest.approx((precision, share))


def test_retrieval_searches_the_test_split_and_says_what_it_leaves_out(caplog):
    train, (rows, labels) = clouds(), clouds(30, seed=1)
    labels[0], labels[1] = 9, -1
    with caplog.at_level(logging.WARNING):
        got = retrieval.compare(images(train, (rows, labels)), config(evaluate__recall_at=(1, 3)))
    assert "1 images that are alone in their class are left out" in caplog.text
    recalls, precision, share = slow_retrieval(rows, labels, (1, 3))
    expected = {"r@1": recalls[0], "r@3": recalls[1], "map@r": precision, "r-precision": share}
    expected |= {"queries": 28, "left_out": 1}
    assert got == pytest.approx({f"retrieval/{name}": value for name, value in expected.items()})


def test_map_at_r_of_a_case_by_hand():
    relevant = np.array([[True, False, True, True], [False, True, True, True]])
    got = retrieval.average_precision(relevant, np.array([3, 2]))
    assert got == pytest.approx([(1 + 2 / 3) / 3, (1 / 2) / 2])
    assert retrieval.r_precision(relevant, np.array([3, 2])) == pytest.approx([2 / 3, 1 / 2])


def test_the_blocks_of_the_search_do_not_show(monkeypatch):
    rows, labels = clouds(101)
    whole = list(_similar.most_similar(*(2 * [seen(rows, labels).rows()]), 9, labels >= 0, ""))
    monkeypatch.setattr(_similar, "_QUERIES", 16)
    monkeypatch.setattr(_similar, "_BANK", 13)
    parts = list(_similar.most_similar(*(2 * [seen(rows, labels).rows()]), 9, labels >= 0, ""))
    assert len(whole) == 1 and len(parts) == 7
    np.testing.assert_array_equal(np.concatenate([p.ids for p in parts]), whole[0].ids)
    np.testing.assert_array_equal(np.concatenate([p.neighbours for p in parts]), whole[0].neighbours)
    np.testing.assert_allclose(np.concatenate([p.similarity for p in parts]), whole[0].similarity, atol=1e-6)


def test_features_that_are_not_finite_are_refused():
    rows, labels = clouds()
    rows[3, 1] = np.nan
    for module in (knn, retrieval):
        with pytest.raises(DataError, match="row 3 hold NaN"):
            module.compare(images((rows, labels)), config())


def test_kmeans_finds_classes_that_are_far_apart_in_any_dimension():
    for dim in (2, 40):
        rng = np.random.default_rng(0)
        labels = np.arange(90) % 3
        rows = 10 * rng.standard_normal((3, dim))[labels] + 0.1 * rng.standard_normal((90, dim))
        labels[4] = -1
        got = kmeans.compare(images((rows, labels)), config(cluster__runs=3, cluster__l2=False, cluster__k=7))
        assert got["kmeans/k"] == 3 and got["kmeans/acc"] == got["kmeans/nmi"] == 1
        pic = config(cluster__runs=3, cluster__l2=False, cluster__method="pic")
        assert kmeans.compare(images((rows, labels)), pic)["kmeans/acc"] == 1


def test_few_labels_are_drawn_alike_of_each_class_and_by_seed():
    labels = np.r_[np.repeat([0, 1, 2], [600, 300, 100]), np.full(50, -1)].astype(np.int32)
    for share, each in ((0.01, 3), (0.1, 33), (1e-6, 1)):
        drawn = lowlabel.draw(labels, share, (0, 0))
        assert np.bincount(labels[drawn]).tolist() == [each] * 3 and (np.diff(drawn) > 0).all()
    assert np.bincount(labels[lowlabel.draw(labels, 0.5, (0, 0))]).tolist() == [167, 167, 100]
    np.testing.assert_array_equal(lowlabel.draw(labels, 0.1, (0, 1)), lowlabel.draw(labels, 0.1, (0, 1)))
    assert (lowlabel.draw(labels, 0.1, (0, 1)) != lowlabel.draw(labels, 0.1, (0, 2))).any()


def test_more_labels_help_and_those_learnt_from_are_not_judged():
    train, test = clouds(400), clouds(200, seed=1)
    got = lowlabel.compare(images(train, test), config())
    assert 0.3 < got["lowlabel/1pct/top1"] < got["lowlabel/10pct/top1"] < 1 and got["lowlabel/1pct/top1_std"] > 0
    rng = np.random.default_rng(0)  # classes that cannot be learnt, only be known by heart
    noise = rng.standard_normal((200, 400)), rng.permutation(200) % 2
    alone = lowlabel.compare(images(noise), config(evaluate__lowlabel_percent=(50.0,)))
    assert alone["lowlabel/50pct/top1"] < 0.65
    with pytest.raises(DataError, match="all 200 labelled training images were drawn"):
        lowlabel.compare(images(noise), config(evaluate__lowlabel_percent=(100.0,)))
    with pytest.raises(DataError, match="of one class"):
        lowlabel.compare(images((noise[0], np.zeros(200))), config())


def test_linear_reports_the_last_epoch_and_the_best():
    curve = [{"top1": a, "top5": 0.9, "loss": 1.0} for a in (0.2, 0.7, 0.7, 0.6)]
    got = linear.compare(Images(None, None, lambda: {"conv3": curve}), config())
    assert got == {
        "linear/conv3/top1": 0.6, "linear/conv3/top5": 0.9, "linear/conv3/loss": 1.0,
        "linear/conv3/top1_best": 0.7, "linear/conv3/best_epoch": 2.0,
    }  # fmt: skip


def test_hits_of_log_probabilities():
    probabilities = np.array([[5, 2, 1, 1, 1, 1, 1], [3, 3, 4, 1, 1, 1, 1], [1] * 7, [1] * 7]) / 14
    right, five, loss = linear.hits(np.log(probabilities), np.array([0, 1, 5, -1]))
    assert (right, five) == (1, 2)  # of equal ones the lower class comes first: 1 is third, 5 is sixth
    assert loss == pytest.approx(-np.log([5 / 14, 3 / 14, 1 / 14]).sum())


def test_the_suite_compares_only_what_was_asked_for_and_makes_features_once():
    made = []

    def rows():
        made.append(1)
        return seen(*clouds()).rows()

    two = Images(Seen(rows, clouds()[1].astype(np.int32)), None, no_probes)
    got = suite.run_comparisons(two, config(evaluate__suite="clustering,knn,retrieval"))
    assert {key.partition("/")[0] for key in got} == {"knn", "retrieval"} and made == [1]
    assert not suite.compares(config(evaluate__suite="clustering,silhouette"))
    assert suite.evaluate({"cluster": np.arange(4) % 2}, None, config(evaluate__suite="clustering,knn"), rows)
    assert made == [1]


def test_comparisons_without_labels_are_refused_and_the_others_listed():
    asked = config(evaluate__suite="knn, clustering,linear")
    for labels in (None, np.full(9, -1)):
        with pytest.raises(ConfigError) as error:
            suite.check(asked, {"train": labels, "test": np.array([0, -1, 1])})
        message = str(error.value)
        assert "suite asks for knn, linear, which" in message and "train: 0 known, test: 2 known" in message
        assert "Without labels there is: clustering, groups, heads, silhouette" in message
        suite.check(config(evaluate__suite="clustering,silhouette"), {"train": labels})
    suite.check(asked, {"train": np.arange(9)})


def test_what_learns_classes_is_refused_where_the_test_has_none_of_them():
    asked = config(evaluate__suite="readouts,knn,retrieval,linear,lowlabel,kmeans")
    with pytest.raises(ConfigError, match="suite asks for knn, linear, lowlabel, which learn classes .* readouts"):
        suite.check(asked, {"train": np.array([0, 1, -1]), "test": np.array([2, 3, -1])})
    for test in (np.array([1, 2]), np.array([-1]), None):
        suite.check(asked, {"train": np.array([0, 1]), "test": test})
    suite.check(config(evaluate__suite="readouts,kmeans"), {"train": np.array([0]), "test": np.array([2])})


@pytest.mark.parametrize("name", ["recall_at", "lowlabel_percent"])
def test_lists_of_numbers_are_checked(name):
    for wrong in ((), (0,), (True,), ("1",)):
        made = config_lib.base()
        made.evaluate[name] = wrong
        with pytest.raises(ConfigError, match=f"config.evaluate.{name}=.* must be .*numbers from"):
            config_lib.validate(made)


def test_bad_features_name_the_evaluation():
    rows, labels = clouds()
    rows[0, 0] = np.inf
    with pytest.raises(DataError, match="evaluation 'knn': the features of row 0"):
        suite.run_comparisons(images((rows, labels)), config(evaluate__suite="knn"))


def test_other_evaluations_of_the_same_checkpoint_are_kept():
    config = config_lib.base()
    config.evaluate.suite = "clustering,knn"
    before = {"train/acc": 0.5, "knn/top1": 0.1, "knn/top5": 0.2, "linear/conv1/top1": 0.3, "step": 40}
    same, later = ({"train/acc": 0.5, "knn/top1": 0.1, "step": step} for step in (40, 80))
    assert evaluate.kept(before, same, config) == {"train/acc": 0.5, "linear/conv1/top1": 0.3, "step": 40}
    assert evaluate.kept(before, later, config) == evaluate.kept({}, same, config) == {}
    config.data.source, config.freeze_body, config.rounds = "features:rows.npz", True, 0
    assert evaluate.kept(before, same, config) == {}  # the file may hold other vectors by now
