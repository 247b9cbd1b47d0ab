"""The contract that every method keeps: those in jaxclust/methods, found by walking, and a toy of every shape."""

import importlib
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from small import few_digits, few_vectors, small_config
from small import prepared as prepared_on
from small import trained as trained_on
from toys import TOYS

from jaxclust import config as config_lib
from jaxclust import methods, plugins, runtime
from jaxclust.data.pipeline import exact_batches
from jaxclust.errors import ConfigError
from jaxclust.features.extract import extract
from jaxclust.jobs import evaluate, train
from jaxclust.jobs.options import Options
from jaxclust.methods.base import DataInfo, Targets, TrainState
from jaxclust.runtime import StopSignal
from jaxclust.train import loop
from jaxclust.train.checkpoint import Checkpoints
from jaxclust.train.image_rows import ImageRows
from jaxclust.train.refresh import refresh
from jaxclust.train.stage import prepare

MODULES = {name: importlib.import_module(f"jaxclust.methods.{name}") for name in plugins.names("jaxclust.methods")}
PUBLISHED = [name for name, module in MODULES.items() if hasattr(module, "make")]
VECTORS = [f"{name}:features" for name in ("plain", "refreshed", "two_views")]  # the toys take vectors as well
WIDE = {"reliable", "cae", "expert", "deepcluster_v2", "moco", *VECTORS}
SHOWN = {"plain", "supervised", "own_update", "row_outputs"}  # what they have, a published method has too


@pytest.fixture
def config(request, monkeypatch, tmp_path):
    """A small config for the method named by the test's parameter."""
    name, _, source = request.param.partition(":")
    made = small_config(rounds=2, refresh_every="3 steps", save_every="2 steps", log_every="1 step")
    made.sampler = "uniform_image"
    made.method = name
    made.batch_size, made.eval_batch_size = 32, 64
    made.model.blocks = 2 if name == "uad" else 1  # which takes maps of another layer than the last
    made.data.source = source or "digits"
    made.views.train.noise = 0.1
    with made.unlocked():
        for view in ("query", "key", "large", "small", "original", "weak", "strong"):
            made.views[view] = made.views.train.copy_and_resolve_references()
    made.views.large.number = made.deepcluster_v2.heads = 2
    made.moco.queue, made.moco.dim = 64, 16
    made.spice.num_head = made.spice.num_repeat = 2
    made.spice.train_sub_batch_size = made.reliable.num_neighbor = 10
    made.reliable.ratio_confident, made.reliable.score, made.reliable.balance = 0.0, 0.0, "cap"
    made.groups, net = "0-4,5-9", made.clustnet
    net.encoder.layers, net.encoder.channels, net.encoder.dim, net.gate.layers, net.experts.layers = 2, 4, 16, 0, 0
    made.cluster.k = 3 if name == "clustnet" else made.cluster.k  # so that each expert is given some of 32 images
    if name == "fixmatch":
        made.sampler, made.unlabelled_ratio, made.fixmatch.labels = "labelled_first", 3, str(tmp_path / "labels.npy")
        np.save(made.fixmatch.labels, np.where(np.arange(300) % 3, -1, np.arange(300) % 10))
    if name in TOYS:
        monkeypatch.setattr(methods, "get", lambda config, info: TOYS[config.method](config, info))
    return made


def prepared(config, workdir):
    return prepared_on(config, workdir, few_vectors() if config.data.source == "features" else few_digits())


def trained(config, workdir):
    return trained_on(config, workdir, few_vectors() if config.data.source == "features" else few_digits())


# They go on as deepcluster, spice, clustnet or a toy does.
AS_ANOTHER = {"uad", "fixmatch", "dscl", "refreshed", "two_views", "averaged", "two_optimizers"}
ALL = (*PUBLISHED, *TOYS, *VECTORS)
BEGINNING = [name for name in ALL if name != "reliable"]  # has no steps, see test_spice


def each(names, wide):
    params = [pytest.param(name, marks=pytest.mark.wide if name in wide else ()) for name in names]
    return pytest.mark.parametrize("config", params, indirect=True)


every_method = each(ALL, WIDE | SHOWN)
beginning = each(BEGINNING, WIDE | SHOWN | AS_ANOTHER)
going_on = each(BEGINNING, WIDE | SHOWN | AS_ANOTHER | {"deepcluster"})  # which test_faults kills and stops


def leaves(tree):
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def assert_same(a, b):
    a, b = leaves(a), leaves(b)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_deepcluster_is_found():
    assert "deepcluster" in PUBLISHED


