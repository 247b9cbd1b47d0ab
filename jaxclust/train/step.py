"""The train step: one program for each device, mapped over the mesh and jitted, with donated state."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxclust.methods.base import Aux, Batch, Method, TrainState
from jaxclust.runtime import AXIS
from jaxclust.train.optim import Optimizer

Step = Callable[[TrainState, Batch, jax.Array], tuple[TrainState, dict[str, jax.Array], jax.Array]]


def gradient_update(
    method: Method, optimizer: Optimizer
) -> Callable[[TrainState, Batch, jax.Array], tuple[TrainState, Aux]]:
    """The default `update`: one step down the gradient of the loss over the batch of all devices."""

    def update(state: TrainState, batch: Batch, rng: jax.Array) -> tuple[TrainState, Aux]:
        def objective(params: Any) -> tuple[jax.Array, Aux]:
            loss, aux = method.loss(params, state.extra, batch, jax.random.fold_in(rng, jax.lax.axis_index(AXIS)))
            # The gradient *of the mean* is already summed over devices; the mean of a gradient would not be.
            return jax.lax.pmean(loss, AXIS), aux

        (loss, aux), gradient = jax.value_and_grad(objective, has_aux=True)(state.params)
        changes, opt_state = optimizer.update(gradient, state.opt_state, state.params, step=state.step, value=loss)
        params = optax.apply_updates(state.params, changes)
        extra = method.after(params, aux.extra) if method.after else aux.extra
        new, metrics = state._replace(params=params, extra=extra, opt_state=opt_state), {"loss": loss, **aux.metrics}
        if method.accept is not None:
            taken, metrics = method.accept(loss, gradient, {name: mean(value) for name, value in metrics.items()})
            new = jax.tree.map(partial(jnp.where, taken), new, state)
        return new, aux._replace(metrics=metrics)

    return update


def make(method: Method, optimizer: Optimizer, mesh: Mesh) -> Step:
    """(state, batch, key of the stage) -> (state, rows by image, updates since the last log)."""
    update = jax.jit(method.update or gradient_update(method, optimizer))  # traced once, with sums or without

    def device_step(state: TrainState, batch: Batch, key: jax.Array) -> Any:
        new, aux = update(state._replace(sums={}), batch, jax.random.fold_in(key, state.step))
        sums = add_metrics(state.sums, aux.metrics, state.step)
        rows = {**aux.rows, "id": batch["id"], "position": batch["position"]} if aux.rows else {}
        # The sums are donated to the next step; the count returned beside them tells when this one is done.
        return new._replace(step=state.step + 1, sums=sums), rows, sums["count"]

    batch_specs = {name: P() if name == "step" else P(AXIS) for name in BATCH_NAMES}
    mapped = jax.shard_map(device_step, mesh=mesh, in_specs=(P(), batch_specs, P()), out_specs=(P(), P(AXIS), P()))
    return jax.jit(mapped, donate_argnums=0)


BATCH_NAMES = ("views", "id", "position", "target", "weight", "step")


def mean(value: Any) -> jax.Array:
    """The mean of a metric over the devices, float32."""
    return jax.lax.pmean(jnp.asarray(value, jnp.float32), AXIS)


def add_metrics(sums: dict[str, jax.Array], metrics: dict[str, jax.Array], step: jax.Array) -> dict[str, jax.Array]:
    """Adds a step's metrics to the sums since the last log, and keeps the first step that was not finite.

    They live on the device and in the checkpoint, so nothing waits for them and a resumed run logs the same.
    """
    means = {name: mean(value) for name, value in metrics.items()}
    finite = jnp.all(jnp.isfinite(jnp.stack(list(means.values()))))
    bad = jnp.where(finite | (sums["bad_step"] >= 0), sums["bad_step"], step)
    added = {name: sums.get(name, 0.0) + value for name, value in means.items()}
    return {**added, "count": sums["count"] + 1, "bad_step": bad}


def zero_sums(names: Iterable[str]) -> dict[str, np.ndarray]:
    """The sums of no steps."""
    sums = {name: np.zeros((), np.float32) for name in names}
    return {**sums, "count": np.zeros((), np.int32), "bad_step": np.full((), -1, np.int32)}


def outputs(
    step: Step, state: TrainState, batch: Batch, key: jax.Array
) -> tuple[tuple[str, ...], dict[str, jax.ShapeDtypeStruct]]:
    """Names of what `step` measures, and the shapes of what it says of the images of its batch.

    Found by tracing it with a state that has no sums yet.
    """
    traced, rows, _ = jax.eval_shape(step, state, batch, key)
    return tuple(name for name in traced.sums if name not in ("count", "bad_step")), rows
