"""Every k-means back end, found by walking the folder, against one contract and slow doubles."""

import importlib
import logging

import faiss
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import normalized_mutual_info_score

from jaxclust import cluster, plugins
from jaxclust.cluster import _faiss, _lloyd, _memory, _race, _sharded, kmeans_faiss, kmeans_jax
from jaxclust.config import base
from jaxclust.errors import ConfigError, DataError
from jaxclust.features.rows import Rows

BACKENDS = [name for name in plugins.names("jaxclust.cluster") if name.startswith("kmeans_")]
REPAIRS = ["split", "farthest"]


def module(name):
    return importlib.import_module(f"jaxclust.cluster.{name}")


@pytest.fixture(params=BACKENDS)
def backend(request):
    return module(request.param)


def blobs(seed=0, size=50):
    rng = np.random.default_rng(seed)
    centres = np.array([[0, 0, 0], [6, 0, 0], [0, 6, 0], [0, 0, 6]])
    truth = np.repeat(np.arange(4), size)
    return (centres[truth] + rng.normal(0, 0.3, (4 * size, 3))).astype(np.float32), truth


def noise(size=300, dim=6, seed=0):
    return np.random.default_rng(seed).normal(size=(size, dim)).astype(np.float32)


def points(rows):
    """Rows as a clustering gets them."""
    held = Rows(len(rows), rows.shape[1:], np.float32, 1 << 30, None)
    held.append(rows)
    return held.finish()


def duplicates():
    return np.repeat(noise(20, 4), 50, axis=0)


def slow_squared(rows, centroids):
    return ((rows[:, None].astype(np.float64) - centroids[None]) ** 2).sum(-1)


def slow_kmeans(rows, initial_ids, iterations):
    """Lloyd in float64; no empty clusters expected."""
    rows = rows.astype(np.float64)
    centroids = rows[initial_ids]
    for _ in range(iterations):
        labels = slow_squared(rows, centroids).argmin(1)
        centroids = np.stack([rows[labels == c].mean(0) for c in range(len(centroids))])
    return slow_squared(rows, centroids).argmin(1), centroids


def check_contract(found, rows, k):
    assert found.labels.dtype == np.int32 and found.labels.shape == (len(rows),)
    assert found.distances.dtype == np.float32 and found.distances.shape == (len(rows),)
    assert found.centroids.dtype == np.float32 and found.centroids.shape == (k, rows.shape[1])
    assert np.isfinite(found.centroids).all()
    squared = slow_squared(rows, found.centroids)
    own = squared[np.arange(len(rows)), found.labels]
    np.testing.assert_allclose(own, squared.min(1), atol=1e-4)
    np.testing.assert_allclose(found.distances, own, rtol=1e-4, atol=1e-4)
    info = found.info
    assert info["empty"] == k - len(np.unique(found.labels))
    assert info["iterations"] == len(info["splits"]) == len(info["objective"]) - 1
    np.testing.assert_allclose(info["objective"][-1], own.sum(), rtol=1e-4, atol=1e-4)


def test_both_back_ends_are_found():
    assert {"kmeans_faiss", "kmeans_jax"} <= set(BACKENDS)


@pytest.mark.parametrize("reseed_empty", REPAIRS)
@pytest.mark.parametrize(
    "rows, k",
    [(blobs()[0], 4), (noise(), 7), (noise(40), 1), (noise(12), 12), (duplicates(), 50)],
    ids=["blobs", "noise", "one cluster", "as many as rows", "duplicates"],
)
def test_contract(backend, rows, k, reseed_empty):
    before = rows.copy()
    found = backend.kmeans(rows, k, 3, reseed_empty=reseed_empty)
    check_contract(found, rows, k)
    np.testing.assert_array_equal(rows, before)
    again = backend.kmeans(rows, k, 3, reseed_empty=reseed_empty)
    for first, second in zip(found[:3], again[:3], strict=True):
        np.testing.assert_array_equal(first, second)
    assert found.info == again.info
    labels, squared = backend.assign(rows, found.centroids)
    np.testing.assert_array_equal(labels, found.labels)
    np.testing.assert_array_equal(squared, found.distances)


def test_the_best_of_five_seeds_finds_the_blobs(backend):
    rows, truth = blobs()
    scores = [normalized_mutual_info_score(truth, backend.kmeans(rows, 4, s).labels) for s in range(5)]
    assert max(scores) == pytest.approx(1)


