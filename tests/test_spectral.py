"""The DSCL objective against dense float64 doubles (checks D1 to D6 and D10 of its specification)."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxclust.config import base
from jaxclust.evaluation import readouts, retrieval
from jaxclust.evaluation.clustering import accuracy
from jaxclust.features.rows import Rows
from jaxclust.ops import spectral
from jaxclust.ops.spectral import Rule, dscl_loss


def one_hot(labels, classes):
    return np.eye(classes)[labels]


def case(n=40, d=6, classes=7, seed=0, absent=0):
    """Embeddings and indicators of unbalanced classes, of which the first `absent` have no image."""
    rng = np.random.default_rng(seed)
    share = rng.random(classes - absent) ** 2 + 0.05
    labels = absent + rng.choice(classes - absent, n, p=share / share.sum())
    return rng.normal(size=(n, d)) * rng.uniform(0.1, 10, d), one_hot(labels, classes)


def single(*arrays):
    return tuple(np.asarray(array, np.float32) for array in arrays)


def slow(f, y, ridge=None):
    """L and its gradient with n x n matrices: C = Y N^-1 Y' and P = F F^+, or of a ridge F (F'F + lam)^-1 F'."""
    f, y = np.float64(f), np.float64(y)
    c = y / np.maximum(y.sum(axis=0), 1) @ y.T
    present = np.count_nonzero(y.sum(axis=0))
    if ridge is None:
        inverse = np.linalg.pinv(f, rcond=1e-12)
    else:
        inverse = np.linalg.inv(f.T @ f + ridge * np.eye(f.shape[1])) @ f.T
    p = f @ inverse
    return present - np.trace(c @ p), -2 * (np.eye(len(f)) - p) @ c @ inverse.T


def differences(function, f, step=1e-6):
    """The gradient of `function` by central differences."""
    found = np.zeros_like(f)
    for place in np.ndindex(*f.shape):
        moved = np.zeros_like(f)
        moved[place] = step
        found[place] = (function(f + moved) - function(f - moved)) / (2 * step)
    return found


@partial(jax.jit, static_argnums=2)  # tests share shapes, so that few programs are compiled
def everything(f, y, rule=spectral.EXACT):
    """All that is found, and the gradient of the loss."""

    def loss(f):
        found = dscl_loss(f, y, rule)
        return found.loss, found

    (_, found), gradient = jax.value_and_grad(loss, has_aux=True)(f)
    return found, gradient


def value_and_gradient(f, y, rule=spectral.EXACT):
    found, gradient = everything(f, y, rule)
    return np.asarray(found.loss), np.asarray(gradient)


@pytest.mark.parametrize("classes, absent", [(7, 0), (7, 3), (7, 6)], ids=["unbalanced", "absent", "one class"])
def test_d1_the_loss_is_that_of_explicit_projectors(classes, absent, float64):
    f, unbalanced = case(classes=classes, absent=absent)
    balanced = one_hot(absent + np.arange(40) % (classes - absent), classes)
    for y in (unbalanced, balanced):
        expected, gradient = slow(f, y)
        value, found = value_and_gradient(f, y)
        assert abs(value - expected) < 1e-10
        np.testing.assert_allclose(found, gradient, atol=1e-10)
        value, found = value_and_gradient(*single(f, y))
        assert value.dtype == np.float32 and value == pytest.approx(expected, rel=1e-5)
        np.testing.assert_allclose(found, gradient, atol=1e-5 * np.abs(gradient).max() + 1e-6)


def test_d1_embeddings_that_hold_the_classes_have_no_loss():
    rng = np.random.default_rng(0)
    y = one_hot(np.arange(40) % 6, 7)
    found, _ = everything(*single(y[:, :6] @ rng.normal(size=(6, 6)), y))
    assert 0 <= found.loss < 1e-6 and found.rank == 6
    missing, _ = everything(*single(y[:, :4] @ rng.normal(size=(4, 6)), y))
    assert missing.loss == pytest.approx(2, abs=1e-5) and missing.rank == 4  # K_b - d at least


def test_d2_the_gradient_is_that_of_differences_and_of_a_differentiated_decomposition(float64):
    f, y = case()

    def dense(f):
        q, _ = jnp.linalg.qr(f)
        j = y / np.sqrt(np.maximum(y.sum(axis=0), 1))
        return np.count_nonzero(y.sum(axis=0)) - jnp.sum((q.T @ j) ** 2)

    _, found = value_and_gradient(f, y)
    np.testing.assert_allclose(found, differences(lambda f: slow(f, y)[0], f), atol=1e-6)
    np.testing.assert_allclose(found, jax.jit(jax.grad(dense))(f), atol=1e-10)
    _, half = value_and_gradient(f, y, Rule(grad_scale=0.5))
    inverse, n = np.linalg.pinv(f), np.maximum(y.sum(axis=0), 1)
    np.testing.assert_allclose(half, (f @ (inverse @ y) - y) @ (inverse @ (y / n)).T, atol=1e-10)


