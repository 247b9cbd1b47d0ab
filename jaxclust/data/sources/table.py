"""A table of images, `.csv` or `.parquet`: columns path, label, and if wanted x1, y1, x2, y2 and split."""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jaxclust.data.decode import Box
from jaxclust.data.listed import Row, make_source, number_classes
from jaxclust.data.split import Source
from jaxclust.errors import ConfigError, DataError
from jaxclust.hints import did_you_mean

CORNERS = ("x1", "y1", "x2", "y2")  # left, top, right and bottom of a box in pixels
COLUMNS = ("path", "label", *CORNERS, "split")

Columns = Mapping[str, Sequence[Any]]


def read(where: str, settings: ConfigDict) -> Source:
    """Scans every file of the table, whose paths are relative to its folder; ids are in the order of its rows.

    Labels are whole numbers or names; an empty one is unknown. A box that is empty in all corners is the whole image.
    Without a column of splits all images are `train`.
    """
    path = Path(where).expanduser()
    if path.suffix not in (".csv", ".parquet"):
        raise ConfigError(f"config.data.source='table:{where}' must name a .csv or .parquet file")
    if not path.is_file():
        raise DataError(f"{where!r}: no such file (config.data.source=table:FILE)")
    columns = _csv(path) if path.suffix == ".csv" else _parquet(path)
    if "path" not in columns:
        hint = did_you_mean("path", columns)
        raise DataError(f"{path}: has no column 'path'{hint} Columns that mean something are {', '.join(COLUMNS)}.")
    size = len(columns["path"])
    labels, names = number_classes(path, [_known(value) for value in columns.get("label", [None] * size)])
    splits = [_known(value) for value in columns.get("split", [None] * size)]
    boxes = _boxes(path, columns)
    rows = [
        Row(_path(path, i, columns["path"][i]), labels[i], boxes[i], str(splits[i] or "train")) for i in range(size)
    ]
    return make_source(path, path.parent, rows, names, settings)


def _csv(path: Path) -> Columns:
    try:
        with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            header, *rows = [row for row in csv.reader(file) if row] or [[]]
    except (OSError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    for i, row in enumerate(rows):
        if len(row) != len(header):
            raise DataError(f"{path}: {_row(i)} has {len(row)} cells under {len(header)} names: {', '.join(header)}")
    return {name.strip(): [row[i] for row in rows] for i, name in enumerate(header)}


def _parquet(path: Path) -> Columns:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise ConfigError(f"config.data.source='table:{path}' needs pyarrow: pip install 'jaxclust[parquet]'") from None
    try:
        table = parquet.read_table(path, columns=[n for n in parquet.read_schema(path).names if n in COLUMNS])
    except (OSError, ArrowException) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    return table.to_pydict()


def _known(value: Any) -> Any:
    """A cell without blanks around it, None if it is empty."""
    value = value.strip() if isinstance(value, str) else value
    return None if value is None or value == "" or (isinstance(value, float) and math.isnan(value)) else value


def _path(table: Path, i: int, value: Any) -> str:
    if not isinstance(value, str) or not value or "\0" in value:
        raise DataError(f"{table}: {_row(i)} has the path {value!r}, which is none")
    return value


def _boxes(path: Path, columns: Columns) -> list[Box | None]:
    there = [name for name in CORNERS if name in columns]
    size = len(columns["path"])
    if not there:
        return [None] * size
    if len(there) < len(CORNERS):
        raise DataError(f"{path}: a box needs the columns {', '.join(CORNERS)}, and there are only {', '.join(there)}")
    return [_box(path, i, [_known(columns[name][i]) for name in CORNERS]) for i in range(size)]


def _box(path: Path, i: int, corners: Sequence[Any]) -> Box | None:
    if all(value is None for value in corners):
        return None
    try:
        left, top, right, bottom = (round(float(value)) for value in corners)
    except (TypeError, ValueError, OverflowError):
        raise DataError(f"{path}: {_row(i)} has the box {tuple(corners)}; it must be four numbers of pixels") from None
    if left >= right or top >= bottom:
        raise DataError(
            f"{path}: {_row(i)} has the box {tuple(corners)}, which is empty: x1 < x2 and y1 < y2 are needed"
        )
    return Box(left, top, right, bottom)


def _row(i: int) -> str:
    return f"row {i + 1} below the names"
