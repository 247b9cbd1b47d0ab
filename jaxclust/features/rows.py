"""A matrix with one row for each image, in memory or, when too large, in a file."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import numpy as np

from jaxclust import hosts

CHUNK_BYTES = 64 * 2**20


class Rows:
    """Rows [N, D] of one dtype, filled in id order and read in chunks.

    On several hosts each holds the rows of its own ids, while `shape` is that of all rows. Beyond `memory_bytes` they
    go to an unnamed temporary file under `folder` with plain reads and writes (the pages of a memory map count as
    resident), which goes away with the object.
    """

    def __init__(self, size: int, row_shape: tuple[int, ...], dtype: np.dtype, memory_bytes: int, folder: Path):
        self.shape = (size, *row_shape)
        self.dtype = np.dtype(dtype)
        self._own = len(hosts.own_ids(size))
        self._kept = memory_bytes, folder
        self._filled = 0
        self._row_bytes = int(np.prod(row_shape, dtype=np.int64)) * self.dtype.itemsize
        self._file = None
        if self._own * self._row_bytes <= memory_bytes:
            self._array = np.empty((self._own, *row_shape), self.dtype)
        else:
            self._array = np.empty((0, *row_shape), self.dtype)
            folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (it lives as long as the rows)

    def like(self, row_shape: tuple[int, ...], dtype: np.dtype) -> "Rows":
        """A matrix to be filled with as many rows of another kind, kept as these are."""
        return Rows(self.shape[0], row_shape, dtype, *self._kept)

    def append(self, chunk: np.ndarray) -> None:
        """Adds rows [n, D] after those there are."""
        if self._filled + len(chunk) > self._own:
            raise ValueError(f"{self._filled} + {len(chunk)} rows do not fit into {self._own}")
        if self._file is None:
            self._array[self._filled : self._filled + len(chunk)] = chunk
        else:
            self._file.write(np.ascontiguousarray(chunk, self.dtype).data)
        self._filled += len(chunk)

    def finish(self) -> Self:
        """Declares the matrix complete."""
        if self._filled != self._own:
            raise ValueError(f"only {self._filled} of {self._own} rows were filled")
        return self

    def ids(self) -> np.ndarray:
        """The ids of this host's rows, int64 and rising."""
        return hosts.own_ids(self.shape[0])

    @property
    def in_memory(self) -> bool:
        """Whether the rows need no reading."""
        return self._file is None

    def read(self, start: int, count: int) -> np.ndarray:
        """`count` of this host's rows from its row `start` on, [count, D]."""
        if self._file is None:
            return self._array[start : start + count]
        self._file.seek(start * self._row_bytes)
        block = self._file.read(count * self._row_bytes)
        return np.frombuffer(block, self.dtype).reshape(count, *self.shape[1:])

    def chunks(self) -> Iterator[np.ndarray]:
        """Yields blocks [n, D] of this host's rows in id order, of about 64 MiB."""
        step = max(1, CHUNK_BYTES // max(1, self._row_bytes))
        for start in range(0, self._own, step):
            yield self.read(start, min(step, self._own - start))

    def array(self) -> np.ndarray:
        """This host's rows in memory."""
        if self._file is None:
            return self._array
        array, done = np.empty((self._own, *self.shape[1:]), self.dtype), 0
        for chunk in self.chunks():
            array[done : done + len(chunk)] = chunk
            done += len(chunk)
        return array

    def in_order(self) -> Iterator[np.ndarray]:
        """Yields blocks [n, D] of the rows of all hosts in id order; every host must take every block."""
        none = np.empty((0, *self.shape[1:]), self.dtype)  # more hosts than rows: `hosts.in_order` needs a chunk
        return hosts.in_order(self.chunks() if self._own else [none], self.shape[0])

    def whole(self) -> np.ndarray:
        """The rows of all hosts in memory, [N, D], on every host: for what is small."""
        return hosts.whole(self.array(), self.shape[0])