def test_the_gradient_flows_through_unit_rows_and_scales_with_what_follows(float64):
    f, y = case()
    rule = Rule(row_normalize=True)
    _, found = value_and_gradient(f, y, rule)
    unit = lambda f: f / np.linalg.norm(f, axis=1, keepdims=True)  # noqa: E731
    np.testing.assert_allclose(found, differences(lambda f: slow(unit(f), y)[0], f), atol=1e-6)
    tripled = jax.jit(jax.grad(lambda f: 3 * dscl_loss(f, jnp.asarray(y), rule).loss))(f)
    np.testing.assert_allclose(tripled, 3 * found, rtol=1e-12)
    zero = np.where(np.arange(40)[:, None] == 4, 0, f)
    assert np.isfinite(value_and_gradient(zero, y, rule)[1]).all()


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.integers(0, 6))
def test_d3_only_the_column_space_matters(seed, absent):
    with jax.enable_x64(True):
        f, y = case(seed=seed, absent=absent)
        rng = np.random.default_rng(seed)
        a = np.linalg.qr(rng.normal(size=(6, 6)))[0] * rng.uniform(0.2, 5, 6)
        value, g = value_and_gradient(f, y)
        assert abs(value_and_gradient(f @ a, y)[0] - value) < 1e-9
        assert abs(np.sum(f * g)) < 1e-10 and abs(everything(f, y)[0].surrogate) < 1e-10
        scaled, of_scaled = value_and_gradient(7 * f, y)
        assert abs(scaled - value) < 1e-10
        np.testing.assert_allclose(of_scaled, g / 7, atol=1e-12)
        assert -1e-12 <= value <= np.count_nonzero(y.sum(axis=0)) + 1e-12


def test_d4_as_many_numbers_as_images_leave_no_loss_and_no_gradient():
    rng = np.random.default_rng(0)
    found, g = everything(*single(rng.normal(size=(60, 196)), one_hot(rng.integers(0, 98, 60), 98)))
    assert abs(found.loss) < 1e-6 and np.abs(g).max() < 1e-5 and found.rank == 60


def test_d5_random_embeddings_have_the_reference_loss():
    rng = np.random.default_rng(0)
    found, _ = everything(*single(rng.normal(size=(1000, 20)), one_hot(np.arange(1000) % 10, 10)))
    assert found.loss == pytest.approx(9.80, abs=0.05) and found.reference == pytest.approx(9.8)
    assert spectral.expected(98, 6000, 98) == pytest.approx(96.40, abs=0.01) and spectral.expected(5, 10, 20) == 0
    assert found.classes == 10 and found.rank == 20


def conditioned(n, d, cond):
    """Embeddings of a condition number that no scale of the columns takes away, and labels at random."""
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.normal(size=(m, d)))[0] for m in (n, d))
    return u * np.geomspace(1, 1 / cond, d) @ v.T, one_hot(rng.integers(0, d, n), d)


@pytest.mark.parametrize("size, dim, ridge", [(1000, 20, 1.0), (300, 20, 0.1), (20, 60, 1.0), (20, 60, 0.0)])
def test_d5_with_a_ridge_too(size, dim, ridge):
    f = np.random.default_rng(0).normal(size=(size, dim))
    if size < dim:  # as many equal singular values as images
        f = np.linalg.qr(f.T)[0].T
    found = everything(*single(f, one_hot(np.arange(size) % 10, 10)), spectral.Rule(ridge=ridge))[0]
    assert found.loss == pytest.approx(float(found.reference), rel=0.01, abs=1e-4)


def test_d6_the_gradient_of_nearly_dependent_columns_is_good_in_float32():
    f, y = conditioned(1260, 98, 1e4)
    _, exact = slow(f.astype(np.float32), y)
    found, g = everything(*single(f, y))
    assert np.linalg.norm(g - exact) / np.linalg.norm(exact) < 1e-3
    assert found.condition == pytest.approx(np.linalg.cond(f / np.linalg.norm(f, axis=0)), rel=1e-2)


def test_d6_a_column_that_is_there_twice_or_empty_changes_nothing():
    f, y = single(*case())
    narrow = f[:, :5]
    expected = slow(narrow, y)[0]
    for more in (f[:, 2], 100 * f[:, 0] + f[:, 1], np.zeros(40)):
        found, g = everything(*single(np.column_stack([narrow, more]), y))
        assert found.loss == pytest.approx(expected, rel=1e-5) and np.isfinite(g).all()
        assert found.rank == 5 and 1e5 < found.condition < 1e8


def test_d6_columns_of_any_length_say_the_same_and_nothing_overflows():
    f, y = single(*case())
    scales = np.array([1e-20, 1, 1e30, 1e-3, 1e18, 1], np.float32)
    value, g = value_and_gradient(f * scales, y)
    expected, of_plain = value_and_gradient(f, y)
    assert value == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(g * scales, of_plain, rtol=1e-3, atol=1e-5 * np.abs(of_plain).max())


