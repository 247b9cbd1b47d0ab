"""Power iteration clustering and its neighbour search against slow doubles, plain loops written from the formulas."""

from decimal import Decimal, getcontext

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from sklearn.metrics import normalized_mutual_info_score

from jaxclust import cluster
from jaxclust.cluster import neighbours as knn
from jaxclust.cluster import pic as module
from jaxclust.config import base
from jaxclust.errors import ConfigError, DataError
from jaxclust.evaluation.clustering import purity
from jaxclust.features.rows import Rows

BACKENDS = ["faiss", "jax"]
DEFAULTS = dict(neighbours=5, sigma=0.2, alpha=0.001, iterations=200, merge_singletons=True, backend="faiss")


def pic(rows, **changes):
    return module.pic(rows, 0, **{**DEFAULTS, **changes})


def blobs(seed=0):
    """The three blobs of the specification's check 10, float64."""
    truth = np.repeat(np.arange(3), 60)
    centres = np.array([[0, 0], [3, 0], [0, 3]])
    return centres[truth] + np.random.default_rng(seed).normal(0, 0.1, (180, 2)), truth


def noise(size, dim=2, seed=0):
    return np.random.default_rng(seed).uniform(size=(size, dim)).astype(np.float32)


def slow_neighbours(rows, num):
    rows = rows.astype(np.float64)
    squared = ((rows[:, None] - rows[None]) ** 2).sum(-1)
    np.fill_diagonal(squared, np.inf)
    ids = np.argsort(squared, axis=1, kind="stable")[:, :num]
    return ids, np.take_along_axis(squared, ids, axis=1)


def slow_pic(rows, num, sigma, alpha, iterations, merge):
    """Every formula as it is written, with 60 digits, so that nothing has to be arranged against rounding."""
    getcontext().prec = 60
    points = [[Decimal(float(x)) for x in row] for row in rows]
    size, sigma, alpha = len(points), Decimal(sigma), Decimal(alpha)
    squared = [[sum((a - b) ** 2 for a, b in zip(p, q, strict=True)) for q in points] for p in points]
    near = [sorted((j for j in range(size) if j != i), key=lambda j: (squared[i][j], j))[:num] for i in range(size)]
    w = [[Decimal(0)] * size for _ in range(size)]
    for i in range(size):
        for j in near[i]:
            weight = (-squared[i][j] / sigma**2).exp()
            w[i][j] += weight
            w[j][i] += weight
    edges = [[j for j in range(size) if w[i][j] > 0] for i in range(size)]
    v = [1 / Decimal(size)] * size
    for _ in range(iterations):
        v = [alpha * sum(w[j][i] * v[j] for j in edges[i]) + (1 - alpha) / size for i in range(size)]
        total = sum(v)
        v = [x / total for x in v]
    roots = []
    for start in range(size):
        i = start
        while True:
            best, gain = i, Decimal(0)
            for j in edges[i]:
                if w[i][j] * (v[j] - v[i]) > gain:
                    best, gain = j, w[i][j] * (v[j] - v[i])
            if best == i:
                break
            i = best
        roots.append(i)
    before = list(roots)
    for i in range(size):
        if merge and before.count(before[i]) == 1:
            roots[i] = next((before[j] for j in near[i] if before.count(before[j]) > 1), roots[i])
    return [sorted(set(roots)).index(root) for root in roots]


# Neighbours


