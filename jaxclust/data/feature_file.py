"""A matrix of features in an .npy file as a split of vectors, in memory or read row by row."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from jaxclust.data.split import Split, from_array
from jaxclust.errors import DataError
from jaxclust.runtime import tensorflow

if TYPE_CHECKING:
    from tensorflow import Tensor


def open_npy(path: Path, name_of: Callable[[int], str], cache_bytes: float, parts: int = 1) -> Split:
    """The rows float32 [N, D] of `path`, in memory if they take at most `cache_bytes`; DataError on another content.

    A row may be of several `parts`, [N, parts * D], that become rows of their own, one after the other.
    """
    matrix = np.load(path, mmap_mode="r", allow_pickle=False)
    if matrix.ndim != 2 or matrix.dtype != np.float32 or not matrix.flags.c_contiguous:
        raise DataError(f"{path}: holds {matrix.dtype} {matrix.shape}; it must be float32 [N, D] in rows")
    matrix = matrix.reshape(len(matrix) * parts, -1)
    size, width = matrix.shape
    if matrix.nbytes <= cache_bytes:
        return from_array(np.array(matrix), (width,), name_of)
    return Split(size, (width,), name_of, *_readers(path, matrix.offset, width))


def _readers(
    path: Path, offset: int, width: int
) -> tuple[Callable[["Tensor"], "Tensor"], Callable[["Tensor"], "Tensor"]]:
    """`load` and `gather` by plain reads, since the pages of a memory map count as resident."""
    tf = tensorflow()
    file = os.open(path, os.O_RDONLY)  # open as long as the process: the file may be replaced, its rows stay
    row_bytes = 4 * width

    def read(ids: NDArray[np.integer]) -> NDArray[np.float32]:
        parts = [os.pread(file, row_bytes, offset + int(i) * row_bytes) for i in np.ravel(ids)]
        return np.frombuffer(b"".join(parts), np.float32).reshape(*ids.shape, width)

    def gather(ids: "Tensor") -> "Tensor":
        rows = tf.numpy_function(read, [ids], tf.float32, stateful=False)
        return tf.ensure_shape(rows, (*ids.shape, width))

    return gather, gather