@beginning
def test_loss_is_finite_and_its_gradient_reaches_every_parameter(config, tmp_path):
    stage = prepared(config, tmp_path)
    state, targets = stage.first()
    if stage.method.refresh:
        state, targets, _ = refresh(stage, state, targets, 0, last=False)
    batch = next(loop._batches(stage, targets, 0))

    def program(params, extra, batch):
        def objective(params):
            return jax.lax.pmean(stage.method.loss(params, extra, batch, jax.random.key(0))[0], runtime.AXIS)

        return jax.value_and_grad(objective)(params)

    P = jax.sharding.PartitionSpec
    specs = (P(), P(), {name: P() if name == "step" else P(runtime.AXIS) for name in batch})
    mapped = jax.jit(jax.shard_map(program, mesh=stage.mesh, in_specs=specs, out_specs=P()))
    value, gradient = mapped(state.params, state.extra, batch)
    assert np.isfinite(value)
    for name, leaf in leaves(gradient).items():
        assert np.isfinite(leaf).all(), name
        # A bias before batch norm has no influence; every other parameter must have some.
        if not name.endswith("_conv']['bias']"):
            assert np.abs(leaf).max() > 0, f"no gradient reaches {name}"


class StopAt(StopSignal):
    """A signal that is there at the n-th look."""

    def __init__(self, look):
        super().__init__()
        self.looks_left = look

    def asked(self):
        self.looks_left -= 1
        return self.looks_left <= 0


@going_on
def test_stopped_and_started_again_equals_uninterrupted_and_another_seed_does_not(config, tmp_path):
    """For DSCL this is D14 of its specification."""
    config.save_every = "never"
    stage = prepared(config, tmp_path / "whole")
    whole = loop.run_stage(stage, StopSignal())
    cuts = {tmp_path / "in a round": 2, tmp_path / "right after a refresh": 4}
    for cut, look in cuts.items():
        with pytest.raises(runtime.Stopped):
            loop.run_stage(stage._replace(workdir=cut), StopAt(look))
    again = prepared(config, cut)  # other programs, as after a start
    for cut in cuts:
        assert_same(whole, loop.run_stage(again._replace(workdir=cut), StopSignal()))
    first, config.seed = stage.first(), 1
    other = prepared(config, tmp_path / "other").first()
    pairs = zip(jax.tree.leaves(first.state.params), jax.tree.leaves(other.state.params), strict=True)
    assert any((a != b).any() for a, b in pairs)


@every_method
def test_embed_gives_one_row_for_each_id_in_order(config, tmp_path):
    config.eval_batch_size = 128  # does not divide the number of images
    stage = prepared(config, tmp_path)
    state, _ = stage.first()
    rows = extract(stage.embed, state.params, state.extra, stage.split, config, stage.mesh, tmp_path, "test")
    features = rows["features"].array()
    assert len(features) == stage.split.size
    ids = [200, 3, 299, 0]
    images = next(iter(exact_batches(stage.split, 300)))["image"][ids]
    alone = jax.jit(stage.method.embed)(state.params, state.extra, images)
    np.testing.assert_allclose(features[ids], alone, rtol=1e-4, atol=1e-5)


@every_method
def test_labels_reach_only_the_methods_that_say_so(config, tmp_path):
    stage = prepared(config, tmp_path)
    _, targets = stage.first()
    shows_labels = (targets.cluster == stage.split.labels).all()
    assert shows_labels == (stage.method.labels == "class")
    info_fields = " ".join(DataInfo._fields)
    assert "label" not in info_fields


@pytest.mark.parametrize("config", ["refreshed"], indirect=True)
def test_stage_without_steps_refreshes_once_and_keeps_what_it_found(config, tmp_path):
    config.rounds = 0
    snapshot = trained(config, tmp_path)
    assert snapshot.state.step == 0 and snapshot.targets.refreshed_at == 0
    assert list(snapshot.targets.ids[:3]) == [0, 2, 4]
    assert snapshot.targets.target.max() == 3


