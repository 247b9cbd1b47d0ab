"""What a stage takes from another run: the body of the same network, and nothing where networks differ."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from small import small_config

from jaxclust import config as config_lib
from jaxclust import models
from jaxclust.errors import ConfigError
from jaxclust.methods.base import Method, Targets, TrainState
from jaxclust.train import donor, loop
from jaxclust.train.checkpoint import Checkpoints, Snapshot

METHOD = Method(init=None, loss=None, embed=None)


def first_state(config, **more):
    """A state of zeros with the body of `config.model`, and `more` arrays in it."""
    network = models.get(config)
    shapes = jax.eval_shape(network.init, jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))["params"]
    body = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    none = np.zeros(0, np.int32)
    state = TrainState(np.int32(0), {"body": {**body, **more}}, {}, {}, {})
    return Snapshot(state, Targets(none, none, none, np.asarray(-1, np.int32)))


def left(workdir, config, snapshot):
    """The run in `workdir`, whose only stage has left `snapshot`."""
    config_lib.save(config, workdir / "config.json")
    Checkpoints(workdir / "checkpoints" / "deepcluster", 1).save(0, snapshot)


def checked(tmp_path, **model):
    """Checks the run in `tmp_path` as the donor of a run with `model`."""
    config = small_config(init_from=str(tmp_path), **model)
    donor.find(config, "deepcluster", tmp_path / "new").check(first_state(config), METHOD)


TINY = {"model__width": 4, "model__dim": 0}
SMALL_18 = {"model__name": "resnet18", "model__stem": "small", **TINY}


@pytest.mark.parametrize(
    ("there", "words"),
    [
        ({**SMALL_18, "model__name": "resnet34"}, "/checkpoints/deepcluster is .*: resnet34 there, resnet18 here"),
        ({**SMALL_18, "model__stem": "pooled"}, "resnet18 config.model.stem='pooled' there, resnet18 .*='small' here"),
        ({**SMALL_18, "model__sobel": True}, "model.sobel=True there, resnet18 config.model.sobel=False here"),
    ],
)
def test_the_body_of_another_network_is_refused_though_its_arrays_agree(tmp_path, there, words):
    config = small_config(**there)
    left(tmp_path, config, first_state(config))
    with pytest.raises(ConfigError, match=words):
        checked(tmp_path, **SMALL_18)


def test_a_stage_says_whose_body_it_begins_with_and_not_when_it_goes_on(tmp_path, capsys, monkeypatch):
    config = small_config(**SMALL_18)
    left(tmp_path, config, first_state(config))
    found = donor.find(small_config(init_from=str(tmp_path), **SMALL_18), "deepcluster", tmp_path / "new")
    monkeypatch.setattr(loop, "_loop", lambda *_: None)
    stage = SimpleNamespace(
        name="self", workdir=tmp_path / "new", config=config, first=lambda: None, whose=found.name,
        method=METHOD, lengths=SimpleNamespace(stage=5),
    )  # fmt: skip
    loop.run_stage(stage, None)
    said = f"self: begins with the body of {tmp_path}/checkpoints/deepcluster, step 0\n"
    assert capsys.readouterr().out == said
    stage.whose = None
    loop.run_stage(stage, None)
    assert not capsys.readouterr().out
    stage.whose = found.name
    Checkpoints(tmp_path / "new" / "checkpoints" / "self", 1).save(3, first_state(config))
    stage.first = lambda: first_state(config)
    loop.run_stage(stage, None)
    assert capsys.readouterr().out == "self: going on from step 3 of 5\n"


def test_settings_that_change_no_network_and_their_defaults_are_the_same(tmp_path):
    config = small_config(model__name="clusterresnet", model__stem="small", model__dropout=0.5, **TINY)
    left(tmp_path, config, first_state(config))
    checked(tmp_path, model__name="clusterresnet", **TINY)
    with pytest.raises(ConfigError, match="clusterresnet .*there, resnet34 .*='pooled' here"):
        checked(tmp_path, model__name="resnet34", model__stem="pooled", **TINY)  # which is drawn otherwise
    donor.check_network(small_config(model__width=0), small_config(model__width=32), tmp_path)


def test_a_body_with_more_arrays_than_this_one_is_refused(tmp_path):
    config = small_config()
    left(tmp_path, config, first_state(config, encoder=np.zeros((2, 3), np.float32)))
    with pytest.raises(ConfigError, match=r"params.body.encoder is \(2, 3\) in .*makes no such array"):
        checked(tmp_path)


@pytest.mark.parametrize("of_key", [True, False])
def test_copies_of_a_body_begin_as_that_of_the_run_and_not_as_they_were_drawn(tmp_path, of_key):
    """Keys of MoCo on the body of another method; those that the run has are its own."""
    rng = np.random.default_rng(0)

    def drawn(*names):
        statistics = {"norm": {"mean": rng.normal(size=3).astype(np.float32)}}
        return {name: {"kernel": rng.normal(size=(2, 3)).astype(np.float32)} for name in names}, statistics

    def state(params, extra):
        none = np.zeros(0, np.int32)
        return Snapshot(TrainState(np.int32(0), params, extra, {}, {}), Targets(none, none, none, np.int32(-1)))

    body, statistics = drawn("conv1")
    key_body, key_statistics = drawn("conv1", "own")
    key = {"key": {"body": key_body, "batch_stats": key_statistics}} if of_key else {}
    saved = state({"body": body}, {"batch_stats": statistics, **key})
    Checkpoints(tmp_path, 1).save(0, saved)
    body, statistics = drawn("conv1")
    key_body, key_statistics = drawn("conv1", "own")
    first = state({"body": body}, {"batch_stats": statistics, "key": {"body": key_body, "batch_stats": key_statistics}})
    on_device = jax.tree.map(jax.numpy.asarray, first)
    begun = Checkpoints(tmp_path).restore_body(on_device, METHOD).state
    there = saved.state.extra["key"] if of_key else {**saved.state.extra, "body": saved.state.params["body"]}
    np.testing.assert_array_equal(
        begun.params["body"]["conv1"]["kernel"], saved.state.params["body"]["conv1"]["kernel"]
    )
    np.testing.assert_array_equal(begun.extra["key"]["body"]["conv1"]["kernel"], there["body"]["conv1"]["kernel"])
    mean = there["batch_stats"]["norm"]["mean"]
    np.testing.assert_array_equal(begun.extra["key"]["batch_stats"]["norm"]["mean"], mean)
    own = (saved if of_key else first).state.extra["key"]["body"]["own"]["kernel"]  # no body has such a layer
    np.testing.assert_array_equal(begun.extra["key"]["body"]["own"]["kernel"], own)
