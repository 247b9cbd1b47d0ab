"""k-means: both back ends of jaxclust against each other, faiss and scikit-learn.

All start from the same rows, run the same number of Lloyd iterations on all points and assign once more at the end, so
their objectives, computed anew in float64, may differ by rounding and by the repair of empty clusters alone. A run of
one iteration warms up, and compiles what is compiled. The plot shows time against the number of points.
"""

import importlib
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks import results, sides
from jaxclust import config as config_lib


class Case(NamedTuple):
    """How many rows of which length are clustered, and how."""

    size: int
    dim: int
    k: int
    iterations: int


Fit = Callable[[np.ndarray, Case], np.ndarray]
"""(rows, case) -> centroids after `iterations` from the first k rows."""

CASE, SIZES = Case(50_000, 256, 1000, 20), (5_000, 10_000, 20_000, 50_000, 100_000)
QUICK, QUICK_SIZES = Case(400, 16, 10, 3), (200, 400)


def main() -> None:
    """Measures, draws and writes the section."""
    parser = results.arguments(__doc__)
    parser.add_argument("--turns", type=int, default=3, help="turns of each side")
    options = results.parse(parser)
    case, sizes, turns = (QUICK, QUICK_SIZES, 1) if options.quick else (CASE, SIZES, options.turns)
    with sides.sides({name: (side, fit) for name, fit in FITS.items()}) as asks:
        by_size = {size: measure(asks, case._replace(size=size), turns) for size in sizes}
    figure = options.results.with_name("kmeans.png")
    plot(figure, case, by_size)
    text = f"{describe(case, by_size[case.size])}\n\n![Time against the number of points]({figure.name})"
    results.publish(options, "k-means", "python -m benchmarks.kmeans", text)


def measure(asks: Mapping[str, sides.Ask], case: Case, turns: int) -> dict[str, list[sides.Answer]]:
    """(seconds, objective) of every side and turn."""
    print(f"{case.size:,} points …", flush=True)
    sides.take_turns(asks, 1, case._replace(iterations=1))
    return sides.take_turns(asks, turns, case)


def describe(case: Case, answers: Mapping[str, Sequence[sides.Answer]]) -> str:
    """The table of one case."""
    seconds = {name: [answer.value[0] for answer in of_side] for name, of_side in answers.items()}
    objectives = {name: of_side[-1].value[1] for name, of_side in answers.items()}
    rows = [
        [
            name,
            results.spread(times),
            *(results.ratio(seconds[peer], times) for peer in PEERS),
            f"{objectives[name] / objectives[PEERS[0]]:.5f}",
            results.gigabytes(answers[name][-1].peak),
        ]
        for name, times in seconds.items()
    ]
    head = ("", "seconds", *(f"speed / {peer}" for peer in PEERS), f"objective / {PEERS[0]}", "peak memory")
    title = f"{case.size:,} x {case.dim}, k = {case.k:,}, {case.iterations} iterations, {len(rows)} sides"
    return f"{title}.\n\n{results.table(head, rows)}"


def plot(path: Path, case: Case, by_size: Mapping[int, Mapping[str, Sequence[sides.Answer]]]) -> None:
    """Seconds against the number of points, both on logarithmic axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for name in FITS:
        spreads = [results.spread(answer.value[0] for answer in answers[name]) for answers in by_size.values()]
        axes.plot(list(by_size), [s.median for s in spreads], marker="o", markersize=4, label=name)
    axes.set(xscale="log", yscale="log", xlabel="points", ylabel="seconds")
    axes.set_title(f"{case.iterations} iterations of k-means, {case.dim} dimensions, k = {case.k:,}", fontsize=10)
    axes.set_xticks(list(by_size), [f"{size:,}" for size in by_size])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def side(fit: Fit) -> Callable[[Case], tuple[float, float]]:
    """Answers a case with (seconds, objective)."""

    def run(case: Case) -> tuple[float, float]:
        rows = blobs(case)
        start = time.perf_counter()
        centroids = fit(rows, case)
        seconds = time.perf_counter() - start
        return seconds, objective(rows, centroids)

    return run


def blobs(case: Case) -> np.ndarray:
    """Unit rows of overlapping clusters, twice as many as are looked for: float32 [size, dim]."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((2 * case.k, case.dim), np.float32)
    rows = centres[rng.integers(0, len(centres), case.size)]
    rows += 1.5 * rng.standard_normal(rows.shape, np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def objective(rows: np.ndarray, centroids: np.ndarray) -> float:
    """Sum of squared distances to the nearest centroid, in float64."""
    c = centroids.astype(np.float64)
    squares = np.square(c).sum(axis=1)
    chunks = (rows[start : start + 4096].astype(np.float64) for start in range(0, len(rows), 4096))
    return float(sum(np.square(x).sum() + (squares - 2 * x @ c.T).min(axis=1).sum() for x in chunks))


def ours(backend: str, rows: np.ndarray, case: Case) -> np.ndarray:
    """A back end of jaxclust."""
    from jaxclust import runtime

    runtime.start(config_lib.base())
    kmeans = importlib.import_module(f"jaxclust.cluster.kmeans_{backend}").kmeans
    found = kmeans(rows, case.k, 0, iterations=case.iterations, initial_ids=np.arange(case.k))
    centroids: np.ndarray = found.centroids
    return centroids


def fit_faiss(rows: np.ndarray, case: Case) -> np.ndarray:
    """faiss.Kmeans on all points."""
    import faiss

    kmeans = faiss.Kmeans(case.dim, case.k, niter=case.iterations, max_points_per_centroid=len(rows))
    kmeans.train(rows, init_centroids=rows[: case.k])
    kmeans.assign(rows)
    centroids: np.ndarray = kmeans.centroids
    return centroids


def fit_sklearn(rows: np.ndarray, case: Case) -> np.ndarray:
    """scikit-learn's Lloyd."""
    from sklearn.cluster import KMeans

    start = rows[: case.k]
    kmeans = KMeans(case.k, init=start, n_init=1, max_iter=case.iterations, tol=0, algorithm="lloyd").fit(rows)
    centroids: np.ndarray = kmeans.cluster_centers_
    return centroids


PEERS = ("faiss.Kmeans", "sklearn.cluster.KMeans")
FITS: dict[str, Fit] = {
    PEERS[0]: fit_faiss,
    PEERS[1]: fit_sklearn,
    "kmeans_faiss": partial(ours, "faiss"),
    "kmeans_jax": partial(ours, "jax"),
}


if __name__ == "__main__":
    main()
