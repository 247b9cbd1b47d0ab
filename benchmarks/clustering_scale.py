"""The clustering stage at the size of ImageNet: PCA-whitening of 1,281,167 x 4,096 features, then k-means.

The features are made in chunks whenever they are asked for, as they would be read from a file, and making them is not
counted. Two iterations of k-means are timed (each is one search and one update; a last search assigns) and twenty
extrapolated. The peer is faiss itself (PCAMatrix, then Kmeans) in memory, on as many of the first rows as `--subset`
says, against ours on the same rows, from the same initial ids, in turns. Every process runs alone.
"""

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np

from benchmarks import results, sides
from jaxclust import config as config_lib

if TYPE_CHECKING:
    from jaxclust.features.rows import Rows

T = TypeVar("T")

CHUNK = 4096  # rows made at a time


class Case(NamedTuple):
    """Sizes of the stage."""

    rows: int
    width: int
    dim: int
    k: int
    iterations: int


class Timing(NamedTuple):
    """Seconds of each part, and the mean squared distance to the centroids."""

    fit: float
    transform: float
    kmeans: float
    error: float


class Features:
    """Rows [N, D] of correlated columns around many centres; each chunk is the same whenever it is made.

    `seconds` is what making them has taken.
    """

    def __init__(self, case: Case):
        rng = np.random.default_rng(0)
        rank = min(2 * case.dim, case.width)
        self.shape = (case.rows, case.width)
        self.seconds = 0.0
        self._centres = rng.standard_normal((2 * case.k, rank), np.float32)
        decay = np.arange(1, rank + 1, dtype=np.float32)[:, None] ** -0.5  # the spectrum of features falls slowly
        self._basis = decay * rng.standard_normal((rank, case.width), np.float32)

    def chunks(self) -> Iterator[np.ndarray]:
        """The rows in order."""
        for start in range(0, self.shape[0], CHUNK):
            clock = time.perf_counter()
            rng = np.random.default_rng([1, start])
            count = min(CHUNK, self.shape[0] - start)
            latent = self._centres[rng.integers(0, len(self._centres), count)]
            latent += rng.standard_normal(latent.shape, np.float32)
            chunk = latent @ self._basis
            self.seconds += time.perf_counter() - clock
            yield chunk

    def like(self, row_shape: tuple[int, ...], dtype: np.dtype) -> "Rows":
        """A matrix in memory for what is made of the rows."""
        from jaxclust.features.rows import Rows

        return Rows(self.shape[0], row_shape, dtype, sys.maxsize, Path())


CASE, SUBSET = Case(1_281_167, 4096, 256, 10_000, 2), 20_480
QUICK, QUICK_SUBSET = Case(3000, 64, 16, 20, 2), 1000
FULL_ITERATIONS = 20


def main() -> None:
    """Measures and writes the section."""
    parser = results.arguments(__doc__)
    parser.add_argument("--rows", type=int, default=0, help="rows in place of ImageNet's 1,281,167")
    parser.add_argument("--subset", type=int, default=0, help="rows on which faiss is compared with")
    parser.add_argument("--turns", type=int, default=2, help="turns of each side on the subset")
    options = results.parse(parser)
    case, subset, turns = (QUICK, QUICK_SUBSET, 1) if options.quick else (CASE, SUBSET, options.turns)
    case = case._replace(rows=options.rows or case.rows)
    with sides.side(ours) as ask:
        whole = ask(case)
    print(describe_whole(case, whole), flush=True)
    part = case._replace(rows=min(options.subset or subset, case.rows))
    with sides.sides({"ours": (ours,), "faiss": (peer,)}) as asks:
        answers = sides.take_turns(asks, turns, part)
    text = f"{describe_whole(case, whole)}\n\n{describe_peer(part, answers)}"
    results.publish(options, "Clustering at the size of ImageNet", "python -m benchmarks.clustering_scale", text)


