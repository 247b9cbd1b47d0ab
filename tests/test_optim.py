"""Optimisers and the course of their rates, against slow doubles."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from hypothesis import given, settings
from hypothesis import strategies as st
from small import few_digits, prepared, smaller_config, trained

from jaxclust import methods, models
from jaxclust.config import from_file
from jaxclust.errors import ConfigError
from jaxclust.methods.base import Method
from jaxclust.train import loop, optim
from jaxclust.train.lengths import Lengths, lengths
from jaxclust.train.refresh import refresh

PARAMS = {
    "body": {"kernel": jnp.asarray([1.0, -2.0]), "scale": jnp.asarray([1.5])},
    "top": {"bias": jnp.asarray([0.5])},
}
METHOD = Method(init=None, loss=None, embed=None)


def made(steps=100, every=10, method=METHOD, warmup=0, **fields):
    """The optimiser of PARAMS for settings of the body (`lr=1`) or the top (`top__lr=1`)."""
    fields = {"schedule": "none", **fields}
    named = {f"optimizer__{name if name.startswith('top__') else 'body__' + name}": v for name, v in fields.items()}
    of_groups = {"body": every, "top": every}, {"body": warmup}
    return optim.make(smaller_config(**named), method, PARAMS, Lengths(steps, every, every, 0, 0, *of_groups))


def constant(value):
    return jax.tree.map(lambda leaf: jnp.full_like(leaf, value), PARAMS)


def test_14_a_step_of_sgd_is_that_of_pytorch_on_every_parameter():
    optimizer = made(name="sgd", lr=0.05, momentum=0.9, wd=-2.0)
    params, state = PARAMS["body"], optimizer.init(PARAMS)
    expected = {name: np.asarray(value, np.float64) for name, value in params.items()}
    velocity = dict.fromkeys(params, 0.0)
    whole = PARAMS
    for step in range(3):
        changes, state = optimizer.update(constant(0.3 * (step + 1)), state, whole, step=jnp.asarray(step))
        whole = jax.tree.map(jnp.add, whole, changes)
        for name in expected:
            g = 0.3 * (step + 1) + 1e-2 * expected[name]
            velocity[name] = 0.9 * velocity[name] + g
            expected[name] = expected[name] - 0.05 * velocity[name]
    for name in expected:
        np.testing.assert_allclose(whole["body"][name], expected[name], rtol=1e-6)


def test_14_an_exponent_of_minus_five_is_a_decay_of_exactly_one_hundred_thousandth():
    decays = []
    for fields in ({"wd": -5.0}, {"weight_decay": 1e-5}):
        optimizer = made(name="sgd", lr=1.0, momentum=0.0, **fields)
        changes, _ = optimizer.update(constant(0.0), optimizer.init(PARAMS), PARAMS, step=jnp.asarray(0))
        decays.append(np.asarray(changes["body"]["kernel"]))
    np.testing.assert_array_equal(decays[0], -np.float32(1e-5) * np.asarray(PARAMS["body"]["kernel"]))
    np.testing.assert_array_equal(*decays)


@pytest.mark.parametrize("value", [1e-5, 0.5, 2.0, -1e-5, -0.5, math.nan])
def test_a_plain_value_in_the_field_of_the_exponent_is_refused_with_the_field_it_belongs_to(value):
    with pytest.raises(ConfigError, match=r"optimizer.body.wd=.* must be an exponent .*weight_decay"):
        smaller_config(optimizer__body__wd=value)


def test_two_ways_to_say_the_decay_contradict():
    with pytest.raises(ConfigError, match=r"body.wd=-5.0 \(a decay of 1e-05\) and config.optimizer.body.weight_decay"):
        made(wd=-5.0, weight_decay=1e-4)


def test_a_step_of_nesterov_is_that_of_pytorch():
    optimizer = made(name="sgd", lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01)
    expected, velocity = np.asarray(PARAMS["body"]["kernel"], np.float64), 0.0
    whole, state = PARAMS, optimizer.init(PARAMS)
    for step in range(3):
        changes, state = optimizer.update(constant(0.3 * (step + 1)), state, whole, step=jnp.asarray(step))
        whole = jax.tree.map(jnp.add, whole, changes)
        g = 0.3 * (step + 1) + 0.01 * expected
        velocity = 0.9 * velocity + g
        expected = expected - 0.05 * (g + 0.9 * velocity)
    np.testing.assert_allclose(whole["body"]["kernel"], expected, rtol=1e-6)


def test_norms_may_be_left_out_of_the_decay_and_biases_of_other_layers_not():
    params = {
        "body": {
            "conv1_conv": {"kernel": jnp.ones((3, 3, 1, 2))},
            "conv1_norm": {"scale": jnp.ones(2), "bias": jnp.ones(2)},
            "block": {"skip_norm": {"scale": jnp.ones(2), "bias": jnp.ones(2)}},
            "feature": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)},
        },
        "top": PARAMS["top"],
    }
    fields = {f"optimizer__body__{name}": v for name, v in {"lr": 1.0, "momentum": 0.0, "weight_decay": 0.5}.items()}
    config = smaller_config(optimizer__body__name="sgd", **fields, optimizer__body__decayed="no_norm")
    optimizer = optim.make(config, METHOD, params, Lengths(9, 9, 9, 0, 0, {"body": 9, "top": 9}))
    zeros = jax.tree.map(jnp.zeros_like, params)
    changes, _ = optimizer.update(zeros, optimizer.init(params), params, step=jnp.asarray(0))
    moved = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(changes["body"])}
    decayed = {name for name, leaf in moved.items() if leaf.any()}
    assert decayed == {"['conv1_conv']['kernel']", "['feature']['kernel']", "['feature']['bias']"}
    assert (moved["['feature']['bias']"] == -0.5).all()


def test_every_norm_of_a_network_is_left_out_and_nothing_else(tmp_path):
    config = smaller_config(model__name="wrn28_2", model__width=4)
    shapes = models.parameter_shapes(config, (8, 8, 1))
    tree = traverse_util.unflatten_dict(
        {tuple(name[2:-2].split("']['")): np.zeros(shape) for name, shape in shapes.items()}
    )
    decays = optim.not_of_norms(tree)
    for path, decayed in jax.tree_util.tree_leaves_with_path(decays):
        assert decayed == (not path[-2].key.endswith("_norm")), path
    assert sum(not decayed for decayed in jax.tree.leaves(decays)) == 2 * 25


def test_s11_the_rate_of_fixmatch_at_its_ends():
    optimizer = made(steps=2**20, name="sgd", lr=0.03, schedule="cosine_part")
    rates = [optimizer.rates(optimizer.init(PARAMS), step)["body"] for step in (0, 2**19, 2**20, 2**21)]
    assert rates == pytest.approx([0.03, 0.03 * math.cos(7 * math.pi / 32), 0.00585, 0.00585], rel=1e-3)


def test_body_and_top_have_independent_rules():
    optimizer = made(name="adam", lr=0.5, top__name="sgd", top__lr=0.25, top__momentum=0.0)
    changes, _ = optimizer.update(constant(3.0), optimizer.init(PARAMS), PARAMS, step=jnp.asarray(0))
    np.testing.assert_allclose(changes["body"]["kernel"], -0.5, rtol=1e-4)  # the first step of Adam is its rate
    np.testing.assert_allclose(changes["top"]["bias"], -0.75, rtol=1e-6)


@pytest.mark.parametrize(
    "schedule, expected",
    [
        ("none", lambda step: 1.0),
        ("cosine", lambda step: 0.5 * (1 + math.cos(math.pi * step / 100))),
        ("exponential", lambda step: 0.9 ** (step // 10)),
        ("cosine_part", lambda step: math.cos(0.4375 * math.pi * step / 100)),
        ("steps", lambda step: 0.1 ** ((step >= 10) + (step >= 30))),
    ],
)
def test_rates_follow_their_schedule(schedule, expected):
    optimizer = made(name="sgd", lr=1.0, momentum=0.0, schedule=schedule, gamma=0.9, milestones=(1, 3))
    state = optimizer.init(PARAMS)
    for step in (0, 9, 10, 29, 30, 99):
        changes, _ = optimizer.update(constant(1.0), state, PARAMS, step=jnp.asarray(step))
        np.testing.assert_allclose(changes["body"]["kernel"], -expected(step), rtol=1e-5, atol=1e-6)
        assert optimizer.rates(state, step)["body"] == pytest.approx(expected(step), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("schedule", ["none", "cosine", "cosine_part", "exponential", "steps"])
def test_rates_rise_evenly_before_their_course(schedule):
    optimizer = made(
        name="sgd",
        lr=4.8,
        momentum=0.0,
        schedule=schedule,
        gamma=0.9,
        milestones=(1, 3),
        min_lr=0.0048,
        warmup=20,
        warmup_lr=0.3,
    )
    rates = [optimizer.rates(optimizer.init(PARAMS), step)["body"] for step in range(101)]
    np.testing.assert_allclose(rates[:20], 0.3 + 4.5 * np.arange(20) / 20, rtol=1e-5)
    after = np.arange(81)
    expected = {
        "none": np.full(81, 4.8),
        "cosine": 0.0048 + 0.5 * (4.8 - 0.0048) * (1 + np.cos(np.pi * after / 80)),
        "cosine_part": 4.8 * np.cos(0.4375 * np.pi * after / 80),
        "exponential": 4.8 * 0.9 ** (after // 10),
        "steps": 4.8 * 0.1 ** ((after >= 10) * 1 + (after >= 30)),
    }
    np.testing.assert_allclose(rates[20:], expected[schedule], rtol=1e-5)


def test_the_rate_of_the_second_version_at_full_size():
    config = from_file(Path("configs/deepcluster.py"), "v2")
    length = lengths(config, 1_281_167)
    assert (length.round, length.stage, length.warmup["body"]) == (313, 250_400, 3_128)
    course = optim.Course(config.optimizer.body, length.every["body"], length.warmup["body"])
    rate = optim.schedule(course, length.stage)
    steps = {0: 0.3, 1564: 2.55, 3128: 4.8, 3128 + 247_272 // 2: 2.4024, 250_400: 0.0048}
    for step, expected in steps.items():
        assert float(rate(jnp.asarray(step))) == pytest.approx(expected, rel=1e-4), step


def test_lars_makes_a_step_a_share_of_the_length_of_its_parameter():
    optimizer = made(name="lars", lr=2.0, momentum=0.9, weight_decay=0.1, trust=0.01)
    params = {"body": {"kernel": jnp.asarray([3.0, -4.0]), "scale": jnp.asarray([0.0])}, "top": PARAMS["top"]}
    expected = {name: np.asarray(value, np.float64) for name, value in params["body"].items()}
    velocity, state = dict.fromkeys(expected, 0.0), optimizer.init(params)
    for step in range(3):
        gradient = jax.tree.map(lambda leaf, step=step: jnp.full_like(leaf, 0.5 - step), params)
        changes, state = optimizer.update(gradient, state, params, step=jnp.asarray(step))
        params = jax.tree.map(jnp.add, params, changes)
        for name, value in expected.items():
            g = 0.5 - step + 0.1 * value
            if np.linalg.norm(value) > 0:
                g = g * 0.01 * np.linalg.norm(value) / np.linalg.norm(g)
            velocity[name] = 0.9 * velocity[name] + g
            expected[name] = value - 2.0 * velocity[name]
        for name, value in expected.items():
            np.testing.assert_allclose(params["body"][name], value, rtol=1e-5)


@pytest.mark.parametrize("name", ["adam", "sgd", "lars"])
def test_a_frozen_group_neither_moves_nor_remembers_until_its_step(name):
    frozen, free = made(name=name, lr=0.1, weight_decay=0.1, frozen=3), made(name=name, lr=0.1, weight_decay=0.1)
    state, fresh = frozen.init(PARAMS), free.init(PARAMS)
    for step in range(3):
        changes, state = frozen.update(constant(1.0 + step), state, PARAMS, step=jnp.asarray(step))
        assert not any(leaf.any() for leaf in jax.tree.leaves(changes["body"]))
        assert all(leaf.any() for leaf in jax.tree.leaves(changes["top"]))
    for step in range(3, 5):
        changes, state = frozen.update(constant(0.5), state, PARAMS, step=jnp.asarray(step))
        expected, fresh = free.update(constant(0.5), fresh, PARAMS, step=jnp.asarray(step))
        jax.tree.map(np.testing.assert_array_equal, changes["body"], expected["body"])


def reduced_by_hand(losses, lr, factor, patience, min_lr):
    """The rate after each mean loss, as PyTorch's scheduler has it (relative threshold 1e-4)."""
    best, bad, rates = math.inf, 0, []
    for value in losses:
        if value < best * (1 - 1e-4):
            best, bad = value, 0
        else:
            bad += 1
        if bad > patience:
            lr, bad = max(lr * factor, min_lr), 0
        rates.append(lr)
    return rates


