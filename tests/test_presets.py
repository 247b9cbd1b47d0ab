"""Every file in configs/ and each of its variants: it loads, traces at full size, and runs when shrunk."""

import re
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxclust import config as config_lib
from jaxclust import models
from jaxclust.config import from_file
from jaxclust.methods.base import DataInfo
from jaxclust.train import optim
from jaxclust.train.lengths import lengths
from jaxclust.train.stage import example_batch, prepare


def variants(path):
    """Names of the variants of a config file, as its answer to a wrong one lists them."""
    with pytest.raises(config_lib.ConfigError) as refused:
        from_file(path, "unheard of")
    return re.search(r"There is: (.*)\.$", str(refused.value))[1].split(", ")


OF_IMAGENET = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
PAPER = {  # of SPICE, sections 3, 4 and 9: K, side, network and its first convolution; epochs, queue; pool, chunk, test
    # batch, epochs; cutout, share; semi, and its colours
    "stl10": (
        10, 96, "clusterresnet", (3, 3), 1000, 65_536, 5000, 100, 100, 100, 32, 0.90, "wrn37_2", *OF_IMAGENET,
    ),
    "cifar10": (
        10, 32, "resnet18", (3, 3), 1000, 12_800, 5000, 100, 100, 30, 16, 0.99, "resnet18", (125.3, 123.0, 113.9),
        (63.0, 62.1, 66.7),
    ),
    "cifar100": (
        20, 32, "clusterresnet", (3, 3), 1000, 12_800, 10_000, 1000, 500, 100, 16, 0.99, "wrn28_8",
        (129.3, 124.1, 112.4), (68.2, 65.4, 70.4),
    ),
    "imagenet10": (
        10, 224, "resnet34", (7, 7), 5000, None, 5000, 500, 100, 100, 32, 0.90, "resnet34", *OF_IMAGENET
    ),
    "imagenet_dog": (
        15, 224, "resnet34", (7, 7), 3000, None, 8000, 500, 100, 100, 32, 0.90, "resnet34", *OF_IMAGENET
    ),
    "tiny_imagenet": (
        200, 64, "clusterresnet", (3, 3), None, None, None, None, 1000, None, None, 0.90, None, None, None
    ),
}  # fmt: skip
SPICE = Path("configs/spice.py")


def marks(path, name):
    """Seen less often: networks that take seconds to trace, of which there is a smaller one, and what is as another."""
    large = name in ("v2", "imagenette", "cifar10") or path == SPICE and name in PAPER
    others = ("dscl", "cars196"), ("dscl", "seed"), ("clustnet", "diverse"), ("dscl", "digits"), ("uad", "imagenet")
    others += ("dscl", "tiny"), ("clustnet", "separate"), ("uad", "folder"), ("dscl", "paper_aug")
    again = name in ("smoke", "recommended", "grid", "seeds", "mnist")
    return [pytest.mark.wide] if large or again or (path.stem, name) in others else []


PRESETS = [
    pytest.param(path, name, marks=marks(path, name))
    for path in sorted(Path("configs").glob("*.py"))
    for name in ["", *variants(path)]
    if not (path.stem == "uad" and name.startswith("v2")) and not name.endswith("_star")
]
IMAGES = {"imagenet": 1_281_167, "v2": 1_281_167, "imagenette": 9469, "cifar10": 50_000, "mnist": 60_000}
IMAGES |= {"stl10": 113_000, "imagenet_dog": 19_500, "tiny_imagenet": 100_000}


def traced(config, size, shape, number=0):
    """A stage of a config, by default the first, traced and not run; of a sweep what all its runs have in common."""
    config.runtime.devices, config.sweep = 1, ""
    if config.cluster.k == 0:
        config.cluster.k = 20
    name = config_lib.stage_names(config_lib.validate(config))[number]
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


def first_kernel(config):
    """The window of the first convolution of a ResNet."""
    return (models.get(config).stem.kernel,) * 2


def levels(colours):
    return tuple(round(255 * colour, 3) for colour in colours)


@pytest.mark.parametrize("name", PAPER)
def test_spices_settings_are_those_of_the_specification(name):
    config = config_lib.validate(from_file(SPICE, name))
    stage = {stage: config_lib.for_stage(config, stage) for stage in config_lib.stage_names(config)}
    moco, heads, reliable, semi = (stage.get(name) for name in ("moco", "self", "reliable", "semi"))
    side = config.data.image_size
    found = (
        config.cluster.k, side, heads.model.name, first_kernel(heads), moco.rounds, moco.moco.queue, heads.batch_size,
        heads.spice.target_sub_batch_size, config.eval_batch_size, heads.rounds, heads.views.strong.erase * side,
        reliable.reliable.ratio_confident, semi and semi.model.name, semi and levels(semi.data.mean),
        semi and levels(semi.data.std),
    )  # fmt: skip
    assert {first_kernel(stage[name]) for name in ("moco", "embed", "self", "reliable")} == {first_kernel(heads)}
    assert [pair for pair in zip(found, PAPER[name], strict=True) if pair[1] not in (None, pair[0])] == []
    assert moco.moco.queue % moco.batch_size == 0 and moco.moco.queue < moco.data.num_images
    assert {stage.cluster.k for stage in stage.values()} == {config.cluster.k}
    body, spice = moco.optimizer.body, heads.spice
    assert (body.name, body.lr, body.momentum, body.weight_decay, body.schedule) == ("sgd", 0.015, 0.9, 1e-4, "cosine")
    assert (moco.batch_size, moco.moco.temperature, moco.moco.momentum, moco.moco.dim) == (128, 0.2, 0.999, 128)
    assert (spice.train_sub_batch_size, spice.num_repeat, spice.num_head, spice.lr) == (128, 8, 10, 0.005)
    assert (spice.center_ratio, heads.sampler, config.evaluate.nmi_average) == (0.5, "resample", "geometric")
    assert (reliable.reliable.num_neighbor, reliable.reliable.score) == (100, 0.99)


