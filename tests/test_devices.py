"""The same result on one device and on eight."""

import jax
import numpy as np
import pytest
from small import few_digits, prepared, smaller_config, trained

from jaxclust import config as config_lib
from jaxclust import runtime
from jaxclust.errors import ConfigError
from jaxclust.main import main
from jaxclust.train import devices, loop
from jaxclust.train import workdir as workdir_lib


def rounds(config, workdir):
    trained(config, workdir, few_digits(600))
    folder = workdir / "assignments" / "deepcluster"
    return [np.load(folder / f"{i}.npz")["cluster"] for i in range(3)]


def on_devices(count, dtype, workdir, rule):
    config = smaller_config(runtime__devices=count, runtime__dtype=dtype, optimizer__body__name=rule, model__blocks=1)
    config.optimizer.body.lr = config.optimizer.top.lr = 1e-2
    return rounds(config, workdir / str(count))


@pytest.mark.wide  # as four devices of two hosts do in test_hosts, and a step of eight does below
def test_two_rounds_on_eight_devices_give_the_assignments_of_one_in_float64(tmp_path, float64):
    one, eight = (on_devices(count, "float64", tmp_path, "adam") for count in (1, 8))
    for a, b in zip(one, eight, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.wide
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
    for count in (1, 8):
        config = smaller_config(
            runtime__devices=count, runtime__dtype="float64", optimizer__body__name="sgd", model__blocks=1
        )
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
    config = smaller_config(runtime__devices=8, batch_size=100)
    with pytest.raises(ConfigError, match=r"config.batch_size=100 must divide by 8 devices; nearest: 96, 104"):
        prepared(config, tmp_path, few_digits())
    with pytest.raises(ConfigError, match="there are 8 cpu devices"):
        prepared(smaller_config(runtime__devices=9), tmp_path, few_digits())


def test_seeds_are_paths_of_names():
    keys = [runtime.key(0), runtime.key(1), runtime.key(0, "a"), runtime.key(0, "a", 1), runtime.key(0, "b")]
    data = {tuple(jax.random.key_data(key).tolist()) for key in keys}
    assert len(data) == len(keys)
    assert (jax.random.key_data(runtime.key(0, "a", 1)) == jax.random.key_data(keys[3])).all()


def unasked(**fields):
    return smaller_config(runtime__devices=0, batch_size=64, eval_batch_size=64, **fields)


def timed(monkeypatch, seconds):
    """Train steps take `seconds` by their number of devices; returns the numbers that were tried."""
    tried = []

    def measure(count):
        tried.append(count)
        return seconds[count]

    monkeypatch.setattr(devices, "seconds_of_step", measure)
    return tried


def chosen(config, workdir):
    return devices.choose(config, workdir, lambda config: config.runtime.devices).runtime.devices


def test_a_cpu_is_used_as_the_number_of_devices_that_was_fastest(monkeypatch, tmp_path, capsys):
    tried = timed(monkeypatch, {1: 0.4, 2: 0.2, 4: 0.3, 8: 0.1})
    assert chosen(unasked(), tmp_path) == 2
    assert tried == [1, 2, 4]  # it grew slower: 8 is not tried
    said = "400 ms as one device, 200 ms as 2 devices, 300 ms as 4 devices: the CPU is used as 2 devices"
    assert said in capsys.readouterr().out


def test_quick_steps_are_not_worth_a_second_compilation(monkeypatch, tmp_path, capsys):
    tried = timed(monkeypatch, {1: 0.005})
    assert chosen(unasked(), tmp_path) == 1
    assert tried == [1] and not capsys.readouterr().out


def test_only_numbers_that_divide_the_batches_are_tried(monkeypatch, tmp_path):
    config = unasked()
    config.batch_size = 30
    tried = timed(monkeypatch, {1: 0.4, 2: 0.2})
    assert chosen(config, tmp_path) == 2 and tried == [1, 2]


def test_the_search_ends_at_a_number_that_the_method_refuses(monkeypatch, tmp_path):
    tried = timed(monkeypatch, {1: 0.4, 2: 0.2})

    def prepare(config, most):
        if config.runtime.devices > most:
            raise ConfigError("too many")
        return config.runtime.devices

    found = devices.choose(unasked(), tmp_path, lambda config: prepare(config, 2))
    assert found.runtime.devices == 2 and tried == [1, 2]
    with pytest.raises(ConfigError, match="too many"):
        devices.choose(unasked(), tmp_path, lambda config: prepare(config, 0))


@pytest.mark.parametrize("field, value", [("devices", 3), ("cpu_devices", 8)])
def test_what_the_user_says_is_not_measured(monkeypatch, tmp_path, field, value):
    config = unasked()
    config.runtime[field] = value
    tried = timed(monkeypatch, {})
    assert devices.choose(config, tmp_path, lambda config: 0).runtime[field] == value and not tried


@pytest.mark.slow
def test_a_run_goes_on_with_its_number_of_devices(monkeypatch, tmp_path):
    workdir = tmp_path / "run"
    monkeypatch.setattr(devices, "QUICK_STEP", 0.0)
    monkeypatch.setattr(devices, "seconds_of_step", lambda stage: 1 / stage.mesh.size)
    monkeypatch.setattr(devices, "counts", lambda config, available: [1, 4])
    command = ["jaxclust", "--config=configs/deepcluster.py:smoke", f"--workdir={workdir}", "--config.rounds=1"]
    assert main(command) == 0
    assert workdir_lib.devices_used(workdir) == 4
    monkeypatch.setattr(devices, "seconds_of_step", lambda stage: 1 / 0)
    command[-1] = "--config.rounds=2"
    assert main(command) == 0
    assert workdir_lib.devices_used(workdir) == 4
    assert config_lib.load(workdir / "config.json").runtime.devices == 0  # another machine may have fewer
    assert main(["jaxclust", "--job=evaluate", f"--workdir={workdir}"]) == 0


def test_of_a_frozen_body_a_step_on_its_features_is_timed(tmp_path, monkeypatch):
    stage = prepared(smaller_config(runtime__devices=1, model__blocks=1, model__dim=12, freeze_body=True), tmp_path)
    seen = []

    def step(state, batch, key):
        seen.append(batch["views"]["train"].shape)
        return state, None, np.zeros(())

    monkeypatch.setattr(devices, "TIMED", 1e-9)
    assert devices.seconds_of_step(stage._replace(step=step)) >= 0
    assert set(seen) == {(128, 12)}


def test_a_real_step_is_timed(tmp_path):
    seconds = devices.seconds_of_step(prepared(smaller_config(runtime__devices=2, model__blocks=1), tmp_path))
    assert 0 < seconds < 5