def test_d6_a_ridge_is_smooth_and_its_gradient_that_of_differences(float64):
    f, y = case()
    rule = Rule(ridge=0.05)
    lam = 0.05 * np.sum(f**2) / 6
    value, found = value_and_gradient(f, y, rule)
    assert abs(value - slow(f, y, lam)[0]) < 1e-10 and value > slow(f, y)[0]
    np.testing.assert_allclose(found, differences(lambda f: slow(f, y, lam)[0], f), atol=1e-6)
    assert everything(f, y, rule)[0].surrogate < -1e-3  # longer embeddings have a lower loss
    f[:, 5] = f[:, 0]
    _, found = value_and_gradient(f, y, rule)
    np.testing.assert_allclose(found, slow(f, y, 0.05 * np.sum(f**2) / 6)[1], atol=1e-9)


def test_what_is_not_finite_makes_all_of_it_so_and_zeros_say_nothing():
    f, y = single(*case())
    for bad in (np.nan, np.inf):
        value, g = value_and_gradient(*single(np.where(np.arange(40)[:, None] == 7, bad, f), y))
        assert np.isnan(value) and np.isnan(g).all()
    nothing, g = everything(np.zeros_like(f), y)
    assert nothing.loss == pytest.approx(float(nothing.classes)) and nothing.rank == 0 == nothing.effective_rank
    assert not np.asarray(g).any() and np.isfinite(nothing.condition)


def test_the_effective_rank_counts_directions_by_their_share():
    y = one_hot(np.arange(40) % 7, 7)
    f = one_hot(np.arange(40) % 6, 6)
    assert everything(*single(f, y))[0].effective_rank == pytest.approx(6, rel=1e-2)
    alike, _ = everything(*single(f[:, :1] + f[:, 1:2] + 1e-3 * f, y))
    assert 1 < alike.effective_rank < 1.5 and alike.rank == 6


def test_products_are_of_full_precision_on_every_device():
    program = str(jax.make_jaxpr(everything, static_argnums=2)(*single(*case()), spectral.EXACT))
    exact = "precision=(Precision.HIGHEST, Precision.HIGHEST)"
    assert program.count("dot_general[") == program.replace("\n", " ").count(exact) > 4


SIZES = (1000, 2000, 4000)
CENTRES = (
    [(-6, 0, 0), (0, 60, 0), (6, 60, 18)],
    [(6, 0, 0), (6, 60, 0), (-6, 60, 0)],
    [(3, 60, 6), (-6, 0, 6), (-6, -6, -6)],
)


def toy(rng):
    """The authors' toy: three classes of three blobs in space, 15,000 points to train on and 6,000 to be judged by."""
    x = [rng.normal(size=(n, 3)) + centre for n, of in zip(SIZES, CENTRES, strict=True) for centre in of]
    labels = np.repeat(np.arange(3), [3 * n for n in SIZES])
    order = rng.permutation(len(labels))
    x, labels = np.concatenate(x)[order].astype(np.float32), labels[order]
    return SimpleNamespace(x=x[:15_000], y=labels[:15_000], test=x[15_000:], truth=labels[15_000:])


def mlp(params, x):
    for i, (w, b) in enumerate(params):
        x = (jnp.tanh(x) if i else x) @ w + b
    return x


def k_means_accuracy(rows, truth):
    from sklearn.cluster import KMeans

    return accuracy(KMeans(3, n_init=10, random_state=0).fit_predict(rows), truth)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_d10_the_authors_toy_is_learnt(seed, tmp_path):
    rng = np.random.default_rng(seed)
    data, sizes = toy(rng), (3, 30, 30, 3)
    params = [
        (jnp.asarray(rng.normal(size=(a, b)) / np.sqrt(a), jnp.float32), jnp.zeros(b))
        for a, b in zip(sizes, sizes[1:], strict=False)
    ]
    adam, x, y = optax.adam(1e-4), jnp.asarray(data.x), jax.nn.one_hot(data.y, 3)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, moments, places):
        rule = Rule(grad_scale=0.5)
        gradient = jax.grad(lambda p: dscl_loss(mlp(p, x[places]), y[places], rule).loss)(params)
        changes, moments = adam.update(gradient, moments)
        return optax.apply_updates(params, changes), moments

    def judged():
        rows = np.asarray(mlp(params, data.test))
        return float(dscl_loss(rows, jax.nn.one_hot(data.truth, 3)).loss), rows

    before, _ = judged()
    moments = adam.init(params)
    for _ in range(100):
        for places in rng.permutation(15_000).reshape(15, 1000):
            params, moments = step(params, moments, places)
    after, rows = judged()
    kept = Rows(6_000, (3,), np.float32, 10**9, tmp_path)
    kept.append(rows)
    config, found = base(), {}
    for name in ("raw", "spectral"):
        points = readouts.READOUTS[name].make(kept.finish(), 3, config)
        found[name] = k_means_accuracy(points.whole(), data.truth)
        assert retrieval.scores(points, data.truth, (1,), cosine=name == "spectral")["r@1"] >= 0.99
    print("L", before, after, "accuracy", found)
    assert before > 1 and after < 0.4
    assert found["spectral"] >= 0.97 and found["spectral"] >= found["raw"] - 0.005
