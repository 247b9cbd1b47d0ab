"""--job=evaluate: what a finished training says of every split, against the labels where there are any.

A file of features needs no training: its vectors are clustered as they are, and judged.
"""

import csv
import shutil
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxclust import hosts, methods
from jaxclust.cluster import warn_once
from jaxclust.config import stage_names
from jaxclust.data.pipeline import images_at
from jaxclust.data.source import Source, Split, of_last_stage, open_source
from jaxclust.errors import ConfigError
from jaxclust.evaluation import clustering, readouts, retrieval, suite
from jaxclust.features.extract import compile_for, extract
from jaxclust.features.reconstruction import errors
from jaxclust.features.rows import Rows
from jaxclust.files import replacing, write_json
from jaxclust.jobs.options import Options
from jaxclust.methods.base import DataInfo, TrainState
from jaxclust.report import retrieval as retrieval_table
from jaxclust.report.workdir import newest_assignment
from jaxclust.runtime import stop_signal
from jaxclust.train import devices, loop, probes, skips, validation
from jaxclust.train import workdir as workdir_lib
from jaxclust.train.checkpoint import Checkpoints
from jaxclust.train.stage import Stage, prepare
from jaxclust.train.writer import seconds_of

SAMPLES_PER_CLUSTER = 24
SAMPLED_CLUSTERS = 100

UNTRAINED = "untrained/"  # what begins the keys of `write_untrained`

HEADLINES = ("/top1", "/r@1", "/map@r", "kmeans/acc")  # what `summary` says of comparisons

Predictions = dict[str, np.ndarray]


def run(config: ConfigDict, workdir: Path, options: Options) -> None:
    """Evaluates a checkpoint of the last stage, or a file of features, and rewrites results.json."""
    if is_bare(config):
        stage, state, source = cluster_vectors(config, workdir)
    else:
        config = workdir_lib.resolved(config, workdir_lib.data_info(workdir).image_shape)
        source = open_source(config)
        workdir_lib.check(config, workdir, source)
        check_suite(config, source)
        source = of_last_stage(source, config)
        stage, state = restore(config, workdir, source.splits["train"])
        check_probes(stage)
    results = write_results(stage, state, source, None)
    print(f"{summary(results)}\nresults: {workdir / 'results.json'}", flush=True)


def is_bare(config: ConfigDict) -> bool:
    """Whether vectors are to be judged that nothing learns from: a training on vectors has a frozen body, and steps or
    a solution without any."""
    if config.data.source.partition(":")[0] != "features":
        return False
    return not (config.freeze_body and (config.rounds or config.steps or methods.solves(config)))


def cluster_vectors(config: ConfigDict, workdir: Path) -> tuple[Stage, TrainState, Source]:
    """The vectors of `config.data.source` as the features of a run without steps, which only clusters them."""
    config = ConfigDict(config.to_dict())
    config.method = config.stages = "deepcluster"
    config.freeze_body, config.rounds, config.steps, config.init_from = True, 0, 0, ""
    source = open_source(config)
    workdir_lib.check(config, workdir, source)
    check_suite(config, source)
    split = source.splits["train"]
    info = DataInfo(split.size, split.image_shape, source.train_classes)
    stage = prepare(config, config.stages, split, info, workdir)
    check_probes(stage)
    workdir_lib.write(config, workdir, source, stage.mesh.size)
    folder = workdir / "checkpoints" / stage.name
    if Checkpoints.exist(folder) and Checkpoints(folder).latest() == 0:  # the file may have other vectors by now
        if hosts.is_first():
            shutil.rmtree(folder)
        hosts.wait("the old clustering")
    with stop_signal() as stop:
        return stage, loop.run_stage(stage, stop).state, source


def check_suite(config: ConfigDict, source: Source) -> None:
    """ConfigError if an evaluation of `config.evaluate.suite` cannot be made of `source`, or says nothing of it."""
    suite.check(config, {name: split.labels for name, split in source.splits.items()})
    if "readouts" in suite.load(config):
        readouts.asked(config)
    for name in ("untrained", "save_retrieval"):
        if config.evaluate[name] and not suite.compares(config):
            raise ConfigError(
                f"config.evaluate.{name} is about features, and config.evaluate.suite={config.evaluate.suite!r} judges "
                "none; add readouts, knn or kmeans, say"
            )