def test_labels_are_those_of_the_slow_double(backend):
    rows = noise(400, 5)
    ids = np.random.default_rng(1).choice(400, 8, replace=False)
    found = backend.kmeans(rows, 8, 0, iterations=15, initial_ids=ids)
    labels, centroids = slow_kmeans(rows, ids, 15)
    np.testing.assert_array_equal(found.labels, labels)
    np.testing.assert_allclose(found.centroids, centroids, atol=1e-5)


def test_labels_and_objective_are_those_of_faiss_itself(backend):
    rows = noise(2000, 8)
    ids = np.random.default_rng(1).choice(2000, 10, replace=False)
    theirs = faiss.Kmeans(8, 10, niter=10, max_points_per_centroid=10**7)
    theirs.train(rows, init_centroids=rows[ids])
    ours = backend.kmeans(rows, 10, 0, iterations=10, initial_ids=ids)
    assert (theirs.index.search(rows, 1)[1][:, 0] == ours.labels).mean() > 0.999
    np.testing.assert_allclose(ours.info["objective"][:10], theirs.obj, rtol=1e-4)


@pytest.mark.parametrize("rows", [noise(1000, 8), duplicates()], ids=["noise", "duplicates"])
def test_back_ends_agree_from_equal_initial_ids(rows):
    found = [module(name).kmeans(rows, 30, 5).info["objective"] for name in BACKENDS]
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5, abs=1e-3)
    assert found[0][-1] == pytest.approx(found[1][-1], rel=0.01, abs=1e-3)


def test_the_objective_never_rises_where_nothing_is_split(backend):
    info = backend.kmeans(noise(500), 12, 0).info
    steps = np.diff(info["objective"])
    calm = np.array(info["splits"]) == 0
    assert calm.any()
    assert (steps[calm] <= 1e-5 * info["objective"][0]).all()


def test_it_stops_at_a_fixed_point_with_the_result_of_all_iterations(backend):
    rows = blobs()[0]
    found = backend.kmeans(rows, 4, 0, iterations=300)
    assert found.info["iterations"] < 300
    more = backend.kmeans(rows, 4, 0, iterations=found.info["iterations"])
    np.testing.assert_array_equal(found.centroids, more.centroids)


def test_restarts_keep_the_lowest_objective(backend):
    rows = blobs()[0]
    single = [
        backend.kmeans(rows, 4, 0, initial_ids=_lloyd.draw_initial_ids(len(rows), 4, 0, run)).info["objective"][-1]
        for run in range(6)
    ]
    assert max(single) > min(single)  # so that there is something to choose
    best = backend.kmeans(rows, 4, 0, runs=6)
    assert best.info["objective"][-1] == min(single)


@settings(max_examples=10)
@given(st.permutations(range(60)), st.sampled_from(BACKENDS))
def test_permuting_the_rows_permutes_the_labels(order, name):
    rows, order = noise(60, 4), np.array(order)
    ids = np.arange(5) * 7
    plain = module(name).kmeans(rows, 5, 0, initial_ids=ids)
    moved = module(name).kmeans(rows[order], 5, 0, initial_ids=np.argsort(order)[ids])
    np.testing.assert_array_equal(moved.labels, plain.labels[order])


@settings(max_examples=25)
@given(st.integers(2, 40), st.integers(1, 9), st.integers(0, 99), st.sampled_from(BACKENDS))
def test_contract_on_random_rows_with_ties(size, k, seed, name):
    rows = np.random.default_rng(seed).integers(0, 3, (size, 2)).astype(np.float32)
    if k <= size:
        check_contract(module(name).kmeans(rows, k, seed, iterations=5), rows, k)


def test_fewer_distinct_points_than_clusters_leaves_some_empty(backend):
    rows = duplicates()
    found = backend.kmeans(rows, 50, 0)
    assert found.info["empty"] > 0
    assert found.info["splits"][0] > 0
    points = found.labels.reshape(20, 50)
    assert (points == points[:, :1]).all()  # equal rows stay together


@pytest.mark.parametrize("reseed_empty", REPAIRS)
def test_an_empty_cluster_is_repaired(backend, reseed_empty):
    rows = np.concatenate([blobs()[0], np.full((2, 3), 6, np.float32)])
    ids = np.array([200, 201, 0, 50])  # two equal starts: the second of them gets no row
    found = backend.kmeans(rows, 4, 0, initial_ids=ids, reseed_empty=reseed_empty)
    assert found.info["splits"][0] == 1
    assert found.info["empty"] == 0


