"""A stage made ready: method, data, lengths, programs and first state, all checked before work starts."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxclust import methods, runtime
from jaxclust.config import for_stage, load, stage_names
from jaxclust.data.split import Split
from jaxclust.errors import ConfigError
from jaxclust.evaluation import suite
from jaxclust.features.extract import Program, compile_for
from jaxclust.methods.base import Batch, DataInfo, Method, Targets, TrainState
from jaxclust.train import optim
from jaxclust.train import step as train_step
from jaxclust.train.checkpoint import Checkpoints, Snapshot
from jaxclust.train.lengths import Lengths, lengths
from jaxclust.train.optim import Optimizer


class Stage(NamedTuple):
    """What `loop.run_stage` and the jobs work with."""

    name: str
    number: int  # place among the stages, from 0
    config: ConfigDict
    workdir: Path
    split: Split
    info: DataInfo
    method: Method
    lengths: Lengths
    mesh: Mesh
    optimizer: Optimizer
    step: train_step.Step
    embed: Program
    look: Program  # what refresh sees
    predict: Program | None
    metrics: tuple[str, ...]  # names of what a step measures
    first: Callable[[], Snapshot]  # the state before the first step
    shapes: TrainState  # its shapes and dtypes
    measure: Callable[[TrainState], dict[str, float]] | None = None  # replaces the suite during training


def prepare(
    config: ConfigDict,
    name: str,
    split: Split,
    info: DataInfo,
    workdir: Path,
    devices: Sequence[jax.Device] | None = None,
    make: Callable[[ConfigDict, DataInfo], Method] | None = None,
) -> Stage:
    """Stage `name` of `config` on `split`; errors of settings and data show here.

    `info` describes the data that the stage is trained on, which for new images is not `split`. `devices` are those
    that its programs are compiled for, by default this job's. `make` makes the method, by default `config.method`.
    """
    names = stage_names(config)
    number = names.index(name)
    config = for_stage(config, name)
    kinds = ("checkpoints", "assignments", "rows")
    left = {f"{kind}/{earlier}": workdir / kind / earlier for earlier in names[:number] for kind in kinds}
    info = info._replace(files=left)
    method = (make or methods.get)(config, info)
    missing = [view for view in method.views if view not in config.views]
    if missing:
        raise ConfigError(f"config.views has no section {missing[0]!r}, which method {config.method!r} needs")
    suite.load(config)  # only to see that every evaluation exists
    mesh = runtime.mesh(config, devices)
    batch = example_batch(method, info, config.batch_size)
    key = runtime.key(config.seed, name)
    variables = jax.eval_shape(method.init, key, batch)
    length = lengths(config, info.size)
    optimizer = optim.make(config, method, variables[0], length)
    step = train_step.make(method, optimizer, mesh)
    shapes = jax.eval_shape(lambda batch: _state(method, optimizer, key, batch, ()), batch)
    metrics = train_step.metric_names(step, shapes, batch, key)
    shapes = shapes._replace(sums=jax.eval_shape(lambda: train_step.zero_sums(metrics)))

    begun = Checkpoints.exist(workdir / "checkpoints" / name)  # then the donor is no longer needed
    donor = trained_body(Path(config.init_from)) if config.init_from and number == 0 and not begun else None
    if donor:
        donor.check_body(Snapshot(shapes, first_targets(method, split)), method.fresh)

    def first() -> Snapshot:
        state = jax.jit(lambda: _state(method, optimizer, runtime.key(config.seed, name, "init"), batch, metrics))()
        snapshot = Snapshot(runtime.put_replicated(state, mesh), first_targets(method, split))
        return donor.restore_body(snapshot, method.fresh) if donor else snapshot

    embed = compile_for(method.embed, mesh)
    return Stage(
        name, number, config, workdir, split, info, method, length, mesh, optimizer, step,
        embed, compile_for(method.look, mesh) if method.look else embed,
        compile_for(method.predict, mesh) if method.predict else None,
        metrics, first, shapes,
    )  # fmt: skip


def _state(method: Method, optimizer: Optimizer, key: jax.Array, batch: Batch, metrics: tuple[str, ...]) -> TrainState:
    params, extra = method.init(key, batch)
    sums = jax.tree.map(jnp.asarray, train_step.zero_sums(metrics))
    return TrainState(jnp.zeros((), jnp.int32), params, extra, optimizer.init(params), sums)


def trained_body(workdir: Path) -> Checkpoints:
    """The checkpoints of the last stage of another run; ConfigError if there are none."""
    saved = workdir / "config.json"
    if not saved.exists():
        raise ConfigError(f"config.init_from={str(workdir)!r} holds no run (there is no {saved})")
    folder = workdir / "checkpoints" / stage_names(load(saved))[-1]
    if not Checkpoints.exist(folder):
        raise ConfigError(f"config.init_from={str(workdir)!r} has no checkpoint yet (there is none in {folder})")
    return Checkpoints(folder)


def first_targets(method: Method, split: Split) -> Targets:
    """Targets before any refresh: the labels where the method may see them, else zeros."""
    labels = split.labels if method.labels else None
    target = np.zeros(split.size, np.int32) if labels is None else labels.astype(np.int32)
    ids = np.flatnonzero(target >= 0).astype(np.int32)  # of some images the label may be unknown
    return Targets(target, np.ones(split.size, np.float32), ids, np.asarray(-1, np.int32))


def example_batch(method: Method, info: DataInfo, size: int) -> Batch:
    """A batch of zeros, for shapes and dtypes; its images take no memory."""
    zero = np.zeros((), np.uint8 if len(info.image_shape) == 3 else np.float32)
    zeros: dict[str, Any] = {
        "views": {name: np.broadcast_to(zero, (size, *info.image_shape)) for name in method.views},
        "id": np.zeros(size, np.int32),
        "position": np.zeros(size, np.int64),
        "target": np.zeros(size, np.int32),
        "weight": np.ones(size, np.float32),
        "step": np.zeros((), np.int32),
    }
    return zeros
