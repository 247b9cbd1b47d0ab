"""Checkpoints: everything that moves, in one Orbax step folder, written whole or not at all."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as preserved

from jaxclust import hosts
from jaxclust.errors import ConfigError
from jaxclust.methods.base import Method, Targets, TrainState

LEARNT = ("state.params.", "state.extra.")  # names of what a stage hands on


class Snapshot(NamedTuple):
    """What a checkpoint holds: device arrays and host arrays."""

    state: TrainState
    targets: Targets


class Judged(NamedTuple):
    """A step, and how good its state is: more is better."""

    step: int
    value: float


class Checkpoints:
    """The checkpoints of one stage, `folder`/<step>/, each a flat dict of named arrays.

    Who saves says how many to `keep`, beside the best of those that were judged; without it they are only read, be it
    while another process saves. All hosts write them together; they can be restored onto any number of devices and
    hosts.
    """

    def __init__(self, folder: Path, keep: int | None = None):
        self._folder = folder
        self._manager = ocp.CheckpointManager(
            folder.absolute(),
            options=ocp.CheckpointManagerOptions(
                best_fn=_value,
                preservation_policy=preserved.AnyPreservationPolicy(
                    [
                        preserved.LatestN(keep),
                        preserved.BestN(get_metric_fn=_rank, n=1, keep_checkpoints_without_metrics=False),
                    ]
                ),
                enable_async_checkpointing=False,
                cleanup_tmp_directories=keep is not None,
            ),
            item_handlers=ocp.StandardCheckpointHandler(),
        )

    @staticmethod
    def exist(folder: Path) -> bool:
        """Whether there is a checkpoint in `folder`."""
        return bool(hosts.agreed(folder.exists())) and Checkpoints(folder).latest() is not None

    def save(self, step: int, snapshot: Snapshot, value: float | None = None) -> None:
        """Saves what is reached after `step` updates, and how good it is if that is known; a step that is there
        already would only be the same."""
        metrics = {} if value is None else Judged(step, value)._asdict()
        if not hosts.agreed(step in self._manager.all_steps()):
            self._manager.save(step, args=ocp.args.StandardSave(_arrays(snapshot)), metrics=metrics, force=True)

    def best(self) -> Judged | None:
        """The best of the steps that were judged, the first of equal ones; None without one."""
        said = [self._manager.metrics(step) for step in self.steps()]
        judged = [Judged(**metrics) for metrics in said if metrics]
        return max(judged, key=lambda one: one.value, default=None)

    def latest(self) -> int | None:
        """Step of the newest checkpoint, None without one."""
        step = self._manager.latest_step()
        agreed = hosts.agreed(-1 if step is None else step)
        return agreed if agreed >= 0 else None

    def steps(self) -> list[int]:
        """The steps of all checkpoints, rising."""
        return sorted(self._manager.all_steps())

    def restore(self, like: Snapshot, fresh: tuple[str, ...] = (), step: int | None = None) -> Snapshot:
        """The newest snapshot, or that of `step`, in the structure and on the devices of `like`.

        Arrays under a name in `fresh` and the targets take their saved shape, since a head and a list of ids may
        have changed their length. ConfigError names the first array that differs otherwise.
        """
        step = self.latest() if step is None else step
        saved = self._manager.item_metadata(step).tree
        wanted = {}
        for name, leaf in _arrays(like).items():
            if name not in saved:
                raise ConfigError(f"{self._folder}/{step} has no array {name}: it was made by another model or method")
            shape = tuple(saved[name].shape)
            free = name.startswith("targets.") or _under(name, fresh)
            if shape != leaf.shape and not free:
                raise ConfigError(
                    f"{self._folder}/{step}: {name} has shape {shape}, this config makes {leaf.shape}; "
                    "it was made by another model or method"
                )
            wanted[name] = _target(leaf, shape)
        arrays = self._manager.restore(step, args=ocp.args.StandardRestore(wanted))
        restored: Snapshot = jax.tree_util.tree_map_with_path(lambda path, leaf: arrays.get(_name(path), leaf), like)
        return restored

    def check_body(self, like: Snapshot, method: Method) -> None:
        """ConfigError unless the newest snapshot has the body of `like` and what is `given`, and no more of them."""
        step, here = self.latest(), _named(like)
        saved = self._manager.item_metadata(step).tree
        wanted = {n: leaf for n, leaf in here.items() if _of_body(n) or _under(n, method.given)}
        more = {name for name in saved if name not in here and name.startswith(LEARNT)}
        extra = {name for name in more if _of_body(name)} if any(map(_of_body, wanted)) else set()
        extra |= {name for name in more if _under(name, method.given)}
        for name in [*wanted, *sorted(extra)]:
            there = tuple(saved[name].shape) if name in saved else "missing"
            made = wanted[name].shape if name in wanted else "no such array"
            if there != made and not _under(name, method.fresh):
                raise ConfigError(
                    f"config.init_from: {name} is {there} in {self._folder}/{step}, this config makes {made}; "
                    "it was made by another model"
                    + ("" if _of_body(name) else ", by another method or with other settings, such as config.cluster.k")
                )

    def restore_body(self, like: Snapshot, method: Method) -> Snapshot:
        """`like` with the body of the newest snapshot.

        Other parameters and arrays of `extra`, such as heads and batch statistics, come along where name and shape
        agree, but for those under a name in `method.fresh`. What the snapshot has none of begins as a copy: experts,
        each an equal share, as one that was without a gate, the convolutions of a gate as those of an encoder, and
        copies of a body in `extra`, such as MoCo's keys, as that body.
        """
        self.check_body(like, method)
        step = self.latest()
        saved = self._manager.item_metadata(step).tree
        wanted = {name: np.empty(about.shape, about.dtype) for name, about in saved.items()}
        taken, alone = {}, not any(_under(name, ("gate",)) for name in saved)
        for name, leaf in _arrays(like).items():
            there = name if name in saved else _copied(name)
            shape = tuple(saved[there].shape) if there in saved else ()
            shared = alone and _under(name, ("experts",)) and _share(shape, leaf.shape)
            fits = there in saved and (shape == leaf.shape or shared)
            if fits and not _under(name, method.fresh) and name.startswith(LEARNT):
                wanted[there], taken[name] = _target(leaf, shape), there
        arrays = self._manager.restore(step, args=ocp.args.StandardRestore(wanted))

        def begun(path: tuple[Any, ...], leaf: Any) -> Any:
            if _name(path) not in taken:
                return leaf
            array = arrays[taken[_name(path)]]
            times = leaf.shape[0] // array.shape[0] if array.shape != leaf.shape else 1
            return jax.device_put(jnp.repeat(array, times, axis=0) if times > 1 else array, leaf.sharding)

        restored: Snapshot = jax.tree_util.tree_map_with_path(begun, like)
        return restored


def _rank(metrics: dict[str, Any]) -> tuple[float, int]:
    """What orders checkpoints by how good they are, those that nobody judged first."""
    return metrics.get("value", -np.inf), -metrics.get("step", 0)


def _value(metrics: dict[str, Any]) -> float:
    return _rank(metrics)[0]


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _named(tree: Any) -> dict[str, Any]:
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _of_body(name: str) -> bool:
    return name.startswith("state.params.body.")


def _copied(name: str) -> str:
    """The array that one begins as where there is none of its own name."""
    of_body = re.fullmatch(r"state\.extra\..+\.(body|batch_stats)\.(.+)", name)
    if of_body:
        return {"body": "state.params.body.", "batch_stats": "state.extra.batch_stats."}[of_body[1]] + of_body[2]
    return name.replace(".gate.stack.", ".body.stack.")


def _share(few: tuple[int, ...], many: tuple[int, ...]) -> bool:
    """Whether arrays along the first axis of `few` can be shared out evenly among those of `many`."""
    return bool(few) and few[1:] == many[1:] and many[0] % few[0] == 0


def _under(name: str, keys: tuple[str, ...]) -> bool:
    return not set(keys).isdisjoint(name.split("."))


def _arrays(snapshot: Snapshot) -> dict[str, Any]:
    """Every array by its name; host scalars as arrays, arrays without elements left out (Orbax takes neither)."""
    named = _named(snapshot)
    arrays = {name: leaf if isinstance(leaf, jax.Array) else np.asarray(leaf) for name, leaf in named.items()}
    return {name: array for name, array in arrays.items() if array.size}


def _target(leaf: Any, shape: tuple[int, ...]) -> Any:
    if isinstance(leaf, jax.Array):
        return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=leaf.sharding)
    return np.empty(shape, leaf.dtype)
