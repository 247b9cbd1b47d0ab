"""The one loop. The order of events at each step stands in `_loop`; everything else serves it.

`step` counts updates done: events at `step` see the state after that many updates, and those of the last step
see the trained state. A restored state goes on exactly where it was saved.
"""

import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from jaxclust import hosts, runtime
from jaxclust.data import sampler
from jaxclust.data.pipeline import train_batches
from jaxclust.errors import NonFiniteError
from jaxclust.methods.base import Batch, Targets, TrainState
from jaxclust.progress import progress
from jaxclust.runtime import StopSignal
from jaxclust.train import skips, validation
from jaxclust.train import step as train_step
from jaxclust.train.checkpoint import Checkpoints, Snapshot
from jaxclust.train.console import print_round
from jaxclust.train.frozen import with_features
from jaxclust.train.image_rows import ImageRows
from jaxclust.train.lengths import due
from jaxclust.train.refresh import refresh
from jaxclust.train.stage import Stage
from jaxclust.train.writer import Writer

IN_FLIGHT = 8  # steps that may wait for the device: enough to keep it busy, few enough to bound memory
# (XLA's CPU client deadlocks when some 32 steps of several devices wait)


def steps_done(stage: Stage) -> int:
    """The step of the newest checkpoint of a stage, -1: it has none."""
    folder = stage.workdir / "checkpoints" / stage.name
    step = Checkpoints(folder).latest() if Checkpoints.exist(folder) else None  # to look makes no folder
    return -1 if step is None else step


def run_stage(stage: Stage, stop: StopSignal) -> Snapshot:
    """Trains a stage to its end, from its newest checkpoint if it has one.

    Stopped after a signal, with the state saved; NonFiniteError on a bad loss, with the last good checkpoint intact.
    """
    checkpoints = Checkpoints(stage.workdir / "checkpoints" / stage.name, stage.config.keep_checkpoints)
    restored = checkpoints.latest()
    first = stage.first()
    snapshot = first if restored is None else checkpoints.restore(first, stage.method.fresh)
    if restored is not None and restored >= stage.lengths.stage:
        print(f"{stage.name}: finished before, at step {restored:,}", flush=True)
        return snapshot
    if restored is not None:
        print(f"{stage.name}: going on from step {restored:,} of {stage.lengths.stage:,}", flush=True)
    if restored is None and stage.whose:
        print(f"{stage.name}: begins with the body of {stage.whose()}", flush=True)
    if stage.config.freeze_body:
        stage = with_features(stage, snapshot.state, restored is not None)
    writer = Writer(stage.workdir, stage.name, restored)
    try:
        return _loop(stage, snapshot, restored, checkpoints, writer, stop)
    finally:
        writer.close()


