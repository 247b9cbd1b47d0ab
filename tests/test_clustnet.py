"""ClustNet: its network and gate against what is worked out by hand, whose turn it is, and the real thing, small."""

import json
import re
import shutil
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import few_digits, prepared, run, trained, with_settings

from jaxclust import config as config_lib
from jaxclust import main, methods, runtime
from jaxclust.cluster import warn_once
from jaxclust.config import from_file
from jaxclust.errors import ConfigError
from jaxclust.features import score_file
from jaxclust.jobs import sweep
from jaxclust.methods import cae, clustnet, gate, mixture, terms, turns
from jaxclust.methods.base import DataInfo, Targets, TrainState
from jaxclust.models.layers import RowNorm, batch_norm
from jaxclust.pictures import Seen, _layers
from jaxclust.runtime import AXIS, StopSignal
from jaxclust.train import loop, probes
from jaxclust.train.checkpoint import Checkpoints, Snapshot
from jaxclust.train.stage import example_batch, layer_names, prepare

DIGITS = DataInfo(1400, (8, 8, 1), 10)


def settings(variant="digits", **overrides):
    made = from_file(Path("configs/clustnet.py"), variant)
    made.runtime.devices = 1
    return with_settings(made, **overrides)


def small(k=3, **overrides):
    """Linear experts in float64, k of them, and a gate of a single layer."""
    overrides = {"clustnet__gate__dense_layers": 1, "clustnet__gate__dense_size": (1,), **overrides}
    return settings(runtime__dtype="float64", cluster__k=k, **overrides)


def made(config, images, seed=0):
    """The network of a config, its parameters and statistics."""
    net = mixture.build(config)
    params, extra = jax.jit(partial(mixture.init, net))(jax.random.key(seed), {"views": {"train": images}})
    return net, params, extra["batch_stats"]


def shapes_of(config, shape, size=60_000):
    """Shapes of the parameters of the method on images."""
    method = methods.get(config, DataInfo(size, shape, 10))
    batch = example_batch(method, DataInfo(size, shape, 10), config.batch_size, config.views)
    params = jax.eval_shape(method.init, jax.random.key(0), batch)[0]
    return params, {name: sum(leaf.size for leaf in jax.tree.leaves(params[name])) for name in params}


def test_networks_have_the_published_numbers_of_parameters():
    _, counts = shapes_of(settings("mnist"), (28, 28, 1))
    assert counts == {"gate": 1745, "experts": 5 * 146}
    params, _ = shapes_of(settings("cifar10"), (32, 32, 3))
    assert params["gate"]["output"]["kernel"].shape == (192, 5)
    assert params["experts"]["output"]["kernel"].shape == (5, 27, 2)
    params, counts = shapes_of(settings("mnist,shared"), (28, 28, 1))
    assert params["body"]["output"]["kernel"].shape == (32 * 7 * 7, 100)
    assert [params["gate"][name]["kernel"].shape for name in ("hidden1", "output")] == [(100, 64), (64, 5)]
    assert counts["experts"] == 5 * 202


def test_what_is_recommended_is_the_default_and_no_variant_but_its_own_has_it():
    for variant, recommended in (("", True), ("recommended", True), ("digits", False), ("mnist", False)):
        config = settings(variant)
        s = config.clustnet
        own = (config.batch_size, config.rounds, s.lr, s.gate.dense_layers, s.group_diversity, s.gate_entropy)
        assert (own == (64, 60, 0.1, 1, 1.0, -0.3)) == recommended and s.diversity == 0


@pytest.mark.parametrize(
    ("variant", "row"),
    [("digits", (4, 0.01, 30, 0.0)), ("diverse", (16, 0.05, 60, 0.3)), ("mnist10k", (4, 0.01, 10, 0.0))],
)
def test_rows_of_digits_are_those_of_the_specification(variant, row):
    config = settings(variant)
    s = config.clustnet
    assert (config.batch_size, s.lr, config.rounds, s.diversity) == row
    assert (s.momentum, s.period, s.mode, s.combine, config.cluster.k) == (0.5, 0, "joint", "sum", 5)
    assert (s.gate.layers, s.gate.dense_layers, s.gate.dense_size) == (0, 3, (128, 64))  # 64-128-64-5
    assert (s.experts.layers, s.experts.dense_layers, s.encoder.layers) == (0, 1, 0)  # linear, on the pixels


def test_shipped_settings_are_those_of_the_specification():
    s = settings("mnist").clustnet
    assert (s.lr, s.lr_gate, s.momentum, s.optimizer, s.period, s.decision) == (0.01, -1.0, 0.5, "sgd", 2, "sample")
    assert (s.combine, s.mode, s.best_share, s.encoder.gradient) == ("sum", "joint", (0.9, 0.5, 0.1), "both")
    assert not any(s[name] for name in ("noise", "gate_entropy", "diversity", "group_diversity", *clustnet.LAYERED))


def test_experts_are_drawn_by_their_probability_whatever_device_has_the_image():
    p = jnp.array([0.5, 0.3, 0.2])
    noise = gate.noise(jax.random.key(0), jnp.arange(100_000), 3)
    found = gate.drawn(jnp.tile(jnp.log(p), (100_000, 1)), noise, 1.0)
    assert set(np.unique(found)) == {0, 1}
    np.testing.assert_allclose(found.mean(axis=0), p, atol=0.01)
    np.testing.assert_array_equal(gate.noise(jax.random.key(0), jnp.arange(50, 60), 3), noise[50:60])
    relaxed = gate.gumbel(jnp.tile(jnp.log(p), (100_000, 1)), noise, 0.5)
    np.testing.assert_array_equal(relaxed, found)


def test_each_decision_draws_or_not_in_training_and_in_evaluation():
    logits = jax.random.normal(jax.random.key(0), (500, 4))
    noises = [gate.noise(jax.random.key(n), jnp.arange(500), 4) for n in range(2)]
    draws = {
        name: tuple(bool((f(logits, noises[0], 1.0) != f(logits, noises[1], 1.0)).any()) for f in decision)
        for name, decision in gate.DECISIONS.items()
    }
    assert draws == {
        "sample": (True, False), "always_sample": (True, True), "argmax": (False, False), "soft": (False, False),
        "gumbel": (True, False),
    }  # fmt: skip
    largest = jax.nn.one_hot(jnp.argmax(logits, axis=1), 4)
    for name, decision in gate.DECISIONS.items():
        expected = largest if name in ("sample", "argmax", "gumbel") else None
        if expected is not None:
            np.testing.assert_array_equal(decision.evaluation(logits, noises[0], 1.0), expected)
    np.testing.assert_array_equal(gate.soft(logits, noises[0], 1.0), jax.nn.softmax(logits))
    assert gate.likeliest(jnp.zeros((1, 3)), noises[0][:1, :3], 1.0).tolist() == [[1, 0, 0]]


def test_gradients_go_straight_through_a_choice_to_the_probabilities(float64):
    logits, weights = jax.random.normal(jax.random.key(0), (2, 3, 4))
    noise = gate.noise(jax.random.key(1), jnp.arange(3), 4).astype(logits.dtype)
    p = jax.nn.softmax(logits)
    expected = p * (weights - (p * weights).sum(axis=1, keepdims=True))  # the Jacobian of softmax
    for name, choose in (("drawn", gate.drawn), ("likeliest", gate.likeliest), ("soft", gate.soft)):
        found = jax.grad(lambda a, f=choose: jnp.sum(f(a, noise, 1.0) * weights))(logits)
        np.testing.assert_allclose(found, expected, atol=1e-12, err_msg=name)
    q = jax.nn.softmax((logits + noise) / 0.3)
    found = jax.grad(lambda a: jnp.sum(gate.gumbel(a, noise, 0.3) * weights))(logits)
    np.testing.assert_allclose(found, q * (weights - (q * weights).sum(axis=1, keepdims=True)) / 0.3, atol=1e-12)


