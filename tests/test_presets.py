"""Every file in configs/ and each of its variants: it loads, traces at full size, and runs when shrunk."""

import ast
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxclust import config as config_lib
from jaxclust.config import from_file
from jaxclust.methods.base import DataInfo
from jaxclust.train.stage import example_batch, prepare


def variants(path):
    """Names in the dict that `apply_variants` is given, or those of the config that a file begins with."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Dict) and all(isinstance(value, ast.Name) for value in node.values):
            return [key.value for key in node.keys]
        if isinstance(node, ast.Constant) and str(node.value).endswith(".py"):
            return variants(path.with_name(node.value))
    raise AssertionError(f"{path} has no variants")


PRESETS = [(path, name) for path in sorted(Path("configs").glob("*.py")) for name in ["", *variants(path)]]
IMAGES = {"imagenet": 1_281_167, "imagenette": 9469, "cifar10": 50_000, "mnist": 60_000}


def traced(config, size, shape):
    """The stage of a config, traced and not run."""
    config.runtime.devices = 1
    if config.cluster.k == 0:
        config.cluster.k = 20
    name = config_lib.stage_names(config_lib.validate(config))[0]
    info = DataInfo(size, shape, 10)
    return prepare(config, name, SimpleNamespace(size=size, image_shape=shape, labels=None), info, Path("nowhere"))


@pytest.mark.parametrize("path, variant", PRESETS, ids=str)
def test_presets_trace_at_full_size(path, variant):
    config = from_file(path, variant)
    side = config.data.image_size or (28 if variant == "mnist" else 8)
    shape = (side, side, 1 if side < 32 else 3)
    stage = traced(config, IMAGES.get(variant, 5000), shape)  # traces init and the train step
    params, extra = jax.eval_shape(
        stage.method.init, jax.random.key(0), example_batch(stage.method, stage.info, config.batch_size)
    )
    images = jax.ShapeDtypeStruct((config.eval_batch_size, *shape), np.uint8)
    features = jax.eval_shape(stage.method.embed, params, extra, images)
    predicted = jax.eval_shape(stage.method.predict, params, extra, images)
    assert features.shape[0] == config.eval_batch_size and features.ndim == 2
    assert predicted["cluster"].shape == (config.eval_batch_size,)
    if variant in ("imagenet", "imagenette"):
        assert features.shape[1] == 4096
    if variant == "imagenet":
        assert params["top"]["kernel"].shape == (4096, 10_000)
        assert jax.tree.leaves(extra["space"])[-1].shape[1] == 256


@pytest.mark.parametrize("path, variant", PRESETS, ids=str)
def test_presets_shrink_with_smoke(path, variant):
    config = from_file(path, f"{variant},smoke")
    side = config.data.image_size or 8
    stage = traced(config, 300, (side, side, 3))
    params, _ = jax.eval_shape(
        stage.method.init, jax.random.key(0), example_batch(stage.method, stage.info, config.batch_size)
    )
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) < 1_000_000
    assert stage.lengths.stage <= 40


def test_the_papers_settings_are_those_of_the_specification():
    config = from_file(Path("configs/deepcluster.py"), "imagenet")
    assert (config.model.name, config.model.sobel, config.cluster.k) == ("alexnet", True, 10_000)
    assert (config.batch_size, config.rounds, config.refresh_every, config.seed) == (256, 200, "1 epoch", 31)
    body, top = config.optimizer.body, config.optimizer.top
    assert (body.name, body.lr, body.momentum, body.wd, body.schedule) == ("sgd", 0.05, 0.9, -5.0, "none")
    assert (top.name, top.lr, top.momentum, top.wd, top.schedule) == ("sgd", 0.05, 0.0, -5.0, "none")
    view = {name: value for name, value in config.views.train.items() if value}
    assert view == {"crop_area": 0.08, "crop_aspect": 0.75, "flip": 0.5}
    clustering = config.cluster
    assert (clustering.pca_dim, clustering.iterations, clustering.runs) == (256, 20, 1)
    assert clustering.whiten and clustering.l2 and clustering.whiten_power == 1.0
    pic = clustering.pic
    assert (pic.neighbours, pic.sigma, pic.alpha, pic.iterations) == (5, 0.2, 0.001, 200)


def test_imagenette_has_adam_for_the_body_and_sgd_for_the_top():
    config = from_file(Path("configs/deepcluster.py"), "imagenette")
    assert (config.optimizer.body.name, config.optimizer.top.name, config.model.name) == ("adam", "sgd", "vgg16")


def test_own_folders_need_a_number_of_clusters():
    config = from_file(Path("configs/deepcluster.py"), "folder")
    with pytest.raises(config_lib.ConfigError, match=r"cluster.k=0: say into how many clusters.*--job=sweep"):
        config_lib.validate(config)
    config.cluster.method = "pic"
    config_lib.validate(config)
