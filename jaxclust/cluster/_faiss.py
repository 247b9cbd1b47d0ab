"""The exact search of faiss."""

import functools

import numpy as np

_SMALL = 1 << 26  # multiplications of a search that one thread does in about 10 ms


def search(x: np.ndarray, rows: np.ndarray, num: int) -> tuple[np.ndarray, np.ndarray]:
    """The `num` nearest of rows [N, d] per row of x [n, d]: squared distances float32, ids int64, both [n, num]."""
    import faiss  # not installed everywhere

    most = _threads()  # asked before it is changed
    # The result does not depend on the number of threads, but to wait for them costs more than a small search.
    faiss.omp_set_num_threads(1 if x.size * len(rows) < _SMALL else most)
    distances, ids = faiss.knn(x, rows, num)
    return distances, ids


@functools.cache
def _threads() -> int:
    """The number of threads that faiss takes if it is left alone."""
    import faiss

    count: int = faiss.omp_get_max_threads()
    return count