@pytest.mark.wide
@pytest.mark.parametrize("config", ["plain"], indirect=True)
def test_stages_follow_one_another_each_with_its_own_settings(config, tmp_path, monkeypatch):
    config.stages = "first,second,third"
    with config.unlocked():
        config.stage.second = {"method": "refreshed", "rounds": 0}
        config.stage.third = {"method": "refreshed", "rounds": 1, "init_from": "@first"}
        config.stage.third.optimizer = {"body": {"lr": 0.5}}
    seen = {}

    def get(config, info):
        seen[config.method, config.rounds] = sorted(info.files)
        return TOYS[config.method](config, info)

    monkeypatch.setattr(methods, "get", get)
    monkeypatch.setattr(train, "open_source", lambda config: few_digits())
    judged = []
    judge = evaluate.judged
    monkeypatch.setattr(evaluate, "judged", lambda stage, *of: judged.append(stage.name) or judge(stage, *of))
    train.run(config_lib.validate(config), tmp_path / "run", Options())
    assert judged == ["first", "second", "third"]
    assert seen["plain", 2] == [] and "checkpoints/first" in seen["refreshed", 0]
    assert {"checkpoints/second", "assignments/first"} <= set(seen["refreshed", 1])
    saved = {path.name: [p.name for p in path.iterdir()] for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert "6" in saved["first"] and saved["second"] == ["0"] and "3" in saved["third"]
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert list(dict.fromkeys(record["stage"] for record in metrics)) == ["first", "second", "third"]
    rates = [record["lr/body"] for record in metrics if record["stage"] == "third" and "lr/body" in record]
    assert rates == pytest.approx([0.375, 0.125, 0.0])  # half a cosine from 0.5 over three steps
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["images"] == 300 and results["third/train/acc"] == results["train/acc"]
    assert results["first/step"] == 6 and results["first/train/acc"] > 0.1
    tables = {path.name for path in (tmp_path / "run").glob("confusion-*.csv")}
    assert tables == {"confusion-first-train.csv", "confusion-second-train.csv", "confusion-train.csv"}
    (tmp_path / "run" / "results.json").unlink()
    train.run(config, tmp_path / "run", Options())  # every stage is done: only the evaluation runs again
    again = json.loads((tmp_path / "run" / "results.json").read_text())
    assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in results.items() if k != "seconds"}


@pytest.mark.parametrize("config", ["refreshed"], indirect=True)
def test_renewed_head_starts_with_clean_optimiser_slots_and_the_body_keeps_its_own(config, tmp_path):
    stage = prepared(config, tmp_path)
    state, targets, _ = refresh(stage, *stage.first(), 0, last=False)
    state, _, _ = stage.step(state, next(loop._batches(stage, targets, 0)), jax.random.key(0))
    before = leaves(state.opt_state)
    state, targets, _ = refresh(stage, state, targets, 3, last=False)
    after = leaves(state.opt_state)
    slots = [name for name in after if "mu" in name or "nu" in name]
    assert any("'head'" in name for name in slots) and any("'body'" in name for name in slots)
    for name in slots:
        if "inner_states['head']" in name:
            assert not after[name].any(), name
        else:
            np.testing.assert_array_equal(after[name], before[name])
            assert after[name].any(), name


@pytest.mark.parametrize("config", ["row_outputs"], indirect=True)
@pytest.mark.parametrize("devices", [pytest.param(1, marks=pytest.mark.wide), 4])
def test_rows_are_kept_by_position_and_do_not_depend_on_devices(config, tmp_path, devices):
    config.runtime.devices = devices
    trained(config, tmp_path / str(devices))
    files = sorted((tmp_path / str(devices) / "rows" / "deepcluster").glob("*.npz"), key=lambda p: int(p.stem))
    rows = {name: np.concatenate([np.load(path)[name] for path in files]) for name in ("position", "id", "gate")}
    assert rows["position"].tolist() == list(range(6 * config.batch_size))
    key = jax.random.key(config.seed)
    expected = [int(jax.random.randint(jax.random.fold_in(key, p), (), 0, 4)) for p in range(20)]
    assert rows["gate"][:20].tolist() == expected


def test_of_an_image_that_was_met_twice_the_later_row_is_remembered_and_other_rows_are_written(tmp_path):
    rows = ImageRows(tmp_path, None, memory="row")
    targets = Targets(*[np.zeros(4, np.int32)] * 4, memory=np.zeros((4, 2), np.float32))
    for step, ids in enumerate(([2, 0], [3, 2])):
        said = np.full((2, 2), step + 1, np.float32)
        rows.add({"id": np.array(ids), "position": 2 * step + np.arange(2), "gate": np.array(ids), "row": said})
        before, memory = targets.memory.copy(), targets.memory
        targets = rows.remember(targets)
        np.testing.assert_array_equal(memory, before)
    np.testing.assert_array_equal(targets.memory[:, 0], [1, 0, 2, 2])
    assert rows.remember(targets) is targets
    rows.flush(2)
    with np.load(tmp_path / "2.npz") as file:
        assert sorted(file) == ["gate", "id", "position"] and file["gate"].tolist() == [2, 0, 3, 2]


