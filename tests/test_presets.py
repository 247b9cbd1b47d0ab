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


PRESETS = [
    pytest.param(path, name, marks=[pytest.mark.medium] if name == "v2" else [])
    for path in sorted(Path("configs").glob("*.py"))
    for name in ["", *variants(path)]
    if not (path.stem == "uad" and name.startswith("v2"))
]
IMAGES = {"imagenet": 1_281_167, "v2": 1_281_167, "imagenette": 9469, "cifar10": 50_000, "mnist": 60_000}


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
        stage.method.init, jax.random.key(0), example_batch(stage.method, stage.info, config.batch_size, config.views)
    )
    images = jax.ShapeDtypeStruct((config.eval_batch_size, *shape), np.uint8)
    features = jax.eval_shape(stage.method.embed, params, extra, images)
    assert features.shape[0] == config.eval_batch_size and features.ndim == 2
    if stage.method.predict:
        predicted = jax.eval_shape(stage.method.predict, params, extra, images)
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
        stage.method.init, jax.random.key(0), example_batch(stage.method, stage.info, config.batch_size, config.views)
    )
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) < 1_000_000
    assert stage.lengths.stage <= 40


def changed(view):
    """What of a view is not as by default."""
    return {name: value for name, value in view.items() if value != config_lib.base().views.train[name]}


def test_the_papers_settings_are_those_of_the_specification():
    config = from_file(Path("configs/deepcluster.py"), "imagenet")
    assert (config.model.name, config.model.sobel, config.cluster.k) == ("alexnet", True, 10_000)
    assert (config.batch_size, config.rounds, config.refresh_every, config.seed) == (256, 200, "1 epoch", 31)
    body, top = config.optimizer.body, config.optimizer.top
    assert (body.name, body.lr, body.momentum, body.wd, body.schedule) == ("sgd", 0.05, 0.9, -5.0, "none")
    assert (top.name, top.lr, top.momentum, top.wd, top.schedule) == ("sgd", 0.05, 0.0, -5.0, "none")
    assert changed(config.views.train) == {"crop_area": 0.08, "flip": 0.5} and config.views.train.crop_aspect == 0.75
    clustering = config.cluster
    assert (clustering.pca_dim, clustering.iterations, clustering.runs) == (256, 20, 1)
    assert clustering.whiten and clustering.l2 and clustering.whiten_power == 1.0
    pic = clustering.pic
    assert (pic.neighbours, pic.sigma, pic.alpha, pic.iterations) == (5, 0.2, 0.001, 200)


def test_the_second_versions_settings_are_those_of_the_specification():
    config = from_file(Path("configs/deepcluster.py"), "v2")
    v2, clustering, body = config.deepcluster_v2, config.cluster, config.optimizer.body
    assert (v2.heads, v2.temperature, v2.hidden, v2.dim) == (3, 0.1, 2048, 128)
    assert (clustering.method, clustering.k, clustering.iterations, clustering.runs) == ("spherical", 3000, 10, 1)
    assert (config.model.name, config.model.sobel, config.batch_size, config.rounds) == ("resnet50", False, 4096, 800)
    assert (body.name, body.trust, body.momentum, body.weight_decay, body.wd) == ("lars", 0.001, 0.9, 1e-6, 0.0)
    rate = (body.schedule, body.warmup, body.warmup_lr, body.lr, body.min_lr)
    assert rate == ("cosine", "10 epochs", 0.3, 4.8, 0.0048)
    assert config.optimizer.prototypes.frozen == 300_000 > config.rounds * -(-IMAGES["v2"] // 4096)
    large, small = changed(config.views.large), changed(config.views.small)
    colours = {"jitter": 0.8, "brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2}
    shared = {**colours, "flip": 0.5, "grey": 0.2, "blur": 0.5}
    assert large == {**shared, "number": 2, "crop_area": 0.14} and config.data.image_size == 224
    assert small == {**shared, "number": 6, "size": 96, "crop_area": 0.05, "crop_area_max": 0.14}


def test_the_second_version_is_no_uad():
    with pytest.raises(config_lib.ConfigError, match="UAD is a difference from DeepCluster, not from deepcluster_v2"):
        from_file(Path("configs/uad.py"), "v2")


def test_imagenette_has_adam_for_the_body_and_sgd_for_the_top():
    config = from_file(Path("configs/deepcluster.py"), "imagenette")
    assert (config.optimizer.body.name, config.optimizer.top.name, config.model.name) == ("adam", "sgd", "vgg16")


def test_own_folders_need_a_number_of_clusters():
    config = from_file(Path("configs/deepcluster.py"), "folder")
    with pytest.raises(config_lib.ConfigError, match=r"cluster.k=0: say into how many clusters.*--job=sweep"):
        config_lib.validate(config)
    config.cluster.method = "pic"
    config_lib.validate(config)
