"""MoCo: the order of its step, its queue, its groups of batch norm, and what it refuses."""

import json
import re
import runpy
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from small import few_digits, few_vectors, prepared, run, with_settings

from jaxclust import config as config_lib
from jaxclust import runtime
from jaxclust.cluster import warn_once
from jaxclust.errors import ConfigError
from jaxclust.jobs import sweep, train
from jaxclust.jobs.options import Options
from jaxclust.methods import moco
from jaxclust.methods.base import merge
from jaxclust.ops.losses import weighted_cross_entropy
from jaxclust.train import loop

SIZE, BATCH, GROUPS, QUEUE, DIM = 96, 32, 4, 64, 16
P = jax.sharding.PartitionSpec


def made(**fields):
    """A queue of two batches; `a__b=value` sets config.a.b."""
    config = config_lib.for_stage(runpy.run_path("configs/spice.py")["get_config"]("smoke"), "moco")
    fields = {
        "batch_size": BATCH, "eval_batch_size": 32, "moco__queue": QUEUE, "moco__dim": DIM, "model__blocks": 2,
        "model__width": 4, "runtime__devices": 1, **fields,
    }  # fmt: skip
    config.stages, config.stage = "moco", ConfigDict()  # it is in the config by now
    return with_settings(config, **fields)


def ready(workdir, **fields):
    return prepared(made(**fields), workdir, few_digits(SIZE))


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    return ready(tmp_path_factory.mktemp("moco"), moco__momentum=0.5)


@pytest.fixture(scope="module")
def begun(stage):
    """The first state, with a key encoder that is unlike the query's, and two batches."""
    state, targets = stage.first()
    state = jax.device_get(state)
    rng = np.random.default_rng(0)
    key = jax.tree.map(lambda leaf: leaf + 0.1 * rng.standard_normal(leaf.shape).astype(leaf.dtype), state.params)
    state = state._replace(extra=merge(state.extra, key=merge(state.extra["key"], **key)))
    batches = loop._batches(stage, targets, 0)
    return state, [jax.device_get(next(batches)) for _ in range(2)]


def net_of(stage, bn="group"):
    return stage.method.loss.args[0]._replace(norm=moco.NORMS[bn])


def on_one_device(stage, function, *arguments):
    """`function(*arguments)` where the axis of the devices has a name."""
    mapped = jax.shard_map(function, mesh=stage.mesh, in_specs=P(), out_specs=P(), check_vma=False)
    return jax.device_get(jax.jit(mapped)(*arguments))


def stepped(stage, state, batch):
    """The state after a step, which takes nothing of the one before."""
    new, _, _ = stage.step(runtime.put_replicated(state, stage.mesh), runtime.put_batch(batch, stage.mesh), KEY)
    return jax.device_get(new)


KEY = jax.random.key(0)


def test_the_key_encoder_moves_towards_the_query_as_it_was_before_its_own_step(stage, begun):
    state, (batch, _) = begun
    new = stepped(stage, state, batch)
    for part in ("body", "projection"):
        middle = jax.tree.map(lambda k, q: 0.5 * k + 0.5 * q, state.extra["key"][part], state.params[part])
        jax.tree.map(np.testing.assert_array_equal, new.extra["key"][part], middle)
    assert (new.params["body"]["feature"]["kernel"] != state.params["body"]["feature"]["kernel"]).all()
    jax.tree.map(  # its batch statistics are its own, a tenth of them new
        lambda new, old: np.testing.assert_raises(AssertionError, np.testing.assert_array_equal, new, old),
        new.extra["key"]["batch_stats"], new.extra["batch_stats"],
    )  # fmt: skip
    published = net_of(stage)._replace(momentum=0.999)
    nearer = moco.moved(published, state.extra["key"], state.params)["body"]
    expected = jax.tree.map(lambda k, q: 0.999 * k + 0.001 * q, state.extra["key"]["body"], state.params["body"])
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), nearer, expected)


