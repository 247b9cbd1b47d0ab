"""The gate of ClustNet: which expert an image is given to, and what the gradient makes of that choice.

A choice is c [B, K], a one in each row where it is hard. Straight-through (Bengio, Léonard, Courville, "Estimating or
Propagating Gradients Through Stochastic Neurons for Conditional Computation", arXiv 1308.3432): c counts as the
probabilities p when gradients are taken. Section 2.3 of our specification.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

Choose = Callable[[jax.Array, jax.Array, float], jax.Array]
"""(logits a [B, K], Gumbel noise [B, K], temperature) -> choice c [B, K]."""


def straight_through(number: jax.Array, p: jax.Array) -> jax.Array:
    """Rows with a one at `number` int [B], exactly, whose gradient is that of p [B, K]."""
    return jax.nn.one_hot(number, p.shape[1], dtype=p.dtype) + (p - jax.lax.stop_gradient(p))


def drawn(logits: jax.Array, noise: jax.Array, temperature: float) -> jax.Array:
    """One draw from Categorical(softmax a) for each row: the largest of a + Gumbel noise."""
    return straight_through(jnp.argmax(logits + noise, axis=1), jax.nn.softmax(logits))


def likeliest(logits: jax.Array, noise: jax.Array, temperature: float) -> jax.Array:
    """The largest logit, the first of equal ones."""
    return straight_through(jnp.argmax(logits, axis=1), jax.nn.softmax(logits))


def soft(logits: jax.Array, noise: jax.Array, temperature: float) -> jax.Array:
    """All experts, by their probability."""
    return jax.nn.softmax(logits)


def gumbel(logits: jax.Array, noise: jax.Array, temperature: float) -> jax.Array:
    """A draw whose gradient is that of softmax((a + noise) / temperature) (Jang, Gu, Poole, ICLR 2017)."""
    relaxed = jax.nn.softmax((logits + noise) / temperature)
    return straight_through(jnp.argmax(relaxed, axis=1), relaxed)


class Decision(NamedTuple):
    """How the gate chooses in training and in evaluation."""

    training: Choose
    evaluation: Choose


DECISIONS = {
    "sample": Decision(drawn, likeliest),
    "always_sample": Decision(drawn, drawn),
    "argmax": Decision(likeliest, likeliest),
    "soft": Decision(soft, soft),
    "gumbel": Decision(gumbel, likeliest),
}


def noise(key: jax.Array, numbers: jax.Array, k: int) -> jax.Array:
    """Gumbel noise float32 [B, k], of each row by its number [B] alone."""
    return jax.vmap(lambda number: jax.random.gumbel(jax.random.fold_in(key, number), (k,)))(numbers)


def fingerprint(images: jax.Array) -> jax.Array:
    """A number uint32 [B] of each image by its values alone, for noise where there is no position."""
    rows = images.reshape(images.shape[0], -1)
    if rows.dtype != jnp.uint8:
        rows = jax.lax.bitcast_convert_type(rows.astype(jnp.float32), jnp.uint32)
    odd = 2 * jnp.arange(rows.shape[1], dtype=jnp.uint32) + 1
    return jnp.sum(rows.astype(jnp.uint32) * odd, axis=1, dtype=jnp.uint32)