def hard(number, k):
    return jax.nn.one_hot(jnp.asarray(number), k, dtype=jnp.float64)


def answers(net, params, stats, x, combine="sum"):
    """(choice) -> log-probabilities of images x by the experts, in evaluation mode."""
    changed = net._replace(settings=with_settings_of(net, combine))
    return jax.jit(lambda choice: mixture.ask(changed, params, stats, x, choice, False, jax.random.key(0)).output)


def with_settings_of(net, combine):
    made = net.settings.copy_and_resolve_references()
    made.combine = combine
    return made


def test_the_gates_gradient_is_that_of_two_linear_experts_by_hand(float64):
    x = jax.random.normal(jax.random.key(0), (5, 6))
    net, params, stats = made(small(k=2), x)
    number, target = np.array([0, 1, 1, 0, 1]), np.array([1, 0, 1, 0, 0])
    choice, say = hard(number, 2), answers(net, params, stats, x)

    def value(c):
        return clustnet.nll(say(c), target).sum()

    p = jax.nn.softmax(jax.random.normal(jax.random.key(1), (5, 2)))
    found = jax.jit(jax.grad(lambda p: value(gate.straight_through(jnp.asarray(number), p))))(p)
    kernel, bias = (np.asarray(params["experts"]["output"][name]) for name in ("kernel", "bias"))
    outputs = np.stack([(np.asarray(choice)[:, k, None] * x) @ kernel[k] + bias[k] for k in range(2)])
    total = jax.nn.log_softmax(outputs).sum(axis=0)
    residual = jax.nn.softmax(total) - np.eye(2)[target]  # of the sum, and since its rows add up to 0 of each output
    by_hand = np.stack([((x @ kernel[k]) * residual).sum(axis=1) for k in range(2)], axis=1)
    np.testing.assert_allclose(found, by_hand, atol=1e-12)
    for row, k in ((0, 0), (0, 1), (1, 0), (2, 1)):  # entries of the choice that are and are not chosen
        step = np.zeros((5, 2))
        step[row, k] = 1e-6
        difference = (value(choice + step) - value(choice - step)) / 2e-6
        np.testing.assert_allclose(found[row, k], difference, atol=1e-7)


def test_experts_are_added_up_or_the_chosen_one_is_selected(float64):
    x = jax.random.normal(jax.random.key(0), (7, 6))
    net, params, stats = made(small(), x)
    number = np.arange(7) % 3
    kernel, bias = (np.asarray(params["experts"]["output"][name]) for name in ("kernel", "bias"))
    own = np.asarray(jax.nn.log_softmax(np.einsum("bd,bdo->bo", x, kernel[number]) + bias[number]))
    others = np.asarray(jax.nn.log_softmax(bias)).sum(axis=0) - np.asarray(jax.nn.log_softmax(bias))[number]
    expected = np.asarray(jax.nn.log_softmax(own + others))
    np.testing.assert_allclose(answers(net, params, stats, x)(hard(number, 3)), expected, atol=1e-12)
    np.testing.assert_allclose(answers(net, params, stats, x, "select")(hard(number, 3)), own, atol=1e-12)


CONVOLUTIONS = {
    "clustnet__experts__layers": 2,
    "clustnet__experts__pool_out": 2,
    "clustnet__experts__channels": 2,
}


@pytest.mark.parametrize(
    ("combine", "dense_layers"),
    [
        ("sum", 1),
        ("select", 0),
        pytest.param("sum", 0, marks=pytest.mark.wide),
        pytest.param("select", 1, marks=pytest.mark.wide),
    ],
)
def test_forced_gates_say_what_each_expert_would_alone(float64, combine, dense_layers):
    x = jax.random.normal(jax.random.key(0), (4, 8, 8, 1))
    config = small(clustnet__experts__dense_layers=dense_layers, clustnet__combine=combine, **CONVOLUTIONS)
    net, params, stats = made(config, x)
    stats = jax.tree.map(lambda leaf: leaf + 0.3, stats)  # so that zeros do not stay zeros
    found = jax.jit(partial(mixture.forced, net))(params, stats, x)
    for k in range(3):
        alone = answers(net, params, stats, x, combine)(hard([k] * 4, 3))
        np.testing.assert_allclose(found[k], alone, atol=1e-10)
    assert np.abs(found[0] - found[1]).max() > 1e-3


@pytest.mark.parametrize("sum_pixels", [False, True])
def test_maps_of_experts_without_a_layer_of_their_own_are_added_up_for_a_common_one(float64, sum_pixels):
    x = jax.random.normal(jax.random.key(0), (4, 8, 8, 1))
    sizes = {"clustnet__experts__dense_layers": 0, "clustnet__experts__sum_pixels": sum_pixels, **CONVOLUTIONS}
    net, params, stats = made(small(**sizes), x)
    choice = hard([0, 2, 1, 1], 3)
    given = jnp.stack([choice[:, k, None, None, None] * x for k in range(3)])
    maps = np.asarray(mixture.run_experts(net, params, stats, given, False, jax.random.key(0)).output).sum(axis=0)
    assert maps.shape == (4, 2, 2, 2)
    seen = maps.sum(axis=(1, 2)) if sum_pixels else maps.reshape(4, 8)
    expected = jax.nn.log_softmax(seen @ params["top"]["output"]["kernel"] + params["top"]["output"]["bias"])
    np.testing.assert_allclose(answers(net, params, stats, x)(choice), expected, atol=1e-10)


@pytest.mark.wide
def test_maps_of_two_halves_of_the_experts_stand_side_by_side(float64):
    x = jax.random.normal(jax.random.key(0), (4, 8, 8, 1))
    sizes = {"clustnet__experts__dense_layers": 0, "clustnet__combine": "halves", **CONVOLUTIONS}
    net, params, stats = made(small(4, **sizes), x)
    choice = hard([0, 3, 1, 2], 4)
    given = jnp.stack([choice[:, k, None, None, None] * x for k in range(4)])
    maps = np.asarray(mixture.run_experts(net, params, stats, given, False, jax.random.key(0)).output)
    seen = np.concatenate([maps[0] + maps[1], -maps[2] - maps[3]], axis=3).reshape(4, -1)
    expected = jax.nn.log_softmax(seen @ params["top"]["output"]["kernel"] + params["top"]["output"]["bias"])
    np.testing.assert_allclose(answers(net, params, stats, x, "halves")(choice), expected, atol=1e-10)


def test_in_bfloat16_only_layers_compute():
    config, images = settings("shared", runtime__dtype="bfloat16"), np.zeros((2, 8, 8, 1), np.uint8)
    method, net = methods.get(config, DIGITS), mixture.build(config)
    batch = example_batch(method, DIGITS, 2, config.views)
    params, extra = jax.eval_shape(method.init, jax.random.key(0), batch)
    learn = jax.vmap(partial(clustnet.joint, net), in_axes=None, axis_size=1, axis_name=AXIS)
    learnt = jax.eval_shape(learn, params, extra["batch_stats"], batch, jax.random.key(0))
    predicted = jax.eval_shape(method.predict, params, extra, images)
    assert predicted.pop("cluster").dtype == predicted.pop("binary").dtype == jnp.int32
    feature = jax.eval_shape(method.embed, params, extra, images)
    found = jax.tree.leaves((params, extra, learnt, predicted, feature))
    assert {leaf.dtype for leaf in found} == {jnp.dtype("float32")}


