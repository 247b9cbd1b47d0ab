"""Reads what a finished or running workdir holds; whatever is absent or half written is None."""

import csv
import json
import math
import zipfile
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class Metrics(NamedTuple):
    """Metrics of all rounds of all stages, one after the other."""

    rows: list[dict[str, float]]
    stages: list[tuple[str, int]]  # name, index of its first row

    def series(self, name: str) -> tuple[Array, Array]:
        """Round numbers (counted from 0 over all stages) and values where `name` was logged."""
        points = [(i, row[name]) for i, row in enumerate(self.rows) if name in row]
        return tuple(np.array(points, float).reshape(-1, 2).T)  # type: ignore[return-value]

    def newest_loss(self) -> tuple[dict[str, float], float]:
        """The newest round of the last stage that has a loss, and how many clusters were found before it, 0: none."""
        start = self.stages[-1][1] if self.stages else 0
        at = max((i for i, row in enumerate(self.rows) if i >= start and "train/loss" in row), default=start)
        found = [row["clusters/found"] for row in self.rows[start:at] if "clusters/found" in row]
        return (self.rows[at] if self.rows else {}), (found[-1] if found else 0.0)

    def last(self) -> dict[str, float]:
        """The newest value of every metric of the last stage."""
        start = self.stages[-1][1] if self.stages else 0
        return {name: value for row in self.rows[start:] for name, value in row.items()}


class Confusion(NamedTuple):
    """Counts [clusters, classes] with the ids of the rows and the names of the columns."""

    table: Array
    clusters: list[int]
    classes: list[str]


class Samples(NamedTuple):
    """Images near the centres of their clusters."""

    images: Array  # uint8 [M, H, W, C]
    id: Array
    cluster: Array
    distance: Array


class Run(NamedTuple):
    """All that a report is made from."""

    workdir: Path
    config: dict[str, Any] | None
    results: dict[str, float] | None
    metrics: Metrics
    clusters: tuple[Array, Array] | None  # ids of the clusters found, their sizes
    samples: Samples | None
    confusions: dict[str, Confusion]
    paths: dict[int, str]  # of the images in `samples`
    skipped: list[list[str]] | None

    @property
    def finished(self) -> bool:
        """Whether the results are those of the whole run; before its end there may be some of its first stages."""
        return "seconds" in (self.results or {})

    @property
    def stages(self) -> dict[str, dict[str, Any]]:
        """The settings that each stage sees, in order."""
        config = self.config or {}
        return {name: _of_stage(config, name) for name in _stage_names(config)}


def read(workdir: Path) -> Run:
    """Reads a workdir; files that are absent, or that a running job has half written, are None."""
    config = _json(workdir / "config.json")
    samples = _samples(workdir / "samples.npz")
    final, paths = _final(workdir / "assignments.csv", set() if samples is None else set(samples.id.tolist()))
    run = Run(
        workdir=workdir,
        config=config,
        results=_json(workdir / "results.json"),
        metrics=_metrics(workdir / "metrics.jsonl"),
        clusters=None,
        samples=samples,
        confusions=_confusions(workdir),
        paths=paths,
        skipped=_skipped(workdir / "skipped.csv"),
    )
    newest = None if run.finished and len(final) else _newest_of_stages(workdir / "assignments", config)
    return run._replace(clusters=_counted(final if newest is None else newest))


def newest_assignment(folder: Path) -> Array | None:
    """The cluster of each image, int [N], as the newest file of assignments/<stage>/ has it; -1: none."""
    rounds = [path for path in folder.glob("*.npz") if path.stem.isdigit()]
    for path in sorted(rounds, key=lambda path: int(path.stem), reverse=True):
        if (arrays := _npz(path, ["cluster"])) is not None:
            return arrays[0]
    return None


def _stage_names(config: Mapping[str, Any]) -> list[str]:
    return [name.strip() for name in str(config.get("stages", "")).split(",") if name.strip()]


def _of_stage(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    own = config.get("stage")
    return _laid_over(config, own.get(name) if isinstance(own, dict) else None)


def _laid_over(below: Any, above: Any) -> Any:
    if not (isinstance(below, Mapping) and isinstance(above, Mapping)):
        return below if above is None else above
    return {**below, **{name: _laid_over(below.get(name), value) for name, value in above.items()}}


def _json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _metrics(path: Path) -> Metrics:
    merged: dict[tuple[str, int], dict[str, float]] = {}
    for record in _lines(path):
        key = (str(record.get("stage", "")), int(record.get("round", len(merged))))
        numbers = {name: float(value) for name, value in record.items() if _finite(value)}
        merged.setdefault(key, {}).update(numbers)
    stages: list[tuple[str, int]] = []
    for row, (stage, _) in enumerate(merged):
        if not stages or stages[-1][0] != stage:
            stages.append((stage, row))
    return Metrics(list(merged.values()), stages)


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _lines(path: Path) -> Iterator[Mapping[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # the line that a running job is writing, or that a killed one left
        if isinstance(record, dict):
            yield record


def _counted(clusters: Array) -> tuple[Array, Array] | None:
    """Ids and sizes of the clusters of an assignment."""
    clusters = clusters[clusters >= 0]
    return np.unique(clusters, return_counts=True) if len(clusters) else None


def _newest_of_stages(folder: Path, config: Mapping[str, Any] | None) -> Array | None:
    """The newest assignment of the last stage that has one."""
    stages = [folder / name for name in reversed(_stage_names(config or {})) if (folder / name).is_dir()]
    found = (newest_assignment(stage) for stage in stages or sorted(folder.glob("*/")))
    return next((clusters for clusters in found if clusters is not None), None)


def _npz(path: Path, names: list[str]) -> list[Array] | None:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return [arrays[name] for name in names]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _samples(path: Path) -> Samples | None:
    arrays = _npz(path, list(Samples._fields))
    return Samples(*arrays) if arrays is not None and len(arrays[0]) else None


def _confusions(workdir: Path) -> dict[str, Confusion]:
    found = {}
    for path in sorted(workdir.glob("confusion-*.csv")):
        rows = _csv(path)
        header = next(rows, [])
        whole = (row for row in rows if len(row) == len(header) and all(map(str.isdigit, row)))
        body = [[int(cell) for cell in row] for row in whole]
        if len(header) > 1 and body:
            table = np.array(body, np.int64)
            split = path.stem.removeprefix("confusion-")
            found[split] = Confusion(table[:, 1:], table[:, 0].tolist(), header[1:])
    return dict(sorted(found.items(), key=lambda item: item[0] != "train"))


def _final(path: Path, wanted: set[int]) -> tuple[Array, dict[int, str]]:
    """Of assignments.csv (id, path, cluster, distance) the clusters, and the paths of `wanted` ids."""
    clusters, paths, rows = array("q"), {}, _csv(path)
    next(rows, None)
    for row in rows:
        if len(row) < 4 or not (row[0].isdigit() and row[2].isdigit()):
            continue  # cut off, or without a cluster
        clusters.append(int(row[2]))
        if int(row[0]) in wanted:
            paths[int(row[0])] = row[1]
    return np.array(clusters, np.int64), paths


def _skipped(path: Path) -> list[list[str]] | None:
    if not path.is_file():
        return None
    return [row for row in list(_csv(path))[1:] if len(row) >= 3]


def _csv(path: Path) -> Iterator[list[str]]:
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        yield from csv.reader(file)
