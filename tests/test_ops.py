"""Distances and losses against slow float64 doubles, at their edges and through their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxclust.ops import distances, losses

floats = st.floats(-10, 10, width=32)
rows = st.sampled_from([1, 2, 8])  # few, because each pair of them is compiled
matrices = hnp.arrays(np.float32, st.tuples(rows, st.just(3)), elements=floats)


@settings(max_examples=50)
@given(matrices, matrices)
def test_squared_distances_equal_the_differences(x, c):
    slow = ((x[:, None].astype(np.float64) - c[None]) ** 2).sum(-1)
    fast = np.asarray(jax.jit(distances.squared_distances)(x, c))
    np.testing.assert_allclose(fast, slow, atol=1e-3)
    assert (fast >= 0).all()


def test_squared_distances_to_itself_are_clamped_and_keep_float64():
    x = np.random.default_rng(0).normal(size=(50, 7)) + 100
    assert (np.diag(distances.squared_distances(x.astype(np.float32), x.astype(np.float32))) >= 0).all()
    with jax.enable_x64(True):
        found = distances.squared_distances(jnp.asarray(x), jnp.asarray(x[:3]))
        assert found.dtype == jnp.float64
        slow = ((x[:, None] - x[None, :3]) ** 2).sum(-1)
        np.testing.assert_allclose(found, slow, atol=1e-9)


def test_a_point_on_a_centroid_has_the_distance_zero_without_a_sign():
    x = np.eye(3, dtype=np.float32)
    for num in (1, 2):
        ids, found = jax.jit(distances.nearest, static_argnums=2)(x, x, num)
        assert not np.signbit(found).any() and ids[:, 0].tolist() == [0, 1, 2]
        np.testing.assert_array_equal(found[:, 1:], 2.0)


def test_products_are_of_full_precision_on_every_device():
    x = np.ones((2, 2), np.float32)
    programs = [
        jax.make_jaxpr(distances.squared_distances)(x, x),
        jax.make_jaxpr(lambda x: distances.whiten(x, x[0], x, True))(x),
    ]
    assert all("Precision.HIGHEST" in str(program) for program in programs)


def test_nearest_prefers_the_lowest_index_in_a_tie():
    centroids = np.array([[5, 5], [1, 0], [1, 0], [0, 0]], np.float32)
    x = np.array([[1, 0], [0, 0]], np.float32)
    ids, squared = distances.nearest(x, centroids)
    assert ids.dtype == jnp.int32
    np.testing.assert_array_equal(ids, [[1], [3]])
    np.testing.assert_array_equal(squared, [[0], [0]])
    ids, squared = distances.nearest(x, centroids, num=3)
    np.testing.assert_array_equal(ids, [[1, 2, 3], [3, 1, 2]])
    np.testing.assert_array_equal(squared, [[0, 0, 1], [0, 1, 1]])


def test_normalize_gives_unit_rows_and_exact_zeros_with_finite_gradients():
    x = np.array([[3, 4], [0, 0], [1e-13, 0], [1e-9, 0]], np.float32)
    np.testing.assert_allclose(distances.normalize(x), [[0.6, 0.8], [0, 0], [0, 0], [1, 0]], rtol=1e-6)
    gradient = jax.grad(lambda v: distances.normalize(v)[:, 0].sum())(x)
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[1:3], 0)
    half = distances.normalize(jnp.zeros((2, 3), jnp.float16))
    assert half.dtype == jnp.float16
    np.testing.assert_array_equal(half, 0)


def test_whiten_subtracts_projects_and_normalizes():
    rng = np.random.default_rng(0)
    x, mean, projection = rng.normal(size=(6, 5)), rng.normal(size=5), rng.normal(size=(5, 3))
    slow = (x - mean) @ projection
    np.testing.assert_allclose(distances.whiten(x, mean, projection, False), slow, atol=1e-5)
    unit = slow / np.linalg.norm(slow, axis=1, keepdims=True)
    np.testing.assert_allclose(distances.whiten(x, mean, projection, True), unit, atol=1e-5)


def slow_cross_entropy(logits, targets, weights, num_outputs):
    total = 0.0
    for row, target, weight in zip(logits.astype(np.float64), targets, weights, strict=True):
        shifted = row[:num_outputs] - row[:num_outputs].max()
        total += weight * (np.log(np.exp(shifted).sum()) - shifted[target])
    return total / len(logits)


@pytest.mark.parametrize("num_outputs", [None, 1, 4, 7])
def test_cross_entropy_equals_the_slow_double(num_outputs):
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 30, size=(16, 7)).astype(np.float32)
    targets = rng.integers(0, num_outputs or 7, 16)
    weights = rng.random(16).astype(np.float32)
    fast, gradient = jax.value_and_grad(losses.weighted_cross_entropy)(logits, targets, weights, num_outputs)
    slow = slow_cross_entropy(logits, targets, weights, num_outputs)
    np.testing.assert_allclose(fast, slow, rtol=1e-5, atol=1e-6)
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[:, num_outputs or 7 :], 0)
    np.testing.assert_allclose(gradient.sum(axis=1), 0, atol=1e-6)


def test_a_row_of_weight_zero_counts_in_the_mean_only_and_may_have_any_target():
    logits = np.array([[2, 1, 0], [0, 0, 9]], np.float32)
    weights = np.array([1, 0], np.float32)
    expected = slow_cross_entropy(logits[:1], [0], [1], 2) / 2
    for unassigned in (2, -1):
        loss, gradient = jax.value_and_grad(losses.weighted_cross_entropy)(
            logits, np.array([0, unassigned]), weights, 2
        )
        np.testing.assert_allclose(loss, expected, rtol=1e-6)
        assert np.isfinite(gradient).all()
        np.testing.assert_array_equal(gradient[1], 0)


def test_one_program_serves_every_number_of_outputs_in_at_least_float32():
    loss = jax.jit(losses.weighted_cross_entropy)
    logits, ones = jnp.zeros((4, 8), jnp.bfloat16), jnp.ones(4)
    for count in (2, 5, 8):
        value = loss(logits, jnp.zeros(4, int), ones, count)
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, np.log(count), rtol=1e-6)
    assert loss._cache_size() == 1


def test_accuracy_ignores_outputs_that_are_not_in_use():
    logits = np.array([[0, 1, 9], [2, 1, 9], [0, 1, 9]], np.float32)
    targets = np.array([1, 0, 2])
    np.testing.assert_allclose(losses.accuracy(logits, targets, 2), 2 / 3)
    np.testing.assert_allclose(losses.accuracy(logits, targets), 1 / 3)
