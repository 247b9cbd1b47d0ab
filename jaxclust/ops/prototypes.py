"""Prototype pseudo-labels: the E step of SPICE (Niu, Shan, Wang, arXiv 2103.09382; section 6.2 of our specification).

A cluster's centre is the mean of the images that the head is surest of, and its members are the images most similar to
the centre. All sizes are static, so that a program compiles once; ties go to the lower index.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxclust.ops.distances import normalize


class Rule(NamedTuple):
    """How images get labels: `top` of them make a centre, and `members` of them are labelled as its cluster.

    overlap: an image may stand under several clusters ("keep"), or a cluster passes over what one before it took, for
    centres and for members ("greedy"), or an image stays under the most similar of its centres alone ("best").
    assignment: as many images for each cluster ("balanced"), or each image to its most similar centre ("argmax").
    """

    top: int
    members: int
    overlap: str = "keep"
    assignment: str = "balanced"


class PseudoLabels(NamedTuple):
    """Which images get which labels: `image` and `label` int32 [n], grouped by label unless the rule is "argmax".

    n = K members, or B by "argmax". Rows that are not `kept`, bool [n], do not count.
    """

    image: jax.Array
    label: jax.Array
    kept: jax.Array


def pseudo_labels(
    embeddings: jax.Array, log_probs: jax.Array, rule: Rule, used: tuple[jax.Array, jax.Array] | None = None
) -> PseudoLabels:
    """Labels for the most typical of B images, by one head; changes nothing and has no gradient.

    `used`, which may be traced, are smaller numbers in place of `rule.top` and `rule.members`.

    Shapes: embeddings [B, D] unit rows, log_probs [B, K]; K members <= B for "greedy".
    """
    top, members = (rule.top, rule.members) if used is None else used
    clusters, greedy = jnp.arange(log_probs.shape[1], dtype=jnp.int32), rule.overlap == "greedy"
    centre = centres(embeddings, log_probs, rule, top)
    if rule.assignment == "argmax":
        nearest = jnp.argmax(_products(normalize(centre), embeddings), axis=0).astype(jnp.int32)
        return PseudoLabels(jnp.arange(len(nearest), dtype=jnp.int32), nearest, jnp.ones(len(nearest), bool))
    index = _ranked(_products(centre, embeddings), rule.members, members, greedy)
    kept = jnp.broadcast_to(jnp.arange(rule.members) < members, index.shape)
    if rule.overlap == "best":
        similar = _products(normalize(centre), embeddings)
        taken = jnp.zeros(similar.shape, bool).at[clusters[:, None], index].max(kept)
        owner = jnp.argmax(jnp.where(taken, similar, -jnp.inf), axis=0)
        kept &= owner[index] == clusters[:, None]
    return PseudoLabels(index.reshape(-1), jnp.repeat(clusters, rule.members), kept.reshape(-1))


def centres(embeddings: jax.Array, log_probs: jax.Array, rule: Rule, top: jax.Array | int) -> jax.Array:
    """Of each cluster the mean embedding of the `top` <= `rule.top` images that the head is surest of, [K, D]."""
    return _means(embeddings, _ranked(log_probs.T, rule.top, top, rule.overlap == "greedy"), top)


def log_probabilities(logits: jax.Array) -> jax.Array:
    """log softmax [..., K] whose largest entry is exact: near certainty the plain one is 0 for many images, a tie."""
    largest = jnp.argmax(logits, axis=-1, keepdims=True) == jnp.arange(logits.shape[-1])
    shifted = logits - jnp.max(logits, axis=-1, keepdims=True)
    return shifted - jnp.log1p(jnp.sum(jnp.where(largest, 0, jnp.exp(shifted)), axis=-1, keepdims=True))


def _ranked(scores: jax.Array, count: int, used: jax.Array | int, greedy: bool) -> jax.Array:
    """The `count` best columns of each row [K, B], best first, int32 [K, count]; a greedy row passes over those that
    were among the first `used` of a row before."""
    if not greedy:
        return jax.lax.top_k(scores, count)[1].astype(jnp.int32)

    def pick(taken: jax.Array, row: jax.Array) -> tuple[jax.Array, jax.Array]:
        best = jax.lax.top_k(jnp.where(taken, -jnp.inf, row), count)[1].astype(jnp.int32)
        return taken.at[best].max(jnp.arange(count) < used), best

    return jax.lax.scan(pick, jnp.zeros(scores.shape[1], bool), scores)[1]


def _means(embeddings: jax.Array, index: jax.Array, used: jax.Array | int) -> jax.Array:
    """Means of the first `used` of the rows `index` [K, count], [K, D]; as a product, without a copy of the rows."""
    count = index.shape[1]
    member = jnp.broadcast_to((jnp.arange(count) < used).astype(embeddings.dtype), index.shape)
    weights = jnp.zeros((len(index), len(embeddings)), embeddings.dtype)
    weights = weights.at[jnp.arange(len(index))[:, None], index].set(member)
    return jnp.matmul(weights, embeddings, precision=jax.lax.Precision.HIGHEST) / used


def _products(centres: jax.Array, embeddings: jax.Array) -> jax.Array:
    """Similarities [K, B]; a lower precision could swap images near the cut."""
    return jnp.matmul(centres, embeddings.T, precision=jax.lax.Precision.HIGHEST)


def coverage(found: PseudoLabels, size: int) -> tuple[jax.Array, jax.Array]:
    """Share of the kept rows that are repetitions of an image, and share of the `size` images that have a row."""
    met = jnp.zeros(size, bool).at[found.image].max(found.kept)
    distinct = jnp.sum(met)
    return 1 - distinct / jnp.maximum(jnp.sum(found.kept), 1), distinct / size


def ratio(epoch: int, start: float, end: float, knots: tuple[int, int, int, int]) -> float:
    """`start`, from the first knot on evenly to `end` at the second, from the third back to `start` at the fourth."""
    rise, up, down, fall = knots
    if rise <= epoch < up:
        return start + (end - start) * (epoch - rise) / (up - rise)
    if up <= epoch < down:
        return end
    if down <= epoch < fall:
        return end + (start - end) * (epoch - down) / (fall - down)
    return start


def sizes(images: int, clusters: int, center_ratio: float, ratios: list[float]) -> np.ndarray:
    """(images that make a centre, images that get a label) of each cluster for each of `ratios`, int32 [E, 2]."""
    each = images // clusters
    pairs = [(int(center_ratio * each * share), int(each * share)) for share in ratios]
    return np.asarray(pairs, np.int32)


def least_images(clusters: int, center_ratio: float, smallest_ratio: float) -> int:
    """The fewest images of which each cluster has one for its centre and one for its label."""
    each = math.ceil(1 / (center_ratio * smallest_ratio))
    while int(center_ratio * each * smallest_ratio) < 1:  # rounding
        each += 1
    return each * clusters