def describe_whole(case: Case, answer: sides.Answer) -> str:
    """The whole stage: seconds of each part, the total for twenty iterations, memory."""
    timing: Timing = answer.value
    searches = timing.kmeans / (case.iterations + 1)
    full = searches * (FULL_ITERATIONS + 1)
    rows: list[tuple[str, float]] = [
        ("PCA fit", timing.fit),
        ("PCA transform", timing.transform),
        (f"k-means, {case.iterations} iterations", timing.kmeans),
        (f"k-means, {FULL_ITERATIONS} iterations, extrapolated", full),
        (f"total with {FULL_ITERATIONS} iterations", timing.fit + timing.transform + full),
    ]
    cells = [[name, f"{seconds:,.1f}", f"{1e6 * seconds / case.rows:,.1f}"] for name, seconds in rows]
    title = (
        f"{case.rows:,} x {case.width:,} to {case.dim}, k = {case.k:,}. Peak memory {results.gigabytes(answer.peak)}."
    )
    return f"{title}\n\n{results.table(('part', 'seconds', 'microseconds a row'), cells)}"


def describe_peer(case: Case, answers: dict[str, list[sides.Answer]]) -> str:
    """Ours against faiss on the same rows."""
    timings: dict[str, list[Timing]] = {name: [answer.value for answer in of_side] for name, of_side in answers.items()}
    rows = []
    for part in ("fit", "transform", "kmeans"):
        seconds = {name: [getattr(timing, part) for timing in of_side] for name, of_side in timings.items()}
        spreads = [results.spread(seconds[name]) for name in ("faiss", "ours")]
        rows.append([part, *spreads, results.ratio(seconds["faiss"], seconds["ours"])])
    error = timings["ours"][-1].error / timings["faiss"][-1].error
    peaks = {name: results.gigabytes(of_side[-1].peak) for name, of_side in answers.items()}
    text = results.table(("part", "faiss, seconds", "ours, seconds", "ratio"), rows)
    last = f"Objective, ours / faiss: {error:.5f}. Peak memory: faiss {peaks['faiss']}, ours {peaks['ours']}."
    return f"The first {case.rows:,} rows, which faiss holds in memory:\n\n{text}\n\n{last}"


def ours() -> Callable[[Case], Timing]:
    """The clustering stage of jaxclust, on rows in chunks."""
    from jaxclust import runtime
    from jaxclust.cluster import kmeans_faiss, reduce

    runtime.start(config_lib.base())

    def run(case: Case) -> Timing:
        rows = Features(case)
        fit, (whitening, _) = clocked(lambda: reduce.fit(rows, case.dim))
        fit, making = fit - rows.seconds, rows.seconds
        transform, (points, _) = clocked(lambda: reduce.transform(rows, whitening, l2=True))
        transform -= rows.seconds - making
        start = np.arange(case.k)
        seconds, found = clocked(
            lambda: kmeans_faiss.kmeans(points.array(), case.k, 0, iterations=case.iterations, initial_ids=start)
        )
        return Timing(fit, transform, seconds, float(found.distances.mean(dtype=np.float64)))

    return run


def peer() -> Callable[[Case], Timing]:
    """The same with faiss alone, as DeepCluster's authors wrote it."""
    import faiss

    def run(case: Case) -> Timing:
        rows = np.concatenate(list(Features(case).chunks()))
        pca = faiss.PCAMatrix(case.width, case.dim, -0.5)
        fit, _ = clocked(lambda: pca.train(rows))

        def whitened() -> np.ndarray:
            points: np.ndarray = pca.apply(rows)
            faiss.normalize_L2(points)
            return points

        transform, points = clocked(whitened)
        kmeans = faiss.Kmeans(case.dim, case.k, niter=case.iterations, max_points_per_centroid=case.rows)

        def labelled() -> np.ndarray:
            kmeans.train(points, init_centroids=points[: case.k])
            distances: np.ndarray = kmeans.assign(points)[0]
            return distances

        seconds, distances = clocked(labelled)
        return Timing(fit, transform, seconds, float(distances.mean(dtype=np.float64)))

    return run


def clocked(function: Callable[[], T]) -> tuple[float, T]:
    """Seconds that a call takes, and its result."""
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


if __name__ == "__main__":
    main()
