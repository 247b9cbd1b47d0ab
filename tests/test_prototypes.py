"""The E step of SPICE against naive loops, and the loss of its heads (spice.md, checks S1 to S4)."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxclust.ops import losses, prototypes
from jaxclust.ops.prototypes import Rule, coverage, pseudo_labels


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def drawn(size, k, dim=6, seed=0):
    """Unit rows and log-probabilities in float64."""
    rng = np.random.default_rng(seed)
    logits = 3 * rng.standard_normal((size, k))
    return unit(rng.standard_normal((size, dim))), logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def first(scores, count, taken=()):
    """The best `count` that are not taken; Python's sort is stable."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    return [i for i in order if i not in taken][:count]


def slow_labels(embeddings, log_probs, top, members, overlap="keep", assignment="balanced"):
    """(index, label, kept) as lists, one cluster and one image at a time."""
    size, k = log_probs.shape
    greedy, taken, centres = overlap == "greedy", set(), []
    for c in range(k):
        of_centre = first(log_probs[:, c], top, taken if greedy else ())
        taken |= set(of_centre)
        centres.append(sum(embeddings[i] for i in of_centre) / top)
    if assignment == "argmax":
        cosine = [[centre @ e / np.linalg.norm(centre) for centre in centres] for e in embeddings]
        return list(range(size)), [int(np.argmax(row)) for row in cosine], [True] * size
    index, label, taken = [], [], set()
    for c in range(k):
        mine = first([centres[c] @ e for e in embeddings], members, taken if greedy else ())
        taken |= set(mine)
        index += mine
        label += [c] * members
    kept = [True] * len(index)
    if overlap == "best":
        for row, (i, c) in enumerate(zip(index, label, strict=True)):
            claims = [label[r] for r in range(len(index)) if index[r] == i]
            cosine = [centres[d] @ embeddings[i] / np.linalg.norm(centres[d]) for d in claims]
            kept[row] = claims[int(np.argmax(cosine))] == c
    return index, label, kept


def as_lists(found):
    return [np.asarray(part).tolist() for part in found]


def test_s1_counts_and_orthogonal_groups():
    top, members = prototypes.sizes(1003, 10, 0.5, [1.0])[0].tolist()
    assert (top, members) == (50, 100)
    truth = np.random.default_rng(0).permutation(np.arange(1003) % 10)
    rows = np.eye(10, dtype=np.float32)[truth]
    found = jax.jit(pseudo_labels, static_argnums=2)(rows, np.log(0.9 * rows + 0.01), Rule(top, members))
    assert found.image.shape == (1000,) and np.bincount(found.label).tolist() == [100] * 10
    assert found.label.tolist() == np.repeat(np.arange(10), 100).tolist()
    np.testing.assert_array_equal(truth[found.image], found.label)
    overlap, covered = coverage(found, 1003)
    assert overlap == 0 and covered == pytest.approx(1000 / 1003)


@pytest.mark.parametrize(
    ("overlap", "assignment"),
    [("keep", "balanced"), ("greedy", "balanced"), ("best", "balanced"), ("keep", "argmax"), ("greedy", "argmax")],
)
def test_s2_the_labels_are_those_of_a_naive_loop_for_each_head(float64, overlap, assignment):
    embeddings, _ = drawn(47, 4)
    scores = np.stack([drawn(47, 4, seed=seed)[1] for seed in (1, 2, 3)])
    rule = Rule(5, 11, overlap, assignment)
    found = jax.vmap(lambda log_probs: pseudo_labels(jnp.asarray(embeddings), log_probs, rule))(scores)
    for head in range(3):
        expected = slow_labels(embeddings, scores[head], 5, 11, overlap, assignment)
        assert as_lists(jax.tree.map(lambda part, head=head: part[head], found)) == [*expected]
    if overlap == "best":
        assert not found.kept.all()
    order = np.random.default_rng(4).permutation(47)
    moved = pseudo_labels(jnp.asarray(embeddings[order]), scores[0][order], rule)
    if assignment == "argmax":
        np.testing.assert_array_equal(moved.label, found.label[0][order])
    else:
        np.testing.assert_array_equal(order[moved.image], found.image[0])
        np.testing.assert_array_equal(moved.kept, found.kept[0])