def check_probes(stage: Stage) -> None:
    """ConfigError if linear probes are asked for and cannot be trained on the network of `stage`."""
    if "linear" in suite.load(stage.config):
        probes.check(stage)


def restore(config: ConfigDict, workdir: Path, split: Split) -> tuple[Stage, TrainState]:
    """The last stage of a workdir, to work on `split`, and the state that `config.evaluate.step` asks for; ConfigError
    if there is no checkpoint."""
    name = stage_names(config)[-1]
    folder = workdir / "checkpoints" / name
    if not Checkpoints.exist(folder):
        raise ConfigError(f"--workdir={workdir} has no checkpoint of stage {name!r}; train it first (--job=train)")
    used = workdir_lib.devices_used(workdir)
    if used is not None and not config.runtime.devices and hosts.count() == 1 and used <= len(jax.devices()):
        config = devices.with_devices(config, used)  # another number would change last bits
    stage = prepare(config, name, split, workdir_lib.data_info(workdir), workdir)
    checkpoints = Checkpoints(folder)
    return stage, checkpoints.restore(stage.first(), stage.method.fresh, _step(checkpoints, config)).state


def _step(checkpoints: Checkpoints, config: ConfigDict) -> int | None:
    """The step of the checkpoint that `config.evaluate.step` asks for, None: the newest.

    Where it was not kept the nearest is taken, of two as near the later one, which is said with all there are.
    """
    asked, steps = config.evaluate.step, checkpoints.steps()
    if asked >= 0:
        step = min(steps, key=lambda step: (abs(step - asked), -step)) if asked else None
        if asked and step != asked:
            there = ", ".join(f"{step:,}" for step in steps)
            warn_once(f"config.evaluate.step={asked}: no such checkpoint; step {step:,} is taken of {there}")
        return step
    best = checkpoints.best()
    if best is None:
        raise ConfigError(
            f"config.evaluate.step={asked} asks for the best checkpoint, and none was judged: that takes "
            "config.data.hold_out and config.eval_every in the training"
        )
    return best.step


def write_results(stage: Stage, state: TrainState, source: Source, seconds: float | None) -> dict[str, Any]:
    """Writes assignments.csv, results.json, samples.npz and the confusion tables; returns the results.

    Of a method that predicts no clusters there are only comparisons of its features, and no tables.
    Every host works, host 0 writes. `seconds` is how long all starts of the training took; None: nothing was trained,
    what results.json says stays. So does what evaluations found that are not asked for now, if of this checkpoint.
    """
    path = stage.workdir / "results.json"
    before = workdir_lib.results(stage.workdir)
    seconds = before.get("seconds", seconds_of(stage.workdir / "metrics.jsonl")) if seconds is None else seconds
    results: dict[str, Any] = reconstructed(stage, state, source)
    for name in source.splits if stage.predict else ():
        predictions, scores = judged(stage, state, source, name)
        results |= scores
        if hosts.is_first():
            write_tables(stage, source, name, predictions)
        hosts.wait(f"the tables of {name}")
    if len(stage_names(stage.config)) > 1:
        found = {"step": int(state.step)} | results
        results |= {f"{stage.name}/{key}": value for key, value in found.items()}
    if suite.compares(stage.config):
        images = compared(stage, state, source)
        results |= compare(stage, images)
        if stage.config.evaluate.save_retrieval:
            save_retrieval(stage.workdir / "retrieval.npz", images, stage.config)
    folder = stage.workdir / "checkpoints" / stage.name
    best = Checkpoints(folder).best() if Checkpoints.exist(folder) else None
    results |= {} if best is None else {"best/step": best.step, f"best/{validation.SELECTING}": best.value}
    results |= skips.result(stage, int(state.step))
    results |= {
        "images": sum(split.size for split in source.splits.values()),
        "skipped": len(source.skipped),
        "seconds": round(seconds, 1),
        "step": int(state.step),
    }
    results = kept(before, results, stage.config) | lasting(before, stage.config) | results
    if hosts.is_first():
        write_json(path, results)
        if table := retrieval_table.table(results, stage.config):
            with replacing(stage.workdir / "retrieval.md") as temporary:
                temporary.write_text(table, encoding="utf-8")
    return results