@settings(max_examples=25)
@given(
    losses=st.lists(st.integers(1, 6), min_size=1, max_size=25),
    patience=st.integers(0, 3),
    min_lr=st.sampled_from([0.0, 0.02, 1.0]),
)
def test_plateau_lowers_the_rate_as_pytorch_does_with_the_mean_loss_of_a_round(losses, patience, min_lr):
    every = 2
    optimizer = made(
        every=every, name="sgd", lr=0.5, momentum=0.0, schedule="plateau", factor=0.1, patience=patience, min_lr=min_lr
    )
    state = optimizer.init(PARAMS)
    update = jax.jit(lambda state, step, value: optimizer.update(constant(1.0), state, PARAMS, step=step, value=value))
    seen = []
    for i, loss in enumerate(losses):
        for half in (-0.5, 0.5):  # the mean counts, not the last one
            changes, state = update(state, jnp.asarray(i), jnp.asarray(loss + half))
        seen.append(optimizer.rates(state, 0)["body"])
        np.testing.assert_allclose(changes["body"]["kernel"], -seen[-1], rtol=1e-5)
    np.testing.assert_allclose(seen, reduced_by_hand(losses, 0.5, 0.1, patience, min(min_lr, 0.5)), rtol=1e-5)


def test_a_renewed_head_gets_clean_slots_but_keeps_its_rate():
    optimizer = made(every=1, top__name="sgd", top__lr=1.0, top__schedule="plateau", top__patience=0)
    state = optimizer.init(PARAMS)
    for _ in range(3):
        _, state = optimizer.update(constant(1.0), state, PARAMS, step=jnp.asarray(0), value=jnp.asarray(2.0))
    lowered = optimizer.rates(state, 0)["top"]
    assert lowered == pytest.approx(0.01)
    renewed = optim.renew(optimizer, state, PARAMS, ("top",))
    assert optimizer.rates(renewed, 0)["top"] == lowered
    old, new = (dict(jax.tree_util.tree_leaves_with_path(s)) for s in (state, renewed))
    slots = [path for path in new if "'top'" in jax.tree_util.keystr(path) and "trace" in jax.tree_util.keystr(path)]
    assert slots and all(old[path].any() and not new[path].any() for path in slots)


