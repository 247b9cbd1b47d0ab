"""Optimisers from `config.optimizer`: one for each top-level key of the parameters.

A group's rule (`direction`) lives under its name, so that a renewed head gets clean slots; the learning rates of all
groups come after it, under no name, so that the course of a rate goes on.
"""

from collections.abc import Callable, Mapping
from functools import partial
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
    courses = {
        name: Course(config.optimizer[section], lengths.every[section], lengths.warmup.get(section, 0))
        for name, section in groups.items()
    }
    scale, rates = scale_by_rates(courses, lengths.stage)
    chain = optax.chain(optax.partition(rules, group_labels), scale)
    return Optimizer(chain.init, chain.update, lambda state, step: rates(state[1], step))


def _check(field: str, group: ConfigDict, every: int, method: Method) -> None:
    if group.wd and group.weight_decay:
        raise ConfigError(
            f"{field}.wd={group.wd} (a decay of {10.0**group.wd:g}) and {field}.weight_decay={group.weight_decay}: "
            "only one can say the weight decay; leave the other at 0"
        )
    if group.schedule in ("exponential", "steps", "plateau") and not every:
        raise ConfigError(f"{field}.every='never', but schedule={group.schedule!r} needs a length such as '1 round'")
    if group.schedule == "plateau" and method.update is not None:
        raise ConfigError(
            f"{field}.schedule='plateau' waits for a training loss that no longer falls, and this method takes its own "
            "steps without showing one; choose another"
        )


def direction(group: ConfigDict) -> optax.GradientTransformationExtraArgs:
    """g + decay * w, then momentum (v = mu v + g, no dampening) or Adam, before the rate.

    Nesterov's momentum moves by mu v + g in place of v, as PyTorch has it.
    "lars" makes g + decay * w of each parameter as long as `trust` of that parameter before the momentum, without
    clipping (You, Gitman, Ginsburg, "Large batch training of convolutional networks", 2017, where the length is
    |g| + decay |w|); where one of both is zero it stays as it is.
    """
    decay = 10.0**group.wd if group.wd else group.weight_decay
    momentum = partial(optax.trace, group.momentum, nesterov=group.nesterov)
    rules = {
        "adam": (optax.scale_by_adam,),
        "sgd": (momentum,),
        "lars": (partial(optax.scale_by_trust_ratio, trust_coefficient=group.trust), momentum),
    }
    chain = optax.chain(
        optax.add_decayed_weights(decay, DECAYED[group.decayed]), *(rule() for rule in rules[group.name])
    )
    return still(chain, group.frozen) if group.frozen else chain


def not_of_norms(params: Any) -> Any:
    """Which parameters do not belong to a norm, whose parameters are a scale and whatever stands beside it."""
    norms = {path[:-1] for path, _ in jax.tree_util.tree_leaves_with_path(params) if path[-1].key == "scale"}
    return jax.tree_util.tree_map_with_path(lambda path, _: path[:-1] not in norms, params)


DECAYED = {"all": None, "no_norm": not_of_norms}
"""A function of the parameters that tells which of them decay, None for all."""


def still(rule: optax.GradientTransformationExtraArgs, steps: int) -> optax.GradientTransformationExtraArgs:
    """`rule`, which before step `steps` moves nothing and keeps its state."""

    def update(updates: Any, state: Any, params: Any = None, *, step: jax.Array, **extra: Any) -> tuple[Any, Any]:
        moved, new = rule.update(updates, state, params, **extra)
        free = step >= steps
        return (
            jax.tree.map(lambda change: jnp.where(free, change, 0), moved),
            jax.tree.map(lambda after, before: jnp.where(free, after, before), new, state),
        )

    return optax.GradientTransformationExtraArgs(rule.init, update)


class Course(NamedTuple):
    """What a learning rate follows: the settings of its group, and two of their lengths in steps."""

    group: ConfigDict
    every: int
    warmup: int = 0


def schedule(course: Course, steps: int) -> Schedule:
    """Learning rate by step: constant, half a cosine down to min_lr at `steps`, the first part of a cosine, lr *
    gamma^(step // every), or lr * factor^(milestones that are reached), each after a straight line from warmup_lr."""
    group, every, warmup = course
    length = max(steps - warmup, 1)
    if group.schedule == "cosine":
        lowest = group.min_lr / group.lr if group.lr else 0.0
        follows = optax.cosine_decay_schedule(group.lr, length, alpha=lowest)
    elif group.schedule == "cosine_part":
        follows = cosine_part(group.lr, length, group.part)
    elif group.schedule == "exponential":
        follows = optax.exponential_decay(group.lr, every, group.gamma, staircase=True)
    elif group.schedule == "steps":
        falls = {milestone * every: group.factor for milestone in group.milestones}
        follows = optax.piecewise_constant_schedule(group.lr, falls)
    else:
        follows = optax.constant_schedule(group.lr)
    if not warmup:
        return follows
    return optax.join_schedules([optax.linear_schedule(group.warmup_lr, group.lr, warmup), follows], [warmup])


def cosine_part(rate: float, steps: int, part: float) -> Schedule:
    """rate * cos(pi * part * step / steps); FixMatch's part is 7/16, and above 1/2 the rate would become negative."""
    return lambda step: rate * jnp.cos(jnp.pi * part * jnp.minimum(step / steps, 1.0))


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
    courses: Mapping[str, Course], steps: int
) -> tuple[optax.GradientTransformationExtraArgs, Callable[[Any, int], dict[str, float]]]:
    """Multiplies the updates of each group by minus its rate; and the function that tells the rates.

    `step` is an argument of `update`: optax counts steps in its own state, which a renewed head would start at 0.
    """
    schedules = {name: schedule(course, steps) for name, course in courses.items()}
    plateaus = {name: plateau(course.group, course.every) for name, course in courses.items()}

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