def test_spices_views_are_those_of_the_specification():
    config = from_file(SPICE, "stl10")
    heads, semi = (config_lib.for_stage(config, name).views for name in ("self", "semi"))
    moco = {"crop_area": 0.2, "flip": 0.5, "jitter": 0.8, "brightness": 0.4, "contrast": 0.4, "saturation": 0.4}
    assert changed(heads.query) == changed(heads.key) == {**moco, "hue": 0.1, "grey": 0.2, "blur": 0.5}
    assert changed(heads.original) == {} and changed(heads.weak) == changed(semi.weak) == {"flip": 0.5, "pad": 4}
    cutout = {"erase": 32 / 96, "erase_fill": (0.485, 0.456, 0.406)}
    assert changed(heads.strong) == {"flip": 0.5, "randaugment": 4, **cutout}
    cutout = {"erase": 0.5, "erase_fill": (125 / 255, 123 / 255, 114 / 255)}
    assert changed(semi.strong) == {
        "flip": 0.5, "pad": 4, "randaugment": 3, "randaugment_set": "fixmatch", **cutout
    }  # fmt: skip


def test_the_first_version_of_moco_is_that_of_the_specification_on_any_data_set():
    config = config_lib.validate(from_file(SPICE, "cifar10,moco_v1"))
    moco, second = (config_lib.for_stage(c, "moco") for c in (config, from_file(SPICE, "cifar10")))
    assert (moco.moco.temperature, moco.moco.mlp, moco.moco.queue) == (0.07, False, second.moco.queue)
    colours = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.4}
    assert (
        changed(moco.views.query) == changed(moco.views.key) == {"crop_area": 0.2, "flip": 0.5, "grey": 0.2, **colours}
    )
    length = lengths(moco, 50_000)
    rate = optim.schedule(optim.Course(moco.optimizer.body, length.every["body"]), length.stage)
    rates = [float(rate(epoch * length.round)) for epoch in (0, 119, 120, 159, 160, 999)]
    assert rates == pytest.approx([0.015, 0.015, 0.0015, 0.0015, 0.00015, 0.00015])


def test_every_variant_of_spice_has_nmi_and_pictures_as_published():
    for name in variants(SPICE):
        config = from_file(SPICE, name)
        assert config.evaluate.nmi_average == "geometric"
        assert {"prototypes", "similarity", "tsne"} <= set(config.report.pictures.split(","))
        assert "heads" in config.evaluate.suite.split(",")
        assert config_lib.for_stage(config, "self").eval_every == "1 round", "figures of each head in every round"


def test_spices_last_stage_is_fixmatch_as_published_with_its_own_colours():
    config = from_file(SPICE, "cifar10")
    heads, semi = (config_lib.for_stage(config, name) for name in ("self", "semi"))
    assert (semi.rounds, semi.steps, semi.refresh_every, semi.fixmatch.ema) == (0, 2**20, "1000 steps", 0.999)
    assert (semi.batch_size, semi.unlabelled_ratio, semi.sampler) == (64 * 8, 7, "labelled_first")
    for group in semi.optimizer.values():
        assert (group.lr, group.schedule, group.part, group.nesterov) == (0.03, "cosine_part", 7 / 16, True)
        assert (group.momentum, group.weight_decay, group.decayed) == (0.9, 5e-4, "no_norm")
    assert heads.data.mean == (0.485, 0.456, 0.406) and heads.data.std == (0.229, 0.224, 0.225)
    np.testing.assert_allclose(np.multiply(semi.data.mean, 255), (125.3, 123.0, 113.9))
    np.testing.assert_allclose(np.multiply(semi.data.std, 255), (63.0, 62.1, 66.7))
    assert from_file(SPICE, "cifar100").data.label == "coarse_label"


@pytest.mark.parametrize(
    "name, moco, heads, semi",
    [
        ("stl10", "train+test+unlabelled", "train+test", "train+test+unlabelled"),
        ("stl10_star", "train+unlabelled", "train", "train+unlabelled"),
        ("cifar10", "train", "train+test", "train+test"),
        ("cifar10_star", "train", "train", "train"),
        ("imagenet10", "train", "train", "train"),
    ],
)
def test_spices_stages_are_trained_on_the_images_of_the_paper(name, moco, heads, semi):
    config = from_file(SPICE, name)
    data = {stage: config_lib.for_stage(config, stage).data for stage in config_lib.stage_names(config)}
    trains = {"moco": moco, "embed": heads, "self": heads, "reliable": heads, "semi": semi}
    assert {stage: of.train for stage, of in data.items()} == trains
    sizes = {"stl10": (5000, 8000, 100_000), "cifar1": (50_000, 10_000), "imagen": (13_000,)}
    of = dict(
        zip(("train", "test", "unlabelled"), next(v for k, v in sizes.items() if name.startswith(k)), strict=False)
    )
    assert all(of_stage.num_images == sum(of[part] for part in of_stage.train.split("+")) for of_stage in data.values())


@pytest.mark.wide
@pytest.mark.parametrize("number, size", [(1, 60_000), (2, 60_000), (3, 60_000), (4, 60_000)])
def test_the_whole_recipe_of_cifar10_traces_at_full_size(number, size):
    stage = traced(from_file(SPICE, "cifar10"), size, (32, 32, 3), number)
    assert stage.lengths.stage == (0, 30 * 12, 0, 2**20)[number - 1]
    if stage.name == "semi":
        assert stage.shapes.params["top"]["embedding"]["kernel"].shape == (512, 10)
