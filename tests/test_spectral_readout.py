"""Spectral read-outs of features against slow doubles (check D11 of our specification)."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxclust.cluster import neighbours, spectral
from jaxclust.errors import ConfigError, DataError
from jaxclust.features.rows import Rows


class Pieces(Rows):
    """An array read in small chunks."""

    def __init__(self, array, chunk=7):
        super().__init__(len(array), array.shape[1:], np.float32, 1 << 30, None)
        self.append(array)
        self.chunk = chunk

    def chunks(self):
        for start in range(0, len(self.array()), self.chunk):
            yield self.array()[start : start + self.chunk]


def read_out(rows, **how):
    points = spectral.normalised(Pieces(np.asarray(rows, np.float32)), **how)
    assert points.array().dtype == np.float32
    return points.array()


def slow(rows, rtol=1e-5, center=False):
    """Dot products of the rows of U_r at unit length, from the projector on the column space."""
    rows = np.asarray(rows, np.float32).astype(np.float64)
    rows = rows - rows.mean(axis=0) * center
    u, s, _ = np.linalg.svd(rows, full_matrices=False)
    projector = u[:, s > rtol * s[0]] @ u[:, s > rtol * s[0]].T
    lengths = np.sqrt(np.diag(projector))
    lengths[lengths < 1e-12] = np.inf
    return projector / lengths / lengths[:, None]


def gaussian(size, dim, seed=0):
    return np.random.default_rng(seed).standard_normal((size, dim))


@pytest.mark.parametrize("size, dim, rank", [(60, 5, 5), (60, 8, 3), (6, 9, 6), (40, 1, 1)])
@pytest.mark.parametrize("center", [False, True])
def test_rows_have_the_dot_products_of_the_projector(size, dim, rank, center):
    rows = gaussian(size, rank) @ gaussian(rank, dim, 1) + 0.5
    rows[3] = 0
    got = read_out(rows, center=center)
    np.testing.assert_allclose(got @ got.T, slow(rows, center=center), atol=2e-6)
    assert got.shape[1] == np.linalg.matrix_rank(rows - rows.mean(axis=0) * center, tol=1e-3)
    assert np.linalg.norm(got, axis=1) == pytest.approx([1.0] * 3 + [float(center)] + [1.0] * (size - 4))


def test_d11_three_orthogonal_groups_are_three_points_whatever_the_scale_in_them():
    group = np.arange(90) % 3
    directions = np.linalg.qr(gaussian(7, 3))[0].T
    rows = directions[group] * np.exp(gaussian(90, 1, 2))
    got = read_out(rows)
    assert got.shape == (90, 3)
    for number in range(3):
        own = got[group == number]
        assert np.abs(own - own[0]).max() < 1e-6
    np.testing.assert_allclose(got @ got.T, group[:, None] == group, atol=1e-6)


@given(st.integers(0, 10**6), st.integers(2, 6))
@settings(max_examples=20)
def test_d11_an_invertible_map_of_the_features_changes_nothing(seed, dim):
    rows = gaussian(30, dim, seed)
    mix = np.linalg.qr(gaussian(dim, dim, seed + 1))[0] * np.geomspace(1, 100, dim)
    a, b = read_out(rows), read_out(rows @ mix)
    np.testing.assert_allclose(a @ a.T, b @ b.T, atol=1e-4)  # 100 times the rounding of float32


def test_scales_of_columns_that_float32_still_tells_apart_do_not_count_as_rank():
    rows = gaussian(50, 4) * np.array([1.0, 1e-8, 1e8, 1.0])
    assert read_out(rows).shape == (50, 4)
    np.testing.assert_allclose(read_out(rows) @ read_out(rows).T, slow(gaussian(50, 4)), atol=1e-5)
    rows[:, 3] = rows[:, 0]
    assert read_out(rows).shape == (50, 3)


def test_rows_without_a_space_are_refused():
    with pytest.raises(DataError, match="all 5 rows are zero"):
        read_out(np.zeros((5, 3)))
    with pytest.raises(DataError, match="all 5 rows are the same"):
        read_out(np.full((5, 3), 0.1), center=True)
    with pytest.raises(DataError, match="the features of row 2"):
        read_out(np.array([[1.0], [2.0], [np.nan]]))


HOW = {"neighbours": 6, "scale": "local", "backend": "jax", "seed": 0}


def blobs(size, dim=4, seed=0):
    """Directions around three orthogonal ones, of any length, and which of them."""
    rng = np.random.default_rng(seed)
    group = np.arange(size) % 3
    rows = np.eye(3, dim)[group] + 0.1 * rng.standard_normal((size, dim))
    return (rows * np.exp(rng.standard_normal((size, 1)))).astype(np.float32), group


@pytest.mark.parametrize("scale", ["local", "median", "cosine"])
def test_the_graph_is_the_one_that_is_defined(scale):
    rows = spectral.unit(gaussian(25, 3)).astype(np.float32)
    rows[1] = rows[0]
    found = neighbours.neighbours(rows, 8, "jax")
    graph = spectral.affinity(found, scale).toarray()
    squared = np.square(rows[:, None].astype(np.float64) - rows).sum(axis=2)
    ids = np.argsort(squared + np.diag(np.full(25, np.inf)), axis=1)[:, :8]
    edge = np.zeros((25, 25), bool)
    np.put_along_axis(edge, ids, True, axis=1)
    distance = np.sqrt(squared)
    own = np.take_along_axis(distance, ids[:, 6:7], axis=1)
    weight = {
        "local": np.exp(-squared / (own * own.T)),
        "median": np.exp(-squared / (2 * np.median(np.take_along_axis(distance, ids, axis=1)) ** 2)),
        "cosine": np.maximum(0, 1 - squared / 2),
    }[scale]
    np.testing.assert_allclose(graph, np.where(edge | edge.T, weight, 0), atol=1e-6)


@pytest.mark.parametrize("scale", ["local", "median", "cosine"])
@pytest.mark.parametrize("dense", [0, 1000])
def test_groups_that_the_graph_tells_apart_are_points(scale, dense, monkeypatch):
    monkeypatch.setattr(spectral, "DENSE", dense)
    rows, group = blobs(180)
    got = spectral.embedding(rows, 3, **{**HOW, "scale": scale})
    assert got.shape == (180, 3) and got.dtype == np.float32
    same = group[:, None] == group
    products = got @ got.T
    assert products[same].min() > 0.9 and np.abs(products[~same]).max() < 0.2


def test_lanczos_finds_the_space_of_the_dense_eigenvectors(monkeypatch):
    rows = np.random.default_rng(0).standard_normal((150, 5)).astype(np.float32)
    dense = spectral.embedding(rows, 4, **HOW)
    monkeypatch.setattr(spectral, "DENSE", 0)
    sparse = spectral.embedding(rows, 4, **HOW)
    np.testing.assert_allclose(sparse @ sparse.T, dense @ dense.T, atol=1e-4)
    np.testing.assert_array_equal(sparse, spectral.embedding(rows, 4, **HOW))


def test_the_read_out_of_the_graph_is_kept_as_the_rows_are():
    rows, _ = blobs(60)
    points = spectral.ng_jordan_weiss(Pieces(rows), 3, deadline=60.0, **HOW)
    np.testing.assert_array_equal(points.array(), spectral.embedding(rows, 3, **HOW))


def test_too_few_rows_for_the_graph_are_refused():
    with pytest.raises(ConfigError, match="njw_neighbours=6 needs at least 7 images; there are 5"):
        spectral.embedding(gaussian(5, 2), 2, **HOW)
    with pytest.raises(ConfigError, match="into 5 clusters needs more rows; there are 5"):
        spectral.embedding(gaussian(5, 2), 5, **HOW)
