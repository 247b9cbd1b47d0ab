"""A stage made ready: method, data, lengths, programs and first state, all checked before work starts."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxclust import methods, models, runtime
from jaxclust.cluster import warn_once
from jaxclust.config import for_stage, naming_section, stage_names
from jaxclust.data import view as view_lib
from jaxclust.data.groups import groups_of
from jaxclust.data.split import Split, fingerprint
from jaxclust.errors import ConfigError, DataError
from jaxclust.evaluation import suite
from jaxclust.features.extract import Program, compile_for
from jaxclust.methods.base import Batch, DataInfo, Method, Targets, TrainState
from jaxclust.train import donor as donors
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
    body: Program  # what is kept of images that a frozen body has seen
    predict: Program | None
    metrics: tuple[str, ...]  # names of what a step measures
    first: Callable[[], Snapshot]  # the state before the first step
    shapes: TrainState  # its shapes and dtypes
    others: Mapping[str, Split] = {}  # further splits that it is judged on during training
    measure: Callable[[TrainState], dict[str, float]] | None = None  # replaces that judgement
    whose: Callable[[], str] | None = None  # what its body is taken from, None: it begins with a new one


def prepare(
    config: ConfigDict,
    name: str,
    split: Split,
    info: DataInfo,
    workdir: Path,
    devices: Sequence[jax.Device] | None = None,
    make: Callable[[ConfigDict, DataInfo], Method] | None = None,
    others: Mapping[str, Split] = {},
) -> Stage:
    """Stage `name` of `config` on `split`, judged on `others` too; errors of settings and data show here.

    `info` describes the data that the stage is trained on, which for new images is not `split`. `devices` are those
    that its programs are compiled for, by default this job's. `make` makes the method, by default `config.method`.
    """
    number = stage_names(config).index(name)
    begun = Checkpoints.exist(workdir / "checkpoints" / name)  # then no body is needed
    donor = None if begun else donors.find(config, name, workdir)
    files = donors.files(config, name, workdir)
    info = info._replace(files=files, begun=begun, fingerprint=partial(fingerprint, split))
    whole, config = config, for_stage(config, name)
    check_colours(config, info.image_shape)
    with naming_section(whole, name):
        method = (make or methods.get)(config, info)
    labels = seen_labels(method, config, info, split)
    _check_class_count(config, method, labels, begun)
    check_views(config, method)
    _check_hold_out(config, method)
    suite.load(config)  # only to see that every evaluation exists
    mesh = runtime.mesh(config, devices)
    batch = example_batch(method, info, config.batch_size, config.views)
    key = runtime.key(config.seed, name)
    length = lengths(config, info.size)
    optimizer = optim.make(config, method, jax.eval_shape(method.init, key, batch)[0], length)
    step = train_step.make(method, optimizer, mesh)
    shapes = jax.eval_shape(lambda batch: _state(method, optimizer, key, batch, ()), batch)
    metrics, rows = train_step.outputs(step, shapes, batch, key)
    shapes = shapes._replace(sums=jax.eval_shape(lambda: train_step.zero_sums(metrics)))

    _check_scores(config, name, rows)
    if donor:
        donor.check(Snapshot(shapes, first_targets(method, split.size, labels, rows)), method)

    begin = jax.jit(lambda: _state(method, optimizer, runtime.key(config.seed, name, "init"), batch, metrics))

    def first() -> Snapshot:
        snapshot = Snapshot(runtime.put_replicated(begin(), mesh), first_targets(method, split.size, labels, rows))
        if donor is None:
            return snapshot
        given = donor.give(snapshot, method)
        return donors.noisy(snapshot, given, config.init_noise, runtime.key(config.seed, name, "init_noise"))

    embed = compile_for(method.embed, mesh)
    return Stage(
        name, number, config, workdir, split, info, method, length, mesh, optimizer, step,
        embed, compile_for(method.look, mesh) if method.look else embed,
        compile_for(method.body, mesh) if method.body else embed,
        compile_for(method.predict, mesh) if method.predict else None,
        metrics, first, shapes, others, whose=donor.name if donor else None,
    )  # fmt: skip


def _check_hold_out(config: ConfigDict, method: Method) -> None:
    """ConfigError if images are held out, which classes say, and the method may see none; a word if nobody looks."""
    share = config.data.hold_out
    if share and method.labels is None:
        raise ConfigError(
            f"config.data.hold_out={share} holds images out by their class, and config.method={config.method!r} learns "
            "without labels; set it to 0"
        )
    if share and config.eval_every == "never":
        warn_once(f"config.data.hold_out={share}, but config.eval_every='never': nothing is judged by these images")


def _check_scores(config: ConfigDict, name: str, rows: Mapping[str, Any]) -> None:
    """ConfigError if files of scores are asked for and the steps of stage `name` say nothing that stands in them."""
    if config.scores.every != "never" and not {"gate", "groups"} <= rows.keys():
        raise ConfigError(
            f"config.scores.every={config.scores.every!r}, but config.method={config.method!r} of stage {name!r} has "
            "no gate and tells no groups of classes apart, as clustnet does; set it to 'never'"
        )


def layer_names(stage: Stage) -> tuple[str, ...]:
    """The maps of images that `stage.method.embed` knows, beside "feature"."""
    if stage.method.layers is not None:
        return stage.method.layers
    return models.map_names(models.get(stage.config), stage.info.image_shape)


def _state(method: Method, optimizer: Optimizer, key: jax.Array, batch: Batch, metrics: tuple[str, ...]) -> TrainState:
    params, extra = method.init(key, batch)
    sums = jax.tree.map(jnp.asarray, train_step.zero_sums(metrics))
    return TrainState(jnp.zeros((), jnp.int32), params, extra, optimizer.init(params), sums)


def check_colours(config: ConfigDict, shape: tuple[int, ...]) -> None:
    """ConfigError unless `config.data.mean` and `std` are one number, or one for each channel of images of `shape`."""
    for name in ("mean", "std"):
        numbers, channels = len(config.data[name]), shape[-1]
        if len(shape) == 3 and numbers not in (1, channels):
            raise ConfigError(
                f"config.data.{name}={config.data[name]} has {numbers} numbers, and the images of "
                f"config.data.source={config.data.source!r} have channels: {channels}; give one number for all, such "
                "as (0.5,), or see grey images as colours with config.data.channels=3"
            )


def check_views(config: ConfigDict, method: Method) -> None:
    """ConfigError unless `config.views` has every view that the method needs, with a number and crops it can use."""
    _check_copies(config, method)
    for name in method.views:
        if name not in config.views:
            raise ConfigError(f"config.views has no section {name!r}, which method {config.method!r} needs")
        view = view_lib.make_view(config.views[name])
        if view.number > 1 and not method.copies:
            raise ConfigError(
                f"config.views.{name}.number={view.number}, but config.method={config.method!r} sees one of each image "
                "in a view; set it to 1"
            )
        if view.crop_area > view.crop_area_max:
            raise ConfigError(
                f"config.views.{name}.crop_area={view.crop_area} is the smallest share of a crop and must not be more "
                f"than the largest, config.views.{name}.crop_area_max={view.crop_area_max}"
            )


def _check_copies(config: ConfigDict, method: Method) -> None:
    if config.frozen_views and config.freeze_body and len(method.views) != 1:
        raise ConfigError(
            f"config.frozen_views={config.frozen_views}: copies are kept of one view, and config.method="
            f"{config.method!r} has {len(method.views)} ({', '.join(method.views)}); set it to 0"
        )


def seen_labels(method: Method, config: ConfigDict, info: DataInfo, split: Split) -> np.ndarray | None:
    """What the method may see of the labels: classes, or groups of them, int32 [N], negative where unknown.

    None where there are none, or it may see none. A class that was not there in training is of no group.
    """
    if method.labels is None or split.labels is None:
        return None
    if method.labels == "class":
        return without_small(split.labels, method.class_size)
    assert info.num_classes is not None
    known = (split.labels >= 0) & (split.labels < info.num_classes)
    return np.where(known, groups_of(config.groups, info.num_classes)[np.where(known, split.labels, 0)], -1)


def _check_class_count(config: ConfigDict, method: Method, labels: np.ndarray | None, begun: bool) -> None:
    """DataError where images to train on, by their `labels`, are of fewer classes than the method takes.

    A training that has `begun` may be shown others.
    """
    if labels is None or method.labels != "class" or begun:
        return
    found, least = len(np.unique(labels[labels >= 0])), method.class_count
    if found < least:
        source, chosen = config.data.source, config.data.train_classes
        classes = f"{found} class" + ("" if found == 1 else "es")
        raise DataError(
            f"config.method={config.method!r} learns to tell {least} classes or more apart, and config.data.source="
            f"{source!r} with config.data.train_classes={chosen!r} has {classes} to train on ({len(labels):,} images). "
            "Likely causes: train_classes chooses too few; class folders lie one folder deeper than the source, or "
            "all images in one; the column of labels says the same in each row"
        )


def without_small(labels: np.ndarray, least: int) -> np.ndarray:
    """Labels int [N] where those of classes with fewer than `least` images are unknown, which is said; DataError if
    none is left."""
    sizes = np.bincount(labels[labels >= 0], minlength=1)
    small = np.flatnonzero((sizes > 0) & (sizes < least))
    if len(small) == np.count_nonzero(sizes):
        raise DataError(
            f"of {len(labels):,} images none is of a class with {least} or more, so that none can be trained on; "
            "labels may be numbers of images in place of classes"
        )
    if not len(small):
        return labels
    warn_once(
        f"{len(small)} of {np.count_nonzero(sizes)} classes have fewer than {least} images and are not trained on "
        f"(their numbers: {', '.join(map(str, small[:5]))}{', …' if len(small) > 5 else ''})"
    )
    return np.where(np.isin(labels, small), -1, labels)


def first_targets(
    method: Method, size: int, labels: np.ndarray | None, rows: Mapping[str, jax.ShapeDtypeStruct]
) -> Targets:
    """Targets before any refresh: the labels that the method may see, else zeros; and an empty memory.

    `rows` are shapes and dtypes of what a step says of the images of its batch.
    """
    target = np.zeros((size, *method.target_shape), np.int32) if labels is None else labels.astype(np.int32)
    ids = np.flatnonzero((target >= 0).reshape(size, -1).all(axis=1))  # of some images the label may be unknown
    targets = Targets(target, np.ones(size, np.float32), ids.astype(np.int32), np.asarray(-1, np.int32))
    if method.memory is None:
        return targets
    kept = rows[method.memory]
    return targets._replace(memory=np.zeros((size, *kept.shape[1:]), kept.dtype))


def of_pass(stage: Stage) -> tuple[Any, Any, jax.ShapeDtypeStruct]:
    """Shapes of parameters, `extra` and images of a pass over the images in evaluation mode."""
    shape = stage.info.image_shape
    images = jax.ShapeDtypeStruct((stage.config.eval_batch_size, *shape), np.uint8 if len(shape) == 3 else np.float32)
    return stage.shapes.params, stage.shapes.extra, images


def batch_of_step(stage: Stage) -> Batch:
    """A batch of zeros such as the train step sees: of images, or of what is kept of them where the body is frozen."""
    info = stage.info
    if stage.config.freeze_body:
        info = info._replace(image_shape=jax.eval_shape(stage.body, *of_pass(stage)).shape[1:])
    return example_batch(stage.method, info, stage.config.batch_size, stage.config.views)


def example_batch(method: Method, info: DataInfo, size: int, views: Mapping[str, Mapping[str, Any]] = {}) -> Batch:
    """A batch of zeros, for shapes and dtypes; its images take no memory.

    `views` is `config.views`; a view that it lacks is one image of the size in `info`.
    """
    zero = np.zeros((), np.uint8 if len(info.image_shape) == 3 else np.float32)
    made = {name: view_lib.make_view(views.get(name, {})) for name in method.views}
    shapes = {name: (*view_lib.copies(view), *view_lib.shape(view, info.image_shape)) for name, view in made.items()}
    zeros: dict[str, Any] = {
        "views": {name: np.broadcast_to(zero, (size, *shape)) for name, shape in shapes.items()},
        "id": np.zeros(size, np.int32),
        "position": np.zeros(size, np.int64),
        "target": np.zeros((size, *method.target_shape), np.int32),
        "weight": np.ones(size, np.float32),
        "step": np.zeros((), np.int32),
    }
    return zeros