def write_stage(stage: Stage, state: TrainState, source: Source) -> None:
    """Adds what a stage that others follow predicts or decodes, judged, to results.json, as "<stage>/<split>/<score>",
    with confusion-<stage>-<split>.csv; once for its last step."""
    path = stage.workdir / "results.json"
    before = workdir_lib.results(stage.workdir)
    mute = stage.predict is None and stage.method.reconstruct is None
    if mute or hosts.agreed(before.get(f"{stage.name}/step", -1)) == int(state.step):
        return
    found: dict[str, Any] = {"step": int(state.step)} | reconstructed(stage, state, source)
    for name in source.splits if stage.predict else ():
        predictions, scores = judged(stage, state, source, name)
        found |= scores
        if hosts.is_first():
            write_confusion(stage, source, name, predictions, f"{stage.name}-{name}")
    if hosts.is_first():
        write_json(path, before | {f"{stage.name}/{key}": value for key, value in found.items()})
    hosts.wait(f"the results of {stage.name}")


def write_untrained(stage: Stage, source: Source) -> None:
    """Adds what comparisons say of the state that a training begins with to results.json, as "untrained/<name>".

    Once, if `config.evaluate.untrained` asks for it; a training that has begun no longer has that state.
    """
    path = stage.workdir / "results.json"
    before = workdir_lib.results(stage.workdir)
    measured = any(key.startswith(UNTRAINED) for key in before)
    if not stage.config.evaluate.untrained or hosts.agreed(int(measured)):
        return
    if hosts.agreed(int(stage.info.begun)):
        print("config.evaluate.untrained: this training has begun, so no network is untrained; use another --workdir")
        return
    found = compare(stage, compared(stage, stage.first().state, source))
    if hosts.is_first():
        write_json(path, before | {f"{UNTRAINED}{key}": value for key, value in found.items()})
    hosts.wait("the results of the untrained network")


def lasting(results: dict[str, Any], config: ConfigDict) -> dict[str, Any]:
    """The part of results.json that `write_stage` and `write_untrained` wrote."""
    first = (*(f"{name}/" for name in stage_names(config)), UNTRAINED)
    return {key: value for key, value in results.items() if key.startswith(first)}


def judged(stage: Stage, state: TrainState, source: Source, name: str) -> tuple[Predictions, dict[str, Any]]:
    """What the method predicts of a split, and how good that is."""
    split = source.splits[name]
    predictions = predict(stage, state, split, name)
    scores = suite.evaluate(predictions, split.labels, stage.config, partial(features, stage, state, split, name))
    sizes = clustering.sizes(predictions["cluster"], stage.method.num_clusters)
    results: dict[str, Any] = {f"{name}/{key}": value for key, value in scores.items() if "/" not in key}
    results |= {f"{name}/{key}": sizes[f"clusters/{key}"] for key in ("entropy", "largest_share")}
    if name == "train":
        results["clusters"] = len(np.unique(predictions["cluster"]))
        if "head" in predictions:
            agreement = 1 - clustering.changed(predictions["cluster"], predictions["head"])
            results["train/head_agreement"] = float(agreement)
        results |= labelled(newest_assignment(stage.workdir / "assignments" / stage.name), split.labels)
    return predictions, results


def labelled(cluster: np.ndarray | None, labels: np.ndarray | None) -> dict[str, Any]:
    """Of an assignment [N] that leaves images out (-1) how many it does not, and their ACC; else nothing."""
    if cluster is None or (cluster >= 0).all():
        return {}
    kept = cluster >= 0
    known = labels is not None and suite.has_labels(labels[kept])
    acc = {"kept_acc": clustering.accuracy(cluster, np.asarray(labels))} if known else {}
    return {"labelled": int(np.count_nonzero(kept)), **acc}


def reconstructed(stage: Stage, state: TrainState, source: Source) -> dict[str, float]:
    """The mean error of a decoder on each split, "<split>/error_percent"; of a method without one nothing."""
    if stage.method.reconstruct is None:
        return {}
    program = compile_for(partial(errors, stage.method.reconstruct, tuple(stage.config.data.std)), stage.mesh)
    folder, found = stage.workdir / "tmp", {}
    for name, split in source.splits.items():
        title = f"reconstructions of {name}"
        rows = extract(program, state.params, state.extra, split, stage.config, stage.mesh, folder, title)["features"]
        found[f"{name}/error_percent"] = float(rows.whole().mean(dtype=np.float64))
    return found


