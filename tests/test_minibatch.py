"""Mini-batch k-means against Lloyd's and a slow double, on files in the order of classes, within bounded memory."""

import subprocess
import sys

import numpy as np
import pytest
from host_runs import ENVIRONMENT
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from sklearn.metrics import normalized_mutual_info_score

from jaxclust.cluster import kmeans_faiss, minibatch
from jaxclust.errors import ConfigError, DataError
from jaxclust.features.rows import Rows


def held(rows, folder=None, memory=1 << 30):
    matrix = Rows(len(rows), rows.shape[1:], np.float32, memory, folder)
    matrix.append(rows)
    return matrix.finish()


def blobs(count=12, each=400, dim=8, seed=0):
    """Overlapping blobs, one after the other, and their numbers."""
    rng = np.random.default_rng(seed)
    truth = np.repeat(np.arange(count), each)
    return (3 * rng.normal(size=(count, dim))[truth] + rng.normal(size=(len(truth), dim))).astype(np.float32), truth


def digits():
    data = load_digits()
    order = np.argsort(data.target, kind="stable")
    return (data.data[order] / 16).astype(np.float32)


def run(rows, k, seed=0, *, passes=20, batch_rows=256, init="kmeans++"):
    return minibatch.minibatch(held(rows), k, seed, passes=passes, batch_rows=batch_rows, init=init)


@pytest.mark.wide
@pytest.mark.parametrize(
    "rows, k", [pytest.param(blobs()[0], 12, marks=pytest.mark.wide), (digits(), 10)], ids=["blobs", "digits"]
)
def test_from_equal_starts_it_is_near_lloyd_though_files_are_in_the_order_of_classes(rows, k):
    ratios = []
    for seed in range(5):
        lloyd = kmeans_faiss.kmeans(rows, k, seed, iterations=100).info["objective"][-1]
        ratios.append(run(rows, k, seed, init="rows").info["objective"][-1] / lloyd)
    assert np.mean(ratios) < 1.03, ratios


def test_it_finds_the_blobs():
    rows, truth = blobs()
    assert any(normalized_mutual_info_score(truth, run(rows, 12, seed).labels) > 0.95 for seed in range(3))


def test_a_pass_is_that_of_the_slow_double(monkeypatch):
    rows, k, seed = blobs(5, 60)[0], 5, 3
    found = run(rows, k, seed, passes=2, batch_rows=50, init="rows")
    runs = minibatch._runs(300, 50)
    rng = np.random.default_rng(seed)
    centroids = rows[np.random.default_rng([seed, 0]).choice(300, k, replace=False)].astype(np.float64)
    met, objective = np.zeros(k), []
    for _ in range(2):
        objective.append(0.0)
        for batch in minibatch._batches(runs, rng):
            assert runs.length == 1
            squared = ((rows[batch][:, None] - centroids[None]) ** 2).sum(-1)
            objective[-1] += squared.min(1).sum()
            for x, label in zip(rows[batch].astype(np.float64), squared.argmin(1), strict=True):  # Sculley's loop
                met[label] += 1
                centroids[label] = (1 - 1 / met[label]) * centroids[label] + x / met[label]
    assert (met > 0).all()
    np.testing.assert_allclose(found.centroids, centroids, atol=1e-5)
    np.testing.assert_allclose(found.info["objective"][:2], objective, rtol=1e-5)
    squared = ((rows[:, None] - found.centroids[None].astype(np.float64)) ** 2).sum(-1)
    np.testing.assert_array_equal(found.labels, squared.argmin(1))
    np.testing.assert_allclose(found.distances, squared.min(1), rtol=1e-4)
    assert found.info["objective"][-1] == pytest.approx(squared.min(1).sum(), rel=1e-5)


