"""--job=export: features, programs and parameters of a trained workdir in formats that other tools read."""

import hashlib
import json
import os
import shutil
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxclust import __version__
from jaxclust.data import by_cluster
from jaxclust.data.source import Source, Split, files_of, of_last_stage, open_source
from jaxclust.errors import ConfigError, DataError, Stopped
from jaxclust.features import artefacts, store
from jaxclust.features.extract import Program, extract
from jaxclust.jobs import evaluate
from jaxclust.jobs.options import Options
from jaxclust.methods.base import TrainState
from jaxclust.progress import progress
from jaxclust.train import workdir as workdir_lib
from jaxclust.train.stage import Stage

LOADING = {
    ".npy": "numpy.load(FILE): float32 [N, D], row i is of the image with id i",
    ".parquet": "pyarrow.parquet.read_table(FILE) or pandas.read_parquet(FILE)",
    ".tfrecord": "tensorflow.data.TFRecordDataset(FILE): a tf.train.Example for each row of the Parquet file",
    ".jaxexport": "jax.export.deserialize(bytearray(open(FILE, 'rb').read())).call(images), with jax and flatbuffers "
    "installed; it compiles once for every new number of images",
    ".safetensors": "safetensors.numpy.load_file(FILE): the arrays by name",
}
ROW_BYTES = 1000  # about what id, path, cluster, score and label of an image take in all files
FILE_BYTES = 4096  # what the smallest file takes


def run(config: ConfigDict, workdir: Path, options: Options) -> None:
    """Writes export/: features of every split, embed and predict as programs, the parameters, a manifest.

    The folder appears when it is complete. ConfigError if it exists, unless options.overwrite.
    """
    target = workdir / "export"
    check_options(target, options)
    config = workdir_lib.resolved(config, workdir_lib.data_info(workdir).image_shape)
    source = open_source(config)
    workdir_lib.check(config, workdir, source)
    source = of_last_stage(source, config)
    stage, state = evaluate.restore(config, workdir, source.splits["train"])
    check_pictures(options.by_cluster, stage)
    try:
        check_space(target, stage, state, source, options.by_cluster)
        with replacing_folder(target, options.overwrite) as folder, stopping_cleanly():
            write_programs(folder, stage, state)
            found = write_features(folder, stage, state, source, options.by_cluster)
            about = description(stage, state, source) | found | {"by_cluster": options.by_cluster or None}
            text = json.dumps(about | {"files": listing(folder)}, indent=2)
            (folder / "manifest.json").write_text(text + "\n")
    except OSError as error:
        raise DataError(f"{target} cannot be written: {error}") from error
    images = sum(split.size for split in source.splits.values())
    print(f"{images:,} features of {about['feature']['dim']}\nresults: {target}", flush=True)


def check_options(target: Path, options: Options) -> None:
    """ConfigError if an option is wrong, or `target` exists and may not be replaced."""
    if options.by_cluster not in ("", "link", "copy"):
        raise ConfigError(f"--by-cluster={options.by_cluster!r} must be link or copy")
    if not os.path.lexists(target):
        return
    if not options.overwrite:
        raise ConfigError(f"{target} exists; give --overwrite to replace it, or move it away")
    if not (target / "manifest.json").is_file():
        raise ConfigError(f"{target} was not made by an export (it has no manifest.json); --overwrite leaves it alone")


def check_pictures(how: str, stage: Stage) -> None:
    """ConfigError if --by-cluster=`how` cannot work with this method or source."""
    source = stage.config.data.source
    if how and stage.predict is None:
        raise ConfigError(f"--by-cluster={how}: method {stage.config.method!r} predicts no clusters")
    if how and len(stage.split.image_shape) == 1:
        raise ConfigError(f"--by-cluster={how}: config.data.source={source!r} holds vectors, which have no pictures")
    if how == "link" and files_of(stage.config) is None:
        raise ConfigError(
            f"--by-cluster=link: config.data.source={source!r} has no files to link to; "
            "--by-cluster=copy writes its images as PNG"
        )


def check_space(target: Path, stage: Stage, state: TrainState, source: Source, how: str) -> None:
    """DataError if there is too little room for what will be written, estimated rather too large."""
    sizes = [split.size for split in source.splits.values()]
    row = feature_dim(stage, state) * jnp.dtype(jnp.float32).itemsize
    arrays = sum(leaf.nbytes for leaf in jax.tree.leaves((state.params, state.extra)))
    # .npy, Parquet and TFRecord, and the features of one split at a time while they are made
    needed = sum(sizes) * (3 * row + ROW_BYTES) + max(sizes) * row + 3 * arrays
    if how:
        needed += sum(sizes) * FILE_BYTES
    if how == "copy":
        needed += sum(picture_bytes(files_of(stage.config), split) for split in source.splits.values())
    free = shutil.disk_usage(target.parent).free
    if needed > free:
        raise DataError(f"{target} needs about {needed / 1e9:.3g} GB; only {free / 1e9:.3g} GB are free on its disk")


def picture_bytes(root: Path | None, split: Split) -> int:
    """What the images of a split take as files."""
    if root is None:
        return split.size * int(np.prod(split.image_shape))
    return sum((root / split.path(id)).stat().st_size for id in range(split.size))


def feature_dim(stage: Stage, state: TrainState) -> int:
    """Length of the feature."""
    shape = stage.split.image_shape
    images = jax.ShapeDtypeStruct((1, *shape), artefacts.input_dtype(shape))
    return int(jax.eval_shape(stage.method.embed, state.params, state.extra, images).shape[1])


