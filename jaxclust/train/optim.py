"""Optimisers from `config.optimizer`: one for each top-level key of the parameters."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from jaxclust.methods.base import Method

Schedule = Callable[[jax.Array], jax.Array]


def schedule(group: ConfigDict, steps: int) -> Schedule:
    """Learning rate of an optimiser group by step: constant, or half a cosine down to 0 at `steps`."""
    if group.schedule == "cosine":
        return optax.cosine_decay_schedule(group.lr, max(steps, 1))
    return optax.constant_schedule(group.lr)


def scale_by_step(rate: Schedule) -> optax.GradientTransformationExtraArgs:
    """Multiplies updates by -rate(step), `step` being an argument of `update`.

    optax counts steps in its own state, which a renewed head would start again from 0.
    """

    def init(params: Any) -> optax.EmptyState:
        return optax.EmptyState()

    def update(updates: Any, state: Any, params: Any = None, *, step: jax.Array, **extra: Any) -> tuple[Any, Any]:
        return jax.tree.map(lambda u: jnp.asarray(-rate(step), u.dtype) * u, updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def group_optimizer(group: ConfigDict, steps: int) -> optax.GradientTransformationExtraArgs:
    """One group: g + weight_decay * w, then momentum (v = mu v + g, no dampening) or Adam, then the rate."""
    direction = optax.scale_by_adam() if group.name == "adam" else optax.trace(group.momentum)
    return optax.chain(optax.add_decayed_weights(group.weight_decay), direction, scale_by_step(schedule(group, steps)))


def make(config: ConfigDict, method: Method, params: Any, steps: int) -> optax.GradientTransformationExtraArgs:
    """The method's own optimiser, or a group for each top-level key of `params` (no section: `body`'s)."""
    if method.optimizer is not None:
        return optax.with_extra_args_support(method.optimizer())
    sections = {name: config.optimizer.get(name, config.optimizer.body) for name in params}
    groups = {name: group_optimizer(section, steps) for name, section in sections.items()}
    return optax.partition(groups, group_labels)


def group_labels(params: Any) -> Any:
    """For each parameter its top-level key."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[0].key, params)


def rates(config: ConfigDict, params: Any, steps: int, step: int) -> Iterator[tuple[str, float]]:
    """(group, learning rate) at `step` for each configured group of `params`."""
    for name in params:
        if name in config.optimizer:
            yield name, float(schedule(config.optimizer[name], steps)(jnp.asarray(step)))


def renew(optimizer: optax.GradientTransformation, opt_state: Any, params: Any, fresh: tuple[str, ...]) -> Any:
    """The optimiser state with everything under a name in `fresh` as `init` makes it."""
    new = optimizer.init(params)

    def pick(path: tuple[Any, ...], new_leaf: Any) -> Any:
        if any(getattr(entry, "key", None) in fresh for entry in path):
            return new_leaf
        return old[path]

    old = dict(jax.tree_util.tree_leaves_with_path(opt_state))
    return jax.tree_util.tree_map_with_path(pick, new)
