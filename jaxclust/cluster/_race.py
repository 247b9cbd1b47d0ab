"""Weighted draws of rows that come out alike on any number of hosts and devices, and in NumPy as in JAX.

Every row waits for a time that is exponential with its weight as rate, and the first to arrive is drawn: row i with
probability w_i / sum(w), without the sum or any order of the rows. The waiting time is a hash of the row's id, so it
does not depend on where the row is. Source of the race: Efraimidis and Spirakis, "Weighted random sampling with a
reservoir", 2006; of the weights: Arthur and Vassilvitskii, "k-means++: the advantages of careful seeding", SODA 2007.
"""

from typing import Any

import numpy as np

_LEAST = 1e-30  # rate of a row that equals a chosen one: it is drawn only where there is no other


def keys(k: int, seed: int, run: int) -> np.ndarray:
    """One key for each of k draws, uint32 [k]."""
    return np.random.default_rng([seed, run]).integers(2**32, size=k, dtype=np.uint32)


def arrivals(xp: Any, ids: Any, key: Any, closest: Any) -> Any:
    """When each row arrives, float32 [n], of `xp` NumPy or `jax.numpy`.

    `ids` uint32 [n]; `closest` float32 [n]: squared distance to the nearest row chosen so far, infinite (then all
    weights are equal) before there is one, negative for rows that may not be drawn.
    """
    uniform = (_mixed(_mixed(ids) ^ key).astype(np.float32) + 0.5) * 2**-32
    waits = -xp.log1p(-xp.minimum(uniform, 1 - 2**-24))  # precise where it is short, which is what counts
    rates = xp.where(xp.isinf(closest), 1, xp.maximum(closest, _LEAST))
    return xp.where(closest < 0, np.inf, waits / rates)


def _mixed(bits: Any) -> Any:
    """A bijection of uint32 that looks random (the finalizer of Appleby's MurmurHash3)."""
    bits = (bits ^ (bits >> 16)) * np.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * np.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)