def kept(before: dict[str, Any], results: dict[str, Any], config: ConfigDict) -> dict[str, Any]:
    """What earlier evaluations of the same checkpoint found and this one was not asked for.

    Of a file of features nothing, since it may have other vectors by now.
    """
    if is_bare(config) or before.get("step") != results["step"]:
        return {}
    return {key: value for key, value in before.items() if key.partition("/")[0] not in suite.load(config)}


def compare(stage: Stage, images: suite.Images) -> dict[str, float]:
    """What comparisons say of the features; the main read-out of a method that predicts nothing has plain names."""
    found = suite.run_comparisons(images, stage.config)
    return found if stage.predict else {key.replace(f"/{readouts.MAIN}/", "/"): value for key, value in found.items()}


def save_retrieval(path: Path, images: suite.Images, config: ConfigDict) -> None:
    """Writes the split that retrieval is judged on: `vectors` [N, D], `labels` [N], and `neighbours` int32 [N, 1 + K],
    the ids of each image itself and of the K nearest by cosine, for the largest K of `config.evaluate.recall_at`."""
    split = images.test or images.train
    rows = split.rows()
    neighbours = retrieval.index_table(rows, split.labels, max(config.evaluate.recall_at))
    vectors = hosts.whole(rows.array(), len(split.labels))
    if hosts.is_first():
        with replacing(path) as temporary:
            np.savez(temporary, vectors=vectors, labels=split.labels, neighbours=neighbours)
    hosts.wait("the neighbours")


def compared(stage: Stage, state: TrainState, source: Source) -> suite.Images:
    """What comparisons see: the features of the splits that have labels, and probes of the network."""
    splits = {name: split for name, split in source.splits.items() if suite.has_labels(split.labels)}
    seen = {
        name: suite.Seen(cache(partial(features, stage, state, split, name)), np.asarray(split.labels))
        for name, split in splits.items()
    }
    train, test, classes = splits["train"], splits.get("test"), source.num_classes or 0
    return suite.Images(seen["train"], seen.get("test"), lambda: probes.train(stage, state, train, test, classes))


def write_tables(stage: Stage, source: Source, name: str, predictions: Predictions) -> None:
    """The files of one split: the confusion table, and of the training images assignments.csv and samples.npz."""
    split = source.splits[name]
    write_confusion(stage, source, name, predictions, name)
    if name == "train":
        write_assignments(stage.workdir / "assignments.csv", predictions, split)
        if len(split.image_shape) == 3:
            write_samples(stage.workdir / "samples.npz", predictions, split)


def predict(stage: Stage, state: TrainState, split: Split, title: str) -> Predictions:
    """What the method predicts for every image of a split, by id, on every host."""
    if stage.predict is None:
        raise ConfigError(f"method {stage.config.method!r} predicts no clusters")
    rows = extract(
        stage.predict, state.params, state.extra, split, stage.config, stage.mesh, stage.workdir / "tmp", title
    )
    return {name: matrix.whole() for name, matrix in rows.items()}


def features(stage: Stage, state: TrainState, split: Split, title: str) -> Rows:
    """The method's features of every image of a split, by id, each host's own."""
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


def write_confusion(stage: Stage, source: Source, name: str, predictions: Predictions, title: str) -> None:
    """confusion-<title>.csv of a split that has labels: counts by cluster (rows) and class (columns)."""
    labels, clusters = source.splits[name].labels, predictions["cluster"]
    if labels is None:
        return
    asked = stage.method.num_clusters or int(clusters.max()) + 1
    table = clustering.confusion(clusters, labels, asked, source.num_classes or 0)
    with (
        replacing(stage.workdir / f"confusion-{title}.csv") as temporary,
        temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,  # names of folders
    ):
        writer = csv.writer(file)
        writer.writerow(("cluster", *(source.class_names or ())))
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
    parts = [f"{results['images']:,} images" + (f" in {results['clusters']} clusters" if "clusters" in results else "")]
    for name in ("train", "test"):
        scores = {key: results.get(f"{name}/{key}") for key in ("acc", "nmi", "ari")}
        words = [f"{key.upper()} {score:.3f}" for key, score in scores.items() if score is not None]
        if words:
            parts.append(f"{name} " + ", ".join(words))
    parts += [f"{key} {value:.3f}" for key, value in results.items() if key.endswith(HEADLINES)]
    parts += [f"{count:,} of {results['step']:,} steps skipped"] if (count := results.get("skipped_steps")) else []
    return "; ".join(parts)