@settings(max_examples=30)
@given(st.integers(1, 2000), st.integers(1, 600), st.integers(0, 9))
def test_a_pass_takes_every_run_once_in_batches_of_about_the_wanted_size(size, batch_rows, seed):
    runs = minibatch._runs(size, batch_rows)
    rng = np.random.default_rng(seed)
    first, second = (list(minibatch._batches(runs, rng)) for _ in range(2))
    for batches in (first, second):
        np.testing.assert_array_equal(np.sort(np.concatenate(batches)), np.arange(runs.number))
        assert max(len(batch) for batch in batches) * runs.length <= max(batch_rows, runs.length)
    assert runs.length * (runs.number - 1) < size <= runs.length * runs.number


def test_a_batch_has_rows_of_many_places():
    runs = minibatch._runs(10**6, 65_536)
    assert runs.length == 64 and runs.batch == 1024
    batch = next(minibatch._batches(runs, np.random.default_rng(0)))
    in_tenths = np.bincount(batch * 10 // runs.number, minlength=10)
    assert in_tenths.min() > 60


@pytest.mark.parametrize("init", ["rows", "kmeans++"])
def test_it_is_deterministic_and_a_file_is_as_good_as_memory(tmp_path, init):
    rows, arguments = blobs()[0], {"passes": 3, "batch_rows": 512, "init": init}
    in_memory, on_disk = held(rows), held(rows, tmp_path, 0)
    assert in_memory.in_memory and not on_disk.in_memory
    first, second = (minibatch.minibatch(points, 12, 5, **arguments) for points in (in_memory, on_disk))
    for a, b in zip(first[:3], second[:3], strict=True):
        np.testing.assert_array_equal(a, b)
    assert first.info == second.info
    other = minibatch.minibatch(in_memory, 12, 6, **arguments)
    assert (other.centroids != first.centroids).any()


def test_a_centroid_that_gets_no_rows_is_drawn_anew(monkeypatch):
    rows = blobs()[0]
    first = rows[:12].copy()
    first[3] = 1000  # far from every row
    monkeypatch.setattr(minibatch, "_first", lambda *_: first)
    found = run(rows, 12, passes=8)
    assert sum(found.info["splits"]) >= 1 and found.info["empty"] == 0
    assert np.abs(found.centroids).max() < 30


def test_fewer_distinct_rows_than_clusters_end_well():
    rows = np.repeat(blobs(4, 1)[0], 50, axis=0)
    found = run(rows, 9, passes=4)
    assert np.isfinite(found.centroids).all() and found.info["empty"] == 9 - len(np.unique(found.labels))
    assert (found.labels.reshape(4, 50) == found.labels.reshape(4, 50)[:, :1]).all()


def test_bad_rows_and_too_many_clusters_are_refused():
    rows = blobs()[0]
    rows[4321, 0] = np.inf
    with pytest.raises(DataError, match="row 4321 "):
        run(rows, 12)
    with pytest.raises(ConfigError, match=r"cluster\.k=7 .* 6 rows"):
        run(blobs(6, 1)[0], 7)
    assert run(blobs(6, 1)[0], 6, batch_rows=1, passes=1).info["empty"] >= 0


MEMORY = """
import resource, sys
from pathlib import Path
import jax, numpy as np
from jaxclust.cluster import minibatch
from jaxclust.features.rows import Rows
size, points = int(sys.argv[2]), None
points = Rows(size, (64,), np.float32, 0, Path(sys.argv[1]))
rng = np.random.default_rng(0)
for start in range(0, size, 10_000):
    points.append(rng.standard_normal((10_000, 64), np.float32))
points.finish()
found = minibatch.minibatch(points, 8, 0, passes=1, batch_rows=8192, init="kmeans++")
assert len(found.labels) == size
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.wide
def test_memory_does_not_grow_with_the_points_but_with_labels_and_distances(tmp_path):
    def peak(size):
        command = [sys.executable, "-c", MEMORY, str(tmp_path), str(size)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True, env=ENVIRONMENT).stdout)

    small, large = 20_000, 1_000_000  # 5 MB and 256 MB of points
    assert peak(large) - peak(small) < 64e6
