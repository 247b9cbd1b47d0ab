"""The objective of deep spectral clustering: how far the classes lie outside of the column space of the embeddings.

Law, Urtasun, Zemel, "Deep Spectral Clustering Learning", ICML 2017; sections 2 to 4 of our specification. Of
embeddings F [n, d] and indicators Y [n, K] of K_b present classes, J = Y N^(-1/2) with N = diag(class sizes),
C = J J^T and the projector P on the columns of F:

    L(F) = K_b - tr(C P) = |(I - P) J|^2,    dL/dF = -2 (I - P) C (F^+)^T = 2 G

Everything is at least float32 and of full matrix-product precision.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxclust.ops.distances import normalize


class Rule(NamedTuple):
    """How the objective is measured.

    grad_scale: the gradient is 2 * grad_scale * G, 1 the exact one and 0.5 the authors' (section 3.3). rtol: singular
    values below rtol times the largest count as zero; 0: 1e-5, in float64 1e-12. ridge: over 0, P becomes
    F (F^T F + lam I)^-1 F^T with lam = ridge * tr(F^T F) / d, a constant to the gradient, and nothing is cut off.
    row_normalize: whether rows of F are brought to unit length first.
    """

    grad_scale: float = 1.0
    rtol: float = 0.0
    ridge: float = 0.0
    row_normalize: bool = False


EXACT = Rule()


class Found(NamedTuple):
    """Scalars of a batch. All but `loss` are constants to the gradient."""

    loss: jax.Array  # L, from 0 to `classes`
    reference: jax.Array  # what random embeddings have
    classes: jax.Array  # K_b
    rank: jax.Array  # directions that count
    effective_rank: jax.Array  # exp of the entropy of the singular values (Roy, Vetterli, EUSIPCO 2007)
    condition: jax.Array  # the largest singular value by the least, at most 1 / eps
    surrogate: jax.Array  # <G, F>, which is rounding noise where there is no ridge (section 3.4)


def dscl_loss(f: jax.Array, y: jax.Array, rule: Rule = EXACT) -> Found:
    """L of embeddings `f` [n, d] and indicators `y` [n, K], whose columns may be empty, with what else F says.

    Nothing differentiates through the decomposition. Singular values, and the ranks, are of F with columns of unit
    length, which have the same span; with a ridge of F itself. Where a number of F is not finite, neither is L.
    """
    f = f.astype(jnp.promote_types(f.dtype, jnp.float32))
    f = normalize(f) if rule.row_normalize else f
    return _loss(f, y.astype(f.dtype), rule)


def expected(classes: jax.Array | float, size: int, dim: int, ridge: float = 0.0) -> jax.Array:
    """E[L] = K_b (1 - d / n) of random embeddings [n, d] (section 3.4).

    With a ridge (`Rule.ridge`) d is the trace of P where all r = min(n, d) singular values are alike, r / (1 + ridge
    r / d).
    """
    rank = min(size, dim)
    return jnp.asarray(classes * (1 - rank / (1 + ridge * rank / dim) / size))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _loss(f: jax.Array, y: jax.Array, rule: Rule) -> Found:
    return _solve(f, y, rule)[0]


def _forward(f: jax.Array, y: jax.Array, rule: Rule) -> tuple[Found, jax.Array]:
    return _solve(f, y, rule)


def _backward(rule: Rule, g: jax.Array, of_output: Found) -> tuple[jax.Array, None]:
    return 2 * rule.grad_scale * of_output.loss * g, None


_loss.defvjp(_forward, _backward)


def _solve(f: jax.Array, y: jax.Array, rule: Rule) -> tuple[Found, jax.Array]:
    """What F says, and G [n, d]."""
    with jax.default_matmul_precision("highest"):
        finite = jnp.all(jnp.isfinite(f))
        f = jnp.where(finite, f, 0)  # no decomposition ever sees NaN
        scale = jnp.ones(f.shape[1], f.dtype) if rule.ridge else _lengths(f)
        q, r = jnp.linalg.qr(f / scale)
        u, s, vt = jnp.linalg.svd(r, full_matrices=False)
        basis = q @ u
        weight, inverse = _spectrum(s, f.shape[1], rule)

        sizes = jnp.sum(y, axis=0)
        classes = jnp.sum(sizes > 0).astype(f.dtype)
        j = y / jnp.sqrt(jnp.maximum(sizes, 1))
        inside = basis.T @ j  # U^T Q^T J
        rest = j - basis @ inside
        # K_b - sum of weight * inside^2, without its cancellation
        loss = jnp.sum(rest**2) + jnp.sum((1 - weight)[:, None] * inside**2)
        outside = rest + basis @ ((1 - weight)[:, None] * inside)  # (I - P) J
        g = -outside @ (inside.T * inverse @ vt) / scale
        g = jnp.where(finite, g, jnp.nan)
        reference = expected(classes, f.shape[0], f.shape[1], rule.ridge).astype(f.dtype)
        found = Found(
            jnp.where(finite, loss, jnp.nan), reference, classes,
            jnp.sum(weight > 0).astype(f.dtype), *_ranks(s), jnp.sum(g * f),
        )  # fmt: skip
    return found, g


def _lengths(f: jax.Array) -> jax.Array:
    """Lengths of the columns of `f` [n, d], where squares may overflow; 1 of a column of zeros."""
    largest = jnp.max(jnp.abs(f), axis=0)
    largest = jnp.where(largest > 0, largest, 1)
    return largest * jnp.maximum(jnp.linalg.norm(f / largest, axis=0), 1)


def _spectrum(s: jax.Array, dim: int, rule: Rule) -> tuple[jax.Array, jax.Array]:
    """Of singular values [r], in falling order, their weight in P and in F^+: 1 and 1 / s, or 0 where they are zero."""
    if rule.ridge:
        lam = rule.ridge * jnp.sum(s**2) / dim
        positive = s**2 + lam > 0
        below = jnp.where(positive, s**2 + lam, 1)
        return s**2 / below, s / below
    rtol = rule.rtol or (1e-12 if s.dtype == jnp.float64 else 1e-5)
    kept = (s >= rtol * s[0]) & (s > 0)
    return kept.astype(s.dtype), jnp.where(kept, 1 / jnp.where(kept, s, 1), 0)


def _ranks(s: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Effective rank and condition number of singular values [r] in falling order; 0 and 1 / eps where all are zero."""
    total, eps = jnp.sum(s), jnp.finfo(s.dtype).eps
    p = s / jnp.where(total > 0, total, 1)
    entropy = -jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1)), 0))
    least = jnp.maximum(s[-1], eps * s[0])
    condition = jnp.where(least > 0, s[0] / jnp.where(least > 0, least, 1), 1 / eps)
    return jnp.where(total > 0, jnp.exp(entropy), 0), condition