def test_the_rate_of_images_counts_steps_that_are_asked_for_and_not_yet_done(monkeypatch):
    now = [10.0]

    def waited(*_):
        now[0] += 8.0
        return {"loss": np.float32(3.0), "count": np.int32(2)}

    monkeypatch.setattr(loop.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(loop, "_finite_sums", waited)
    monkeypatch.setattr(loop.runtime, "put_replicated", lambda tree, mesh: tree)
    optimizer = SimpleNamespace(rates=lambda state, step: {})
    stage = SimpleNamespace(metrics=("loss",), optimizer=optimizer, config=small_config(batch_size=20), mesh=None)
    state = TrainState(np.int32(2), {}, {}, (), {})
    _, values = loop._flush(stage, state, None, 2, 8.0, None)
    assert values == {"train/loss": 1.5, "images_per_second": 2 * 20 / 10.0}


@pytest.mark.parametrize("config", ["averaged"], indirect=True)
def test_what_comes_after_a_step_sees_the_parameters_that_it_made(config, tmp_path):
    stage = prepared(config, tmp_path)
    state, targets = stage.first()
    before = leaves(state.params)
    state, _, _ = stage.step(state, next(loop._batches(stage, targets, 0)), jax.random.key(0))
    after, average = leaves(state.params), leaves(state.extra["average"])
    for name in after:
        assert (after[name] != before[name]).any()
        np.testing.assert_allclose(average[name], 0.75 * before[name] + 0.25 * after[name], rtol=1e-6)


@pytest.mark.parametrize("config", ["two_optimizers"], indirect=True)
def test_a_method_may_bring_its_own_optimiser(config, tmp_path):
    stage = prepared(config, tmp_path)
    state, targets = stage.first()
    batches = loop._batches(stage, targets, 0)
    for moving, still in (("body", "head"), ("head", "body")):
        before = leaves(state.params)
        state, _, _ = stage.step(state, next(batches), jax.random.key(0))
        after = leaves(state.params)
        moved = {name for name in after if (after[name] != before[name]).any()}
        assert moved == {name for name in after if moving in name}, still


@pytest.mark.parametrize("config", ["two_views"], indirect=True)
def test_views_are_drawn_independently(config, tmp_path):
    stage = prepared(config, tmp_path)
    _, targets = stage.first()
    views = next(loop._batches(stage, targets, 0))["views"]
    assert set(views) == {"query", "key"}
    assert (np.asarray(views["query"]) != np.asarray(views["key"])).any()


@pytest.mark.wide
@pytest.mark.parametrize("config", ["plain"], indirect=True)
def test_a_stage_starts_with_the_body_of_another_one_here_or_elsewhere(config, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "open_source", lambda config: few_digits())
    config.stages, config.rounds = "first,second", 1
    with config.unlocked():
        config.stage.second = {"init_from": "@first", "rounds": 0}
    train.run(config_lib.validate(config), tmp_path / "both", Options())
    bodies = {name: Checkpoints(tmp_path / "both" / "checkpoints" / name).latest() for name in ("first", "second")}
    assert bodies == {"first": 3, "second": 0}
    after, begun = (trained_stage(config, tmp_path / "both", name) for name in ("first", "second"))
    np.testing.assert_array_equal(after.params["body"]["kernel"], begun.params["body"]["kernel"])
    config.stages = "second"
    train.run(config, tmp_path / "both", Options())  # the first was left here by an earlier start
    config.init_from = str(tmp_path / "both")
    train.run(config, tmp_path / "alone", Options())
    alone = trained_stage(config, tmp_path / "alone", "second")
    np.testing.assert_array_equal(after.params["body"]["kernel"], alone.params["body"]["kernel"])
    config.init_from = ""
    with pytest.raises(ConfigError, match="no stage 'first' before 'second', and .* no checkpoint of one; train it"):
        train.run(config, tmp_path / "nowhere", Options())


def trained_stage(config, workdir, name):
    """The state that a stage has left."""
    config = config_lib.ConfigDict(config.to_dict())
    config.stages = name
    config.stage = config_lib.ConfigDict({name: {"rounds": 1}})
    stage = prepare(config, name, few_digits().splits["train"], DataInfo(300, (8, 8, 1), 10), workdir)
    return Checkpoints(workdir / "checkpoints" / name).restore(stage.first()).state
