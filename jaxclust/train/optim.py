"""Optimisers from `config.optimizer`: one for each top-level key of the parameters.

A group's rule (`direction`) lives under its name, so that a renewed head gets clean slots; the learning rates of all
groups come after it, under no name, so that the course of a rate goes on.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from jaxclust.errors import ConfigError
from jaxclust.methods.base import Method
from jaxclust.train.lengths import Lengths

Schedule = Callable[[jax.Array], jax.Array]


class Optimizer(NamedTuple):
    """An optax transformation whose update takes `step` and `value`, the loss; and what it makes of the rates."""

    init: Callable[[Any], Any]
    update: Callable[..., tuple[Any, Any]]
    rates: Callable[[Any, int], dict[str, float]]
    """(optimiser state, step) -> learning rate of each group."""


def make(config: ConfigDict, method: Method, params: Any, lengths: Lengths) -> Optimizer:
    """The method's own optimiser, or a group for each top-level key of `params` (no section: `body`'s).

    ConfigError if a schedule waits for a loss that the method does not show.
    """
    if method.optimizer is not None:
        own = optax.with_extra_args_support(method.optimizer())
        return Optimizer(own.init, own.update, lambda state, step: {})
    groups = {name: name if name in config.optimizer else "body" for name in params}
    for section in groups.values():
        _check(f"config.optimizer.{section}", config.optimizer[section], lengths.every[section], method)
    frozen = {"body"} if config.freeze_body else set()
    rules = {
        name: optax.set_to_zero() if name in frozen else direction(config.optimizer[section])
        for name, section in groups.items()
    }
    courses = {name: (config.optimizer[section], lengths.every[section]) for name, section in groups.items()}
    scale, rates = scale_by_rates(courses, lengths.stage)
    chain = optax.chain(optax.partition(rules, group_labels), scale)
    return Optimizer(chain.init, chain.update, lambda state, step: rates(state[1], step))


def _check(field: str, group: ConfigDict, every: int, method: Method) -> None:
    if group.wd and group.weight_decay:
        raise ConfigError(
            f"{field}.wd={group.wd} (a decay of {10.0**group.wd:g}) and {field}.weight_decay={group.weight_decay}: "
            "only one can say the weight decay; leave the other at 0"
        )
    if group.schedule in ("exponential", "plateau") and not every:
        raise ConfigError(f"{field}.every='never', but schedule={group.schedule!r} needs a length such as '1 round'")
    if group.schedule == "plateau" and method.update is not None:
        raise ConfigError(
            f"{field}.schedule='plateau' waits for a training loss that no longer falls, and this method takes its own "
            "steps without showing one; choose none, cosine or exponential"
        )


def direction(group: ConfigDict) -> optax.GradientTransformationExtraArgs:
    """g + decay * w on every parameter, then momentum (v = mu v + g, no dampening) or Adam, before the rate."""
    decay = 10.0**group.wd if group.wd else group.weight_decay
    rule = optax.scale_by_adam() if group.name == "adam" else optax.trace(group.momentum)
    return optax.chain(optax.add_decayed_weights(decay), rule)


def schedule(group: ConfigDict, every: int, steps: int) -> Schedule:
    """Learning rate of a group by step: constant, half a cosine down to 0 at `steps`, or lr * gamma^(step // every)."""
    if group.schedule == "cosine":
        return optax.cosine_decay_schedule(group.lr, max(steps, 1))
    if group.schedule == "exponential":
        return optax.exponential_decay(group.lr, every, group.gamma, staircase=True)
    return optax.constant_schedule(group.lr)


def plateau(group: ConfigDict, every: int) -> optax.GradientTransformationExtraArgs:
    """Multiplies by `factor` once the mean loss of `every` steps has not fallen for more than `patience` times."""
    if group.schedule != "plateau":
        return optax.with_extra_args_support(optax.identity())
    lowest = min(1.0, group.min_lr / group.lr) if group.lr else 1.0
    # optax acts at the patience-th mean without progress, PyTorch, which the field knows, at the one after it.
    return optax.contrib.reduce_on_plateau(
        group.factor, int(group.patience) + 1, accumulation_size=every, min_scale=lowest
    )


def scale_by_rates(
    courses: Mapping[str, tuple[ConfigDict, int]], steps: int
) -> tuple[optax.GradientTransformationExtraArgs, Callable[[Any, int], dict[str, float]]]:
    """Multiplies the updates of each group by minus its rate; and the function that tells the rates.

    `step` is an argument of `update`: optax counts steps in its own state, which a renewed head would start at 0.
    """
    schedules = {name: schedule(group, every, steps) for name, (group, every) in courses.items()}
    plateaus = {name: plateau(group, every) for name, (group, every) in courses.items()}

    def init(params: Any) -> tuple[Any, ...]:
        return tuple(plateaus[name].init(params[name]) for name in plateaus)

    def update(
        updates: Any, state: Any, params: Any = None, *, step: jax.Array, value: jax.Array | float = 0.0, **extra: Any
    ) -> tuple[Any, Any]:
        scaled, states = {}, []
        for (name, rule), old in zip(plateaus.items(), state, strict=True):
            rate = -schedules[name](step)
            changes = jax.tree.map(lambda u, rate=rate: jnp.asarray(rate, u.dtype) * u, updates[name])
            scaled[name], new = rule.update(changes, old, value=value)
            states.append(new)
        return scaled, tuple(states)

    def rates(state: Any, step: int) -> dict[str, float]:
        factors = (float(getattr(of_group, "scale", 1.0)) for of_group in state)
        at = {name: float(rate(jnp.asarray(step))) for name, rate in schedules.items()}
        return {name: rate * factor for (name, rate), factor in zip(at.items(), factors, strict=True)}

    return optax.GradientTransformationExtraArgs(init, update), rates


def group_labels(params: Any) -> Any:
    """For each parameter its top-level key."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[0].key, params)


def renew(optimizer: Optimizer, opt_state: Any, params: Any, fresh: tuple[str, ...]) -> Any:
    """The optimiser state with everything under a name in `fresh` as `init` makes it."""
    new = optimizer.init(params)

    def pick(path: tuple[Any, ...], new_leaf: Any) -> Any:
        if any(getattr(entry, "key", None) in fresh for entry in path):
            return new_leaf
        return old[path]

    old = dict(jax.tree_util.tree_leaves_with_path(opt_state))
    return jax.tree_util.tree_map_with_path(pick, new)
