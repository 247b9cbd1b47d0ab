"""The same result on one device and on eight."""

import jax
import numpy as np
import pytest
from small import few_digits, prepared, small_config, trained

from jaxclust import runtime
from jaxclust.errors import ConfigError
from jaxclust.train import loop


def rounds(config, workdir):
    trained(config, workdir, few_digits(600))
    folder = workdir / "assignments" / "deepcluster"
    return [np.load(folder / f"{i}.npz")["cluster"] for i in range(3)]


def on_devices(count, dtype, workdir, rule):
    config = small_config(runtime__devices=count, runtime__dtype=dtype, optimizer__body__name=rule)
    config.optimizer.body.lr = config.optimizer.top.lr = 1e-2
    return rounds(config, workdir / str(count))


@pytest.mark.medium
def test_two_rounds_on_eight_devices_give_the_assignments_of_one_in_float64(tmp_path, float64):
    one, eight = (on_devices(count, "float64", tmp_path, "adam") for count in (1, 8))
    for a, b in zip(one, eight, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.medium
def test_two_rounds_on_eight_devices_agree_with_one_in_float32(tmp_path):
    """Sums run in another order, so at most 1 % may change cluster; with Adam, which makes much of small
    differences, a few per cent do."""
    one, eight = (on_devices(count, "float32", tmp_path, "sgd") for count in (1, 8))
    np.testing.assert_array_equal(one[0], eight[0])
    for a, b in zip(one[1:], eight[1:], strict=True):
        assert (a != b).mean() <= 0.01


def test_a_gradient_over_devices_is_that_of_the_whole_batch(tmp_path, float64):
    """Catches the mean of a gradient that is summed already: eight times too large, and silent."""
    moved = []
    for devices in (1, 8):
        config = small_config(runtime__devices=devices, runtime__dtype="float64", optimizer__body__name="sgd")
        config.optimizer.top.name = "sgd"
        stage = prepared(config, tmp_path, few_digits())
        state, targets = stage.first()
        rng = np.random.default_rng(0)
        targets = targets._replace(target=rng.integers(0, 10, stage.split.size, dtype=np.int32))
        before = jax.device_get(state.params)
        state, _, _ = stage.step(state, next(loop._batches(stage, targets, 0)), runtime.key(0))
        moved.append(jax.tree.map(np.subtract, jax.device_get(state.params), before))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-15), *moved)


def test_a_batch_that_does_not_divide_names_the_nearest_sizes(tmp_path):
    config = small_config(runtime__devices=8, batch_size=100)
    with pytest.raises(ConfigError, match=r"config.batch_size=100 must divide by 8 devices; nearest: 96, 104"):
        prepared(config, tmp_path, few_digits())
    with pytest.raises(ConfigError, match="there are 8 cpu devices"):
        prepared(small_config(runtime__devices=9), tmp_path, few_digits())


def test_seeds_are_paths_of_names():
    keys = [runtime.key(0), runtime.key(1), runtime.key(0, "a"), runtime.key(0, "a", 1), runtime.key(0, "b")]
    data = {tuple(jax.random.key_data(key).tolist()) for key in keys}
    assert len(data) == len(keys)
    assert (jax.random.key_data(runtime.key(0, "a", 1)) == jax.random.key_data(keys[3])).all()