def slow_loss(query, own, queue, temperature):
    """Mean -log softmax of the first of 1 + K scores, and the share of queries with fewer than 1 and 5 above it."""
    losses, above = [], []
    for q, k in zip(np.float64(query), np.float64(own), strict=True):
        scores = np.array([q @ k, *(q @ row for row in np.float64(queue))]) / temperature
        losses.append(np.log(np.exp(scores).sum()) - scores[0])
        above.append((scores[1:] > scores[0]).sum())
    above = np.array(above)
    return np.mean(losses), (above < 1).mean(), (above < 5).mean()


def test_negatives_are_the_queue_without_this_steps_keys_which_then_replace_the_oldest(stage, begun):
    state, (batch, _) = begun
    net = net_of(stage, "sync")  # in which neither order nor groups matter

    def program(params, extra, batch):
        rng = jax.random.key(1)
        of_key = moco.moved(net, extra["key"], params)
        query = moco.embedding(net, moco.together, {**params, **extra}, batch["views"]["query"], rng)[0]
        keys = moco.embedding(net, moco.together, of_key, batch["views"]["key"], rng)[0]
        return query, keys, moco.loss(net, params, extra, batch, rng)

    query, keys, (value, aux) = on_one_device(stage, program, state.params, state.extra, batch)
    np.testing.assert_allclose(np.linalg.norm(keys, axis=1), 1, rtol=1e-5)
    before, after = state.extra["queue"], aux.extra["queue"]
    expected = slow_loss(query, keys, before, net.temperature)
    assert [value, aux.metrics["top1"], aux.metrics["top5"]] == pytest.approx(expected, rel=1e-5)
    assert abs(slow_loss(query, keys, after, net.temperature)[0] - expected[0]) > 0.01
    np.testing.assert_allclose(after[:BATCH], keys, atol=1e-6)  # image by image, though they were shuffled
    np.testing.assert_array_equal(after[BATCH:], before[BATCH:])


def test_keys_of_groups_are_those_of_the_shuffled_images_put_back_and_each_step_shuffles_anew(stage, begun):
    state, (batch, _) = begun
    net, rng = net_of(stage), jax.random.key(1)
    order = np.asarray(jax.random.permutation(jax.random.split(rng, 3)[0], BATCH))

    def program(params, extra, batch):
        of_key, aux = moco.moved(net, extra["key"], params), moco.loss(net, params, extra, batch, rng)[1]
        views = batch["views"]["key"]
        plain, shuffled = (moco.embedding(net, moco.in_groups, of_key, x, rng)[0] for x in (views, views[order]))
        return aux.extra["queue"][:BATCH], plain, shuffled

    written, plain, shuffled = on_one_device(stage, program, state.params, state.extra, batch)
    expected = np.empty_like(shuffled)
    expected[order] = shuffled
    np.testing.assert_allclose(written, expected, atol=1e-5)
    assert np.abs(written - plain).max() > 0.01
    one, two = (stepped(stage, state._replace(step=np.int32(step)), batch).extra["queue"][:BATCH] for step in (0, 1))
    assert np.abs(one - two).max() > 0.01, "all but the order is the same"


def test_the_queue_is_filled_in_turn_and_from_its_start_again(stage, begun):
    state, (batch, other) = begun
    queues = [state.extra["queue"]]
    np.testing.assert_allclose(np.linalg.norm(queues[0], axis=1), 1, rtol=1e-5)
    for step in range(3):
        state = stepped(stage, state, {**(other if step == 1 else batch), "step": np.int32(step)})
        queues.append(state.extra["queue"])
    changed = [(new != old).any(axis=1).nonzero()[0].tolist() for old, new in zip(queues, queues[1:], strict=False)]
    first, second = list(range(BATCH)), list(range(BATCH, QUEUE))
    assert changed == [first, second, first]


