"""--job=evaluate: what a finished training says of every split, against the labels where there are any."""

import csv
import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxclust.config import stage_names
from jaxclust.data.pipeline import images_at
from jaxclust.data.source import Source, Split, open_source
from jaxclust.errors import ConfigError
from jaxclust.evaluation import clustering, suite
from jaxclust.features.extract import extract
from jaxclust.features.rows import Rows
from jaxclust.files import replacing
from jaxclust.jobs.options import Options
from jaxclust.methods.base import TrainState
from jaxclust.train import devices
from jaxclust.train import workdir as workdir_lib
from jaxclust.train.checkpoint import Checkpoints
from jaxclust.train.stage import Stage, prepare

SAMPLES_PER_CLUSTER = 24
SAMPLED_CLUSTERS = 100

Predictions = dict[str, np.ndarray]


def run(config: ConfigDict, workdir: Path, options: Options) -> None:
    """Evaluates the newest checkpoint of the last stage and rewrites results.json."""
    config = workdir_lib.resolved(config, workdir_lib.data_info(workdir).image_shape)
    source = open_source(config)
    workdir_lib.check(config, workdir, source)
    stage, state = restore(config, workdir, source.splits["train"])
    results = write_results(stage, state, source, None)
    print(f"{summary(results)}\nresults: {workdir / 'results.json'}", flush=True)


def restore(config: ConfigDict, workdir: Path, split: Split) -> tuple[Stage, TrainState]:
    """The last stage of a workdir, to work on `split`, and its newest state; ConfigError if there is no checkpoint."""
    name = stage_names(config)[-1]
    folder = workdir / "checkpoints" / name
    if not Checkpoints.exist(folder):
        raise ConfigError(f"--workdir={workdir} has no checkpoint of stage {name!r}; train it first (--job=train)")
    used = workdir_lib.devices_used(workdir)
    if used is not None and not config.runtime.devices and used <= len(jax.devices()):
        config = devices.with_devices(config, used)  # another number would change last bits
    stage = prepare(config, name, split, workdir_lib.data_info(workdir), workdir)
    return stage, Checkpoints(folder).restore(stage.first(), stage.method.fresh).state


def write_results(stage: Stage, state: TrainState, source: Source, seconds: float | None) -> dict[str, Any]:
    """Writes assignments.csv, results.json, samples.npz and the confusion tables; returns the results.

    `seconds` is how long the training took; None: nothing was trained, what results.json says stays.
    """
    path = stage.workdir / "results.json"
    if seconds is None:
        seconds = json.loads(path.read_text())["seconds"] if path.exists() else 0.0
    results: dict[str, Any] = {}
    for name, split in source.splits.items():
        predictions = predict(stage, state, split, name)
        scores = suite.evaluate(predictions, split.labels, stage.config, partial(features, stage, state, split, name))
        results |= {f"{name}/{key}": value for key, value in scores.items() if "/" not in key}
        sizes = clustering.sizes(predictions["cluster"], stage.method.num_clusters)
        results |= {f"{name}/{key}": sizes[f"clusters/{key}"] for key in ("entropy", "largest_share")}
        if split.labels is not None:
            asked = stage.method.num_clusters or int(predictions["cluster"].max()) + 1
            table = clustering.confusion(predictions["cluster"], split.labels, asked, source.num_classes or 0)
            write_confusion(stage.workdir / f"confusion-{name}.csv", table, source.class_names or ())
        if name == "train":
            results["clusters"] = len(np.unique(predictions["cluster"]))
            write_assignments(stage.workdir / "assignments.csv", predictions, split)
            if len(split.image_shape) == 3:
                write_samples(stage.workdir / "samples.npz", predictions, split)
            if "head" in predictions:
                agreement = 1 - clustering.changed(predictions["cluster"], predictions["head"])
                results["train/head_agreement"] = float(agreement)
    results |= {
        "images": sum(split.size for split in source.splits.values()),
        "skipped": len(source.skipped),
        "seconds": round(seconds, 1),
    }
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(results, indent=2) + "\n")
    return results


def predict(stage: Stage, state: TrainState, split: Split, title: str) -> Predictions:
    """What the method predicts for every image of a split, by id."""
    if stage.predict is None:
        raise ConfigError(f"method {stage.config.method!r} predicts no clusters")
    rows = extract(
        stage.predict, state.params, state.extra, split, stage.config, stage.mesh, stage.workdir / "tmp", title
    )
    return {name: matrix.array() for name, matrix in rows.items()}


def features(stage: Stage, state: TrainState, split: Split, title: str) -> Rows:
    """The method's features of every image of a split, by id."""
    folder = stage.workdir / "tmp"
    return extract(stage.embed, state.params, state.extra, split, stage.config, stage.mesh, folder, title)["features"]


def write_assignments(path: Path, predictions: Predictions, split: Split) -> None:
    """Which file is in which cluster: id, path, cluster, distance (squared, to its centroid)."""
    distance = predictions.get("distance", np.zeros(split.size, np.float32))
    with (
        replacing(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as table,  # names of files
    ):
        writer = csv.writer(table)
        writer.writerow(("id", "path", "cluster", "distance"))
        for i in range(split.size):
            writer.writerow((i, split.path(i), int(predictions["cluster"][i]), f"{distance[i]:.6g}"))


def write_confusion(path: Path, table: np.ndarray, names: tuple[str, ...]) -> None:
    """Counts by cluster (rows) and class (columns)."""
    with (
        replacing(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,  # names of folders
    ):
        writer = csv.writer(file)
        writer.writerow(("cluster", *names))
        writer.writerows((i, *counts) for i, counts in enumerate(table.tolist()))


def write_samples(path: Path, predictions: Predictions, split: Split) -> None:
    """The images nearest to the centre of each of the largest clusters, so that a report needs no data set."""
    cluster = predictions["cluster"]
    distance = predictions.get("distance", -predictions.get("score", np.zeros(split.size)))
    order = np.argsort(distance, kind="stable")
    found, counts = np.unique(cluster, return_counts=True)
    largest = found[np.argsort(-counts, kind="stable")][:SAMPLED_CLUSTERS]
    ids = np.concatenate([order[cluster[order] == c][:SAMPLES_PER_CLUSTER] for c in largest])
    with replacing(path) as temporary:
        np.savez_compressed(
            temporary,
            images=images_at(split, ids),
            id=ids.astype(np.int32),
            cluster=cluster[ids].astype(np.int32),
            distance=distance[ids].astype(np.float32),
        )


def summary(results: dict[str, Any]) -> str:
    """The results in a line."""
    parts = [f"{results['images']:,} images in {results['clusters']} clusters"]
    for name in ("train", "test"):
        scores = {key: results.get(f"{name}/{key}") for key in ("acc", "nmi", "ari")}
        words = [f"{key.upper()} {score:.3f}" for key, score in scores.items() if score is not None]
        if words:
            parts.append(f"{name} " + ", ".join(words))
    return f"{'; '.join(parts)}; {results['seconds']:,.0f} s"