@given(st.lists(st.integers(0, 6), min_size=2, max_size=12))
def test_split_conserves_counts_and_nudges_in_alternation(sizes):
    counts = np.array(sizes)
    if counts.sum() < len(counts):
        return
    centroids = noise(len(counts), 5)
    after, shared = _lloyd.split(centroids, counts, None, None)
    assert shared.sum() == counts.sum() and (shared > 0).all()
    empty = np.flatnonzero(counts == 0)
    if len(empty) == 1:
        (changed,) = np.flatnonzero((after != centroids).any(axis=1) & (counts > 0))
        assert shared[empty[0]] == counts[changed] // 2
        signs = np.array([1, -1, 1, -1, 1]) / 1024
        np.testing.assert_allclose(after[empty[0]], centroids[changed] * (1 + signs), rtol=1e-6)
        np.testing.assert_allclose(after[changed], centroids[changed] * (1 - signs), rtol=1e-6)


def test_split_prefers_large_donors():
    counts = np.array([1, 1, 1000, 1, 0])
    _, shared = _lloyd.split(noise(5), counts, None, None)
    np.testing.assert_array_equal(shared, [1, 1, 500, 1, 500])


def test_farthest_takes_distinct_rows_in_order_of_distance():
    rows, distances = noise(6), np.array([0, 5, 1, 9, 5, 2], np.float32)
    engine = _lloyd.Engine(6, None, None, lambda ids: rows[ids], None, lambda values: values)
    found = _lloyd.Found(0.0, None, None, lambda: (None, distances))
    after, counts = _lloyd.farthest(noise(4, seed=1), np.array([0, 6, 0, 0]), engine, found)
    np.testing.assert_array_equal(after[[0, 2, 3]], rows[[3, 1, 4]])
    assert (counts > 0).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
def test_bad_rows_are_named(backend, value):
    rows = noise(30)
    rows[[17, 21], 2] = value
    with pytest.raises(DataError, match=r"row 17 .*2 such rows of 30"):
        backend.kmeans(rows, 3, 0)
    with pytest.raises(DataError, match="row 17 "):
        backend.assign(rows, noise(3))


def test_impossible_settings_name_field_and_values(backend):
    with pytest.raises(ConfigError, match=r"cluster\.k=31 .* 30 rows"):
        backend.kmeans(noise(30), 31, 0)
    with pytest.raises(ConfigError, match=r"cluster\.k=0"):
        backend.kmeans(noise(30), 0, 0)
    with pytest.raises(ConfigError, match=r"cluster\.runs=0"):
        backend.kmeans(noise(30), 3, 0, runs=0)
    with pytest.raises(ConfigError, match=r"reseed_empty='random' .*split, farthest"):
        backend.kmeans(noise(30), 3, 0, reseed_empty="random")
    with pytest.raises(ConfigError, match=r"cluster\.init='random' .*rows, kmeans\+\+"):
        backend.kmeans(noise(30), 3, 0, init="random")
    with pytest.raises(ValueError, match="initial_ids"):
        backend.kmeans(noise(30), 3, 0, initial_ids=np.arange(4))


def test_few_rows_for_each_cluster_are_mentioned_by_the_training_alone(backend, caplog):
    cluster.warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        backend.kmeans(noise(77), 2, 0)
    assert not [r.message for r in caplog.records if "cluster.k" in r.message]


def test_jax_works_in_chunks_that_do_not_divide_the_rows(monkeypatch):
    rows = noise(101)
    whole = kmeans_jax.kmeans(rows, 6, 0)
    monkeypatch.setattr(_sharded, "_DISTANCES", 30)  # 3 pieces of 5 rows on each of 8 devices, the last ones empty
    assert _sharded.place(rows, np.arange(101), 6, 101).ids.shape == (24, 5)
    pieces = kmeans_jax.kmeans(rows, 6, 0)
    np.testing.assert_array_equal(pieces.labels, whole.labels)
    np.testing.assert_allclose(pieces.centroids, whole.centroids, atol=1e-5)


