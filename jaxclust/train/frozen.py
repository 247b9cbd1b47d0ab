"""A frozen body sees each image once: its features are kept in the workdir and take the place of the images."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxclust import hosts, runtime
from jaxclust.data.feature_file import open_npy
from jaxclust.data.pipeline import train_batches
from jaxclust.data.split import Split, fingerprint
from jaxclust.errors import DataError
from jaxclust.features.rows import Rows
from jaxclust.features.store import write_npy
from jaxclust.files import replacing, write_json
from jaxclust.methods.base import TrainState
from jaxclust.progress import progress
from jaxclust.runtime import tensorflow
from jaxclust.train.refresh import run
from jaxclust.train.stage import Stage

if TYPE_CHECKING:
    from tensorflow import Tensor


def with_features(stage: Stage, state: TrainState, restored: bool) -> Stage:
    """The stage with the features of its images, from features/<stage>.npy if the stage goes on (`restored`).

    Where it is judged during training also of the images that it is judged on, in features/<stage>-<split>.npy. With
    `config.frozen_views` a step draws from features of so many views of each image, in features/<stage>-views.npy. The
    .json beside each file says of which images; DataError if these are others than the stage's.
    """
    if len(stage.split.image_shape) == 1:
        return stage
    judged = stage.others if stage.lengths.eval else {}
    others = {
        name: kept(stage._replace(split=split), state, f"{stage.name}-{name}", restored)
        for name, split in judged.items()
    }
    split = kept(stage, state, stage.name, restored)
    if stage.config.frozen_views:
        split = replace(split, draw=drawn(stage, state, restored))
    return stage._replace(split=split, others={**stage.others, **others})


def kept(stage: Stage, state: TrainState, name: str, restored: bool) -> Split:
    """The features of the stage's split as evaluation sees it, which are in features/`name`.npy, or are made now."""

    def made() -> Rows:
        return run(stage, state, stage.body, "features of the frozen body")["features"]

    path, split = written(stage, name, restored, made), stage.split
    features = open_npy(path, split.name_of, stage.config.data.cache_bytes)
    return replace(features, paths=split.paths, labels=split.labels)


def drawn(stage: Stage, state: TrainState, restored: bool) -> Callable[["Tensor", "Tensor"], "Tensor"]:
    """(ids [B], numbers [B] in [0, 1)) -> the features [B, D] of one of the views of each image."""
    count = stage.config.frozen_views
    path = written(stage, f"{stage.name}-views", restored, lambda: of_views(stage, state))
    gather = open_npy(path, str, stage.config.data.cache_bytes, parts=count).gather
    assert gather is not None

    def draw(ids: "Tensor", numbers: "Tensor") -> "Tensor":
        tf = tensorflow()
        view = tf.minimum(tf.cast(numbers * count, ids.dtype), count - 1)
        return gather(ids * count + view)

    return draw


def of_views(stage: Stage, state: TrainState) -> Rows:
    """Features [N, views * D] of augmented views of every image, each host's own."""
    (name,), config, split = stage.method.views, stage.config, stage.split
    count, local = hosts.count(), config.eval_batch_size // hosts.count()
    steps = -(-split.size // config.eval_batch_size)
    # Of each batch the first part is that of the first host, whose ids are 0, count, 2 count, ...
    ids = np.arange(steps * config.eval_batch_size, dtype=np.int32).reshape(steps, local, count).swapaxes(1, 2).ravel()
    batches = train_batches(
        split, {name: {**config.views[name], "number": config.frozen_views}}, np.minimum(ids, split.size - 1),
        np.zeros(split.size, np.int32), np.ones(split.size, np.float32), start_position=0, first_step=0,
        last_step=steps, batch_size=config.eval_batch_size, seed=config.seed, stage_index=stage.number,
        host=hosts.index(), hosts=count,
    )  # fmt: skip
    rows, left = None, len(hosts.own_ids(split.size))
    for batch in progress(batches, steps, "features of views by the frozen body", "batches"):
        views = batch["views"][name].reshape(local, config.frozen_views, *split.image_shape)
        each = [
            runtime.local_rows({"": stage.body(state.params, state.extra, runtime.put_batch(view, stage.mesh))})[""]
            for view in views.swapaxes(0, 1)
        ]
        found = np.concatenate(each, axis=1)[:left]
        if rows is None:
            rows = Rows(split.size, found.shape[1:], found.dtype, config.features.memory_bytes, stage.workdir / "tmp")
        rows.append(found)
        left -= len(found)
    assert rows is not None
    return rows.finish()


def written(stage: Stage, name: str, restored: bool, make: Callable[[], Rows]) -> Path:
    """features/`name`.npy with what `make` gives, if it is not there yet; DataError if it is of other images."""
    path = stage.workdir / "features" / f"{name}.npy"
    about, split = path.with_suffix(".json"), stage.split
    here = {"rows": split.size, "fingerprint": fingerprint(split, split.size)}
    # From before the first checkpoint it may be of another body.
    if restored and hosts.agreed(path.exists() and about.exists()):
        _check(path, json.loads(about.read_text(encoding="utf-8")), here)
    else:
        rows = make()
        if hosts.is_first():
            with replacing(path) as temporary:
                write_npy(temporary, rows)
            write_json(about, here)
        else:
            for _ in rows.in_order():
                pass
        hosts.wait("the file of features")
    return path


def _check(path: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    rows = len(np.load(path, mmap_mode="r", allow_pickle=False))
    if {**there, "rows": rows} != here:
        raise DataError(
            f"{path}: its {rows:,} rows are not of this stage's {here['rows']:,} images, or are of as many in another "
            "order. Likely cause: config.data.train or the images have changed since; remove the file, or use another "
            "--workdir"
        )
