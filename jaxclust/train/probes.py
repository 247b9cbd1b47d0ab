"""Trains linear probes of a finished stage by the loop, in the folder probes/ of its workdir.

probes/ is like a workdir: metrics.csv has every epoch, and a job that is stopped goes on from its checkpoints. Beside
that there are <layer>.safetensors, the classifier after the last epoch, and <layer>-best.safetensors.
"""

import functools
import hashlib
import json
import logging
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from safetensors import safe_open

from jaxclust import hosts
from jaxclust.data.split import Split
from jaxclust.data.subset import hold_out, subset, with_border
from jaxclust.errors import ConfigError, DataError, NonFiniteError
from jaxclust.evaluation.linear import hits
from jaxclust.features import artefacts
from jaxclust.features.extract import compile_for, extract
from jaxclust.features.rows import Rows
from jaxclust.files import replacing
from jaxclust.methods import probe
from jaxclust.methods.base import DataInfo, TrainState
from jaxclust.methods.probe import Probe
from jaxclust.runtime import stop_signal
from jaxclust.train import loop
from jaxclust.train.frozen import with_features
from jaxclust.train.stage import Stage, layer_names, prepare

NAME = "probe"
SCORES = ("top1", "top5", "loss")
HELD_OUT = 0.2  # of the training images, where there is no test split
SAVES = 10  # checkpoints over the whole training

_logger = logging.getLogger(__name__)

Curves = dict[str, list[dict[str, float]]]


def check(stage: Stage) -> None:
    """ConfigError if `config.evaluate.linear` cannot work with the network of `stage` or its devices."""
    widths(stage)
    size, count = stage.config.evaluate.linear.batch_size, stage.mesh.size
    if size % count:
        raise ConfigError(f"config.evaluate.linear.batch_size={size} must divide by {count} devices")


def widths(stage: Stage) -> dict[str, int]:
    """The layers of `config.evaluate.linear.layers`, by default all, and how many numbers each has when pooled."""
    shape = stage.split.image_shape
    asked = tuple(name.strip() for name in stage.config.evaluate.linear.layers.split(",") if name.strip())
    maps = layer_names(stage) if len(shape) == 3 else ()
    names = asked or (*maps, "feature")
    images = jax.ShapeDtypeStruct((1, *shape), artefacts.input_dtype(shape))

    def pooled(params: Any, extra: Any, images: jax.Array) -> dict[str, jax.Array]:
        found = stage.method.embed(params, extra, images, layers=names)
        return {name: probe.pool(name, found[name]) for name in names}

    try:
        shapes = jax.eval_shape(pooled, stage.shapes.params, stage.shapes.extra, images)
    except ConfigError as error:
        raise ConfigError(f"config.evaluate.linear.layers={stage.config.evaluate.linear.layers!r}: {error}") from None
    return {name: shapes[name].shape[1] for name in names}


def train(stage: Stage, state: TrainState, train: Split, test: Split | None, num_classes: int) -> Curves:
    """Trains a classifier of each layer of the network in `state`; {layer: scores of each epoch on the test images}.

    Without `test` a fifth of the training images is held out, of each class alike. The same work done before is only
    read again; anything else in probes/ is removed. Every host must call it.
    """
    settings, folder = stage.config.evaluate.linear, stage.workdir / "probes"
    if test is None:
        train, test = divided(train, stage.config.seed)
    frozen = {"params": state.params, "extra": state.extra}
    side = train.image_shape[0] if settings.ten_crops and len(train.image_shape) == 3 else 0
    probed = Probe(stage.method.embed, widths(stage), num_classes, side)
    begin(folder, about(stage, frozen, probed, (train, test)))
    made = ready(stage, frozen, probed, train, folder)
    try:
        with stop_signal() as stop:
            snapshot = loop.run_stage(made._replace(measure=judge(made, probed, test)), stop)
    except NonFiniteError as error:
        raise NonFiniteError(f"{error}; here of config.evaluate.linear.lr={settings.lr}") from error
    found = hosts.from_first(lambda: curves(folder, probed), "reading probes/", stage.config.runtime.deadline)
    of_epochs = {name: [dict(zip(SCORES, row, strict=True)) for row in found[name].tolist()] for name in probed.widths}
    if hosts.is_first():
        for name, epochs in of_epochs.items():
            save(folder / f"{name}.safetensors", snapshot.state, name, len(epochs), epochs[-1]["top1"])
        warn_of_divergence(folder, probed, settings.lr)
        shutil.rmtree(folder / "features", ignore_errors=True)  # which are made again if they are needed
    hosts.wait("the probes")
    return of_epochs


