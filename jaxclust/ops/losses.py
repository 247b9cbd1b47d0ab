"""Losses and accuracies on the outputs of a head that may be wider than the number of clusters."""

import jax
import jax.numpy as jnp

Count = int | jax.Array


def _only(logits: jax.Array, num_outputs: Count | None) -> jax.Array:
    """Logits past the first `num_outputs` become -inf, so that no row can choose them."""
    if num_outputs is None:
        return logits
    return jnp.where(jnp.arange(logits.shape[-1]) < num_outputs, logits, -jnp.inf)


def weighted_cross_entropy(
    logits: jax.Array, targets: jax.Array, weights: jax.Array, num_outputs: Count | None = None
) -> jax.Array:
    """Mean over the batch of weight * -log softmax(logits)[target].

    Shapes: logits [B, K], targets int [B] in [0, num_outputs), weights [B] -> scalar, at least
    float32. `num_outputs` may be traced: a wide head then serves any number of clusters with one
    compiled program. A row of weight 0 contributes nothing, whatever its target.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    log_probs = jax.nn.log_softmax(_only(logits, num_outputs))
    picked = jnp.take_along_axis(log_probs, jnp.maximum(targets, 0)[:, None], axis=-1)[:, 0]
    # 0 * -inf would be NaN: an image that waits for its first target may point anywhere.
    return -jnp.mean(weights * jnp.where(weights == 0, 0, picked))


def double_softmax(logits: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
    """Mean over the batch of weight * -log softmax(softmax(logits))[target], the loss of SPICE's heads.

    The inner softmax is the head's output p, the outer one that of the cross-entropy. It lies between
    ln((e + K - 1) / e), for p of one at the target, and ln(e + K - 1). Shapes and dtypes as `weighted_cross_entropy`.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    return weighted_cross_entropy(jax.nn.softmax(logits), targets, weights)


def accuracy(logits: jax.Array, targets: jax.Array, num_outputs: Count | None = None) -> jax.Array:
    """Share of rows whose largest logit is the target's.

    Shapes: logits [B, K], targets int [B] -> scalar float32; outputs >= num_outputs do not count.
    """
    hits = jnp.argmax(_only(logits, num_outputs), axis=-1) == targets
    return jnp.mean(hits.astype(jnp.float32))
