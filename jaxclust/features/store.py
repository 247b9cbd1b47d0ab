"""Features of a split as files that other programs read: .npy, Parquet and TFRecord, written chunk by chunk."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from jaxclust.errors import ConfigError
from jaxclust.features.rows import Rows
from jaxclust.progress import progress
from jaxclust.runtime import tensorflow


class Table(NamedTuple):
    """What is known of each image of a split, by id."""

    features: Rows  # float [N, D]
    path: Callable[[int], str]
    predictions: Mapping[str, NDArray[Any]]  # "cluster" int32 [N] and "score" float32 [N], or nothing
    labels: NDArray[np.int32] | None  # [N], negative where unknown
    class_names: tuple[str, ...]

    def label(self, id: int) -> str | None:
        """The class of image `id`, None if it is not known."""
        return None if self.labels is None or self.labels[id] < 0 else self.class_names[self.labels[id]]


def write_npy(path: Path, rows: Rows) -> None:
    """Writes rows [N, D] as float32, to be read with `numpy.load`.

    On several hosts for one to call, while the others take the blocks of `rows.in_order()` too.
    """
    with path.open("wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": rows.shape}
        np.lib.format.write_array_header_1_0(file, header)
        for chunk in rows.in_order():
            file.write(np.ascontiguousarray(chunk, "<f4").data)


def write_parquet(path: Path, table: Table) -> None:
    """Writes columns id, path, cluster, score, label and feature (a list of fixed length); ConfigError without pyarrow.

    Columns of what is not known are left out. A chunk of the features becomes a row group.
    """
    arrow, parquet = pyarrow("a Parquet file")
    types = {
        "id": arrow.int32(), "path": arrow.string(), "cluster": arrow.int32(), "score": arrow.float32(),
        "label": arrow.string(), "feature": arrow.list_(arrow.float32(), table.features.shape[1]),
    }  # fmt: skip
    there = {"id", "path", "feature", *table.predictions} | ({"label"} if table.labels is not None else set())
    schema = arrow.schema([(name, kind) for name, kind in types.items() if name in there])
    with parquet.ParquetWriter(path, schema, use_dictionary=["label"]) as writer:
        for ids, chunk in _chunks(table.features):
            columns: dict[str, Any] = {name: values[ids] for name, values in table.predictions.items()}
            columns["id"] = ids
            columns["path"] = [utf8(table.path(i)) for i in ids]
            columns["label"] = [name if name is None else utf8(name) for name in map(table.label, ids)]
            columns["feature"] = arrow.FixedSizeListArray.from_arrays(arrow.array(chunk.ravel()), chunk.shape[1])
            writer.write_table(arrow.table([columns[name] for name in schema.names], schema=schema))


def write_tfrecord(path: Path, table: Table, title: str) -> None:
    """Writes a tf.train.Example for each image, with the fields of `write_parquet`; a class not known is left out.

    `path` and `label` are the bytes of the names, whatever their encoding.
    """
    tf = tensorflow()
    train, rows = tf.train, ((ids[i], chunk[i]) for ids, chunk in _chunks(table.features) for i in range(len(ids)))
    with tf.io.TFRecordWriter(str(path)) as writer:
        for id, row in progress(rows, table.features.shape[0], title, "images"):
            texts = {"path": table.path(id), "label": table.label(id)}
            numbers = {name: values[id] for name, values in table.predictions.items()}
            feature = {name: _bytes(train, text) for name, text in texts.items() if text is not None}
            feature |= {name: _number(train, value) for name, value in ({"id": id} | numbers).items()}
            feature["feature"] = train.Feature(float_list=train.FloatList(value=row.tolist()))  # faster than an array
            example = train.Example(features=train.Features(feature=feature))
            writer.write(example.SerializeToString(deterministic=True))


def utf8(name: str) -> str:
    """A file name as text that any program can read: bytes that are no UTF-8 become U+FFFD."""
    return raw(name).decode("utf-8", "replace")


def raw(name: str) -> bytes:
    """The bytes of a file name, which need not be UTF-8."""
    return name.encode("utf-8", "surrogateescape")


def pyarrow(what: str) -> tuple[ModuleType, ModuleType]:
    """The modules pyarrow and pyarrow.parquet; ConfigError if they are not installed, which `what` needs."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ConfigError(f"{what} needs pyarrow: pip install 'jaxclust[parquet]'") from None
    return pyarrow, parquet


def _chunks(rows: Rows) -> Iterator[tuple[NDArray[np.int32], NDArray[np.float32]]]:
    """(ids [n], float32 [n, D]) of each chunk."""
    start = 0
    for chunk in rows.chunks():
        yield np.arange(start, start + len(chunk), dtype=np.int32), chunk.astype(np.float32, copy=False)
        start += len(chunk)


def _bytes(train: ModuleType, text: str) -> Any:
    return train.Feature(bytes_list=train.BytesList(value=[raw(text)]))


def _number(train: ModuleType, value: Any) -> Any:
    if np.issubdtype(value.dtype, np.integer):
        return train.Feature(int64_list=train.Int64List(value=[int(value)]))
    return train.Feature(float_list=train.FloatList(value=[float(value)]))