@pytest.mark.parametrize("schedule", ["plateau", "exponential", "steps"])
def test_a_schedule_that_counts_rounds_needs_their_length(schedule):
    with pytest.raises(ConfigError, match=r"optimizer.body.every='never', but schedule="):
        made(every=0, schedule=schedule)


def test_plateau_of_a_method_that_shows_no_loss_is_refused():
    with pytest.raises(ConfigError, match="schedule='plateau' waits for a training loss"):
        made(method=METHOD._replace(update=lambda state, batch, rng: None), schedule="plateau")


@pytest.mark.wide
def test_plateau_in_a_training_is_logged_and_survives_a_restart(tmp_path):
    fields = {"rounds": 4, "refresh_every": "2 steps", "cluster__runs": 1, "optimizer__body__schedule": "none"}
    fields["model__blocks"] = 1
    fields |= {
        f"optimizer__top__{name}": v for name, v in {"schedule": "plateau", "patience": 0, "every": "1 step"}.items()
    }
    config = smaller_config(**fields)
    trained(config, tmp_path / "whole", few_digits())
    rounds = [2, 4]
    for number in rounds:
        config.rounds = number
        snapshot = trained(config, tmp_path / "cut", few_digits())
    logs = [(tmp_path / name / "metrics.csv").read_text() for name in ("whole", "cut")]
    rates = [[line.split(",") for line in log.splitlines()] for log in logs]
    column = rates[0][0].index("lr/top")
    assert [row[column] for row in rates[0]] == [row[rates[1][0].index("lr/top")] for row in rates[1]]
    assert float(rates[0][-1][column]) < config.optimizer.top.lr
    assert np.isfinite(snapshot.state.params["top"]["kernel"]).all()


def test_methods_with_their_own_optimiser_report_no_configured_rate(monkeypatch, tmp_path):
    from toys import two_optimizers

    monkeypatch.setattr(methods, "get", two_optimizers)
    stage = prepared(smaller_config(), tmp_path, few_digits())
    assert stage.optimizer.rates(stage.first().state.opt_state, 0) == {}


def test_a_frozen_body_does_not_move_whatever_the_decay(tmp_path):
    config = smaller_config(freeze_body=True, optimizer__body__weight_decay=0.1)
    stage = prepared(config, tmp_path, few_digits())
    first = stage.first()
    state, targets, _ = refresh(stage, *first, 0, last=False)
    before = jax.device_get(state.params["body"])
    state, _, _ = stage.step(state, next(loop._batches(stage, targets, 0)), jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(state.params["body"]))