@settings(max_examples=40)
@given(st.data(), st.sampled_from(BACKENDS))
def test_neighbours_are_those_of_brute_force_with_ties_by_id(data, backend):
    size = data.draw(st.integers(2, 60))
    num = data.draw(st.integers(1, size - 1))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    kind = data.draw(st.sampled_from(["distinct", "few distinct", "grid"]))
    if kind == "grid":
        rows = rng.integers(-2, 3, (size, 2)).astype(np.float32)
    else:
        rows = rng.normal(size=(size if kind == "distinct" else 4, 7)).astype(np.float32)
        rows = rows[rng.integers(0, len(rows), size)] if kind == "few distinct" else rows
    ids, squared = knn.neighbours(rows, num, backend)
    slow_ids, slow_squared = slow_neighbours(rows, num)
    np.testing.assert_array_equal(ids, slow_ids)
    np.testing.assert_allclose(squared, slow_squared, rtol=1e-12)
    assert ids.dtype == np.int32 and squared.dtype == np.float64
    assert (ids != np.arange(size)[:, None]).all()
    assert (np.diff(np.sort(ids, axis=1)) > 0).all()
    assert (np.diff(squared) >= 0).all()
    assert (squared[(rows[ids] == rows[:, None]).all(-1)] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_rows_find_each_other_where_float32_cannot_tell_rows_apart(backend):
    rows = np.tile(1e4 + noise(200, 3), (2, 1))  # the norms' rounding is far above the distances
    ids, squared = knn.neighbours(rows, 1, backend)
    np.testing.assert_array_equal(ids[:, 0], (np.arange(400) + 200) % 400)
    assert (squared == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_order_is_that_of_float64_where_float32_swaps_near_rows(backend):
    rows = 30 + noise(300, 3, seed=1)  # a float32 search alone swaps some 20 of the neighbours
    np.testing.assert_array_equal(knn.neighbours(rows, 3, backend).ids, slow_neighbours(rows, 3)[0])


def test_zero_and_minus_zero_are_equal():
    rows = np.array([[0.0], [1.0], [-0.0]], np.float32)
    assert knn.group_equal(rows, 5).members.tolist() == [[0, 2], [1, -1]]


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.integers(1, 6))
def test_groups_of_equal_rows_list_their_lowest_ids(values, limit):
    rows = np.array(values, np.float32)[:, None]
    distinct = knn.group_equal(rows, limit)
    np.testing.assert_array_equal(distinct.rows[distinct.group], rows)
    assert [list(row[row >= 0]) for row in distinct.members] == [
        [i for i, v in enumerate(values) if v == value][:limit] for value in dict.fromkeys(values)
    ]


@pytest.mark.parametrize("backend", BACKENDS)
def test_small_chunks_change_nothing_and_bound_what_is_held(monkeypatch, backend):
    rows = noise(101, 20)[np.r_[:101, 4, 4, 7]]
    whole = knn.neighbours(rows, 6, backend)
    shapes = []

    def spy(distinct):
        search = knn_backends[backend](distinct)
        return lambda x, num: shapes.append((len(x), len(distinct), num)) or search(x, num)

    knn_backends = dict(knn._BACKENDS)
    monkeypatch.setitem(knn._BACKENDS, backend, spy)
    for numbers in (1, 1000, 3000):
        shapes.clear()
        monkeypatch.setattr(knn, "_NUMBERS", numbers)
        pieces = knn.neighbours(rows, 6, backend)
        np.testing.assert_array_equal(pieces.ids, whole.ids)
        np.testing.assert_array_equal(pieces.distances, whole.distances)
        assert len(set(shapes)) == 1 and len(shapes) == -(-104 // shapes[0][0])
        assert shapes[0][0] == 1 or shapes[0][0] * max(101, shapes[0][2] * 20) <= numbers


def test_jax_compiles_once_for_a_number_of_rows():
    knn.neighbours(noise(97, 3), 4, "jax")
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None
    )
    knn.neighbours(noise(97, 3, seed=1), 4, "jax")
    assert compiled == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_too_few_images_for_the_neighbours_is_an_error_naming_both(backend):
    with pytest.raises(ConfigError, match=r"config\.cluster\.pic\.neighbours=5 needs at least 6 images; there are 5"):
        pic(noise(5), backend=backend)
    assert len(pic(noise(6), backend=backend).labels) == 6
    with pytest.raises(ConfigError, match=r"config\.knn\.k=7 .* there are 7"):
        knn.neighbours(noise(7), 7, backend, field="config.knn.k")


def test_rows_that_are_not_finite_are_named():
    rows = noise(30)
    rows[17, 1] = np.nan
    with pytest.raises(DataError, match="row 17 "):
        pic(rows)


# The clustering


@settings(max_examples=60)
@given(st.data())
def test_labels_are_those_of_the_slow_double(data):
    size = data.draw(st.integers(2, 24))
    args = (
        data.draw(st.integers(1, min(size - 1, 6))),
        data.draw(st.sampled_from([0.2, 0.5, 2.0])),
        data.draw(st.sampled_from([0.001, 0.1, 0.9, 1.0])),
        data.draw(st.sampled_from([1, 2, 40])),
        data.draw(st.booleans()),
    )
    rows = noise(size, seed=data.draw(st.integers(0, 999)))
    found = module.pic(rows, 3, **dict(zip(DEFAULTS, (*args, data.draw(st.sampled_from(BACKENDS))), strict=True)))
    assert found.labels.tolist() == slow_pic(rows, *args)


def test_the_slow_double_agrees_at_the_default_parameters():
    rows = blobs()[0][::3].astype(np.float32)
    assert pic(rows).labels.tolist() == slow_pic(rows, 5, 0.2, 0.001, 200, True)
    assert pic(rows, alpha=0.9, neighbours=7).labels.tolist() == slow_pic(rows, 7, 0.2, 0.9, 200, True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", range(3))
def test_three_blobs_are_cut_into_pure_pieces_by_the_defaults(seed, backend):
    rows, truth = blobs(seed)
    found = pic(rows.astype(np.float32), backend=backend)
    assert purity(found.labels, truth) == 1
    assert found.info["components"] == 3
    assert 8 <= found.labels.max() + 1 <= 30


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", range(3))
def test_three_blobs_are_found_with_more_neighbours_and_a_larger_alpha(seed, backend):
    rows, truth = blobs(seed)
    found = pic(rows.astype(np.float32), neighbours=15, alpha=0.9, backend=backend)
    assert found.labels.max() + 1 == 3
    assert normalized_mutual_info_score(truth, found.labels) == pytest.approx(1)


@pytest.mark.parametrize("changes", [{}, {"neighbours": 15, "alpha": 0.9}], ids=["defaults", "three"])
def test_rows_in_float64_have_the_labels_of_float32_and_of_the_slow_double(changes):
    rows = blobs()[0]
    wide = pic(rows, **changes)
    np.testing.assert_array_equal(wide.labels, pic(rows.astype(np.float32), **changes).labels)
    few = rows[::4]
    args = {**DEFAULTS, **changes}
    slow = slow_pic(few, args["neighbours"], args["sigma"], args["alpha"], 30, True)
    assert pic(few.astype(np.float32), **{**changes, "iterations": 30}).labels.tolist() == slow


@pytest.mark.parametrize("merge_singletons", [True, False])
def test_the_result_keeps_the_contract_of_a_clustering(merge_singletons):
    rows = blobs(5)[0].astype(np.float32)
    before = rows.copy()
    found = pic(rows, merge_singletons=merge_singletons, iterations=7)
    np.testing.assert_array_equal(rows, before)
    count = found.labels.max() + 1
    assert found.labels.dtype == np.int32 and set(found.labels) == set(range(count))
    assert found.centroids.dtype == found.distances.dtype == np.float32
    means = np.stack([rows[found.labels == c].astype(np.float64).mean(0) for c in range(count)])
    np.testing.assert_allclose(found.centroids, means, atol=1e-6)
    np.testing.assert_allclose(found.distances, ((rows - means[found.labels]) ** 2).sum(1), atol=1e-6)
    info = dict(found.info)
    assert info.pop("components") >= 1
    assert found.certainty.shape == (len(rows),)
    assert info.pop("merged") == (1 if merge_singletons else 0)
    assert info == {"objective": [0.0], "splits": [], "iterations": 7, "empty": 0}


def test_the_seed_changes_nothing():
    rows = noise(60)
    for a, b in zip(module.pic(rows, 0, **DEFAULTS)[:3], module.pic(rows, 1, **DEFAULTS)[:3], strict=True):
        np.testing.assert_array_equal(a, b)


@settings(max_examples=20)
@given(st.permutations(range(50)), st.sampled_from([0.001, 0.9]))
def test_permuting_the_rows_permutes_the_partition(order, alpha):
    rows, order = noise(50), np.array(order)
    plain, moved = pic(rows, alpha=alpha).labels[order], pic(rows[order], alpha=alpha).labels
    assert len(set(zip(plain, moved, strict=True))) == len(set(plain)) == len(set(moved))


# Its steps


def affinities(rows, num=5, sigma=0.2):
    return module.affinity(knn.neighbours(rows, num, "faiss"), sigma)


def test_the_affinity_adds_both_directions():
    rows = np.array([[0.0], [1.0], [3.0]], np.float32)
    near, far = np.exp(-1 / 4), np.exp(-4 / 4)
    expected = [[0, 2 * near, 0], [2 * near, 0, far], [0, far, 0]]
    np.testing.assert_allclose(affinities(rows, num=1, sigma=2.0).toarray(), expected)


def test_the_affinity_is_symmetric_with_columns_in_order():
    graph = affinities(noise(60))
    np.testing.assert_array_equal(graph.toarray(), graph.toarray().T)
    for start, stop in zip(graph.indptr[:-1], graph.indptr[1:], strict=True):
        assert (np.diff(graph.indices[start:stop]) > 0).all()


def test_heights_keep_their_precision_where_v_is_uniform_to_the_last_bit():
    rows = np.array([[0.0], [1.0], [2.1]], np.float32)  # weights of 1e-11 and 1e-13, times alpha
    graph = affinities(rows, num=1)
    height = module.power_iteration(graph, 1e-6, 200)
    first_order = 1e-6 * graph.sum(axis=1)
    np.testing.assert_allclose(height, first_order, rtol=1e-5)
    assert len(np.unique(1 / 3 + height / 3)) < 3  # what v alone would have kept
    assert pic(rows, neighbours=1, alpha=1e-6, merge_singletons=False).labels.tolist() == [0, 0, 0]


def test_v_sums_to_one_and_is_a_fixed_point_in_the_end():
    graph = affinities(noise(40))
    height = module.power_iteration(graph, 0.3, 500)
    v = (height + 1 - height.mean()) / 40
    assert v.sum() == pytest.approx(1)
    again = 0.3 * (graph.toarray().T @ v) + 0.7 / 40
    np.testing.assert_allclose(again / again.sum(), v, rtol=1e-12)


@settings(max_examples=40)
@given(st.integers(6, 60), st.integers(0, 99), st.booleans(), st.sampled_from([0.001, 0.5, 1.0]))
def test_heights_rise_along_pointers_so_that_none_is_in_a_cycle(size, seed, ties, alpha):
    rows = noise(size, seed=seed)
    rows = np.round(rows * 3) / 10 if ties else rows
    graph = affinities(rows)
    height = module.power_iteration(graph, alpha, 200)
    pointers = module.ascent(graph, height)
    moves = pointers != np.arange(size)
    assert (height[pointers[moves]] > height[moves]).all()
    assert (graph.toarray()[np.flatnonzero(moves), pointers[moves]] > 0).all()
    slow = np.arange(size)
    for _ in range(size):
        slow = pointers[slow]
    np.testing.assert_array_equal(module.peaks(pointers), slow)


def test_a_pointer_takes_the_steepest_neighbour_and_the_lowest_id_of_tied_ones():
    weights = np.zeros((6, 6))
    weights[0, [1, 2]] = [1, 1]  # equally steep: 1
    weights[3, [1, 4]] = [1, 3]  # weight outdoes height: 4
    weights[5, [0]] = 1  # downhill only: stays
    weights[2, [1]] = 1  # level: stays
    graph = sparse.csr_array(weights)
    pointers = module.ascent(graph, np.array([0.0, 2.0, 2.0, 0.0, 1.0, 3.0]))
    assert pointers.tolist() == [1, 1, 2, 4, 4, 5]


def test_long_paths_are_followed_to_their_end():
    assert module.peaks(np.r_[1:1000, 999]).tolist() == [999] * 1000


def test_clusters_are_numbered_by_the_ids_of_their_peaks():
    rows = np.array([[9.0], [0.1], [5.1], [9.1], [5.0], [0.0], [5.01], [0.01], [9.09]], np.float32)
    graph = affinities(rows, num=2)
    pointers = module.ascent(graph, module.power_iteration(graph, 0.001, 200))
    assert module.peaks(pointers).tolist() == [8, 7, 6, 8, 6, 7, 6, 7, 8]
    assert pic(rows, neighbours=2).labels.tolist() == [2, 1, 0, 2, 0, 1, 0, 1, 2]


def test_a_singleton_joins_its_nearest_neighbour_in_a_larger_cluster():
    labels = np.array([0, 0, 1, 2, 3, 3, 4])
    neighbours = np.array([[1], [0], [3], [2], [5], [4], [3]]).repeat(3, axis=1)
    neighbours[2] = [3, 4, 0]  # past the singleton 3, to the cluster of 4
    neighbours[6] = [2, 3, 2]  # 2 is a singleton before any merging
    moved, merged = module.without_singletons(labels, neighbours)
    assert merged == 1
    assert moved.tolist() == [0, 0, 2, 1, 2, 2, 3]  # 3 and 6 only know singletons
    assert moved.dtype == np.int32


def test_no_singleton_is_left_as_it_is():
    labels, merged = module.without_singletons(np.array([0, 0, 1, 1]), np.array([[1], [2], [3], [0]]))
    assert labels.tolist() == [0, 0, 1, 1] and merged == 0


# Degenerate rows


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_isolated_pair_of_duplicates_stays_two_singletons_unless_it_can_join(backend):
    rows = np.concatenate([noise(20) / 10, np.full((2, 2), 50)]).astype(np.float32)
    found = pic(rows, neighbours=1, backend=backend)
    assert found.labels[20] != found.labels[21]
    assert np.bincount(found.labels)[found.labels[20:]].tolist() == [1, 1]
    joined = pic(rows, neighbours=2, backend=backend)  # the second neighbour is far, yet in a cluster
    assert joined.labels[20] == joined.labels[21] and (joined.labels[:20] == joined.labels[20]).any()
    assert np.isfinite(joined.centroids).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_identical_rows_climb_to_the_ones_with_the_lowest_ids(backend):
    rows = np.ones((40, 3), np.float32)
    found = pic(rows, backend=backend)
    assert found.labels.tolist() == [0] * 40
    assert (found.distances == 0).all()
    # Rows 0 to 4 are everyone's neighbours and equally high; 5 is the neighbour that each of them has beyond the rest.
    apart = pic(rows, merge_singletons=False, backend=backend)
    assert apart.labels.tolist() == [0, 1, 2, 3, 4] + [0] * 35


@pytest.mark.parametrize("alpha", [0.0, 0.001, 1.0])
@pytest.mark.parametrize("sigma", [1e-3, 1e-200])
@pytest.mark.filterwarnings("error")
def test_rows_whose_affinities_underflow_are_their_own_peaks(sigma, alpha):
    rows = np.arange(12, dtype=np.float32)[:, None]
    found = pic(rows, sigma=sigma, alpha=alpha)
    assert found.labels.tolist() == list(range(12))
    assert found.info["components"] == 12 and found.info["merged"] == 0
    np.testing.assert_array_equal(found.centroids, rows)


def test_an_isolated_row_beside_a_cluster_is_its_own_peak():
    rows = np.concatenate([blobs()[0][:30], [[40, 40]]]).astype(np.float32)
    alone = pic(rows, merge_singletons=False)
    assert (alone.labels == alone.labels[30]).sum() == 1
    assert alone.info["components"] == 2
    joined = pic(rows)
    assert (joined.labels == joined.labels[30]).sum() > 1


# Its place among the clusterings


def test_the_settings_reach_the_clustering(monkeypatch):
    config = base()
    config.cluster.method = "pic"
    rows = Rows(180, (2,), np.float32, 1 << 20, None)
    rows.append(blobs()[0])
    clustered = cluster.get(config)(rows.finish(), 0)
    np.testing.assert_array_equal(clustered.labels, pic(rows.array()).labels)
    assert clustered.info == pic(rows.array()).info
    changes = dict(neighbours=9, sigma=0.3, alpha=0.5, iterations=3, merge_singletons=False)
    config.cluster.pic.update(changes)
    config.cluster.backend = "jax"
    expected, ran = pic(rows.array(), **changes), []
    monkeypatch.setattr(module, "pic", lambda *args, original=module.pic, **kw: ran.append(kw) or original(*args, **kw))
    np.testing.assert_array_equal(cluster.get(config)(rows, 0).labels, expected.labels)
    assert ran == [{**changes, "backend": "jax", "nearest": 1}]
    assert cluster.asked(config.cluster) is None
