"""--job=predict: the cluster of every image in a folder, from a trained workdir."""

import csv
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from jaxclust.data.source import read
from jaxclust.errors import ConfigError, DataError
from jaxclust.evaluation import clustering
from jaxclust.features import store
from jaxclust.files import check_place, replacing
from jaxclust.jobs import evaluate
from jaxclust.jobs.options import Options
from jaxclust.train import workdir as workdir_lib

Table = dict[str, list]

NEEDS_ARROW = "--out=….parquet (not .csv)"


def run(config: ConfigDict, workdir: Path, options: Options) -> None:
    """Writes path, cluster and score (0: a tie of two clusters, 1: sure) of each image under --images to --out.

    Class folders, where there are any, are compared with the clusters.
    """
    out = checked(options)
    config = workdir_lib.resolved(config, workdir_lib.data_info(workdir).image_shape)
    new = {"source": f"folder:{options.images}", "train": "train", "train_classes": ""}
    try:
        source = read(ConfigDict(config.data.to_dict() | new))
    except DataError as error:
        raise DataError(f"--images={options.images}: {error}") from None
    stage, state = evaluate.restore(config, workdir, source.splits["train"])
    table: Table = {"path": [], "cluster": [], "score": []}
    for name, split in source.splits.items():
        predictions = evaluate.predict(stage, state, split, name)
        table["path"] += [split.path(i) for i in range(split.size)]
        table["cluster"] += predictions["cluster"].tolist()
        table["score"] += predictions["score"].astype(np.float32).tolist()
        if split.labels is not None:
            scores = clustering.scores(predictions["cluster"], split.labels, stage.config.evaluate.nmi_average)
            words = (f"{key.upper()} {value:.3f}" for key, value in scores.items())
            print(f"{name}, against the class folders: {', '.join(words)}", flush=True)
    for skipped in source.skipped:
        print(f"skipped {skipped.path}: {skipped.reason}", flush=True)
    with replacing(out) as temporary:
        (_write_csv if out.suffix.lower() == ".csv" else _write_parquet)(temporary, table)
    print(f"{len(table['path']):,} images in {len(set(table['cluster']))} clusters\nresults: {out}", flush=True)


def checked(options: Options) -> Path:
    """The file to write; ConfigError or DataError on what can be known to be wrong before the work."""
    out, images = Path(options.out), Path(options.images).expanduser()
    if not options.images:
        raise ConfigError("--job=predict needs --images=FOLDER")
    if out.suffix.lower() not in (".csv", ".parquet") or out.is_dir():
        raise ConfigError(f"--out={options.out!r} must name a .csv or .parquet file{' and no folder' * out.is_dir()}")
    check_place(out, "--out")
    if out.suffix.lower() == ".parquet":
        store.pyarrow(NEEDS_ARROW)
    if not images.is_dir():
        why = "it is a file; name the folder that it is in" if images.exists() else "there is no such folder"
        raise DataError(f"--images={options.images}: {why}")
    return out


def _write_csv(path: Path, table: Table) -> None:
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(table)
        writer.writerows((path, cluster, f"{score:.6g}") for path, cluster, score in zip(*table.values(), strict=True))


def _write_parquet(path: Path, table: Table) -> None:
    arrow, parquet = store.pyarrow(NEEDS_ARROW)
    clusters, scores = np.asarray(table["cluster"], np.int32), np.asarray(table["score"], np.float32)
    columns = {"path": [store.utf8(name) for name in table["path"]], "cluster": clusters, "score": scores}
    parquet.write_table(arrow.table(columns), path)
