"""ClustNet's two optimisers, and whose turn it is (sections 2.5 and 2.6 of our specification).

One moves the encoder and the gate, the other the encoder and the experts, by the same gradient; each has moments of its
own for the encoder, which both move unless `encoder.gradient` leaves it to the gate. Who waits keeps its parameters and
moments, bit for bit.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from jaxclust import runtime
from jaxclust.errors import ConfigError
from jaxclust.methods.base import DataInfo

RULES: dict[str, Callable[[ConfigDict], optax.GradientTransformation]] = {
    "sgd": lambda settings: optax.trace(settings.momentum),  # v = mu v + g
    "adam": lambda settings: optax.scale_by_adam(),
    "amsgrad": lambda settings: optax.scale_by_amsgrad(),
}


def moved(settings: ConfigDict) -> dict[str, tuple[str, ...]]:
    """The parameters that each of the two moves."""
    shared = ("body",) if settings.encoder.gradient == "both" else ()
    return {"gate": ("body", "gate"), "experts": (*shared, "experts", "top")}


def epoch(config: ConfigDict, info: DataInfo) -> int:
    """Steps of an epoch, in which turns are counted anew."""
    return -(-info.size // config.batch_size)


def is_first(step: jax.Array, epoch: int, period: int) -> jax.Array:
    """Whether `step` is in a block of `period` steps that belongs to who moves first."""
    return step % epoch % (2 * period) < period


def rates(config: ConfigDict) -> dict[str, tuple[float, ...]]:
    """The learning rates of each optimiser, one after the other; ConfigError if they are not equally many."""
    s = config.clustnet
    alike = s.lr_gate < 0
    experts = (s.lr, *s.lr_next)
    gate = (s.lr if alike else s.lr_gate, *(s.lr_gate_next or (s.lr_next if alike else ())))
    if len(gate) != len(experts):
        raise ConfigError(
            f"config.clustnet.lr_next={s.lr_next} and config.clustnet.lr_gate_next={s.lr_gate_next}: gate and experts "
            "must have equally many rates"
        )
    if len(gate) > 1 and (config.refresh_every != "1 epoch" or config.rounds + 1 < len(gate)):
        raise ConfigError(
            f"config.clustnet.lr_next={s.lr_next} shares out epochs: it needs config.refresh_every='1 epoch' (it is "
            f"{config.refresh_every!r}) and as many config.rounds as rates ({config.rounds} for {len(gate)})"
        )
    return {"gate": gate, "experts": experts}


def optimizer(config: ConfigDict, info: DataInfo) -> optax.GradientTransformationExtraArgs:
    """The two as one. A switch to the next rate begins with new moments.

    With n rates the rate of epoch e, from 1, changes where (e - 1) mod ((epochs + 1) // n) = 0.
    """
    s, steps = config.clustnet, epoch(config, info)
    rule, by_group, groups = RULES[s.optimizer](s), rates(config), moved(s)
    count = len(by_group["gate"])
    length = (config.rounds + 1) // count * steps if count > 1 else 1
    key = runtime.key(config.seed, config.method, "noise")

    def init(params: Any) -> Any:
        return {name: rule.init(_part(params, keys)) for name, keys in groups.items()}

    def update(gradient: Any, state: Any, params: Any = None, *, step: jax.Array, **extra: Any) -> tuple[Any, Any]:
        if s.noise:
            gradient = {**gradient, "gate": noisy(gradient["gate"], s.noise, jax.random.fold_in(key, step))}
        number = jnp.minimum(step // length, count - 1)
        switched = (count > 1) & (step % length == 0) & (step // length < count)
        total, states = jax.tree.map(jnp.zeros_like, gradient), {}
        for name, of_group in by_group.items():
            own = _part(gradient, groups[name])
            before = _choose(switched, rule.init(own), state[name])
            changes, after = rule.update(own, before)
            free, rate = moves(name, step, steps, s), jnp.asarray(of_group)[number]
            states[name] = _choose(free, after, before)
            for key_, change in changes.items():
                total[key_] = jax.tree.map(partial(_added, free, rate), total[key_], change)
        return total, states

    return optax.GradientTransformationExtraArgs(init, update)


def moves(name: str, step: jax.Array, epoch: int, settings: ConfigDict) -> jax.Array:
    """Whether the optimiser `name` has its turn. Together the gate begins, in separated training the experts do."""
    if not settings.period:
        return jnp.asarray(True)
    first = "experts" if settings.mode == "separated" else "gate"
    return is_first(step, epoch, settings.period) == (name == first)


def noisy(gradient: Any, share: float, key: jax.Array) -> Any:
    """g + share |g| N(0, 1) of each tensor."""
    leaves, tree = jax.tree.flatten(gradient)
    keys = jax.random.split(key, len(leaves))
    lengths = [jnp.linalg.norm(leaf.ravel()) for leaf in leaves]
    found = [
        leaf + share * length * jax.random.normal(own, leaf.shape, leaf.dtype)
        for leaf, length, own in zip(leaves, lengths, keys, strict=True)
    ]
    return jax.tree.unflatten(tree, found)


def _part(tree: Any, keys: Sequence[str]) -> Any:
    return {key: tree[key] for key in keys if key in tree}


def _choose(condition: jax.Array, yes: Any, no: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)


def _added(free: jax.Array, rate: jax.Array, total: jax.Array, change: jax.Array) -> jax.Array:
    return total - jnp.where(free, rate.astype(change.dtype) * change, 0)