def test_the_loss_of_unrelated_vectors_is_that_of_guessing_and_of_equal_ones_far_below():
    draw = partial(jax.random.normal, shape=(128,))
    rows = jax.vmap(draw)(jax.random.split(KEY, 4096 + 512))
    rows = rows / jnp.linalg.norm(rows, axis=1, keepdims=True)
    query, own, queue = rows[:256], rows[256:512], rows[512:]
    zeros, ones = jnp.zeros(256, jnp.int32), jnp.ones(256)
    guessing = np.log(1 + len(queue))
    unrelated = weighted_cross_entropy(moco.compared(query, own, queue) / 0.2, zeros, ones)
    assert abs(unrelated - (guessing + 0.1)) < 0.15
    equal = weighted_cross_entropy(moco.compared(query, query, queue) / 0.2, zeros, ones)
    assert abs(guessing - 4.9 - equal) < 0.1


def test_the_spread_is_0_of_equal_vectors_and_1_of_opposite_ones(stage, begun):
    one = np.eye(1, DIM, dtype=np.float32)
    for rows, spread in ((np.repeat(one, 8, axis=0), 0), (np.concatenate([one, -one]), 1), (np.eye(4, DIM), 0.75)):
        assert on_one_device(stage, moco.spread, jnp.asarray(rows)) == pytest.approx(spread, abs=1e-6)
    state, (batch, _) = begun
    said = stepped(stage, state, batch).sums
    assert 0 < said["spread"] < 1 and said["count"] == 1


def test_batch_norm_of_groups_is_that_of_four_separate_calls(stage, begun):
    state, (batch, _) = begun
    net, images = net_of(stage), batch["views"]["query"]
    variables = {"params": state.params["body"], "batch_stats": state.extra["batch_stats"]}
    feature, stats = on_one_device(stage, partial(moco.in_groups, net), variables, images, KEY)
    parts = [
        on_one_device(stage, partial(moco.together, net), variables, images[part], KEY)
        for part in np.split(np.arange(BATCH), GROUPS)
    ]
    np.testing.assert_allclose(feature, np.concatenate([one for one, _ in parts]), rtol=1e-4, atol=1e-5)
    means = jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *[one for _, one in parts])
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), stats, means)
    whole, _ = on_one_device(stage, partial(moco.together, net), variables, images, KEY)
    assert np.abs(whole - feature).max() > 0.01


def test_no_convolution_of_a_step_is_in_groups_on_any_accelerator(stage, begun):
    """A vmap over groups makes the gradient of each kernel one of every group, which is slow."""
    state, (batch, _) = begun
    for platform in ("tpu", "cuda", "cpu"):
        text = stage.step.trace(state, batch, KEY).lower(lowering_platforms=(platform,)).as_text()
        counts = re.findall(r"(?:batch|feature)_group_count = (\d+)", text)
        assert len(counts) >= 8 and set(counts) == {"1"}, platform


def keys_of(stage, begun, net, seed):
    state, (batch, _) = begun
    order, rng = jax.random.key(seed), jax.random.key(9)
    return on_one_device(stage, partial(moco._keys, net), state.extra["key"], batch["views"]["key"], order, rng)[0]


@pytest.mark.parametrize(
    "bn, groups, same", [("group", 1, True), ("group", 4, False), ("sync", 4, True), ("ema", 4, True)]
)
def test_keys_depend_on_the_permutation_only_where_there_are_groups(stage, begun, bn, groups, same):
    net = net_of(stage, bn)._replace(groups=groups)
    one, two = (keys_of(stage, begun, net, seed) for seed in (0, 1))
    assert np.allclose(one, two, atol=1e-5) == same


