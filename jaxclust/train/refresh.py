"""What happens between rounds: features of every image, the method's refresh, and its record."""

import jax
import numpy as np

from jaxclust import hosts, runtime
from jaxclust.data.split import fingerprint
from jaxclust.evaluation import clustering, suite
from jaxclust.features.extract import Program, extract
from jaxclust.features.rows import Rows
from jaxclust.files import replacing
from jaxclust.methods.base import Refreshed, Targets, TrainState
from jaxclust.train import optim
from jaxclust.train.stage import Stage


def refresh(
    stage: Stage, state: TrainState, targets: Targets, step: int, last: bool
) -> tuple[TrainState, Targets, dict[str, float]]:
    """New targets, and what the method renews; the metrics of both.

    After the last step nothing is left to train: only `extra` (such as centroids) is taken over, and the recorded
    assignment is what `predict` will say of the same images. A stage without steps takes everything.
    """
    rows = seen(stage, state, targets)
    key = runtime.key(stage.config.seed, stage.name, "refresh", step)
    assert stage.method.refresh is not None
    refreshed = stage.method.refresh(jax.device_get(state), targets, rows, key)
    hosts.require_same("after a refresh the targets", refreshed.target)
    values = {**refreshed.metrics}
    if "features/std" not in values:  # a method whose refresh sees more than features measures it itself
        values["features/std"] = std_of_unit_rows(rows)
    new = state._replace(extra=runtime.put_replicated(refreshed.extra, stage.mesh))
    if last and step:
        if stage.predict is not None and refreshed.cluster is not None:
            predicted = run(stage, new, stage.predict, "assignment")
            refreshed = refreshed._replace(cluster=predicted["cluster"].whole())
        return new, targets, values | _record(stage, state, targets, refreshed, rows, step)
    params = runtime.put_replicated(refreshed.params, stage.mesh)
    opt_state = optim.renew(stage.optimizer, state.opt_state, params, stage.method.fresh)
    new = new._replace(params=params, opt_state=runtime.put_replicated(opt_state, stage.mesh))
    values |= _record(stage, state, targets, refreshed, rows, step)
    at = np.asarray(step, np.int32)
    forgotten = np.zeros_like(targets.memory)
    return new, Targets(refreshed.target, refreshed.weight, refreshed.ids, at, forgotten), values


def seen(stage: Stage, state: TrainState, targets: Targets) -> Rows:
    """The rows that a refresh works with: what was remembered of the images, or what the method's `look` makes."""
    if stage.method.memory is None or targets.refreshed_at < 0:
        return run(stage, state, stage.look, "features")["features"]
    memory = targets.memory
    rows = Rows(len(memory), memory.shape[1:], memory.dtype, stage.config.features.memory_bytes, stage.workdir / "tmp")
    rows.append(memory[hosts.own_ids(len(memory))])
    return rows.finish()


def run(stage: Stage, state: TrainState, program: Program, title: str) -> dict[str, Rows]:
    """A program over every image of the stage's split."""
    folder = stage.workdir / "tmp"
    return extract(program, state.params, state.extra, stage.split, stage.config, stage.mesh, folder, title)


def _record(
    stage: Stage, state: TrainState, targets: Targets, refreshed: Refreshed, rows: Rows, step: int
) -> dict[str, float]:
    """Writes the assignment to the cluster log and measures it; labels meet it only here."""
    if refreshed.cluster is None:
        return {}
    before = _before(stage, targets)
    if hosts.is_first():
        _write(stage, f"{step // stage.lengths.round}.npz", refreshed)
    values = clustering.sizes(refreshed.cluster, stage.method.num_clusters)
    if before is not None and ((before >= 0) & (refreshed.cluster >= 0)).any():
        average = stage.config.evaluate.nmi_average
        values["clusters/nmi_prev"] = clustering.nmi(before, refreshed.cluster, average)
        values["clusters/changed"] = clustering.changed(before, refreshed.cluster)
    found = {"cluster": refreshed.cluster, **refreshed.record}

    def features() -> Rows:
        return rows if stage.look is stage.embed else run(stage, state, stage.embed, "features")["features"]

    scores = suite.evaluate(found, stage.split.labels, stage.config, features)
    return values | {f"train/{name}": value for name, value in scores.items() if "/" not in name}


def _before(stage: Stage, targets: Targets) -> np.ndarray | None:
    """The assignment [N] of the last refresh; targets need not be clusters. None if there is none."""
    path = stage.workdir / "assignments" / stage.name / f"{targets.refreshed_at // stage.lengths.round}.npz"
    if targets.refreshed_at < 0 or not path.exists():
        return None
    with np.load(path, allow_pickle=False) as file:
        cluster: np.ndarray = file["cluster"]
    return cluster


def _write(stage: Stage, name: str, refreshed: Refreshed) -> None:
    """assignments/<stage>/<name>, and what else the method recorded to uncertainty/<stage>/<name>."""
    assert refreshed.cluster is not None
    arrays = {
        "id": np.arange(len(refreshed.cluster), dtype=np.int32),
        "cluster": refreshed.cluster.astype(np.int32),
        "distance": np.asarray(refreshed.distance, np.float32),
        "weight": refreshed.weight,
        "fingerprint": np.array(fingerprint(stage.split, len(refreshed.cluster))),
    }
    written = {"assignments": arrays} | ({"uncertainty": arrays | {**refreshed.record}} if refreshed.record else {})
    for kind, of_kind in written.items():
        with replacing(stage.workdir / kind / stage.name / name) as temporary:
            np.savez_compressed(temporary, allow_pickle=False, **of_kind)


def std_of_unit_rows(rows: Rows) -> float:
    """Mean over dimensions of the standard deviation of unit rows: near 1/sqrt(D) when spread, 0 when collapsed."""
    total, squares = np.zeros((2, *rows.shape[1:]))
    for chunk in rows.chunks():
        unit = chunk / np.maximum(np.linalg.norm(chunk, axis=1, keepdims=True), 1e-12)
        total = total + unit.sum(axis=0, dtype=np.float64)
        squares = squares + np.square(unit, dtype=np.float64).sum(axis=0)
    count = rows.shape[0]
    total, squares = hosts.total(np.stack([total, squares]))
    return float(np.sqrt(np.maximum(squares / count - np.square(total / count), 0)).mean())
