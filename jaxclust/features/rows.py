"""A matrix with one row for each image, in memory or, when too large, in a file."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import numpy as np

CHUNK_BYTES = 64 * 2**20


class Rows:
    """Rows [N, D] of one dtype, filled in id order and read in chunks.

    Beyond `memory_bytes` they go to an unnamed temporary file under `folder` with plain reads and writes (the
    pages of a memory map count as resident), which goes away with the object.
    """

    def __init__(self, size: int, row_shape: tuple[int, ...], dtype: np.dtype, memory_bytes: int, folder: Path):
        self.shape = (size, *row_shape)
        self.dtype = np.dtype(dtype)
        self._filled = 0
        self._row_bytes = int(np.prod(row_shape, dtype=np.int64)) * self.dtype.itemsize
        self._file = None
        if size * self._row_bytes <= memory_bytes:
            self._array = np.empty(self.shape, self.dtype)
        else:
            self._array = np.empty((0, *row_shape), self.dtype)
            folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (it lives as long as the rows)

    def append(self, chunk: np.ndarray) -> None:
        """Adds rows [n, D] after those there are."""
        if self._filled + len(chunk) > self.shape[0]:
            raise ValueError(f"{self._filled} + {len(chunk)} rows do not fit into {self.shape[0]}")
        if self._file is None:
            self._array[self._filled : self._filled + len(chunk)] = chunk
        else:
            self._file.write(np.ascontiguousarray(chunk, self.dtype).data)
        self._filled += len(chunk)

    def finish(self) -> Self:
        """Declares the matrix complete."""
        if self._filled != self.shape[0]:
            raise ValueError(f"only {self._filled} of {self.shape[0]} rows were filled")
        return self

    def chunks(self) -> Iterator[np.ndarray]:
        """Yields blocks [n, D] in id order, of about 64 MiB."""
        step = max(1, CHUNK_BYTES // max(1, self._row_bytes))
        if self._file is not None:
            self._file.seek(0)
        for start in range(0, self.shape[0], step):
            count = min(step, self.shape[0] - start)
            if self._file is None:
                yield self._array[start : start + count]
            else:
                block = self._file.read(count * self._row_bytes)
                yield np.frombuffer(block, self.dtype).reshape(count, *self.shape[1:])

    def array(self) -> np.ndarray:
        """The whole matrix in memory."""
        return self._array if self._file is None else np.concatenate(list(self.chunks()))