def test_in_separated_training_the_gate_follows_the_best_expert_as_often_as_it_should():
    net = mixture.build(small(k=4))
    best = jnp.full(4000, 2)
    for epoch, share in ((0, 0.9), (1, 0.5), (2, 0.1), (7, 0.1)):
        found = clustnet.followed(net, best, jnp.arange(4000), jnp.asarray(epoch))
        counts = np.bincount(found, minlength=4) / 4000
        others = (1 - share) / 4
        np.testing.assert_allclose(counts, [others, others, share + others, others], atol=0.03)


def test_in_its_turn_the_gate_learns_which_expert_is_best_and_its_own_terms(float64):
    x = jax.random.normal(jax.random.key(0), (6, 8, 8, 1))
    target = np.array([1, 0, 1, 0, 0, 1])
    net, params, stats = made(small(clustnet__mode="separated", clustnet__period=1), x)
    forced = np.asarray(mixture.forced(net, params, stats, x))  # ln P of N and P by each expert [K, B, 2]
    best = (-forced[:, np.arange(6), target]).argmin(axis=0)
    assert len({*best.tolist()}) > 1
    weights = {"gate_entropy": 0.2, "diversity": 0.3, "group_diversity": 0.4}

    def loss(share, **changes):
        s = net.settings.copy_and_resolve_references()
        s.update({"best_share": share, **changes})
        batch = {"views": {"train": x}, "target": target, "weight": np.ones(6), "position": jnp.arange(6)}
        learn = jax.vmap(partial(clustnet.gate_alone, net._replace(settings=s), 4), None, axis_name=AXIS, axis_size=1)
        return jax.jit(lambda step: learn(params, stats, {**batch, "step": step}, jax.random.key(0)))

    learnt = loss((1.0,))(0)
    log_gate = np.asarray(jax.nn.log_softmax(learnt.logits[0]))
    expected = -log_gate[np.arange(6), best].mean()
    assert learnt.loss[0] == pytest.approx(expected, rel=1e-6)
    by_epoch = loss((0.0, 1.0, 0.0))
    for step, first in ((0, True), (3, True), (4, False)):  # epochs of four steps: the first trained one is epoch 1
        assert (abs(by_epoch(step).loss[0] - expected) < 1e-9) == first

    def entropy(q):
        return -(q * np.log(q)).sum(axis=-1)

    p = np.exp(log_gate)
    values = {
        "gate_entropy": entropy(p).mean(), "diversity": entropy(p.mean(axis=0)),
        "group_diversity": np.mean([entropy(p[target == g].mean(axis=0)) for g in range(2)]),
    }  # fmt: skip
    added = sum(weight * values[name] for name, weight in weights.items())
    assert loss((1.0,), **weights)(0).loss[0] == pytest.approx(expected - added, rel=1e-6)


def over_devices(function):
    """A function of two devices' rows, each [2, ...]; both must say the same."""
    mapped = jax.jit(jax.vmap(function, axis_name=AXIS))

    def alike(*arrays):
        found = mapped(*arrays)
        np.testing.assert_allclose(found[0], found[1], rtol=1e-6)
        return found[0]

    return alike


def test_diversities_and_gate_entropy_reward_entropy():
    logits = 3 * jax.random.normal(jax.random.key(0), (2, 8, 5))
    target = np.array([[0, 0, 1, 0, 1, 0, 1, 1], [0] * 8])
    p = np.asarray(jax.nn.softmax(logits)).reshape(16, 5)
    group = target.ravel()

    def entropy(q):
        return -(q * np.log(q)).sum(axis=-1)

    expected = {
        "diversity": entropy(p.mean(axis=0)),
        "group_diversity": np.mean([entropy(p[group == g].mean(axis=0)) for g in range(2)]),
        "gate_entropy": entropy(p).mean(),
    }
    for name, value in expected.items():
        net = mixture.build(settings(**{f"clustnet__{name}": 0.5}))

        def term(logits, target, net=net):
            return clustnet.added(net, {}, mixture.Said(logits, None, None, None, {}), {"target": target})

        both = over_devices(term)
        assert both(logits, target) == pytest.approx(-0.5 * value, rel=1e-4)
        slope = jax.jit(jax.grad(lambda x, f=term: jax.vmap(f, axis_name=AXIS)(x, target).mean()))(logits)
        assert both(logits - slope, target) < both(logits, target)
    alone = terms.usage_entropy_of_groups  # of a batch without a group it is that of the other
    found = jax.vmap(lambda q: alone(q, jnp.zeros(8, int)), axis_name=AXIS)(jax.nn.softmax(logits[:1]))
    assert found[0] == pytest.approx(entropy(p[:8].mean(axis=0)), rel=1e-4)


@pytest.mark.parametrize("name", clustnet.LAYERED)
def test_terms_of_maps_and_filters_are_added_to_the_loss_to_be_small(name):
    net, params, _ = made(settings(**CONVOLUTIONS, **{f"clustnet__{name}": 0.5}), np.zeros((1, 8, 8, 1), np.uint8))
    rng = np.random.default_rng(0)
    maps = rng.random((2, 5, 6, 2, 2, 2)).astype(np.float32)
    choice, target = np.eye(5, dtype=np.float32)[rng.integers(2, size=(2, 6))], rng.integers(2, size=(2, 6))
    key = jax.random.fold_in(clustnet._key(net, "filters"), 7)

    def added(maps, choice, target):
        said = mixture.Said(jnp.zeros((6, 5)), choice, None, maps, {})
        return clustnet.added(net, params, said, {"target": target, "step": 7})

    def alone(maps, choice, target):
        if name == "filter_similarity":  # of the last convolution
            return terms.filter_similarity(params["experts"]["stack"]["conv2_conv"]["kernel"], key)
        return getattr(terms, name)(maps, terms.sets(maps, choice, target))

    found, expected = (over_devices(f)(maps, choice, target) for f in (added, alone))
    assert abs(expected) > 1e-3 and float(found) == pytest.approx(0.5 * float(expected), rel=1e-5)


def test_filters_of_one_expert_are_compared_with_those_of_the_others(float64):
    kernels = np.random.default_rng(0).standard_normal((3, 2, 2, 1, 4))
    key = jax.random.key(3)
    one = int(jax.random.randint(key, (), 0, 3))
    rows = kernels.reshape(3, 4, 4).transpose(0, 2, 1)
    unit = rows / np.linalg.norm(rows, axis=2, keepdims=True)
    expected = np.mean([unit[one] @ unit[k].T for k in range(3) if k != one])
    assert terms.filter_similarity(jnp.asarray(kernels), key) == pytest.approx(expected, rel=1e-5)


def test_maps_are_compared_within_an_expert_and_a_group_over_all_devices():
    rng = np.random.default_rng(0)
    maps = rng.uniform(0, 2, (2, 3, 6, 2, 2, 2)).astype(np.float32)  # [device, K, B, H, W, C]
    choice, target = np.eye(3)[rng.integers(0, 3, (2, 6))], rng.integers(0, 2, (2, 6))
    maps[0, :, 1] = 0  # which does not count
    entropies, spreads = [], []
    for k in range(3):
        for group in range(2):
            of = (choice.argmax(axis=2) == k) & (target == group)
            of[0, 1] = False
            members = maps[:, k][of]
            if len(members) > 1:
                entropies.append((-members * np.log(members + 1e-7)).mean())
                spreads.append(members.std(axis=0, ddof=1).mean())
    assert len(entropies) > 1
    for term, expected in ((terms.map_entropy, entropies), (terms.map_spread, spreads)):
        found = over_devices(lambda m, c, t, f=term: f(m, terms.sets(m, c, t)))(maps, choice, target)
        assert found == pytest.approx(np.mean(expected), rel=1e-4)


TREE = {"body": jnp.ones(2), "gate": {"a": jnp.ones(3)}, "experts": jnp.ones(4)}


