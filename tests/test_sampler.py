"""The sampler: shares of clusters, exact lengths, the published defect (deepcluster.md 2.6, check 12)."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxclust import config as c
from jaxclust.data.sampler import POOLS, draw
from jaxclust.errors import ConfigError, DataError
from jaxclust.methods.base import Targets
from jaxclust.train import loop
from jaxclust.train.lengths import lengths

SIZES = (5000, 1000, 500, 100, 50, 10, 0, 1)


def _targets(sizes):
    """Cluster of each image, in a shuffled order as real data have it."""
    targets = np.repeat(np.arange(len(sizes)), sizes).astype(np.int32)
    return np.random.default_rng(0).permutation(targets)


@pytest.mark.parametrize("reassign", [0.5, 1.0, 2.0])
def test_every_non_empty_cluster_gets_an_equal_share(reassign):
    targets = _targets(SIZES)
    length = int(reassign * len(targets))
    ids = draw("uniform_cluster", np.arange(len(targets)), targets, length, 0)
    assert ids.dtype == np.int32 and ids.shape == (length,)
    shares = np.bincount(targets[ids], minlength=len(SIZES)) / length
    assert shares[6] == 0
    np.testing.assert_allclose(np.delete(shares, 6), 1 / 7, atol=0.01)


def test_upstream_mimics_the_published_shares():
    targets = _targets(SIZES)
    ids = np.arange(len(targets))
    drawn = np.concatenate([draw("upstream", ids, targets, len(ids), seed) for seed in range(20)])
    shares = 100 * np.bincount(targets[drawn], minlength=len(SIZES)) / len(drawn)
    # Measured on the original: 78 / 14 / 6 / 0.7 / 0.9 / 0.08 / 0 / 0 %, for one order of the images.
    np.testing.assert_allclose(shares[:3], [75, 15, 7.5], atol=4)
    assert shares[3:].max() < 3


def test_a_draw_repeats_no_image_of_a_large_cluster():
    targets = _targets((500, 20))
    ids = draw("uniform_cluster", np.arange(520), targets, 400, 1)
    large = ids[targets[ids] == 0]
    assert len(large) >= 199 and len(np.unique(large)) == len(large)


def test_the_order_is_shuffled():
    targets = _targets((300, 300))
    ids = draw("uniform_cluster", np.arange(600), targets, 600, 1)
    first_half = np.mean(targets[ids[:300]])
    assert 0.4 < first_half < 0.6


def test_fewer_draws_than_clusters_warns(caplog):
    targets = np.arange(50, dtype=np.int32)
    with caplog.at_level(logging.WARNING):
        assert len(draw("uniform_cluster", np.arange(50), targets, 10, 0)) == 10
    assert "50 clusters" in caplog.text


def test_unknown_kind_and_no_ids_are_errors():
    with pytest.raises(ValueError, match="uniform_image"):
        draw("uniform", np.arange(3), np.zeros(3, np.int32), 3, 0)
    with pytest.raises(ValueError, match="of 0 ids"):
        draw("uniform_image", np.arange(0), np.zeros(3, np.int32), 3, 0)


@settings(max_examples=60)
@given(
    kind=st.sampled_from(["uniform_image", "uniform_cluster", "upstream"]),
    targets=st.lists(st.integers(0, 12), min_size=1, max_size=60),
    share=st.floats(0.1, 1.0),
    length=st.integers(0, 200),
    seed=st.integers(0, 2**31 - 1),
)
def test_only_given_ids_the_exact_length_and_a_function_of_the_seed(kind, targets, share, length, seed):
    targets = np.array(targets, np.int32)
    rng = np.random.default_rng(seed)
    ids = np.sort(rng.permutation(len(targets))[: max(1, int(share * len(targets)))]).astype(np.int32)
    drawn = draw(kind, ids, targets, length, (seed, 3))
    assert len(drawn) == length and np.isin(drawn, ids).all()
    np.testing.assert_array_equal(drawn, draw(kind, ids, targets, length, (seed, 3)))
    if kind == "uniform_image":  # whole passes first, then a part of one: counts differ by one at most
        counts = np.bincount(drawn, minlength=len(targets))[ids]
        assert counts.max() - counts.min() <= 1
    if kind == "uniform_cluster":
        clusters = np.unique(targets[ids])
        counts = np.bincount(targets[drawn], minlength=13)[clusters]
        assert counts.max() <= length // len(clusters) + 1
        assert counts.sum() == length


def test_seeds_differ():
    targets = np.zeros(100, np.int32)
    a, b = (draw("uniform_image", np.arange(100), targets, 100, (0, r)) for r in range(2))
    assert (a != b).any()


def pools(kind, seed=0, first=0, count=5, size=4):
    """`count` batches of 4 of the 14 even numbers below 28, whose order as given is shuffled."""
    ids = np.random.default_rng(1).permutation(2 * np.arange(14))
    drawn = draw(kind, ids, np.zeros(28, np.int32), count * size, (0, seed), size, first_batch=first)
    assert drawn.dtype == np.int32 and drawn.shape == (count * size,) and np.isin(drawn, ids).all()
    return drawn.reshape(count, size)


@pytest.mark.parametrize("kind", POOLS)
def test_a_pool_holds_distinct_images_and_is_a_function_of_the_seed(kind):
    drawn = pools(kind)
    assert all(len(set(batch)) == 4 for batch in drawn.tolist())
    np.testing.assert_array_equal(drawn, pools(kind))
    assert (drawn != pools(kind, seed=1)).any() == (kind != "fixed")


def test_resampled_pools_share_images_and_all_images_come_up():
    drawn = pools("resample", count=60)
    assert len(set(drawn[:3].ravel().tolist())) < 12
    counts = np.bincount(drawn.ravel(), minlength=28)[::2]
    np.testing.assert_allclose(counts, 240 / 14, atol=9)


def test_a_partition_shows_an_image_once_before_it_is_drawn_anew_without_the_remainder():
    drawn = pools("partition", count=6)
    assert len(set(drawn[:3].ravel().tolist())) == 12 == len(set(drawn[3:].ravel().tolist()))
    assert (drawn[:3] != drawn[3:]).any()


def test_a_fixed_chunk_has_the_same_images_in_every_round():
    expected = 2 * np.arange(12).reshape(3, 4)
    np.testing.assert_array_equal(pools("fixed", count=3), expected)
    np.testing.assert_array_equal(pools("fixed", first=5, count=2), expected[[2, 0]])


@pytest.mark.parametrize("kind", POOLS)
def test_an_epoch_has_only_whole_pools_and_a_pool_no_more_than_all_images(kind):
    config = c.base()
    config.sampler, config.batch_size, config.rounds, config.refresh_every = kind, 5000, 3, "1 epoch"
    assert lengths(config, 13_000)[:2] == (6, 2)
    config.refresh_every = "2 epochs"
    assert lengths(config, 14_999).round == 4
    with pytest.raises(ConfigError, match="batch_size=5000.*distinct images, and there are 4999"):
        lengths(config, 4999)
    with pytest.raises(DataError, match=f"batch_size=5, but config.sampler='{kind}' makes .* there are 4 to train on"):
        draw(kind, np.arange(4), np.zeros(4, np.int32), 5, 0, 5)


@settings(max_examples=40)
@given(
    targets=st.lists(st.integers(-1, 4), min_size=1, max_size=40).filter(lambda values: max(values) >= 0),
    ratio=st.integers(1, 9),
    groups=st.integers(1, 60),
    seed=st.integers(0, 2**31 - 1),
)
def test_s11_the_first_of_each_group_has_a_label_and_the_others_are_any(targets, ratio, groups, seed):
    targets = np.array(targets, np.int32)
    ids = np.random.default_rng(seed).permutation(len(targets))
    length = groups * (1 + ratio) - seed % 2
    drawn = draw("labelled_first", ids, targets, length, (seed, 1), unlabelled=ratio)
    assert drawn.dtype == np.int32 and drawn.shape == (length,) and np.isin(drawn, ids).all()
    assert (targets[drawn[:: 1 + ratio]] >= 0).all()
    np.testing.assert_array_equal(drawn, draw("labelled_first", ids, targets, length, (seed, 1), unlabelled=ratio))


def test_s11_all_images_with_a_label_come_first_and_all_images_follow_equally_often():
    targets = np.where(np.arange(20) % 4, -1, 3)
    drawn = draw("labelled_first", np.arange(20), targets, 8 * 1000, 0, unlabelled=7).reshape(-1, 8)
    np.testing.assert_allclose(np.bincount(drawn[:, 0], minlength=20)[::4], 200, atol=50)
    np.testing.assert_allclose(np.bincount(drawn[:, 1:].ravel(), minlength=20), 350, atol=80)
    assert (drawn[:, 1:].min(axis=0) < 4).all() and (drawn[:-1] != drawn[1:]).any(axis=0).all()
    with pytest.raises(DataError, match="sampler='labelled_first' draws images with a label, and none of 20 has one"):
        draw("labelled_first", np.arange(20), np.full(20, -1), 16, 0)


def test_a_run_draws_groups_of_its_own_ratio():
    config = c.base()
    config.sampler, config.unlabelled_ratio, config.batch_size = "labelled_first", 2, 6
    targets = np.where(np.arange(50) % 10, -1, 0).astype(np.int32)
    stage = SimpleNamespace(config=config, number=0, lengths=SimpleNamespace(round=20))
    held = Targets(targets, np.ones(50, np.float32), np.arange(50, dtype=np.int32), np.int32(0))
    drawn = loop._order(stage, held, 1)
    assert drawn.shape == (120,) and (targets[drawn[::3]] == 0).all() and (targets[drawn] == 0).mean() < 0.6


@settings(max_examples=60)
@given(
    targets=st.lists(st.integers(0, 8), min_size=1, max_size=80),
    size=st.integers(4, 40),
    per_class=st.integers(2, 4),
    batches=st.integers(1, 12),
    seed=st.integers(0, 2**31 - 1),
)
def test_pk_batches_have_equally_many_images_of_their_classes_all_of_which_come_in_turn(
    targets, size, per_class, batches, seed
):
    targets = np.array(targets, np.int32)
    ids = np.random.default_rng(seed).permutation(len(targets))[: max(1, len(targets) // 2)].astype(np.int32)
    length = size * batches - seed % 2
    drawn = draw("pk", ids, targets, length, (seed, 1), size, per_class=per_class)
    assert drawn.dtype == np.int32 and drawn.shape == (length,) and np.isin(drawn, ids).all()
    np.testing.assert_array_equal(drawn, draw("pk", ids, targets, length, (seed, 1), size, per_class=per_class))
    classes, members = np.unique(targets[ids], return_counts=True)
    number, appeared = min(len(classes), size // per_class), np.zeros(9, int)
    for batch in drawn[: length // size * size].reshape(-1, size):
        counts = np.bincount(targets[batch], minlength=9)
        found = counts[counts > 0]
        assert len(found) == number and found.min() >= per_class and found.max() - found.min() <= 1
        appeared += counts > 0
        for own in np.flatnonzero(counts):  # no image twice while the class has others
            shown = np.unique(batch[targets[batch] == own])
            assert len(shown) == min(counts[own], members[classes == own][0])
    assert np.ptp(appeared[classes]) <= 1  # classes take turns


def test_pk_shows_all_images_of_a_class_before_one_comes_again_and_mixes_classes():
    targets = np.repeat(np.arange(3), (12, 30, 9)).astype(np.int32)
    drawn = draw("pk", np.arange(51), targets, 9 * 60, 0, 9, per_class=3)
    for own, members in enumerate((12, 30, 9)):
        counts = np.bincount(drawn[targets[drawn] == own], minlength=51)[targets == own]
        assert counts.sum() == 180 and np.ptp(counts) <= 1 and len(counts) == members
    assert len(np.unique(targets[drawn[::9]])) == 3