def test_faiss_sums_in_chunks(monkeypatch):
    rows, labels = noise(101), np.arange(101) % 6
    monkeypatch.setattr(kmeans_faiss, "_CHUNK", 16)
    slow = np.stack([rows[labels == c].astype(np.float64).sum(0) for c in range(7)])
    np.testing.assert_allclose(kmeans_faiss._sums(rows, labels, 7), slow, atol=1e-5)


def test_sums_of_the_accelerator_branch_equal_those_of_the_cpu():
    rows, labels = noise(30), np.arange(30) % 6
    jaxpr = str(jax.make_jaxpr(lambda *args: _sharded._members(*args, 6))(rows, labels))
    assert "dot_general" in jaxpr and "scatter" in jaxpr
    labels[7] = 6  # of no cluster
    slow = np.stack([rows[labels == c].sum(0) for c in range(6)])
    for members in (_sharded._scatter, _sharded._product):
        counts, sums = members(rows, labels, 6)
        np.testing.assert_array_equal(counts, [5, 4, 5, 5, 5, 5])
        np.testing.assert_allclose(sums, slow, atol=1e-5)


def test_jax_compiles_once_for_a_shape():
    kmeans_jax.kmeans(noise(211), 9, 0)
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None
    )
    kmeans_jax.kmeans(noise(211, seed=1), 9, 7, iterations=11, runs=2, reseed_empty="farthest")
    assert compiled == []
    kmeans_jax.kmeans(noise(216), 9, 0)  # as many for each of 8 devices
    assert compiled == []
    kmeans_jax.kmeans(noise(217), 9, 0)
    assert len(compiled) == 2  # a search that adds up, and the last one


def test_get_lists_the_clusterings_and_nothing_else():
    config = base()
    config.cluster.method = "pick"
    with pytest.raises(ConfigError, match=r"config\.cluster\.method='pick'") as error:
        cluster.get(config)
    assert "did you mean 'pic'" in str(error.value)
    assert str(error.value).endswith("There is: kmeans_faiss, kmeans_jax, minibatch, pic, spherical.")


@pytest.mark.parametrize("name", ["faiss", "jax"])
def test_the_settings_reach_k_means(name, monkeypatch):
    config = base()
    wanted = {"iterations": 3, "runs": 2, "init": "kmeans++", "reseed_empty": "farthest"}
    config.cluster.update({"backend": name, "k": 4, **wanted})
    rows, ran = noise(), []
    kmeans = module(f"kmeans_{name}").kmeans
    expected = kmeans(rows, 4, 7, **wanted)
    monkeypatch.setattr(module(f"kmeans_{name}"), "kmeans", lambda *a, **kw: ran.append(kw) or kmeans(*a, **kw))
    found = cluster.get(config, nearest=3)(points(rows), 7)
    np.testing.assert_array_equal(found.labels, expected.labels)
    assert found.info == expected.info
    assert ran == [wanted | {"nearest": 3}] and found.nearest.ids.shape == (len(rows), 3)
    assert cluster.asked(config.cluster) == 4


@pytest.mark.parametrize("method", ["kmeans", "minibatch", "pic"])
@pytest.mark.parametrize("name", ["faiss", "jax"])
def test_every_clustering_keeps_one_contract(method, name):
    config = base()
    config.cluster.update({"method": method, "backend": name, "k": 4})
    clustering = cluster.get(config)
    rows = np.concatenate([blobs()[0], duplicates()[:60, :3]])
    before = rows.copy()
    found = clustering(points(rows), 3)
    np.testing.assert_array_equal(rows, before)
    assert found.labels.dtype == np.int32 and found.labels.shape == (len(rows),)
    assert found.centroids.dtype == np.float32 and found.centroids.shape == (found.labels.max() + 1, 3)
    assert found.distances.dtype == np.float32
    own = ((rows - found.centroids[found.labels].astype(np.float64)) ** 2).sum(1)
    np.testing.assert_allclose(found.distances, own, rtol=1e-4, atol=1e-6)
    assert found.info["iterations"] >= 1 and found.info["empty"] == 0 and "splits" in found.info
    assert np.isfinite(found.info["objective"][-1])
    for first, second in zip(found[:3], clustering(points(rows), 3)[:3], strict=True):
        np.testing.assert_array_equal(first, second)
    rows[17, 0] = np.inf
    with pytest.raises(DataError, match="row 17 "):
        clustering(points(rows), 3)


