"""Records of a data set that TFDS wrote, each read by its number."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from jaxclust.data.decode import Unreadable
from jaxclust.errors import DataError
from jaxclust.progress import progress

HEAD, FOOT = 12, 4  # bytes around a TFRecord: its length (8) and a checksum before, a checksum after


class Records(NamedTuple):
    """Records 0 … size-1 over all files of a split; `read(i)` gives one, or raises Unreadable."""

    size: int
    read: Callable[[int], bytes]


def open_records(file_format: str, paths: Sequence[str], sizes: Sequence[int]) -> Records:
    """The records of `paths`, of which each holds as many as `sizes` says.

    DataError, naming the file, if one is missing, truncated or holds another number, or if there is
    no reader for `file_format`.
    """
    readers = {"tfrecord": _tf_records, "array_record": _array_records}
    if file_format not in readers:
        raise DataError(f"{paths[0]!r} has the format {file_format}; there are readers for {' and '.join(readers)}")
    return readers[file_format](paths, sizes)


def _tf_records(paths: Sequence[str], sizes: Sequence[int]) -> Records:
    """Records of TFRecord files, through an index of where each lies."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        tables = list(progress(pool.map(_index, paths, sizes), len(paths), "finding records", "files"))
    starts, lengths = np.concatenate(tables).T
    file = np.repeat(np.arange(len(paths)), sizes)

    def read(i: int) -> bytes:
        path, length = paths[file[i]], int(lengths[i])
        try:
            with open(path, "rb", buffering=0) as shard:
                record = os.pread(shard.fileno(), length, int(starts[i]))
        except OSError as error:
            raise Unreadable(f"{path}: {error.strerror}") from error
        if len(record) < length:
            raise Unreadable(f"{path} has become shorter")
        return record

    return Records(len(file), read)


def _index(path: str, size: int) -> NDArray[np.int64]:
    """Start and length [size, 2] of the records of a TFRecord file, by the lengths before them alone."""
    found: list[tuple[int, int]] = []
    try:
        with open(path, "rb", buffering=0) as file:
            fd, end, offset = file.fileno(), os.fstat(file.fileno()).st_size, 0
            while offset < end:
                start, length = offset + HEAD, int.from_bytes(os.pread(fd, 8, offset), "little")
                offset = start + length + FOOT
                if offset > end:
                    raise DataError(f"{path!r} is truncated or damaged: record {len(found)} ends behind its end")
                found.append((start, length))
    except OSError as error:
        raise DataError(f"{path!r} cannot be read: {error.strerror}") from error
    _check_size(path, len(found), size)
    return np.array(found, np.int64).reshape(-1, 2)


def _array_records(paths: Sequence[str], sizes: Sequence[int]) -> Records:
    """Records of ArrayRecord files, through their own reader."""
    try:
        from array_record.python.array_record_data_source import ArrayRecordDataSource
    except ImportError:
        raise DataError(f"{paths[0]!r}: to read the format array_record, pip install array_record") from None
    sources = []
    for path, size in zip(paths, sizes, strict=True):
        try:
            sources.append(ArrayRecordDataSource(path))
        except Exception as error:
            raise DataError(f"{path!r} cannot be read: {error}") from error
        _check_size(path, len(sources[-1]), size)
    ends = np.cumsum(sizes)

    def read(i: int) -> bytes:
        file = int(np.searchsorted(ends, i, side="right"))
        try:
            return sources[file][i - int(ends[file]) + sizes[file]]
        except Exception as error:
            raise Unreadable(f"{paths[file]}: {error}") from error

    return Records(int(ends[-1]), read)


def _check_size(path: str, found: int, size: int) -> None:
    if found != size:
        raise DataError(f"{path!r} holds {found} records; its dataset_info.json says {size}")