def divided(split: Split, seed: int) -> tuple[Split, Split]:
    """The training images without those that are held out, and these; DataError if no class has two images."""
    assert split.labels is not None
    held = hold_out(split.labels, HELD_OUT, (seed, 0))
    if not held.any():
        raise DataError("there is no test split, and no class has two training images, of which one could be held out")
    return subset(split, np.flatnonzero(~held)), subset(split, np.flatnonzero(held))


def ready(stage: Stage, frozen: Any, probed: Probe, train: Split, folder: Path) -> Stage:
    """The stage that trains the probes, with the arrays of the network in its state."""
    assert train.labels is not None
    settings = stage.config.evaluate.linear
    shapes = jax.eval_shape(lambda: frozen)
    info = DataInfo(int(np.count_nonzero(train.labels >= 0)), train.image_shape, probed.num_classes)
    config = of_probe(stage.config, 4 * train.size * sum(probed.widths.values()))
    method = probe.method(probed, shapes, settings)
    made = prepare(config, NAME, train, info, folder, make=lambda config, info: method)

    def first() -> Any:
        snapshot = made.first()
        copied = jax.tree.map(jnp.copy, frozen)  # a step takes over what it is given
        return snapshot._replace(state=snapshot.state._replace(extra=copied))

    return made._replace(first=first)


def of_probe(config: ConfigDict, cached_bytes: int) -> ConfigDict:
    """The config by which probes are trained, where all pooled layers take `cached_bytes`."""
    settings, config = config.evaluate.linear, ConfigDict(config.to_dict())
    view = {"crop_shift": settings.crop_shift, "flip": settings.flip}
    with config.unlocked():
        config.stage, config.views.probe = ConfigDict(), ConfigDict(view)
    config.stages, config.init_from, config.sampler = NAME, "", "uniform_image"
    config.batch_size, config.rounds, config.steps = settings.batch_size, settings.epochs, 0
    config.refresh_every, config.log_every, config.eval_every = "1 epoch", "1 round", "1 round"
    config.save_every, config.keep_checkpoints = f"{-(-settings.epochs // SAVES)} rounds", 1
    config.freeze_body = not any(view.values()) and cached_bytes <= settings.cache_bytes  # layers are computed once
    return config


def judge(stage: Stage, probed: Probe, test: Split) -> Callable[[TrainState], dict[str, float]]:
    """A function of the state: the scores of each layer on the test images; the best classifiers so far are saved."""
    assert test.labels is not None
    labels = test.labels[hosts.own_ids(test.size)]
    program = compile_for(functools.partial(probe.log_probabilities, probed), stage.mesh)

    @functools.cache
    def split() -> Split:
        if probed.crop_side:
            return with_border(test)
        if 4 * test.size * sum(probed.widths.values()) > stage.config.evaluate.linear.cache_bytes:
            return test
        return with_features(stage._replace(name="test", split=test), stage.first().state, False).split

    def measure(state: TrainState) -> dict[str, float]:
        epoch, values = int(state.step) // stage.lengths.round, dict[str, float]()
        if not epoch:
            return values
        folder = stage.workdir / "tmp"
        rows = extract(program, state.params, state.extra, split(), stage.config, stage.mesh, folder, "probes")
        for name in probed.widths:
            scores = score(rows, name, labels)
            values |= {f"test/{name}/{key}": value for key, value in scores.items()}
            best = stage.workdir / f"{name}-best.safetensors"
            if hosts.is_first() and scores["top1"] > top1_of(best):
                save(best, state, name, epoch, scores["top1"])
        return values

    return measure