def test_a_small_search_leaves_a_later_large_one_its_threads(monkeypatch):
    counts = []
    monkeypatch.setattr(faiss, "omp_get_max_threads", lambda: counts[-1] if counts else 8)
    monkeypatch.setattr(faiss, "omp_set_num_threads", counts.append)
    _faiss._threads.cache_clear()
    try:
        for small in (1 << 60, 0, 1 << 60, 0):
            monkeypatch.setattr(_faiss, "_SMALL", small)
            _faiss.search(noise(5), noise(9), 2)
    finally:
        _faiss._threads.cache_clear()
    assert counts == [1, 8, 1, 8]


@pytest.mark.parametrize(
    "name, installed, importable, expected",
    [
        ("auto", ["numpy", "faiss-cpu"], True, "faiss"),
        ("auto", ["faiss_gpu_cu12"], True, "faiss"),
        ("auto", ["faiss-cpu", "Faiss_CPU"], True, "faiss"),  # one wheel, listed twice
        ("auto", [], True, "faiss"),  # built from source
        ("auto", ["numpy"], False, "jax"),
        ("faiss", ["faiss"], True, "faiss"),
        ("jax", ["faiss-cpu", "faiss-gpu"], True, "jax"),
    ],
)
def test_choice_of_the_back_end(name, installed, importable, expected):
    assert cluster.choose_backend(name, installed, importable) == expected


@pytest.mark.parametrize("other", ["faiss-gpu", "faiss-gpu-cu12", "faiss_gpu_cu11", "faiss"])
@pytest.mark.parametrize("name", ["auto", "faiss"])
def test_two_faiss_wheels_are_refused_with_the_command_that_helps(name, other):
    with pytest.raises(ConfigError, match="pip uninstall -y faiss") as error:
        cluster.choose_backend(name, ["numpy", "faiss-cpu", other], True)
    assert other.replace("_", "-") in str(error.value) and "faiss-cpu" in str(error.value)


def test_a_missing_faiss_is_an_error_or_mentioned_once(caplog):
    with pytest.raises(ConfigError, match=r"jaxclust\[cpu\].*faiss-cpu.*jaxclust\[cuda12\].*faiss-gpu"):
        cluster.choose_backend("faiss", [], False)
    cluster.warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        cluster.choose_backend("auto", [], False)
        cluster.choose_backend("auto", [], False)
    assert sum("faiss is not installed" in r.message for r in caplog.records) == 1
    with pytest.raises(ConfigError, match="auto, faiss, jax"):
        cluster.choose_backend("scikit", [], True)


def test_this_machine_has_a_back_end():
    assert cluster.backend("auto") in ("faiss", "jax")


def test_jax_stays_in_float32_where_float64_is_on():
    rows = noise(120)
    plain = kmeans_jax.kmeans(rows, 5, 0)
    with jax.enable_x64(True):
        wide = kmeans_jax.kmeans(rows.astype(np.float64), 5, 0)
    check_contract(wide, rows, 5)
    np.testing.assert_array_equal(wide.labels, plain.labels)


# k-means++


@settings(max_examples=15)
@given(st.integers(2, 200), st.integers(1, 9), st.integers(0, 99))
def test_both_back_ends_draw_the_same_rows_for_a_seed(size, k, seed):
    rows, k = noise(size, 5, seed), min(k, size)
    keys = _race.keys(k, seed, 0)
    first, second = (module(name).engine(rows, k).spread(keys) for name in BACKENDS)
    np.testing.assert_array_equal(first, second)
    assert len(np.unique(first, axis=0)) == k


def test_rows_are_drawn_in_proportion_to_their_squared_distance():
    rows = np.array([[0], [1], [3], [3.5], [10]], np.float32)
    counts, draws = np.zeros((5, 5)), 6000
    for seed in range(draws):
        first, second = kmeans_faiss._spread(rows, _race.keys(2, seed, 0))[:, 0]
        counts[rows[:, 0] == first, rows[:, 0] == second] += 1
    squared = (rows - rows.T).astype(np.float64) ** 2
    expected = draws / 5 * squared / squared.sum(1, keepdims=True)
    assert (counts[expected == 0] == 0).all()
    chi2 = ((counts - expected) ** 2)[expected > 0] / expected[expected > 0]
    assert chi2.sum() < 45  # 19 degrees of freedom: one in a thousand is above 43.8


