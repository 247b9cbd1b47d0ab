"""Certainty of assignments and weights of images, against closed forms and slow doubles (UAD, checks 6 to 16)."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit

from jaxclust.cluster import fuzzy
from jaxclust.errors import DataError

FORMS = sorted(fuzzy.FORMS)


def nearest(x, centroids, r):
    """Squared distances [N, r], ascending, and labels, in float64."""
    squared = ((x[:, None] - centroids[None]) ** 2).sum(axis=2)
    return np.sort(squared, axis=1)[:, :r], squared.argmin(axis=1)


def slow_memberships(distances, m):
    """Fuzzy c-means as Bezdek writes it, one ratio at a time."""
    u = np.zeros(distances.shape)
    for i, row in enumerate(distances):
        for j, own in enumerate(row):
            u[i, j] = 1 / sum(((own + 1e-6) / (other + 1e-6)) ** (1 / (m - 1)) for other in row)
    return u


def blobs(seed=0, per=40, k=4, dim=3):
    rng = np.random.default_rng(seed)
    centres = rng.normal(0, 3, (k, dim))
    return np.concatenate([c + rng.normal(0, 1, (per, dim)) for c in centres]), centres


@pytest.mark.parametrize("m", [1.5, 2.0, 3.0])
def test_6_memberships_are_those_of_fuzzy_c_means(m):
    distances, _ = nearest(*blobs(), r=4)
    got = fuzzy.memberships(distances, m)
    np.testing.assert_allclose(got, slow_memberships(distances, m), atol=1e-5)
    np.testing.assert_allclose(got.sum(axis=1), 1, atol=1e-12)


@pytest.mark.parametrize(
    ("row", "first", "c", "tolerance"),
    [
        ((0.2, 0.6), 0.75, 0.5, 1e-5),
        ((1.0, 1.0), 0.5, 0.0, 1e-12),
        ((0.0, 1.0), 1.0, 1.0, 1e-5),
        ((0.0, 0.0, 1.0), 0.5, 0.25, 1e-5),
        ((0.3, np.inf), 1.0, 1.0, 1e-12),  # an empty cluster has no members
    ],
)
def test_7_closed_forms(row, first, c, tolerance):
    distances = np.array([row], np.float32)
    assert fuzzy.memberships(distances, 2.0)[0, 0] == pytest.approx(first, abs=tolerance)
    assert fuzzy.certainty("fcm", distances, np.zeros(1, int), 2.0)[0] == pytest.approx(c, abs=tolerance)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale", [10.0, 0.1])
def test_8_the_scale_of_distances_does_not_matter(form, scale):
    distances, labels = nearest(*blobs(), r=4)
    distances += 0.5  # far above epsilon
    a = fuzzy.certainty(form, distances, labels, 2.0)
    np.testing.assert_allclose(fuzzy.certainty(form, scale * distances, labels, 2.0), a, atol=1e-4)


@given(st.integers(0, 10_000), st.sampled_from(["fcm"]), st.floats(1.2, 4.0))
@settings(max_examples=40)
def test_9_nearer_to_the_own_centroid_is_never_less_certain(seed, form, m):
    rng = np.random.default_rng(seed)
    centroids = rng.normal(size=(5, 3))
    x = rng.normal(size=3)
    own = centroids[((x - centroids) ** 2).sum(axis=1).argmin()]
    path = x + np.linspace(0, 1, 20)[:, None] * (own - x)
    distances, labels = nearest(path, centroids, 5)
    assert (np.diff(fuzzy.certainty(form, distances, labels, m)) >= -1e-9).all()


def test_9_half_way_between_two_centroids_is_no_certainty():
    distances, labels = nearest(np.zeros((1, 2)), np.array([[1.0, 0], [-1, 0]]), 2)
    assert fuzzy.certainty("fcm", distances, labels, 2.0)[0] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("direction", ["certain", "uncertain"])
def test_10_weights_have_mean_one_a_floor_and_a_ceiling(form, direction):
    distances, labels = nearest(*blobs(), r=4)
    c = fuzzy.certainty(form, distances, labels, 2.0)
    w = fuzzy.weights(c, strength=0.7, power=2.0, largest=2.0, direction=direction)
    assert w.dtype == np.float32 and w.mean() == pytest.approx(1, abs=1e-6)
    assert w.min() >= 0.3 - 1e-6
    q = (c if direction == "certain" else 1 - c) ** 2
    unclipped = 0.3 + 0.7 * q / q.mean()
    assert w.max() * np.minimum(unclipped, 2.0).mean() <= 2.0 + 1e-5
    order = np.argsort(c, kind="stable")
    steps = np.diff(w[order]) if direction == "certain" else -np.diff(w[order])
    assert (steps >= -1e-6).all()


def test_10_no_strength_is_no_weight():
    w = fuzzy.weights(np.linspace(0, 1, 9), strength=0.0, power=1.0, largest=5.0, direction="certain")
    np.testing.assert_array_equal(w, 1)


@pytest.mark.parametrize("form", FORMS)
def test_12_equal_rows_and_single_centroids_give_numbers(form, caplog):
    labels = np.zeros(6, int)
    for distances in (np.zeros((6, 3)), np.ones((6, 1)), np.zeros((6, 1))):
        c = fuzzy.certainty(form, distances, labels, 2.0)
        if form in fuzzy.COMPARING and distances.shape[1] == 1:
            assert c is None and "every image weighs 1" in caplog.text
            continue
        assert np.isfinite(c).all() and ((c >= 0) & (c <= 1)).all()
        w = fuzzy.weights(c, strength=0.5, power=1.0, largest=5.0, direction="certain")
        np.testing.assert_allclose(w, 1, rtol=1e-6)


def test_a_distance_that_is_no_number_names_its_image():
    distances = np.ones((4, 2))
    distances[2, 0] = np.nan
    with pytest.raises(DataError, match="image 2"):
        fuzzy.certainty("fcm", distances, np.zeros(4, int), 2.0)


def test_13_a_cluster_of_one_is_not_the_most_certain():
    c = np.array([0.2, 0.4, 0.6, 1.0])
    labels = np.array([0, 0, 0, 1])
    np.testing.assert_allclose(fuzzy.capped(c, labels, 2), [0.2, 0.4, 0.6, 0.5])
    np.testing.assert_array_equal(fuzzy.capped(c, labels, 1), c)


def test_possibilistic_is_measured_by_the_spread_of_the_own_cluster():
    own = np.array([0.5, 1.5, 4.0, 12.0, 7.0])
    labels = np.array([0, 0, 1, 1, 2])
    c = fuzzy.certainty("possibilistic", own[:, None], labels, 2.0)
    scale = np.array([1.0, 1.0, 8.0, 8.0, own.mean()])  # the last cluster has one image
    np.testing.assert_allclose(c, 1 / (1 + own / scale))


def test_gauss_and_rank_are_their_formulas():
    own = np.array([1.0, 3.0, 3.0, 0.5])
    labels = np.array([0, 0, 0, 1])
    np.testing.assert_allclose(fuzzy.certainty("gauss", own[:, None], labels, 2.0), np.exp(-own / (2 * own.mean())))
    expected = [1 - 0.5 / 3, 1 - 2 / 3, 1 - 2 / 3, 0.5]
    np.testing.assert_allclose(fuzzy.certainty("rank", own[:, None], labels, 2.0), expected)


def test_15_images_drawn_uniformly_over_clusters_weigh_one_in_the_mean():
    rng = np.random.default_rng(0)
    sizes = (1000, 100, 10)
    labels = np.repeat(np.arange(3), sizes)
    w = fuzzy.weights(rng.random(len(labels)) ** (1 + labels), strength=0.9, power=1, largest=9, direction="certain")
    w = w / fuzzy.sampler_scale(w, labels)
    clusters = rng.integers(0, 3, 100_000)
    starts = np.cumsum((0, *sizes[:-1]))
    drawn = starts[clusters] + (rng.random(100_000) * np.array(sizes)[clusters]).astype(int)
    assert w[drawn].mean() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("seed", range(4))
def test_16_certainty_tells_right_labels_from_wrong_ones(seed):
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(seed)
    centres = np.array([[0, 0], [2.5, 0], [1.2, 2.2]])
    truth = np.repeat(np.arange(3), 300)
    x = centres[truth] + rng.normal(0, 0.9, (900, 2))
    distances, labels = nearest(x, centres, 3)
    c = fuzzy.certainty("fcm", distances, labels, 2.0)
    assert roc_auc_score(labels == truth, c) >= 0.70
    certain, uncertain = (
        fuzzy.weights(c, strength=0.5, power=1, largest=1e9, direction=d) for d in ("certain", "uncertain")
    )
    np.testing.assert_array_equal(np.argsort(certain, kind="stable"), np.argsort(-uncertain, kind="stable"))


def test_two_centroids_make_the_relative_margin():
    near, far = np.random.default_rng(0).uniform(0.1, 2, (2, 50))
    distances = np.sort(np.stack([near, far], axis=1), axis=1)
    c = fuzzy.certainty("fcm", distances, np.zeros(50, int), 2.0)
    np.testing.assert_allclose(c, (distances[:, 1] - distances[:, 0]) / distances.sum(axis=1), atol=1e-5)
    logits = np.log(distances[:, 1] / distances[:, 0])
    np.testing.assert_allclose(fuzzy.memberships(distances, 2.0)[:, 0], expit(logits), atol=1e-5)