def steps(config, count):
    """(parameters, optimiser state) before and after each of `count` steps down a gradient of ones."""
    rule = turns.optimizer(config, DIGITS._replace(size=10))
    params, state = TREE, rule.init(TREE)
    update = jax.jit(lambda state, step: rule.update(TREE, state, None, step=step))
    for step in range(count):
        changes, new = update(state, jnp.asarray(step))
        after = jax.tree.map(jnp.add, params, changes)
        yield params, state, after, new
        params, state = after, new


def moved(before, after):
    return any(np.any(a != b) for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True))


def test_gate_and_experts_move_in_turns_which_begin_anew_in_each_epoch():
    found = ""
    for before, state, after, new in steps(settings("separate", batch_size=2), 7):  # 5 steps an epoch
        who = [name for name in ("gate", "experts") if moved(before[name], after[name])]
        assert len(who) == 1 and moved(before["body"], after["body"])
        other = "experts" if who == ["gate"] else "gate"
        np.testing.assert_equal(jax.device_get(new[other]), jax.device_get(state[other]))
        assert moved(state[who[0]], new[who[0]])
        found += who[0][0]
    assert found == "ggeeg" + "gg"


def test_without_turns_both_move_and_the_encoder_twice_and_separated_training_begins_with_the_experts():
    config = settings(batch_size=2, clustnet__lr=0.1, clustnet__lr_gate=0.01)
    for number, (before, _, after, _) in enumerate(steps(config, 3)):
        momentum = sum(0.5**i for i in range(number + 1))  # v = mu v + g
        for name, rate in (("gate", 0.01), ("experts", 0.1), ("body", 0.11)):
            for old, new in zip(jax.tree.leaves(before[name]), jax.tree.leaves(after[name]), strict=True):
                np.testing.assert_allclose(old - new, rate * momentum, rtol=1e-5)
    config = settings(batch_size=2, clustnet__lr=0.1, clustnet__lr_gate=0.01, clustnet__encoder__gradient="gate")
    (before, _, after, _), *_ = steps(config, 1)
    np.testing.assert_allclose(before["body"] - after["body"], 0.01, rtol=1e-5)  # the experts leave it alone
    (before, _, after, _), *_, (waiting, _, still, _) = steps(with_settings(config, clustnet__period=1), 2)
    assert moved(before["body"], after["body"]) and not moved(waiting["body"], still["body"])
    separated = settings(batch_size=2, clustnet__mode="separated", clustnet__period=1)
    who = ["gate" if moved(before["gate"], after["gate"]) else "experts" for before, _, after, _ in steps(separated, 3)]
    assert who == ["experts", "gate", "experts"]


def test_a_list_of_rates_is_shared_out_over_epochs_and_a_switch_resets_the_momentum():
    config = settings(batch_size=5, rounds=9, clustnet__lr=0.01, clustnet__lr_next=(0.001,))
    lengths = [float((before["gate"]["a"] - after["gate"]["a"])[0]) for before, _, after, _ in steps(config, 13)]
    rate, momentum, expected = 0.01, 0.0, []
    for step in range(13):  # two steps an epoch; epoch 6 begins with step 10
        if step == 10:
            rate, momentum = 0.001, 0.0
        momentum = 0.5 * momentum + 1
        expected.append(rate * momentum)
    np.testing.assert_allclose(lengths, expected, rtol=2e-3)


def test_the_gate_may_have_a_list_of_rates_of_its_own_or_has_that_of_the_experts():
    lists = {"clustnet__lr": 0.1, "clustnet__lr_next": (0.01,)}
    own = settings(rounds=4, **lists, clustnet__lr_gate=0.5, clustnet__lr_gate_next=(0.25,))
    assert turns.rates(own) == {"gate": (0.5, 0.25), "experts": (0.1, 0.01)}
    assert turns.rates(settings(rounds=4, **lists)) == {"gate": (0.1, 0.01), "experts": (0.1, 0.01)}
    with pytest.raises(ConfigError, match="gate and experts must have equally many rates"):
        turns.rates(settings(rounds=4, **lists, clustnet__lr_gate=0.5))


def test_the_last_layer_of_an_autoencoder_is_linear_unless_it_is_asked_to_be_as_published():
    sizes = {"clustnet__encoder__pool": 1, "clustnet__encoder__pool_out": 1, "clustnet__encoder__kernel": 3}
    for asked in (False, True):
        net = cae.network(settings("cae", clustnet__encoder__decoder_relu=asked, **sizes), (8, 8, 1))
        assert net.decoder.last_relu == asked


def test_noise_is_added_to_the_gates_gradient_alone_and_as_large_as_asked():
    found = turns.noisy({"a": jnp.zeros(20_000).at[0].set(3.0), "b": jnp.zeros(5)}, 0.5, jax.random.key(0))
    assert float(found["a"][1:].std()) == pytest.approx(1.5, rel=0.05) and not found["b"].any()
    first = next(steps(settings(batch_size=2, clustnet__noise=0.5), 1))
    for name, differs in (("gate", True), ("experts", False)):
        change = jax.tree.leaves(first[0][name])[0] - jax.tree.leaves(first[2][name])[0]
        assert (np.abs(change - 0.01).max() > 1e-4) == differs


@pytest.mark.parametrize("name", ["adam", "amsgrad"])
def test_other_rules_move_by_their_rate(name):
    for before, _, after, _ in steps(settings(batch_size=2, clustnet__optimizer=name), 2):
        np.testing.assert_allclose(before["experts"] - after["experts"], 0.01, rtol=1e-3)