def test_waiting_times_are_exponential_and_those_of_jax_are_those_of_numpy():
    ids = np.arange(200_000, dtype=np.uint32)
    alone = np.full(len(ids), np.inf, np.float32)
    keys = _race.keys(2, 0, 0)
    waits = np.stack([_race.arrivals(np, ids, key, alone) for key in keys])
    for quantile in (1e-4, 0.1, 0.5, 0.9):
        assert (waits < -np.log1p(-quantile)).mean() == pytest.approx(quantile, rel=4 / np.sqrt(quantile * 4e5))
    assert abs(np.corrcoef(waits)[0, 1]) < 0.01 and abs(np.corrcoef(waits[0, 1:], waits[0, :-1])[0, 1]) < 0.01
    np.testing.assert_allclose(_race.arrivals(jax.numpy, ids, keys[0], alone), waits[0], rtol=1e-6)
    assert np.isinf(_race.arrivals(np, ids[:2], keys[0], np.array([-1, 1], np.float32))).tolist() == [True, False]


def test_distinct_rows_come_before_equal_ones_and_no_row_comes_twice(backend):
    rows = duplicates()
    engine = backend.engine(rows, 25)
    chosen = engine.spread(_race.keys(25, 0, 0))
    assert len(np.unique(chosen[:20], axis=0)) == 20
    few = backend.engine(rows[:4], 4).spread(_race.keys(4, 0, 0))
    np.testing.assert_array_equal(few, rows[:4])


def test_starts_far_from_each_other_are_better_than_any(backend):
    rows = blobs(size=200)[0]
    plus, plain = (
        np.mean([backend.kmeans(rows, 4, seed, init=init).info["objective"][0] for seed in range(8)])
        for init in ("kmeans++", "rows")
    )
    assert plus < 0.6 * plain


# Large sums, and memory


def test_float32_sums_stay_accurate_for_many_rows():
    rows = (1 + 0.01 * noise(1_000_000, 2)).astype(np.float32)
    found = kmeans_jax.engine(rows, 2).search(np.array([[0.5, 0.5], [-9, -9]], np.float32))
    np.testing.assert_array_equal(found.counts, [1_000_000, 0])
    np.testing.assert_allclose(found.sums[0], rows.sum(0, dtype=np.float64), rtol=1e-5)
    slow = ((rows.astype(np.float64) - 0.5) ** 2).sum()
    assert found.objective == pytest.approx(slow, rel=1e-6)


def tree(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


MEMINFO = {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable: 4000 kB\n"}


@pytest.mark.parametrize(
    "files, free",
    [
        ({}, 4000 * 1024),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/memory.max": "max\n"}, 4000 * 1024),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/b/memory.max": "max\n",
                "sys/fs/cgroup/a/b/memory.current": "5\n",
                "sys/fs/cgroup/a/memory.max": "100000\n",
                "sys/fs/cgroup/a/memory.current": "70000\n",
                "sys/fs/cgroup/a/memory.stat": "anon 3\ninactive_file 20000\n",
            },
            50_000,
        ),
        (
            {
                "proc/self/cgroup": "5:cpu:/x\n4:memory:/docker/77\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "90000\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "95000\n",
            },
            0,
        ),
    ],
    ids=["no groups", "no limit", "version 2, limit of the parent", "version 1, mounted as root"],
)
def test_available_memory_is_the_least_of_machine_and_groups(tmp_path, files, free):
    assert _memory.available(tree(tmp_path, {**MEMINFO, **files})) == free


def test_memory_that_is_not_known_is_no_obstacle(tmp_path, monkeypatch):
    assert _memory.available(tmp_path) is None
    monkeypatch.setattr(_memory, "available", lambda: None)
    _memory.require(10**15, "it")


@pytest.mark.parametrize("method", ["kmeans", "pic"])
def test_what_cannot_fit_on_one_host_is_refused_before_it_begins(monkeypatch, method):
    config = base()
    config.cluster.update({"method": method, "backend": "faiss", "k": 4})
    rows = points(noise(300))
    monkeypatch.setattr(_memory, "available", lambda: 5000)
    wanted = r"of 300 points with 6 columns needs about .* GB .* 0\.0 GB are available.*pca_dim.*backend=jax.*minibatch"
    with pytest.raises(ConfigError, match=wanted):
        cluster.get(config)(rows, 0)
