"""A frozen body sees each image once: its features are kept in the workdir and take the place of the images."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxclust import hosts
from jaxclust.data.feature_file import open_npy
from jaxclust.data.split import fingerprint
from jaxclust.errors import DataError
from jaxclust.features.store import write_npy
from jaxclust.files import replacing, write_json
from jaxclust.methods.base import TrainState
from jaxclust.train.refresh import run
from jaxclust.train.stage import Stage


def with_features(stage: Stage, state: TrainState, restored: bool) -> Stage:
    """The stage with the features of its images, from features/<stage>.npy if the stage goes on (`restored`).

    features/<stage>.json beside it says of which images; DataError if these are others than the stage's.
    """
    split = stage.split
    if len(split.image_shape) == 1:
        return stage
    path = stage.workdir / "features" / f"{stage.name}.npy"
    about = path.with_suffix(".json")
    of_stage = {"rows": split.size, "split": stage.config.data.train, "fingerprint": fingerprint(split, split.size)}
    there = path.exists() and about.exists()
    if restored and hosts.agreed(there):
        _check(path, json.loads(about.read_text(encoding="utf-8")), of_stage)
    else:  # from before the first checkpoint it may be of another body
        rows = run(stage, state, stage.body, "features of the frozen body")["features"]
        if hosts.is_first():
            with replacing(path) as temporary:
                write_npy(temporary, rows)
            write_json(about, of_stage)
        else:
            for _ in rows.in_order():
                pass
        hosts.wait("the file of features")
    features = open_npy(path, split.name_of, stage.config.data.cache_bytes)
    if features.size != split.size:
        _check(path, {**of_stage, "rows": features.size}, of_stage)
    return stage._replace(split=replace(features, paths=split.paths, labels=split.labels))


def _check(path: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    if (there["rows"], there["fingerprint"]) != (here["rows"], here["fingerprint"]):
        raise DataError(
            f"{path}: its {there['rows']:,} rows are of split {there['split']!r}, and this stage has {here['rows']:,} "
            f"images of split {here['split']!r}, or as many in another order. Likely cause: config.data.train or the "
            "images have changed since; remove the file, or use another --workdir"
        )