def test_ties_go_to_the_lower_index_and_saturated_probabilities_are_told_apart():
    rows = np.ones((6, 1), np.float32)
    found = pseudo_labels(rows, np.zeros((6, 2), np.float32), Rule(1, 3))
    assert found.image.tolist() == [0, 1, 2, 0, 1, 2]
    logits = np.array([[20, 0], [30, 0], [25, 0], [0, 20]], np.float32)  # the first three are 1.0 as probabilities
    assert (jax.nn.softmax(logits)[:3, 0] == 1).all() and not jax.nn.log_softmax(logits)[:3, 0].any()
    log_probs = prototypes.log_probabilities(jnp.asarray(logits))
    found = pseudo_labels(np.eye(4, dtype=np.float32), log_probs, Rule(1, 1))
    assert found.image.tolist() == [1, 3]
    gaps = np.array([20.0, 30, 25])
    np.testing.assert_allclose(log_probs[:3], np.stack([-np.exp(-gaps), -gaps], 1), rtol=1e-6)


def test_s3_equal_columns_give_the_same_images_twice_unless_greedy():
    embeddings = drawn(40, 1)[0].astype(np.float32)
    log_probs = np.repeat(np.random.default_rng(6).standard_normal((40, 1)).astype(np.float32), 2, axis=1)
    keep = pseudo_labels(embeddings, log_probs, Rule(5, 12))
    np.testing.assert_array_equal(keep.image[:12], keep.image[12:])
    assert [float(share) for share in coverage(keep, 40)] == pytest.approx([0.5, 12 / 40])
    greedy = pseudo_labels(embeddings, log_probs, Rule(5, 12, "greedy"))
    assert len(set(greedy.image.tolist())) == 24
    best = pseudo_labels(embeddings, log_probs, Rule(5, 12, "best"))
    assert best.kept.tolist() == [True] * 12 + [False] * 12


@pytest.mark.parametrize("overlap", ["keep", "greedy"])
def test_fewer_than_the_rule_says_are_the_first_of_each_cluster(float64, overlap):
    embeddings, log_probs = drawn(30, 3)
    used = jax.jit(lambda *used: pseudo_labels(jnp.asarray(embeddings), log_probs, Rule(4, 10, overlap), used))
    found = used(2, 6)
    expected = slow_labels(embeddings, log_probs, 2, 6, overlap)
    assert found.image[found.kept].tolist() == expected[0]
    assert found.label[found.kept].tolist() == expected[1]


def test_the_ratio_rises_stays_and_falls_and_sizes_are_those_of_the_published_data_sets():
    course = [prototypes.ratio(epoch, 0.2, 1.0, (2, 6, 8, 10)) for epoch in range(12)]
    assert course == pytest.approx([0.2, 0.2, 0.2, 0.4, 0.6, 0.8, 1, 1, 1, 0.6, 0.2, 0.2])
    assert [prototypes.ratio(epoch, 1, 0.5, (3, 3, 5, 5)) for epoch in range(6)] == [1, 1, 1, 0.5, 0.5, 1]
    shapes = {(5000, 10): (250, 500), (8000, 15): (266, 533), (10000, 20): (250, 500)}
    for (size, k), expected in shapes.items():
        assert tuple(prototypes.sizes(size, k, 0.5, [1.0])[0]) == expected
    assert prototypes.sizes(100, 10, 0.5, [1.0, 0.5]).tolist() == [[5, 10], [2, 5]]


@pytest.mark.parametrize("share", [0.5, 0.3, 1.0, 0.07])
def test_the_least_pool_has_one_image_for_each_centre_and_one_less_per_cluster_has_not(share):
    least = prototypes.least_images(7, share, 0.6)
    assert prototypes.sizes(least, 7, share, [0.6]).min() >= 1
    assert prototypes.sizes(least - 7, 7, share, [0.6]).min() < 1


def test_s4_the_double_softmax_is_bounded_and_its_gradient_is_right(float64):
    k, ones, value = 10, jnp.ones(3), jax.jit(losses.double_softmax)
    sure = 60.0 * jnp.eye(k)[jnp.array([4, 4, 4])]
    target = jnp.array([4, 4, 4])
    assert float(value(sure, target, ones)) == pytest.approx(1.4612, abs=1e-4)
    assert float(value(jnp.zeros((3, k)), target, ones)) == pytest.approx(math.log(10))
    assert float(value(sure, target - 1, ones)) == pytest.approx(2.4612, abs=1e-4)
    z = np.random.default_rng(0).standard_normal((3, k))
    weights = jnp.array([1.0, 0.5, 2.0])
    gradient = jax.jit(jax.grad(losses.double_softmax))(jnp.asarray(z), target, weights)
    steps = 1e-6 * np.eye(3 * k).reshape(-1, 3, k)
    each = jax.jit(jax.vmap(lambda moved: losses.double_softmax(moved, target, weights)))
    up, down = (each(z + sign * steps) for sign in (1, -1))
    np.testing.assert_allclose(gradient.reshape(-1), (up - down) / 2e-6, atol=1e-8)