def score(rows: dict[str, Rows], name: str, labels: np.ndarray) -> dict[str, float]:
    """Accuracies by the log-probabilities of a layer, and the loss by those of the centre; labels of this host."""
    sums, done = np.zeros(4), 0
    for chunk, centre in zip(rows[name].chunks(), rows.get(f"{name}/centre", rows[name]).chunks(), strict=True):
        own = labels[done : done + len(chunk)]
        right, five, _ = hits(chunk, own)
        sums += right, five, hits(centre, own)[2], np.count_nonzero(own >= 0)
        done += len(chunk)
    *totals, count = hosts.total(sums).tolist()
    return {key: total / count for key, total in zip(SCORES, totals, strict=True)}


def curves(folder: Path, probed: Probe) -> dict[str, np.ndarray]:
    """The scores of each layer [epochs, 3] from the metrics of the probes."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    names = {name: [f"test/{name}/{key}" for key in SCORES] for name in probed.widths}
    return {name: np.array([[line[key] for key in keys] for line in lines]) for name, keys in names.items()}


def warn_of_divergence(folder: Path, probed: Probe, lr: float) -> None:
    """Logs which layers were learnt worse than by guessing."""
    last = json.loads((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    for name in probed.widths:
        loss, guessing = last[f"train/{name}/loss"], math.log(probed.num_classes)
        if loss > guessing:
            _logger.warning(
                f"the linear probe of {name} ended with a loss of {loss:,.1f}, and guessing has {guessing:.1f}: config."
                f"evaluate.linear.lr={lr} is too high for the values of this layer, or the network has had too few "
                "steps for its running batch statistics"
            )


def save(path: Path, state: TrainState, layer: str, epoch: int, top1: float) -> None:
    """Writes the classifier of a layer, "params.kernel" [D, C] and "params.bias" [C], and what it reached."""
    origin = {"layer": layer, "epoch": str(epoch), "top1": repr(top1)}
    with replacing(path) as temporary:
        temporary.write_bytes(artefacts.arrays(state.params["heads"][layer], {}, origin))


def top1_of(path: Path) -> float:
    """The accuracy of a saved classifier, -1 where there is none."""
    if not path.exists():
        return -1.0
    with safe_open(path, "numpy") as file:
        return float(json.loads(file.metadata()["jaxclust"])["top1"])


def about(stage: Stage, frozen: Any, probed: Probe, splits: tuple[Split, Split]) -> dict[str, Any]:
    """What the probes depend on."""
    settings = {name: value for name, value in stage.config.evaluate.linear.items() if name != "cache_bytes"}
    digest = hashlib.sha256()
    for array in [*jax.tree.leaves(jax.device_get(frozen)), *(split.images for split in splits)]:
        digest.update(np.ascontiguousarray(array if array is not None else 0).data)
    sizes = [split.size for split in splits]
    return {"linear": settings, "seed": stage.config.seed, "layers": dict(probed.widths), "sizes": sizes,
            "sha256": digest.hexdigest()}  # fmt: skip


def begin(folder: Path, about: dict[str, Any]) -> None:
    """Makes `folder` that of the probes which `about` describes; those of other settings or weights are removed."""
    path, text = folder / "probes.json", json.dumps(about, indent=2) + "\n"
    if hosts.is_first() and not (path.exists() and path.read_text(encoding="utf-8") == text):
        shutil.rmtree(folder, ignore_errors=True)
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    hosts.wait("the folder of the probes")