def shared(stage, begun, net, orders=()):
    """Which queries change when both views of the first image do, and which keys: as they are, or in each order."""
    state, (batch, _) = begun
    other = {name: view.copy() for name, view in batch["views"].items()}
    for view in other.values():
        view[0] = 255 - view[0]

    def program(params, extra, views):
        query = moco.embedding(net, net.norm.query, {**params, **extra}, views["query"], KEY)[0]
        if not len(orders):
            return query, moco.embedding(net, net.norm.key, extra["key"], views["key"], KEY)[0][None]
        return query, jax.lax.map(lambda order: moco._keys(net, extra["key"], views["key"], order, KEY)[0], orders)

    before, after = (
        on_one_device(stage, program, state.params, state.extra, views) for views in (batch["views"], other)
    )
    queries, *keys = (
        set(np.flatnonzero(changed).tolist())
        for changed in [(before[0] != after[0]).any(axis=1), *(before[1] != after[1]).any(axis=2)]
    )
    return queries, keys


def test_query_and_key_of_an_image_share_statistics_with_other_images_but_not_with_the_same_ones(stage, begun):
    """What leaks: where the same images normalise both, their statistics alone tell a key of this batch from others."""
    size = BATCH // GROUPS
    queries, keys = shared(stage, begun, net_of(stage, "sync"))
    assert queries == keys[0] == set(range(BATCH))  # plain batch norm
    queries, keys = shared(stage, begun, net_of(stage))
    assert queries == keys[0] == set(range(size))  # groups alone
    queries, keys = shared(stage, begun, net_of(stage), jax.random.split(jax.random.key(3), 24))
    assert queries == set(range(size)) and all(len(group) == size and 0 in group for group in keys)
    both = np.mean([len(group & queries) - 1 for group in keys])  # beside the image itself, of 7 where it leaks
    by_chance = (size - 1) ** 2 / (BATCH - 1)
    assert both == pytest.approx(by_chance, abs=0.8), "four standard errors of the mean of 24 draws"


def test_averaged_statistics_are_the_keys_own_in_place_of_the_batchs(stage, begun):
    state, (batch, _) = begun
    net = net_of(stage, "ema")
    drawn = jax.tree.map(lambda leaf: leaf + 1, state.extra["batch_stats"])
    extra = merge(state.extra, batch_stats=drawn)
    _, aux = on_one_device(stage, partial(moco.loss, net), state.params, extra, batch, KEY)
    middle = jax.tree.map(lambda k, q: 0.5 * k + 0.5 * q, extra["key"]["batch_stats"], drawn)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), aux.extra["key"]["batch_stats"], middle)
    alone, _ = on_one_device(
        stage, partial(moco.embedding, net, moco.as_they_are),
        merge(aux.extra["key"]), batch["views"]["key"][:1], KEY,
    )  # fmt: skip
    np.testing.assert_allclose(aux.extra["queue"][:1], alone, atol=1e-5)


def test_the_key_encoder_begins_as_a_copy_of_the_querys(stage):
    state = stage.first().state
    copy = {"body": state.params["body"], "projection": state.params["projection"]}
    jax.tree.map(np.testing.assert_array_equal, state.extra["key"], {**copy, "batch_stats": state.extra["batch_stats"]})


def test_it_embeds_the_feature_of_the_query_encoder_and_predicts_nothing(stage, begun):
    state, (batch, _) = begun
    assert stage.method.predict is None
    images = batch["views"]["query"]
    variables = {"params": state.params["body"], "batch_stats": state.extra["batch_stats"]}
    net = net_of(stage)
    expected = net.f.body.apply(variables, moco.classifier.standardized(net.f, images))
    np.testing.assert_allclose(stage.method.embed(state.params, state.extra, images), expected, rtol=1e-5, atol=1e-6)


def test_the_first_version_has_one_layer_and_the_second_two(stage, begun, tmp_path):
    assert set(begun[0].params["projection"]) == {"hidden1", "embedding"}
    first = ready(tmp_path, moco__mlp=False)
    assert set(first.shapes.params["projection"]) == {"embedding"}
    assert first.shapes.params["projection"]["embedding"]["kernel"].shape == (32, DIM)


