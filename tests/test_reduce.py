"""PCA-whitening against a float64 double, through distances: sign and rotation are free."""

import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import pdist

from jaxclust import cluster
from jaxclust.cluster import kmeans_faiss, reduce
from jaxclust.errors import DataError
from jaxclust.features import rows


class Rows(rows.Rows):
    """An array read in chunks; counts how often it was read."""

    def __init__(self, array, chunk=64):
        super().__init__(*np.shape(array)[:1], np.shape(array)[1:], np.float32, 1 << 30, None)
        self.append(array)
        self.chunk, self.reads = chunk, 0

    def chunks(self):
        self.reads += 1
        for start in range(0, len(self.array()), self.chunk):
            yield self.array()[start : start + self.chunk]


def transform(*args, **kwargs):
    points, zeros = reduce.transform(*args, **kwargs)
    return points.array(), zeros


def features(size=300, dim=20, seed=0, offset=3.0):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(size, dim)) @ rng.normal(size=(dim, dim)) + offset).astype(np.float32)


def slow_whitening(x, dim, power=1.0):
    """Through the singular values of the centred matrix, in float64."""
    x = x.astype(np.float64)
    centred = x - x.mean(0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    return u[:, :dim] * s[:dim] * (s[:dim] / np.sqrt(len(x))) ** -power


@pytest.mark.parametrize("power", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("l2", [True, False])
@pytest.mark.parametrize("size, dim, kept", [(300, 20, 8), (300, 20, 20), (30, 90, 12)])
def test_pairwise_distances_are_those_of_the_slow_double(size, dim, kept, power, l2):
    x = features(size, dim)
    slow = slow_whitening(x, kept, power)
    if l2:
        slow /= np.linalg.norm(slow, axis=1, keepdims=True)
    whitening, _ = reduce.fit(Rows(x), kept, power=power)
    fast, zeros = transform(Rows(x, 7), whitening, l2=l2)
    assert fast.dtype == np.float32 and fast.shape == (size, kept) and zeros == 0
    np.testing.assert_allclose(pdist(fast), pdist(slow), atol=1e-3)
    if l2:
        np.testing.assert_allclose(np.linalg.norm(fast, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("size, dim, kept", [(400, 20, 12), (40, 100, 20)])
def test_the_whitened_scatter_is_the_identity(size, dim, kept):
    x = features(size, dim)
    whitening, info = reduce.fit(Rows(x), kept)
    z = transform(Rows(x), whitening, l2=False)[0].astype(np.float64)
    np.testing.assert_allclose(z.T @ z / size, np.eye(kept), atol=1e-4)
    np.testing.assert_allclose(z.mean(0), 0, atol=1e-4)
    assert info["floored"] == 0 and info["dim"] == kept and 0 < info["variance"] < 1


def test_a_far_mean_costs_no_accuracy():
    x = features(offset=1000.0)
    near, _ = reduce.fit(Rows(x - 1000), 10)
    far, _ = reduce.fit(Rows(x, chunk=11), 10)
    np.testing.assert_allclose(far.projection, near.projection, rtol=1e-3, atol=1e-4)


@settings(max_examples=20)
@given(st.integers(1, 130))
def test_the_chunks_do_not_matter_and_are_read_once(chunk):
    x = features(120, 6)
    whole, _ = reduce.fit(Rows(x, 120), 6)
    chunked = Rows(x, chunk)
    pieces, _ = reduce.fit(chunked, 6)
    assert chunked.reads == 1
    np.testing.assert_allclose(pieces.mean, whole.mean, rtol=1e-6)
    np.testing.assert_allclose(pieces.projection, whole.projection, rtol=1e-4, atol=1e-6)


def test_the_kept_variance_is_that_of_the_components():
    x = features()
    _, info = reduce.fit(Rows(x), 5)
    s = np.linalg.svd(x.astype(np.float64) - x.mean(0, dtype=np.float64), compute_uv=False) ** 2
    assert info["variance"] == pytest.approx(s[:5].sum() / s.sum(), rel=1e-6)


def test_fewer_rows_than_datareduce_the_dimension_with_a_warning(caplog):
    cluster.warn_once.cache_clear()
    x = np.random.default_rng(0).normal(size=(100, 4096)).astype(np.float32)
    with caplog.at_level(logging.WARNING):
        whitening, info = reduce.fit(Rows(x), 256)
    assert "cluster.pca_dim=256 is reduced to 99" in caplog.text
    assert info["dim"] == 99 and whitening.projection.shape == (4096, 99)
    z, zeros = transform(Rows(x), whitening, l2=True)
    assert np.isfinite(z).all() and zeros == 0


@pytest.mark.parametrize("size, dim", [(50, 8), (8, 50)])
@pytest.mark.parametrize("value", [0.0, 0.1, -1e6])
@pytest.mark.parametrize("power", [1.0, 0.5, 0.0])
def test_constant_databecome_zero_rows(size, dim, value, power):
    constant = Rows(np.full((size, dim), value), chunk=3)
    whitening, info = reduce.fit(constant, 4, power=power)
    assert whitening.projection.shape == (dim, 4)
    for l2 in (True, False):
        z, zeros = transform(constant, whitening, l2=l2)
        np.testing.assert_array_equal(z, 0)
        assert zeros == size


@pytest.mark.parametrize("size, dim", [(200, 30), (20, 30)])
def test_low_rank_keeps_the_shape_and_floors_what_is_missing(size, dim):
    x = features(size, 3) @ np.random.default_rng(1).normal(size=(3, dim))
    whitening, info = reduce.fit(Rows(x), 10)
    assert whitening.projection.shape == (dim, 10) and np.isfinite(whitening.projection).all()
    assert info["floored"] == 7 and info["variance"] == pytest.approx(1)
    z, _ = transform(Rows(x), whitening, l2=False)
    assert np.abs(z[:, 3:]).max() < 0.05 < np.abs(z[:, :3]).max()  # what is missing stays small


def test_signs_are_fixed_and_two_fits_are_equal():
    x = features()
    first, _ = reduce.fit(Rows(x), 10)
    second, _ = reduce.fit(Rows(x), 10)
    np.testing.assert_array_equal(first.projection, second.projection)
    peaks = np.abs(first.projection).argmax(0)
    assert (first.projection[peaks, np.arange(10)] > 0).all()


def test_dimension_zero_only_subtracts_the_mean():
    x = features(50, 6)
    whitening, info = reduce.fit(Rows(x, 7), 0)
    assert info == {"variance": 1.0, "dim": 6, "floored": 0}
    z, _ = transform(Rows(x), whitening, l2=False)
    np.testing.assert_allclose(z, x - x.mean(0), atol=1e-5)


def test_rotating_and_scaling_the_dataleaves_the_clusters():
    x = features(400, 10, offset=0.0)
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(10, 10)))[0]
    moved = 2.5 * x @ rotation + np.arange(10)
    labels = []
    for data in (x, moved):
        z, _ = transform(Rows(data), reduce.fit(Rows(data), 6)[0], l2=True)
        labels.append(kmeans_faiss.kmeans(z, 5, 0, initial_ids=np.arange(5)).labels)
    np.testing.assert_array_equal(*labels)


@pytest.mark.parametrize("size, dim, row", [(100, 6, 77), (10, 20, 8)])
@pytest.mark.parametrize("fit_dim", [0, 4])
def test_bad_rows_are_named_by_their_id(size, dim, row, fit_dim):
    x = features(size, dim)
    whitening, _ = reduce.fit(Rows(x), fit_dim)
    x[row, 1] = np.nan
    with pytest.raises(DataError, match=f"row {row} "):
        reduce.fit(Rows(x, 9), fit_dim)
    with pytest.raises(DataError, match=f"row {row} "):
        transform(Rows(x, 9), whitening, l2=True)


def test_one_row_is_too_few():
    with pytest.raises(DataError, match="1 rows .* at least 2"):
        reduce.fit(Rows(features(1)), 4)