def _loop(
    stage: Stage, snapshot: Snapshot, restored: int | None, checkpoints: Checkpoints, writer: Writer, stop: StopSignal
) -> Snapshot:
    state, targets = snapshot
    lengths, key = stage.lengths, runtime.key(stage.config.seed, stage.name, "step")
    image_rows = ImageRows(stage.workdir / "rows" / stage.name, restored, stage.method.memory)
    start, in_flight, clock = restored or 0, deque[Any](), time.perf_counter()
    batches: Iterator[Batch] = iter(())
    for step in range(start, lengths.stage + 1):
        last = step == lengths.stage
        refreshing = stage.method.refresh is not None and (last or due(step, lengths.round))
        values: dict[str, float] = {}
        if due(step, lengths.log) or refreshing or last:  # before anything is derived from the state
            state, values = _flush(stage, state, targets, step, clock, writer)
        if refreshing and targets.refreshed_at != step:  # a restored state is not refreshed twice
            targets = image_rows.remember(targets)
            state, targets, refreshed = refresh(stage, state, targets, step, last)
            values |= refreshed
        if step != restored and validation.is_due(stage, step):
            targets = image_rows.remember(targets)
            image_rows.flush(step)
            values |= validation.validate(stage, state, step)
        if values:
            before = writer.newest("clusters/found")
            writer.write(step, step // lengths.round, values)
            print_round(stage, step, values, before)
            skips.check(stage, step, values)
        stopping = stop.asked()  # one look: what is saved is what stops
        judged = values.get(validation.SELECTING) if stage.config.data.hold_out else None  # labels select nothing else
        best = judged is not None and _is_best(checkpoints, judged)
        if last or due(step, lengths.save) or stopping or best:
            _finite_sums(stage, state, targets)
            targets = image_rows.remember(targets)
            image_rows.flush(step)
            checkpoints.save(step, Snapshot(state, targets), judged)
        if last:
            break
        if stopping:
            raise stop.error()
        if step == start or due(step, lengths.round):
            batches = _batches(stage, targets, step)
        if values or step == start:
            clock = time.perf_counter()
        state, rows, done = stage.step(state, next(batches), key)
        image_rows.add(rows)
        in_flight.append(done)
        if len(in_flight) > IN_FLIGHT:
            jax.block_until_ready(in_flight.popleft())
    return Snapshot(state, targets)


def _is_best(checkpoints: Checkpoints, judged: float) -> bool:
    """Whether a state that is so good is better than all that are kept."""
    best = checkpoints.best()
    return bool(hosts.agreed(best is None or judged > best.value))


def _flush(
    stage: Stage, state: TrainState, targets: Targets, step: int, clock: float, writer: Writer
) -> tuple[TrainState, dict[str, float]]:
    """Means of the metrics since the last flush, which was at `clock`, and the state with zeroed sums."""
    sums = _finite_sums(stage, state, targets)
    count = int(sums["count"])
    if not count:
        return state, {}
    values = {f"train/{name}": float(sums[name]) / count for name in stage.metrics}
    if "skipped" in stage.metrics:
        values[skips.COUNT] = writer.newest(skips.COUNT) + round(float(sums["skipped"]))
    values |= {f"lr/{name}": rate for name, rate in stage.optimizer.rates(state.opt_state, step).items()}
    # Only now are all steps done; they are asked for ahead.
    values["images_per_second"] = count * stage.config.batch_size / (time.perf_counter() - clock)
    zeros = runtime.put_replicated(train_step.zero_sums(stage.metrics), stage.mesh)
    return state._replace(sums=zeros), values


def _finite_sums(stage: Stage, state: TrainState, targets: Targets) -> dict[str, np.ndarray]:
    """The sums of the metrics, the only thing that the host waits for; NonFiniteError if a step was bad."""
    sums: dict[str, np.ndarray] = jax.device_get(state.sums)
    if sums["bad_step"] >= 0:
        raise NonFiniteError(_bad_batch(stage, targets, int(sums["bad_step"])))
    return sums


def _order(stage: Stage, targets: Targets, round_: int) -> np.ndarray:
    """Ids of a round in the order in which they are trained on."""
    size, steps = stage.config.batch_size, stage.lengths.round
    seed = (stage.config.seed, stage.number, round_)
    return sampler.draw(
        stage.config.sampler, targets.ids, targets.cluster, steps * size, seed, size,
        first_batch=round_ * steps, unlabelled=stage.config.unlabelled_ratio, per_class=stage.config.images_per_class,
    )  # fmt: skip


def _batches(stage: Stage, targets: Targets, step: int) -> Iterator[Batch]:
    """Batches on the devices from `step` to the end of its round."""
    length, config = stage.lengths.round, stage.config
    round_ = step // length
    until = min((round_ + 1) * length, stage.lengths.stage)
    batches = train_batches(
        stage.split,
        {name: config.views[name] for name in stage.method.views},
        _order(stage, targets, round_),
        targets.target,
        targets.weight,
        start_position=round_ * length * config.batch_size,
        first_step=step,
        last_step=until,
        batch_size=config.batch_size,
        seed=config.seed,
        stage_index=stage.number,
        host=hosts.index(),
        hosts=hosts.count(),
    )
    for batch in progress(batches, until - step, f"round {round_ + 1}", "steps"):
        yield runtime.put_batch(batch, stage.mesh)


def _bad_batch(stage: Stage, targets: Targets, step: int) -> str:
    size, length = stage.config.batch_size, stage.lengths.round
    first = step % length * size
    ids = _order(stage, targets, step // length)[first : first + size]
    names = ", ".join(stage.split.path(int(i)) for i in ids[:3])
    return (
        f"stage {stage.name!r}: the loss of step {step} is not finite. Ids of its batch: {ids.tolist()} (the first: "
        f"{names}). The last good checkpoint is kept. Likely cause: a learning rate that is too high "
        "(config.optimizer.body.lr)"
    )