def write_programs(folder: Path, stage: Stage, state: TrainState) -> None:
    """embed.jaxexport, predict.jaxexport and params.safetensors; first, since a network may be found unfit for it."""
    for name, function in {"embed": stage.method.embed, "predict": stage.method.predict}.items():
        if function is not None:
            content = artefacts.program(function, state.params, state.extra, stage.split.image_shape)
            (folder / f"{name}.jaxexport").write_bytes(content)
    origin = {"method": stage.config.method, "model": stage.config.model.name}
    (folder / "params.safetensors").write_bytes(artefacts.arrays(state.params, state.extra, origin))


def write_features(folder: Path, stage: Stage, state: TrainState, source: Source, how: str) -> dict[str, Any]:
    """Every split as .npy, Parquet and TFRecord and, if wanted, its images by cluster.

    Returns the number of clusters found in each split, and what was left out and why.
    """
    left_out, clusters = {}, {}
    try:
        store.pyarrow("<split>.parquet")
    except ConfigError as error:
        left_out["parquet"] = str(error)
        print(f"left out: {error}", flush=True)
    program = features_and_clusters(stage)
    for name, split in source.splits.items():
        rows = extract(program, state.params, state.extra, split, stage.config, stage.mesh, folder, name)
        predictions: dict[str, np.ndarray] = {key: rows[key].array() for key in ("cluster", "score") if key in rows}
        clusters[name] = len(np.unique(predictions["cluster"])) if stage.predict else None
        table = store.Table(rows["features"], split.path, predictions, split.labels, source.class_names or ())
        store.write_npy(folder / f"{name}.npy", table.features)
        store.write_tfrecord(folder / f"{name}.tfrecord", table, f"{name}.tfrecord")
        if "parquet" not in left_out:
            store.write_parquet(folder / f"{name}.parquet", table)
        if how:
            write_pictures(folder / "clusters" / name, how, files_of(stage.config), split, predictions["cluster"])
    return {"clusters": clusters, "left_out": left_out}


def features_and_clusters(stage: Stage) -> Program:
    """Both in one pass over the images, by the programs that training and evaluation run, so that results agree."""

    def program(params: Any, extra: Any, images: jax.Array) -> dict[str, jax.Array]:
        found = stage.predict(params, extra, images) if stage.predict else {}
        return {"features": stage.embed(params, extra, images)} | found

    return program


def write_pictures(folder: Path, how: str, root: Path | None, split: Split, clusters: np.ndarray) -> None:
    """Every image in `folder`/<cluster>: a link, a copy of its file, or a PNG where there are no files."""
    title = f"{folder.name} by cluster"
    if root is None:
        by_cluster.draw(split, clusters, folder, title)
    else:
        place = {"link": by_cluster.link, "copy": by_cluster.copy}[how]
        by_cluster.place_files(place, root, split, clusters, folder, title)


def description(stage: Stage, state: TrainState, source: Source) -> dict[str, Any]:
    """What was exported, for the manifest."""
    config, shape = stage.config, stage.split.image_shape
    return {
        "jaxclust": __version__,
        "method": config.method,
        "model": config.model.name,
        "stage": stage.name,
        "step": int(state.step),
        "config_sha256": sha256(stage.workdir / "config.json"),
        "input": {
            "shape": ["B", *shape],
            "dtype": jnp.dtype(artefacts.input_dtype(shape)).name,
            "values": pixels(config.data.stretch) if len(shape) == 3 else "vectors as in the source",
        },
        "feature": {"dim": feature_dim(stage, state), "dtype": "float32", "computed_in": config.runtime.dtype},
        "splits": {name: split.size for name, split in source.splits.items()},
        "class_names": None if source.class_names is None else [store.utf8(name) for name in source.class_names],
        "platforms": artefacts.PLATFORMS,
    }


def pixels(stretch: bool) -> str:
    """What an image is for the programs, and how those that features were made from became such."""
    whose = "which were made squares whatever their aspect, whose" if stretch else "whose short"
    return (
        f"pixels 0 to 255; config.data.mean and std are applied inside. Features were made from images {whose} side "
        "was brought to 8/7 of this size, unless they had it, and whose centre was cut out"
    )


def listing(folder: Path) -> Mapping[str, Any]:
    """Size, SHA-256 and use of each file of the export; pictures are not listed."""
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    return {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256(path), "load": LOADING[path.suffix]}
        for path in progress(paths, len(paths), "checksums", "files")
    }


def sha256(path: Path) -> str:
    """The digest of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def replacing_folder(target: Path, overwrite: bool) -> Iterator[Path]:
    """A new folder beside `target` that takes its place when the block ends without an error.

    Otherwise what was there stays. If something appears at `target` meanwhile and is not to be overwritten: OSError.
    """
    new, old = (target.with_name(f".{os.getpid()}.{kind}.{target.name}") for kind in ("new", "old"))
    for leftover in (new, old):  # of a killed process that had the same number
        shutil.rmtree(leftover, ignore_errors=True)
    new.mkdir()
    try:
        yield new
        replaced = overwrite and os.path.lexists(target)
        if replaced:
            target.rename(old)
        try:
            new.rename(target)
        except BaseException:
            if replaced:
                old.rename(target)
            raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
    if replaced:
        old.unlink() if old.is_symlink() else shutil.rmtree(old)


@contextmanager
def stopping_cleanly() -> Iterator[None]:
    """Turns SIGTERM and SIGINT into an error, so that temporary files are removed; a second signal ends at once."""

    def stop(number: int, frame: FrameType | None) -> None:
        restore()
        name = signal.Signals(number).name
        raise Stopped(f"stopped by {name}; nothing was written, the same command starts anew")

    previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    restore = partial(_set_signals, previous)
    try:
        yield
    finally:
        restore()


def _set_signals(handlers: Mapping[signal.Signals, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)