def test_an_expert_sees_nothing_of_images_that_it_is_not_given_and_always_drawn_ones_are_drawn_in_evaluation():
    images = few_digits(100).splits["train"].images
    found = {}
    for decision in ("sample", "always_sample"):
        config = settings(clustnet__decision=decision)
        net, params, stats = made(config, images)
        predict, order = jax.jit(partial(clustnet.predict, net)), np.arange(99, -1, -1)
        found[decision] = predict(params, {"batch_stats": stats}, images)
        turned = predict(params, {"batch_stats": stats}, images[order])
        for name, values in turned.items():
            np.testing.assert_allclose(values, found[decision][name][order], atol=1e-6)
    np.testing.assert_array_equal(found["sample"]["cluster"], found["always_sample"]["cluster"])
    assert (found["sample"]["groups"] != found["always_sample"]["groups"]).any(axis=1).mean() > 0.3
    for name in ("groups", "log_probs"):
        np.testing.assert_allclose(np.exp(found["sample"][name]).sum(axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize("decision", ["sample", "argmax"])
def test_in_training_experts_are_drawn_anew_for_each_position_or_not_at_all(decision):
    images = few_digits(100).splits["train"].images
    net, params, stats = made(settings(clustnet__decision=decision), images)
    noise = gate.noise(jax.random.key(1), jnp.arange(100), 5)
    said = mixture.forward(net, params, stats, images, noise, True, jax.random.key(0))
    drawn, likeliest = (f(said.logits, noise, 1.0) for f in (gate.drawn, gate.likeliest))
    assert (drawn != likeliest).any(axis=1).mean() > 0.3
    np.testing.assert_array_equal(said.choice, drawn if decision == "sample" else likeliest)

    @jax.jit
    def learnt(positions):
        of = {"views": {"train": images}, "position": positions, "weight": jnp.ones(100), "target": jnp.zeros(100, int)}
        one = jax.vmap(lambda key: clustnet.joint(net, params, stats, of, key), axis_name=AXIS)
        return one(jax.random.key(0)[None]).log_probs[0]

    first, same, other = (learnt(jnp.arange(start, start + 100)) for start in (0, 0, 100))
    np.testing.assert_array_equal(first, same)
    assert ((first != other).any(axis=1).mean() > 0.3) == (decision == "sample")


@pytest.mark.wide
def test_the_temperature_of_the_settings_is_that_of_the_draws_gradient():
    images = few_digits(20).splits["train"].images
    noise = gate.noise(jax.random.key(1), jnp.arange(20), 5)
    found = {}
    for temperature in (0.2, 2.0):
        net, params, stats = made(settings(clustnet__decision="gumbel", clustnet__temperature=temperature), images)
        logits = mixture.forward(net, params, stats, images, noise, True, jax.random.key(0)).logits

        def chosen(of_gate, net=net, params=params, stats=stats):
            changed = {**params, "gate": of_gate}
            return mixture.forward(net, changed, stats, images, noise, True, jax.random.key(0)).choice[:, 0].sum()

        found[temperature] = jax.jit(jax.grad(chosen))(params["gate"])["output"]["bias"]
        expected = jax.grad(lambda b, a=logits, t=temperature: jax.nn.softmax((a + b + noise) / t)[:, 0].sum())
        np.testing.assert_allclose(found[temperature], expected(jnp.zeros(5)), atol=1e-5)
    assert np.abs(found[0.2] - found[2.0]).max() > 0.1


@pytest.mark.parametrize("gradient", ["both", "gate", "none"])
def test_the_encoder_learns_from_whom_it_should(gradient):
    x = jax.random.normal(jax.random.key(0), (4, 8, 8, 1))
    sizes = {"clustnet__encoder__channels": 2, "clustnet__encoder__kernel": 3, "clustnet__encoder__dim": 6}
    net, params, stats = made(settings("shared", clustnet__encoder__gradient=gradient, **sizes), x)

    @jax.jit
    def slopes(params):
        def values(body):
            said = mixture.forward(net, {**params, "body": body}, stats, x, jnp.zeros((4, 5)), False, jax.random.key(0))
            return said.logits[:, 0].sum(), said.log_probs[:, 0].sum()

        return jax.jacrev(values)(params["body"])

    _, by_experts = slopes({**params, "gate": jax.tree.map(jnp.zeros_like, params["gate"])})  # nothing through the gate
    by_gate, _ = slopes(params)
    assert any(leaf.any() for leaf in jax.tree.leaves(by_gate)) == (gradient != "none")
    assert any(leaf.any() for leaf in jax.tree.leaves(by_experts)) == (gradient == "both")
    code = jnp.ones((4, 6))
    alone = jax.grad(lambda code: mixture.for_experts(net, code).sum())(code)  # of the stage with one expert, too
    assert bool(alone.any()) == (gradient == "both")


CONVOLVED = {
    "batch_size": 16, "eval_batch_size": 64, "cluster__k": 3, "rounds": 1, "refresh_every": "2 steps",
    "clustnet__gate__dense_layers": 1, "clustnet__gate__dense_size": (1,), **CONVOLUTIONS,
}  # fmt: skip


def stepped(config, workdir, count=2):
    """The states of a stage from its first to that after `count` steps, and the rows of each step."""
    stage = prepared(config, workdir, few_digits(64))
    state, targets = stage.first()
    states, rows = [jax.device_get(state)], []
    for batch, _ in zip(loop._batches(stage, targets, 0), range(count), strict=False):
        state, of_step, _ = stage.step(state, batch, jax.random.key(0))
        states.append(jax.device_get(state))
        rows.append(jax.device_get(of_step))
    return states, rows


@pytest.mark.wide
def test_draws_statistics_and_terms_are_the_same_on_any_number_of_devices(tmp_path):
    weights = {f"clustnet__{name}": 0.1 for name in ("group_diversity", "diversity", *clustnet.LAYERED)}
    found = []
    for devices in (1, 2):
        config = settings(clustnet__lr=0.1, **CONVOLVED, **weights)
        config.runtime.devices = devices
        found.append(stepped(config, tmp_path / str(devices)))
    (one, rows), (two, others) = found
    for a, b in zip(jax.tree.leaves((one[-1].params, rows)), jax.tree.leaves((two[-1].params, others)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)
    assert moved(one[0].params["experts"], one[1].params["experts"])


def test_batch_norm_of_selected_images_is_that_of_these_alone_and_stays_where_there_are_none(float64):
    x = np.random.default_rng(0).standard_normal((6, 5, 4, 3)) + 2
    norm, usual = (
        kind(axis=None, param_dtype=jnp.float64, dtype=jnp.float64) for kind in (RowNorm, partial(batch_norm, True))
    )
    variables = usual.init(jax.random.key(0), x[:1])
    chosen = np.array([1.0, 0, 1, 1, 0, 0])
    found, after = norm.apply(variables, x, chosen, mutable=["batch_stats"])
    expected, alone = usual.apply(variables, x[chosen > 0], mutable=["batch_stats"])
    np.testing.assert_allclose(found[chosen > 0], expected, atol=1e-12)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-12), after, alone)
    found, after = norm.apply(variables, x, 0 * chosen, mutable=["batch_stats"])
    np.testing.assert_allclose(found, x / np.sqrt(1 + 1e-5), atol=1e-12)
    jax.tree.map(np.testing.assert_array_equal, after["batch_stats"], variables["batch_stats"])


@pytest.mark.wide
def test_experts_with_batch_norm_of_their_own_images_are_the_same_on_any_number_of_devices(tmp_path):
    found = []
    for devices in (1, 2):
        config = settings(clustnet__lr=0.1, clustnet__experts__bn_selected=True, **CONVOLVED)
        config.runtime.devices = devices
        found.append(stepped(config, tmp_path / str(devices))[0])
    one, two = (states[-1] for states in found)
    for a, b in zip(jax.tree.leaves((one.params, one.extra)), jax.tree.leaves((two.params, two.extra)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)
    assert moved(found[0][0].params["experts"], one.params["experts"])


def test_separated_training_moves_experts_then_the_gate_with_its_own_statistics(tmp_path):
    config = settings(clustnet__mode="separated", clustnet__period=1, clustnet__best_share=(0.5, 0.9), **CONVOLVED)
    config.runtime.devices = 2  # each must take the same branch
    (first, second, third), _ = stepped(config, tmp_path)
    for before, after, name, other in ((first, second, "experts", "gate"), (second, third, "gate", "experts")):
        assert moved(before.params[name], after.params[name]) and not moved(before.params[other], after.params[other])
    stats = [state.extra["batch_stats"]["experts"] for state in (first, second, third)]
    assert moved(stats[0], stats[1]) and not moved(stats[1], stats[2])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"groups": "0-4,4-9"}, "config.groups='0-4,4-9': of the classes 0 to 9 .* in both: 4"),
        ({"groups": ""}, "config.groups='' must be two groups"),
        ({"clustnet__mode": "separated"}, "mode='separated' moves in turns: config.clustnet.period must be at least 1"),
        ({"clustnet__gate__layers": 5}, "config.clustnet.gate: 5 convolutions with kernel=5.* leave nothing of 8 x 8"),
        ({"clustnet__encoder__layers": 2, "clustnet__experts__layers": 2}, "experts.layers=2 .* codes of the encoder"),
        ({"clustnet__gate__dense_size": (64, 32, 16)}, "gate.dense_size=.64, 32, 16. must be one number, or .* the 2"),
        ({"clustnet__experts__dense_layers": 0}, "experts.dense_layers=0 needs convolutions of the experts"),
        ({"clustnet__combine": "halves"}, "combine='halves' adds up maps .* even config.cluster.k .it is 5"),
        ({"clustnet__map_spread": 0.1}, "map_spread=0.1 needs convolutions of the experts"),
        ({"clustnet__lr_gate": 0.1, "clustnet__lr_next": (0.1,)}, "must have equally many rates"),
        ({"clustnet__lr_gate": -0.5}, "config.clustnet.lr_gate=-0.5 must be 0 or more, or -1"),
        ({"evaluate__metric_groups": "upstream", "cluster__k": 12}, "config.cluster.k=12 must be below 10"),
        ({"rounds": 0, "steps": 9, "clustnet__lr_next": (0.1,)}, "as many config.rounds as rates .0 for 2."),
        ({"freeze_body": True}, "config.freeze_body=True keeps the codes of an encoder: .* is 0"),
        ({"method": "cae"}, "config.method='cae' needs images, and convolutions that fit them: .*layers=0"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_work_starts(overrides, words):
    with pytest.raises(ConfigError, match=words):
        methods.get(settings(**overrides), DIGITS)


def test_one_expert_data_without_classes_and_convolutions_of_vectors_are_refused():
    with pytest.raises(ConfigError, match="config.cluster.k=1 must be at least 2"):
        settings(cluster__k=1)
    with pytest.raises(ConfigError, match="config.data.source='digits:397' has no classes; class folders are labels"):
        methods.get(settings(), DIGITS._replace(num_classes=None))
    with pytest.raises(ConfigError, match="gate.layers=2 are convolutions of images, which are vectors; set it to 0"):
        methods.get(settings(clustnet__gate__layers=2), DIGITS._replace(image_shape=(64,)))
    with pytest.raises(ConfigError, match="encoder.layers=2 are convolutions of images, which are vectors; .* to 0$"):
        methods.get(settings(clustnet__encoder__layers=2), DIGITS._replace(image_shape=(64,)))
    with pytest.raises(ConfigError, match="there is no layer 'expert9/conv1'; did you mean 'expert"):
        net, params, stats = made(settings(**CONVOLUTIONS), np.zeros((1, 8, 8, 1), np.uint8))
        mixture.embed(net, params, {"batch_stats": stats}, np.zeros((2, 8, 8, 1), np.uint8), ("expert9/conv1",))


def test_sizes_of_hidden_layers_are_one_for_all_or_one_for_each():
    for layers, sizes, hidden in ((3, (8, 4), (8, 4)), (3, (8,), (8, 8)), (1, (8, 4), ()), (2, (8,), (8,))):
        config = settings(clustnet__gate__dense_layers=layers, clustnet__gate__dense_size=sizes)
        methods.get(config, DIGITS)
        assert mixture.build(config).gate.hidden == hidden


@pytest.mark.wide
def test_all_maps_of_a_network_can_be_probed_and_pictured(tmp_path):
    layers = {"clustnet__gate__layers": 2, "clustnet__gate__kernel": 3, **CONVOLUTIONS}
    for name, overrides in (("clustnet", layers), ("cae", {"clustnet__encoder__layers": 2, **CONVOLUTIONS})):
        config = settings(method=name, clustnet__encoder__channels=2, scores__every="never", **overrides)
        stage = prepared(config, tmp_path, few_digits(64))
        widths = probes.widths(stage)
        assert tuple(widths) == (*layer_names(stage), "feature") and len(widths) == (13 if name == "clustnet" else 3)
        drawn = [layer.name for layer in _layers.layers(Seen(stage, None, None))]
        assert drawn == list(layer_names(stage))


def test_settings_are_read_strictly_by_command_line():
    def read(*arguments):
        return main.parse(["jaxclust", "--config=configs/clustnet.py:digits", *arguments]).config.clustnet

    assert read("--config.clustnet.gate.bn=False").gate.bn is False
    assert read("--config.clustnet.lr_next=(0.1,0.2)", "--config.clustnet.lr=0.3").lr_next == (0.1, 0.2)
    wrong = {
        "--config.clustnet.gate.bn=perhaps": "perhaps",
        "--config.clustnet.lr=fast": "fast",
        "--config.clustnet.period=0.5": "0.5",
        "--config.clustnet.periods=2": "config.clustnet.periods is unknown; did you mean 'clustnet.period'",
    }
    for argument, words in wrong.items():
        with pytest.raises(ConfigError, match=re.escape(words)):
            read(argument)


@pytest.mark.parametrize("data", ["digits", "mnist10k"])
def test_both_published_figures_are_presets_of_sweeps(data):
    for name, fields in (("grid", {"batch_size": 3, "clustnet.lr": 3}), ("seeds", {"seed": 5})):
        config = from_file(Path("configs/clustnet.py"), f"{data},{name}")
        found = sweep.parse(config)
        assert {field: len(values) for field, values in found.items()} == fields and 4 in found.get("batch_size", [4])
        assert len(sweep.plan(config, found)) == np.prod([*fields.values()]) and "accuracy" in config.report.pictures
    assert (config.batch_size, config.clustnet.lr, found["seed"]) == (4, 0.01, [1, 2, 3, 4, 5])
    if data == "mnist10k":
        assert (config.data.train_images, config.data.num_images, config.data.image_size) == (10_000, 10_000, 28)
        assert (config.rounds, config.refresh_every, config.eval_every) == (10, "1 epoch", "1 round")


@pytest.mark.medium
@pytest.mark.usefixtures("optimized")
def test_the_default_finds_classes_of_images_that_it_was_not_trained_on_from_two_groups(tmp_path):
    """After a sixth of its rounds; with two experts in use each group has 0.4, with one 0.2."""
    code = run("--config=configs/clustnet.py", f"--workdir={tmp_path}", "--config.report.pictures=",
               "--config.rounds=10", "--config.eval_every=never", "--config.scores.every=10 rounds",
               "--config.save_every=never")  # fmt: skip
    assert code == 0
    results = json.loads((tmp_path / "results.json").read_text())
    names = {f"{split}/{name}" for split in ("train", "test") for name in ("binary", "acc_p", "acc_n")}
    assert names <= set(results) and results["images"] == 1797
    assert results["test/binary"] >= 0.93 and results["test/acc_p"] >= 0.5 and results["test/acc_n"] >= 0.45
    scores = score_file.read(tmp_path / "scores" / "epoch10.csv")
    assert len(scores.label) == 397
    binary = np.mean((scores.log_probs[:, 1] > scores.log_probs[:, 0]) == (scores.label < 5))
    assert results["test/binary"] == pytest.approx(binary, abs=1e-6)


def test_falling_shares_of_the_best_expert_are_warned_of(caplog):
    methods.get(settings(clustnet__mode="separated", clustnet__period=7), DIGITS)
    assert re.search(r"best_share=\(0.9, 0.5, 0.1\) falls.*\(0.1, 0.5, 0.9\) rises", caplog.text)


def test_an_encoder_that_nothing_ever_moves_is_warned_of(caplog):
    warn_once.cache_clear()
    still = {"clustnet__encoder__gradient": "none"}
    methods.get(settings("shared", init_from="@cae", **still), DIGITS)
    methods.get(settings("shared"), DIGITS)
    methods.get(settings(**still), DIGITS)  # which has none
    assert "as it was drawn" not in caplog.text
    methods.get(settings("shared", **still), DIGITS)
    assert "encoder.gradient='none' without config.init_from: the encoder stays as it was drawn" in caplog.text


@pytest.mark.wide
def test_maps_of_gate_and_experts_can_be_looked_at():
    x = few_digits(4).splits["train"].images
    net, params, stats = made(settings(clustnet__encoder__layers=0, **CONVOLUTIONS), x)
    found = mixture.embed(net, params, {"batch_stats": stats}, x, ("expert0/conv1", "expert4/conv2", "feature"))
    assert [found[name].shape for name in found] == [(4, 8, 8, 2), (4, 4, 4, 2), (4, 64)]
    one = jax.tree.map(lambda leaf: leaf[4], {"params": params["experts"], "batch_stats": stats["experts"]})
    names = mixture.layer_names(net)
    assert names == tuple(f"expert{k}/conv{number}" for k in range(5) for number in (1, 2))
    assert set(mixture.embed(net, params, {"batch_stats": stats}, x, names)) == set(names)
    alone = net.expert.apply(one, (x / 255 - 0.3053) / 0.376, mutable=["maps"])[1]["maps"]["stack"]["conv2"][0]
    np.testing.assert_allclose(found["expert4/conv2"], alone, atol=1e-4)


@pytest.mark.wide
def test_a_stage_may_start_with_the_encoder_of_an_autoencoder_and_results_say_what_was_found(tmp_path):
    digits = few_digits(200).splits["train"]
    file = tmp_path / "digits.npz"
    np.savez(file, images=digits.images[:150], labels=digits.labels[:150],
             test_images=digits.images[150:], test_labels=digits.labels[150:])  # fmt: skip
    sizes = ("channels=4", "kernel=3", "dim=8")
    code = run("--config=configs/clustnet.py:cae,smoke", f"--workdir={tmp_path / 'run'}",
               f"--config.data.source=npz:{file}", "--config.refresh_every=2 steps", "--config.batch_size=16",
               "--config.stage.cae.rounds=1", "--config.eval_batch_size=64", "--config.log_every=1 step",
               "--config.eval_every=never", "--config.scores.every=never", "--config.report.pictures=",
               *(f"--config.clustnet.encoder.{size}" for size in sizes))  # fmt: skip
    assert code == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert {f"{split}/{name}" for split in ("train", "test") for name in ("binary", "acc_p", "acc_n")} <= set(results)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    errors = [line["train/error_percent"] / line["train/loss"] for line in lines if "train/error_percent" in line]
    np.testing.assert_allclose(errors, 100 / 3.2457, rtol=1e-4)
    shutil.copytree(tmp_path / "run" / "checkpoints" / "cae", tmp_path / "again" / "checkpoints" / "cae")
    config, info = config_lib.load(tmp_path / "run" / "config.json"), DataInfo(150, (8, 8, 1), 10)
    split = few_digits(150).splits["train"]
    pretrained, begun = (prepare(config, name, split, info, tmp_path / "again").first() for name in ("cae", "clustnet"))
    pretrained = Checkpoints(tmp_path / "again" / "checkpoints" / "cae").restore(pretrained)
    x = (digits.images / 255 - 0.3053) / 0.376
    net, (_, params, extra, *_) = cae.network(config, (8, 8, 1)), pretrained.state
    made, _ = jax.jit(partial(cae.reconstruct, net, train=False, rng=None))(params, extra["batch_stats"], x)
    errors = np.square(np.asarray(made) - x).mean(axis=(1, 2, 3)) * 100 / 3.2457
    for name, of in (("train", errors[:150]), ("test", errors[150:])):
        assert results[f"cae/{name}/error_percent"] == pytest.approx(of.mean(), rel=1e-4)
    assert not moved(pretrained.state.params["body"], begun.state.params["body"])
    assert not moved(*(part.state.extra["batch_stats"]["body"] for part in (pretrained, begun)))
    layer = "--config.report.tsne.layer=encoder/conv2"
    of_cae = ("--job=report", f"--workdir={tmp_path / 'run'}", "--config.report.pictures=tsne", layer)
    assert run(*of_cae, "--config.report.stage=cae") == 0
    assert (tmp_path / "run" / "pictures" / "tsne" / "tsne.png").exists()
    rows = sorted((tmp_path / "run" / "rows" / "clustnet").glob("*.npz"), key=lambda path: int(path.stem))
    with np.load(rows[0]) as file:
        np.testing.assert_allclose(file["gate"].sum(axis=1), 1, rtol=1e-5)
        np.testing.assert_allclose(np.exp(file["groups"]).sum(axis=1), 1, rtol=1e-5)
        assert file["position"].tolist() == list(range(32))


def filled(method):
    """A state of a method on digits, of any numbers."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(method.init, jax.random.key(0), example_batch(method, DIGITS, 4))
    params, extra = jax.tree.map(lambda leaf: jnp.asarray(rng.random(leaf.shape), leaf.dtype), shapes)
    targets = Targets(*(np.zeros(4, np.float32),) * 3, np.asarray(0))
    return Snapshot(TrainState(jnp.zeros((), jnp.int32), params, extra, (), {}), targets)


def test_a_gates_convolutions_may_be_those_of_an_autoencoder(tmp_path):
    sizes = ("layers", 2), ("channels", 2), ("kernel", 3)
    encoder, gate_ = ({f"clustnet__{name}__{key}": value for key, value in sizes} for name in ("encoder", "gate"))
    donor = filled(methods.get(settings("cae", method="cae", stages="cae", **encoder), DIGITS))
    first = filled(methods.get(settings(**gate_), DIGITS))
    Checkpoints(tmp_path / "cae", keep=1).save(0, donor)
    begun = Checkpoints(tmp_path / "cae").restore_body(first, methods.get(settings(**gate_), DIGITS))
    for given, taken, of_gate in (
        (donor.state.params, begun.state.params, first.state.params),
        (*(one.state.extra["batch_stats"] for one in (donor, begun, first)),),
    ):
        assert not moved(given["body"]["stack"], taken["gate"]["stack"])
        assert not moved(*(tree | {"gate": tree["gate"] | {"stack": 0}} for tree in (taken, of_gate)))
    assert moved(begun.state.params["gate"]["stack"], first.state.params["gate"]["stack"])


@pytest.mark.parametrize(("combine", "count"), [("halves", 2), ("sum", 1)])
def test_each_half_of_the_experts_may_start_as_one_that_was_alone(tmp_path, combine, count):
    sizes = {"clustnet__experts__dense_layers": 0, "cluster__k": 4, "clustnet__combine": combine, **CONVOLUTIONS}
    alone, halves = methods.get(settings(method="expert", **sizes), DIGITS), methods.get(settings(**sizes), DIGITS)
    donor, first = filled(alone), filled(halves)
    assert set(donor.state.params) == {"experts", "top"} and set(donor.state.extra["batch_stats"]) == {"experts"}
    Checkpoints(tmp_path, keep=1).save(0, donor)
    begun = Checkpoints(tmp_path).restore_body(first, halves)
    for part in ("params", "extra"):
        given, taken = (getattr(of.state, part).get("batch_stats", getattr(of.state, part)) for of in (donor, begun))
        for one, each in zip(*(jax.tree.leaves(tree["experts"]) for tree in (given, taken)), strict=True):
            assert one.shape[0] == count and each.shape[0] == 4
            np.testing.assert_array_equal(each, np.repeat(one, 4 // count, axis=0))  # the first's, then the second's
    params = [of.state.params for of in (donor, first, begun)]
    assert not moved(params[1]["gate"], params[2]["gate"])
    kernels = [of["top"]["output"]["kernel"] for of in params]
    assert not moved(kernels[1 if combine == "halves" else 0], kernels[2])  # that of halves sees both and is another


def test_of_two_experts_alone_the_second_learns_the_groups_with_the_opposite_sign(float64):
    sizes = {"clustnet__experts__dense_layers": 0, "clustnet__combine": "halves", **CONVOLUTIONS}
    config = small(4, method="expert", **sizes)
    method, net = methods.get(config, DIGITS), mixture.build(config)._replace(k=2)
    batch = example_batch(method, DIGITS, 6, config.views)
    rng = np.random.default_rng(0)
    batch["views"]["train"] = rng.integers(0, 256, (6, 8, 8, 1)).astype(np.uint8)
    batch["target"], batch["weight"] = np.array([1, 0, 0, 1, 1, 0]), rng.uniform(0.5, 2, 6)
    params, extra = jax.jit(method.init)(jax.random.key(0), batch)
    params["top"]["output"]["kernel"] = jnp.asarray(rng.standard_normal((8, 2)))

    def learn(params, extra):
        x = jnp.broadcast_to((batch["views"]["train"] / 255 - 0.3053) / 0.376, (2, 6, 8, 8, 1))
        value, aux = method.loss(params, extra, batch, jax.random.key(1))
        maps = mixture.run_experts(net, params, extra["batch_stats"], x, True, jax.random.key(2)).output
        return jax.lax.pmean((value, aux.metrics["accuracy"], maps), AXIS)

    mapped = jax.shard_map(learn, mesh=runtime.mesh(config), in_specs=jax.P(), out_specs=jax.P())
    value, accuracy, maps = jax.tree.map(np.asarray, jax.jit(mapped)(params, extra))
    expected, right = 0.0, []
    for sign, of_expert in zip((1, -1), maps.reshape(2, 6, 8), strict=True):
        said = sign * of_expert @ np.asarray(params["top"]["output"]["kernel"]) + params["top"]["output"]["bias"]
        p = np.exp(said) / np.exp(said).sum(axis=1, keepdims=True)
        expected -= np.mean(batch["weight"] * np.log(p[np.arange(6), batch["target"]]))
        right += (p.argmax(axis=1) == batch["target"]).tolist()
    np.testing.assert_allclose(value, expected, rtol=1e-10)
    np.testing.assert_allclose(accuracy, np.mean(right))


@pytest.mark.wide
def test_all_experts_may_start_near_one_that_was_alone_on_the_groups(tmp_path):
    few = {"batch_size": 16, "refresh_every": "3 steps", "save_every": "never", "scores__every": "never"}
    config = settings("pretrained", data__source="digits", **few, **CONVOLUTIONS)
    config.stage.expert.rounds = 1
    source = few_digits(64)
    one = loop.run_stage(prepared(config, tmp_path, source), StopSignal()).state
    assert set(one.params) == {"experts"} and set(one.extra["batch_stats"]) == {"experts"}
    begun = {}
    for noise in (0.0, 0.1):
        config.stage.clustnet.init_noise = noise
        stage = prepare(config, "clustnet", source.splits["train"], DataInfo(64, (8, 8, 1), 10), tmp_path)
        begun[noise] = stage.first().state
    for part in ("params", "extra"):
        for name in begun:
            found = [getattr(state, part) for state in (one, begun[name])]
            found = [tree.get("batch_stats", tree)["experts"] for tree in found]
            for alone, each in zip(*map(jax.tree.leaves, found), strict=True):
                assert each.shape == (5, *alone.shape[1:])
                if name == 0 or part == "extra":
                    np.testing.assert_array_equal(each, np.broadcast_to(alone, each.shape))
                elif alone.size > 50:
                    noise = np.asarray(each - alone)
                    assert noise.std() == pytest.approx(0.05 * np.linalg.norm(alone), rel=0.2)
                    assert np.abs(noise[0] - noise[1]).max() > 0
    assert not moved(one.params, trained_again(config, tmp_path, source).params)


def trained_again(config, workdir, source):
    """The state of the first stage from its checkpoint."""
    stage = prepared(config, workdir, source)
    return Checkpoints(workdir / "checkpoints" / stage.name).restore(stage.first()).state


@pytest.mark.wide
@pytest.mark.usefixtures("optimized")
def test_an_autoencoder_halves_its_error_within_three_epochs(tmp_path):
    config = settings("cae", stages="cae", batch_size=16, log_every="1 round", data__source="digits")
    config.stage.cae.rounds = 3
    source = few_digits(1000)
    snapshot = trained(config, tmp_path, source)
    records = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    first = next(record["train/loss"] for record in records if "train/loss" in record)  # mean of an epoch
    net = cae.network(config_lib.for_stage(config, "cae"), (8, 8, 1))
    x = ((source.splits["train"].images[:100] / 255 - 0.3053) / 0.376).astype(np.float32)
    found, _ = cae.reconstruct(net, snapshot.state.params, snapshot.state.extra["batch_stats"], x, False, None)
    assert float(np.square(found - x).mean()) < 0.5 * first < 0.5
    assert float(found.min()) < -0.5  # the background is below 0


def test_an_autoencoder_halves_its_error_within_three_epochs_of_few_digits():
    """Check 14 of the specification with a small encoder; `wide`: the published one on 1,000 digits."""
    sizes = {f"clustnet__encoder__{name}": size for name, size in (("channels", 8), ("kernel", 3), ("dim", 32))}
    config = settings("cae", method="cae", stages="cae", **sizes)
    images = few_digits(400).splits["train"].images
    net = cae.network(config, (8, 8, 1))
    x = ((images / 255 - 0.3053) / 0.376).astype(np.float32)
    params, extra = jax.jit(partial(cae.init, net))(jax.random.key(0), {"views": {"train": images[:1]}})

    def error(params, stats, x):
        made, new = jax.vmap(lambda x: cae.reconstruct(net, params, stats, x, True, None), axis_name=AXIS)(x[None])
        return jnp.square(made - x).mean(), jax.tree.map(lambda leaf: leaf[0], new)

    def step(state, x):
        params, stats, velocity = state
        (value, stats), slope = jax.value_and_grad(error, has_aux=True)(params, stats, x)
        velocity = jax.tree.map(lambda v, g: 0.5 * v + g, velocity, slope)
        return (jax.tree.map(lambda w, v: w - 0.1 * v, params, velocity), stats, velocity), value

    state, errors, program = (params, extra["batch_stats"], jax.tree.map(jnp.zeros_like, params)), [], jax.jit(step)
    for batch in [*x.reshape(25, 16, 8, 8, 1)] * 3:
        state, value = program(state, batch)
        errors.append(float(value))
    assert np.mean(errors[-25:]) < 0.5 * np.mean(errors[:5]) < 1


@pytest.mark.slow
def test_small_batches_find_classes_of_digits_large_ones_collapse_and_diversity_helps(tmp_path):
    """Check 15 of the specification, and the default; each on five seeds and a random split of 1,400 and 397 digits."""

    at_the_end = [f"--config.{name}_every=never" for name in ("eval", "save")] + ["--config.scores.every=never"]

    def results(name, variant, *arguments):
        found = []
        for seed in range(5):
            workdir = tmp_path / f"{name}-{seed}"
            its_own = f"--workdir={workdir}", f"--config.seed={seed}", "--config.report.pictures="
            assert run(f"--config=configs/clustnet.py:{variant}", *its_own, *at_the_end, *arguments) == 0
            found.append(json.loads((workdir / "results.json").read_text()))
        print(name, [[round(of[f"test/{key}"], 3) for key in ("binary", "acc_p", "acc_n")] for of in found])
        return {key: np.array([of[f"test/{key}"] for of in found]) for key in ("binary", "acc_p", "acc_n")}

    small = results("small", "digits")
    assert ((small["binary"] >= 0.93) & (small["acc_p"] >= 0.38)).sum() >= 4
    large = results("large", "digits", "--config.batch_size=64", "--config.rounds=100")
    assert (large["acc_p"] <= 0.27).sum() >= 4
    diverse = results("diverse", "diverse")
    assert (diverse["binary"] >= 0.95).sum() >= 4
    assert ((diverse["acc_p"] >= 0.55) & (diverse["acc_n"] >= 0.45)).sum() >= 4
    best = results("default", "recommended")
    assert ((best["binary"] >= 0.95) & (best["acc_p"] >= 0.55) & (best["acc_n"] >= 0.45)).sum() >= 4
