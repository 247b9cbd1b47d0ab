"""What may be added to ClustNet's loss, each with the sign that it is meant to have (section 2.5 of our specification).

All are over the batch of all devices. The published code has some of the signs turned around, and cannot run others.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from jaxclust.ops.distances import normalize
from jaxclust.runtime import AXIS

SMALL = 1e-7


Terms = Mapping[str, Callable[[], jax.Array]]
"""Terms by their names in `config.clustnet`, where their weights are; one without a weight is not made."""


def weighted(settings: ConfigDict, found: Terms, dtype: Any) -> jax.Array:
    """The sum of the terms that have a weight."""
    made = (settings[name] * term() for name, term in found.items() if settings[name])
    return sum(made, jnp.zeros((), dtype))


def of_gate(settings: ConfigDict, logits: jax.Array, target: jax.Array) -> jax.Array:
    """The sum of those of a gate alone, of its logits [B, K] and the groups int [B]."""
    p = jax.nn.softmax(logits)
    found: Terms = {
        "gate_entropy": lambda: -gate_entropy(p),
        "diversity": lambda: -usage_entropy(p),
        "group_diversity": lambda: -usage_entropy_of_groups(p, target),
    }
    return weighted(settings, found, p.dtype)


def entropy(p: jax.Array) -> jax.Array:
    """-sum p ln(p + 1e-7) over the last axis."""
    return -jnp.sum(p * jnp.log(p + SMALL), axis=-1)


def gate_entropy(p: jax.Array) -> jax.Array:
    """Mean entropy of gates p [B, K]; to be large."""
    return jax.lax.pmean(jnp.mean(entropy(p)), AXIS)


def usage_entropy(p: jax.Array) -> jax.Array:
    """Entropy of the mean gate, of p [B, K]; large where experts are used evenly."""
    return entropy(jax.lax.pmean(jnp.mean(p, axis=0), AXIS))


def usage_entropy_of_groups(p: jax.Array, target: jax.Array) -> jax.Array:
    """Entropy of the mean gate of each group, of p [B, K] and target int [B]; the mean of the groups that there are.

    Ours: it is large where each expert has as much of P as of N, so that the gate cannot tell them apart itself.
    """
    group = jax.nn.one_hot(target, 2, dtype=p.dtype)
    count = jax.lax.psum(group.sum(axis=0), AXIS)
    mean = jax.lax.psum(group.T @ p, AXIS) / jnp.maximum(count, 1)[:, None]
    there = count > 0
    return jnp.sum(jnp.where(there, entropy(mean), 0)) / jnp.sum(there)


def filter_similarity(kernels: jax.Array, key: jax.Array) -> jax.Array:
    """Mean cosine similarity of the filters of one expert, drawn by `key`, to those of the others; to be small.

    `kernels` [K, h, w, C, filters] are of the last convolution.
    """
    k, filters = len(kernels), kernels.shape[-1]
    unit = normalize(jnp.moveaxis(kernels, -1, 1).reshape(k, filters, -1))
    one = jax.random.randint(key, (), 0, k)
    similarity = jnp.einsum("fd,kgd->kfg", unit[one], unit).mean(axis=(1, 2))
    return jnp.sum(jnp.where(jnp.arange(k) == one, 0, similarity)) / (k - 1)


def sets(maps: jax.Array, choice: jax.Array, target: jax.Array) -> jax.Array:
    """Which maps [K, B, H, W, C] belong together, [K, 2, B] of ones and zeros: those of an expert and a group.

    They are of images that the expert was chosen for, and not all zero.
    """
    chosen = jax.nn.one_hot(jnp.argmax(choice, axis=1), len(maps), axis=0)  # [K, B]
    lit = jnp.any(maps != 0, axis=(2, 3, 4))
    group = jax.nn.one_hot(target, 2, axis=0)
    return (chosen * lit)[:, None] * group


def map_entropy(maps: jax.Array, member: jax.Array) -> jax.Array:
    """Mean of -m ln(m + 1e-7) over the values m of the maps of a set, then over sets; to be small.

    Values below 0, which only an image added to its first map has, count as 0.
    """
    maps = jnp.maximum(maps, 0)
    count = jax.lax.psum(member.sum(axis=2), AXIS)
    of_image = jnp.mean(-maps * jnp.log(maps + SMALL), axis=(2, 3, 4))
    total = jax.lax.psum(jnp.einsum("kgb,kb->kg", member, of_image), AXIS)
    return _mean_of_sets(total / jnp.maximum(count, 1), count)


def map_spread(maps: jax.Array, member: jax.Array) -> jax.Array:
    """Standard deviation of each value of a map over the images of a set, its mean, then that of sets; to be small."""
    count = jax.lax.psum(member.sum(axis=2), AXIS)
    some = jnp.maximum(count, 2)[..., None, None, None]
    mean = jax.lax.psum(jnp.einsum("kgb,kbhwc->kghwc", member, maps), AXIS) / some
    squares = jnp.square(maps[:, None] - mean[:, :, None])
    variance = jax.lax.psum(jnp.einsum("kgb,kgbhwc->kghwc", member, squares), AXIS) / (some - 1)
    deviation = jnp.where(variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1)), 0)
    return _mean_of_sets(deviation.mean(axis=(2, 3, 4)), count)


def _mean_of_sets(values: Any, count: jax.Array) -> jax.Array:
    """Mean of [K, 2] over the sets of two maps at least, 0 where there is none."""
    enough = count >= 2
    return jnp.sum(jnp.where(enough, values, 0)) / jnp.maximum(jnp.sum(enough), 1)