@pytest.mark.medium
@pytest.mark.parametrize("bn", ["group", pytest.param("sync", marks=pytest.mark.wide)])
def test_two_steps_on_four_devices_are_those_of_one_in_float64(tmp_path, float64, bn):
    ends = []
    for count in (1, 4):
        stage = ready(tmp_path, runtime__devices=count, runtime__dtype="float64", moco__bn=bn, model__blocks=1)
        state, targets = stage.first()
        batches = loop._batches(stage, targets, 0)
        for _ in range(2):
            state, _, _ = stage.step(state, next(batches), KEY)
        ends.append(jax.device_get((state.params, state.extra, {**state.sums, "loss": float(state.sums["loss"])})))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-9), *ends)


def test_a_sweep_which_compares_clusters_is_refused(tmp_path):
    runs = sweep.plan(made(), {"seed": [0]})
    with pytest.raises(ConfigError, match="method='moco' predicts no clusters, which are what a sweep compares"):
        sweep.check_runs(runs, tmp_path, runtime.StopSignal())


@pytest.mark.wide
def test_a_run_without_clusters_ends_with_comparisons_and_a_page_without_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "open_source", lambda config: few_digits(SIZE))
    config = made(rounds=1, refresh_every="1 step", evaluate__suite="clustering,knn")
    train.run(config, tmp_path / "run", Options())
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert set(results) == {"knn/top1", "knn/top5", "images", "skipped", "seconds", "step"}
    assert f"{SIZE} images; knn/top1 {results['knn/top1']:.3f}" in capsys.readouterr().out
    assert not (tmp_path / "run" / "assignments.csv").exists()
    page = (tmp_path / "run" / "report" / "index.html").read_text()
    assert "knn" in page and "Every cluster" not in page and "Cluster sizes" not in page and "Training" in page
    other = {"method": "deepcluster", "init_from": str(tmp_path / "run"), "model__width": 8}
    with pytest.raises(ConfigError, match=r"init_from: .* another network: convnet .*width=4 there, .*width=8 here"):
        prepared(made(**other), tmp_path / "other", few_digits(SIZE))


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"moco__queue": 80}, "moco.queue=80 must be a multiple of config.batch_size=32.*nearest: 64, 96"),
        ({"views__key__number": 2}, "views.key.number=2, but config.method='moco' sees one of each image in a view"),
        ({"moco__groups": 5}, "config.batch_size=32 must divide by config.moco.groups=5"),
        ({"runtime__devices": 8}, "moco.groups=4 must be a multiple of the number of devices, which is 8"),
        ({"freeze_body": True}, "learns a body: config.freeze_body must be False"),
    ],
)
def test_what_it_cannot_work_with_is_refused_before_it_starts(tmp_path, fields, words):
    with pytest.raises(ConfigError, match=words):
        ready(tmp_path, **fields)


def test_a_queue_of_all_images_is_warned_of(tmp_path, caplog):
    warn_once.cache_clear()
    ready(tmp_path, moco__queue=SIZE - BATCH)
    assert not caplog.text
    ready(tmp_path, moco__queue=SIZE)
    assert "config.moco.queue=96 keeps keys of all 96 images or more" in caplog.text


def test_vectors_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="has vectors; heads alone learn from these: .*spice.py:features"):
        prepared(made(), tmp_path, few_vectors())


@pytest.mark.slow
def test_own_keys_are_found_by_the_batch_statistics_where_these_are_of_the_whole_batch(tmp_path):
    """The leak that groups prevent: keys of the queue were normalised with other images, the own key was not."""

    def own_key_first(bn):
        command = ("--config=configs/spice.py", "--config.stages=moco", f"--config.moco.bn={bn}")
        rest = ("--config.stage.moco.rounds=8", "--config.evaluate.suite=knn", "--config.report.pictures=")
        assert run(*command, *rest, f"--workdir={tmp_path / bn}") == 0
        said = [json.loads(line) for line in (tmp_path / bn / "metrics.jsonl").read_text().splitlines()]
        return [record["train/top1"] for record in said if "train/top1" in record][-1]

    assert own_key_first("sync") > 1.2 * own_key_first("group")
