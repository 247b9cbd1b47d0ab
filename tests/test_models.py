"""Networks against slow float64 doubles, written from the tables of their papers, and at every size."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxclust import config as config_lib
from jaxclust import models
from jaxclust.errors import ConfigError
from jaxclust.models import layers
from jaxclust.models.heads import MLP
from jaxclust.ops.sobel import sobel
from jaxclust.runtime import AXIS

NAMES = [
    "alexnet", "alexnet_owt", "convnet", "inception_v3", "resnet18", "resnet34", "resnet50", "clusterresnet", "vgg16",
    "wrn28_2", "wrn28_8", "wrn37_2",
]  # fmt: skip
WIDTHS = {
    "alexnet": 6,
    "alexnet_owt": 4,
    "convnet": 4,
    "resnet18": 3,
    "resnet50": 2,
    "clusterresnet": 2,
    "vgg16": 2,
    "wrn28_2": 2,
}
every_network = pytest.mark.parametrize("name", NAMES)
OFTEN = ("alexnet", "convnet", "resnet18")
OTHERS = [pytest.param(name, marks=pytest.mark.wide) for name in ("vgg16", "wrn28_2")]
every_file = pytest.mark.parametrize("name", [*OFTEN, *OTHERS])


def network(name, dtype="float32", **settings):
    config = config_lib.base()
    config.model.name, config.runtime.dtype = name, dtype
    config.model.update(settings)
    return models.get(config_lib.validate(config))


def averages(name):
    """Whether the feature of a network is the mean of its last map."""
    return "resnet" in name or name.startswith(("wrn", "inception"))


def tiny(name, dtype="float32", **settings):
    net = network(name, dtype, **{"width": WIDTHS[name], "dim": 0 if averages(name) else 10, **settings})
    return net.clone(groups=net.groups._replace(blocks=(2, 2, 2))) if name == "wrn28_2" else net


def images(height, width=None, channels=3, batch=2, dtype=np.float32):
    return np.random.default_rng(0).normal(size=(batch, height, width or height, channels)).astype(dtype)


def born(net, x):
    """Shapes of the variables of a new network."""
    variables = jax.eval_shape(net.init, jax.random.key(0), x)
    return {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}


def drawn(net, x, dtype=np.float32):
    """Variables in which no bias is zero and no batch statistic is that of a new network."""
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        if path[-1].key == "kernel":
            return rng.normal(0, np.sqrt(2 / np.prod(leaf.shape[:-1])), leaf.shape).astype(dtype)
        low, high = {"bias": (-0.5, 0.5), "mean": (-0.5, 0.5)}.get(path[-1].key, (0.5, 1.5))
        return rng.uniform(low, high, leaf.shape).astype(dtype)

    return jax.tree_util.tree_map_with_path(draw, born(net, x))


@functools.partial(jax.jit, static_argnums=0)
def _outputs(net, variables, x):
    return net.apply(variables, x, mutable=["maps"])


def outputs(net, variables, x):
    """Feature and maps in evaluation mode."""
    feature, found = _outputs(net, variables, x)
    return np.asarray(feature), {name: np.asarray(value[0]) for name, value in found["maps"].items()}


@functools.partial(jax.jit, static_argnums=0)
def _trained(net, variables, x, key):
    def program(x):
        return net.apply(variables, x, train=True, mutable=["batch_stats"], rngs={"dropout": key})

    return jax.vmap(program, axis_name=AXIS)(x[None])


def trained(net, variables, x, seed=0):
    """Feature and new batch statistics in training mode, as on the one device of a mesh."""
    feature, updated = _trained(net, variables, x, jax.random.key(seed))
    return np.asarray(feature[0]), jax.tree.map(lambda leaf: np.asarray(leaf[0]), updated["batch_stats"])


@functools.cache
def shapes(name, sides, channels=3, **settings):
    """Shapes of parameters, feature and maps, without computing anything."""
    net = network(name, **settings)
    x = jax.ShapeDtypeStruct((2, *sides, channels), jnp.float32)
    variables = born(net, x)
    feature, found = jax.eval_shape(lambda v, x: net.apply(v, x, mutable=["maps"]), variables, x)
    leaves = jax.tree_util.tree_leaves_with_path(variables["params"])
    params = {"/".join(key.key for key in path): leaf.shape for path, leaf in leaves}
    return params, feature.shape, {name: value[0].shape[1:] for name, value in found["maps"].items()}


# The Sobel operator

GX = np.array([[1, 0, -1], [2, 0, -2], [1, 0, -1]])


def slow_sobel(x):
    grey = x.astype(np.float64).mean(axis=-1)
    both = [
        [scipy.ndimage.correlate(image, kernel, mode="constant", cval=0.0) for image in grey] for kernel in (GX, GX.T)
    ]
    return np.moveaxis(np.array(both), 0, -1)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_sobel_of_a_constant_image_is_exactly_zero_inside_and_not_at_the_border(channels, dtype):
    values = np.random.default_rng(0).normal(size=(20, 1, 1, channels))
    found = np.asarray(jax.jit(sobel)(jnp.asarray(np.broadcast_to(values, (20, 9, 7, channels)), dtype)), np.float64)
    assert found.shape == (20, 9, 7, 2)
    np.testing.assert_array_equal(found[:, 1:-1, 1:-1], 0)
    assert (found[:, 1:-1, [0, -1], 0] != 0).all() and (found[:, [0, -1], 1:-1, 1] != 0).all()


@pytest.mark.parametrize("height", [0.75, -2.0])
def test_sobel_of_a_vertical_step_edge_is_four_times_its_height(height):
    step = np.zeros((1, 8, 8, 3), np.float32)
    step[:, :, 4:] = height
    found = np.asarray(sobel(step))[0, 1:-1, 1:-1]
    np.testing.assert_allclose(found[:, 2:4, 0], -4 * height, rtol=1e-6)  # left minus right
    np.testing.assert_array_equal(found[:, [0, 1, 4, 5], 0], 0)
    np.testing.assert_array_equal(found[..., 1], 0)
    turned = np.asarray(sobel(step.transpose(0, 2, 1, 3)))
    np.testing.assert_array_equal(turned[0, 1:-1, 1:-1, 1].T, found[..., 0])


@settings(max_examples=12)
@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 3]))
def test_sobel_equals_the_slow_double(height, width, channels):
    x = images(height, width, channels)
    np.testing.assert_allclose(jax.jit(sobel)(x), slow_sobel(x), atol=1e-5)


def test_sobel_keeps_float64(float64):
    x = images(6, dtype=np.float64)
    found = sobel(x)
    assert found.dtype == jnp.float64
    np.testing.assert_allclose(found, slow_sobel(x), atol=1e-14)


@pytest.mark.wide
@every_file
@pytest.mark.parametrize("channels", [1, 3])
def test_a_network_with_sobel_is_the_network_on_gradients_and_has_no_more_parameters(name, channels):
    x = images(16, channels=channels)
    with_sobel, without = tiny(name, sobel=True), tiny(name)
    assert born(with_sobel, x) == born(without, sobel(x))
    first = "block1_conv" if name == "convnet" else "conv1_conv"
    variables = drawn(with_sobel, x)
    assert variables["params"][first]["kernel"].shape[2] == 2
    np.testing.assert_allclose(
        outputs(with_sobel, variables, x)[0], outputs(without, variables, sobel(x))[0], rtol=1e-4, atol=1e-4
    )


# Pooling


def slow_max_pool(x, window, stride, padding=0):
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)), constant_values=-np.inf)
    height, width = ((side - window) // stride + 1 for side in x.shape[1:3])
    return np.array(
        [
            [x[:, i * stride :, j * stride :][:, :window, :window].max(axis=(1, 2)) for j in range(width)]
            for i in range(height)
        ]
    ).transpose(2, 0, 1, 3)


POOLS = [(2, 2, 0), (3, 2, 0), (3, 2, 1)]


@pytest.mark.parametrize("pool", POOLS)
@settings(max_examples=8)
@given(st.integers(3, 14), st.integers(3, 14))
def test_max_pool_equals_the_slow_double(pool, height, width):
    x = images(height, width)
    found = jax.jit(lambda x: layers.max_pool(x, *pool))(x)
    np.testing.assert_array_equal(found, slow_max_pool(x, *pool))


@pytest.mark.wide
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("sides", [(8, 8), (9, 7), (12, 5)])
def test_gradient_of_max_pool_is_that_of_the_library_where_no_values_tie(pool, sides):
    window, stride, padding = pool
    x = np.random.default_rng(0).permutation(2 * np.prod(sides) * 3).reshape(2, *sides, 3).astype(np.float32)
    library = functools.partial(
        nn.max_pool, window_shape=(window, window), strides=(stride, stride), padding=((padding, padding),) * 2
    )
    cotangent = images(*slow_max_pool(x, *pool).shape[1:3])
    ours = jax.vjp(lambda x: layers.max_pool(x, *pool), x)[1](cotangent)[0]
    np.testing.assert_allclose(ours, jax.vjp(library, x)[1](cotangent)[0], rtol=1e-6)


def test_equal_maxima_share_the_gradient_and_a_map_smaller_than_the_window_stays():
    x = np.zeros((1, 4, 4, 1), np.float32)
    gradient = jax.grad(lambda x: layers.max_pool(x, 2, 2).sum())(x)
    np.testing.assert_array_equal(gradient, np.full_like(x, 0.25))
    for shape in [(1, 2, 5, 1), (1, 5, 2, 1), (1, 1, 1, 1)]:
        assert layers.max_pool(np.ones(shape, np.float32), 3, 2).shape == shape
    assert layers.max_pool(np.ones((1, 1, 1, 1), np.float32), 3, 2, 1).shape == (1, 1, 1, 1)


def slow_adaptive_mean(x, side):
    _, height, width, channels = x.shape
    out = np.empty((len(x), side, side, channels))
    for i in range(side):
        for j in range(side):
            top, bottom = int(np.floor(i * height / side)), int(np.ceil((i + 1) * height / side))
            left, right = int(np.floor(j * width / side)), int(np.ceil((j + 1) * width / side))
            out[:, i, j] = x[:, top:bottom, left:right].astype(np.float64).mean(axis=(1, 2))
    return out


@settings(max_examples=25)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 9))
def test_adaptive_mean_equals_the_slow_double(height, width, side):
    x = images(height, width)
    found = jax.jit(lambda x: layers.adaptive_mean(x, side))(x)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, slow_adaptive_mean(x, side), atol=1e-5)


def test_adaptive_mean_changes_nothing_at_its_own_side_and_repeats_a_single_pixel():
    x = images(6)
    assert layers.adaptive_mean(x, 6) is x
    pixel = images(1)
    np.testing.assert_array_equal(layers.adaptive_mean(pixel, 7), np.broadcast_to(pixel, (2, 7, 7, 3)))


# Whole networks against doubles


def slow_conv(x, kernel, bias, stride, padding):
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    size = kernel.shape[0]
    height, width = ((side - size) // stride + 1 for side in x.shape[1:3])
    out = np.zeros((len(x), height, width, kernel.shape[-1])) + bias
    for i in range(size):
        for j in range(size):
            shifted = x[:, i : i + (height - 1) * stride + 1 : stride, j : j + (width - 1) * stride + 1 : stride]
            out += shifted @ kernel[i, j]
    return out


class Slow:
    """The layers of a network by their names, on float64 arrays; `maps` are kept."""

    def __init__(self, variables):
        self.params, self.stats, self.maps = variables["params"], variables["batch_stats"], {}

    def conv(self, x, name, stride, padding):
        conv, norm, stats = self.params[f"{name}_conv"], self.params[f"{name}_norm"], self.stats[f"{name}_norm"]
        y = slow_conv(x, conv["kernel"], conv.get("bias", 0), stride, padding)
        return (y - stats["mean"]) / np.sqrt(stats["var"] + 1e-5) * norm["scale"] + norm["bias"]

    def relu_map(self, x, name):
        self.maps[name] = np.maximum(x, 0)
        return self.maps[name]

    def dense(self, x, name):
        return x.reshape(len(x), -1) @ self.params[name]["kernel"] + self.params[name]["bias"]


def slow_alexnet(net, x):
    x = slow_max_pool(net.relu_map(net.conv(x, "conv1", 4, 2), "conv1"), 3, 2)
    x = slow_max_pool(net.relu_map(net.conv(x, "conv2", 1, 2), "conv2"), 3, 2)
    for name in ("conv3", "conv4", "conv5"):
        x = net.relu_map(net.conv(x, name, 1, 1), name)
    x = slow_adaptive_mean(slow_max_pool(x, 3, 2), 6)
    return net.dense(np.maximum(net.dense(x, "dense"), 0), "feature")


def slow_vgg16(net, x):
    for number in range(1, 14):
        x = net.relu_map(net.conv(x, f"conv{number}", 1, 1), f"conv{number}")
        if number in (2, 4, 7, 10, 13):
            x = slow_max_pool(x, 2, 2)
    return net.dense(np.maximum(net.dense(slow_adaptive_mean(x, 7), "dense"), 0), "feature")


def slow_convnet(net, x):
    for block in (1, 2, 3):
        y = net.conv(x, f"block{block}", 1, 1)
        x = slow_max_pool(net.relu_map(y, f"conv{block}"), 2, 2)
    return net.dense(x, "feature")


def slow_resnet(net, x, blocks, kernels, stem):
    x = net.relu_map(net.conv(x, "conv1", *((2, 3) if stem == "imagenet" else (1, 1))), "conv1")
    x = {"imagenet": lambda: slow_max_pool(x, 3, 2, 1), "pooled": lambda: slow_max_pool(x, 2, 2, 1)}.get(
        stem, lambda: x
    )()
    for stage, count in enumerate(blocks, 2):
        for block in range(1, count + 1):
            name, y = f"conv{stage}_{block}", x
            halved = stage > 2 and block == 1
            for i, kernel in enumerate(kernels, 1):
                strided = halved and i == kernels.index(3) + 1  # the first 3 x 3
                y = net.conv(y, f"{name}_{i}", 2 if strided else 1, kernel // 2)
                y = y if i == len(kernels) else np.maximum(y, 0)
            if block == 1 and x.shape[-1] != y.shape[-1]:
                x = net.conv(x, f"{name}_skip", 2 if halved else 1, 0)
            x = np.maximum(x + y, 0)
        net.relu_map(x, f"conv{stage}")
    return x.mean(axis=(1, 2))


def slow_resnet18(net, x, stem):
    return slow_resnet(net, x, (2, 2, 2, 2), (3, 3), stem)


def slow_resnet50(net, x, stem):
    return slow_resnet(net, x, (3, 4, 6, 3), (1, 3, 1), stem)


def slow_clusterresnet(net, x, stem):
    return slow_resnet(net, x, (3, 4, 6, 3), (3, 3), "pooled")  # whatever config.model.stem says


def slow_wrn28_2(net, x, stem):
    def conv(x, name, stride, padding):
        return slow_conv(x, net.params[f"{name}_conv"]["kernel"], 0, stride, padding)

    def activated(x, name):
        norm, stats = net.params[f"{name}_norm"], net.stats[f"{name}_norm"]
        y = (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-5) * norm["scale"] + norm["bias"]
        return np.where(y > 0, y, 0.1 * y)

    x = conv(x, "conv1", 1, 1)
    for group, stride in enumerate((1, 2, 2), 1):
        for block in (1, 2):
            name = f"conv{group + 1}_{block}"
            y = activated(x, f"{name}_1")
            if block == 1:
                net.maps[f"conv{group}"] = y
                x, y = conv(y, f"{name}_skip", stride, 0), conv(y, f"{name}_1", stride, 1)
            else:
                y = conv(y, f"{name}_1", 1, 1)
            x = x + conv(activated(y, f"{name}_2"), f"{name}_2", 1, 1)
    net.maps["conv4"] = activated(x, "last")
    return net.maps["conv4"].mean(axis=(1, 2))


@pytest.mark.parametrize(
    ("slow", "sides", "stem"),
    [
        (slow_alexnet, (67, 91), "imagenet"),
        (slow_vgg16, (37, 64), "imagenet"),
        (slow_convnet, (19, 16), "imagenet"),
        (slow_resnet18, (35, 50), "imagenet"),
        (slow_resnet18, (9, 12), "small"),
        pytest.param(slow_resnet18, (11, 14), "pooled", marks=pytest.mark.wide),
        (slow_clusterresnet, (9, 9), "imagenet"),
        (slow_wrn28_2, (12, 9), "imagenet"),
        pytest.param(slow_resnet50, (33, 33), "imagenet", marks=pytest.mark.wide),
        (slow_resnet50, (10, 9), "small"),
    ],
)
def test_feature_and_maps_equal_the_slow_double(slow, sides, stem, float64):
    name = slow.__name__.removeprefix("slow_")
    net, x = tiny(name, "float64", stem=stem), images(*sides, dtype=np.float64)
    variables = drawn(net, x, np.float64)
    double = Slow(variables)
    expected = slow(double, x, stem) if averages(name) else slow(double, x)
    feature, maps = outputs(net, variables, x)
    assert feature.dtype == np.float64 and maps.keys() == double.maps.keys()
    np.testing.assert_allclose(feature, expected, rtol=1e-9, atol=1e-9)
    for key, value in maps.items():
        np.testing.assert_allclose(value, double.maps[key], rtol=1e-9, atol=1e-9, err_msg=key)


# Sizes as published


def test_alexnet_has_the_published_shapes():
    params, feature, maps = shapes("alexnet", (224, 224))
    sides = {"conv1": 55, "conv2": 27, "conv3": 13, "conv4": 13, "conv5": 13}
    channels = {"conv1": 96, "conv2": 256, "conv3": 384, "conv4": 384, "conv5": 256}
    assert maps == {name: (sides[name], sides[name], channels[name]) for name in sides}
    kernels = {name: shape for name, shape in params.items() if name.endswith("kernel")}
    assert kernels == {
        "conv1_conv/kernel": (11, 11, 3, 96),
        "conv2_conv/kernel": (5, 5, 96, 256),
        "conv3_conv/kernel": (3, 3, 256, 384),
        "conv4_conv/kernel": (3, 3, 384, 384),
        "conv5_conv/kernel": (3, 3, 384, 256),
        "dense/kernel": (9216, 4096),
        "feature/kernel": (4096, 4096),
    }
    assert params["conv1_conv/bias"] == params["conv1_norm/scale"] == (96,)
    assert feature == (2, 4096)


def test_alexnet_of_2014_is_narrower_and_has_no_batch_norm():
    params, feature, maps = shapes("alexnet_owt", (224, 224))
    assert {name: shape[2] for name, shape in maps.items()} == dict(
        conv1=64, conv2=192, conv3=384, conv4=256, conv5=256
    )
    assert feature == (2, 4096) and not any("norm" in name for name in params)


def test_inception_v3_has_the_published_shapes():
    params, feature, maps = shapes("inception_v3", (299, 299))
    sides = {"conv1": (147, 64), "conv2": (71, 192), "conv3": (35, 288), "conv4": (17, 768), "conv5": (8, 2048)}
    assert maps == {name: (side, side, channels) for name, (side, channels) in sides.items()}
    assert feature == (2, 2048) and not any(key.endswith("_conv/bias") for key in params)
    assert params["conv4_2_7x7_2_conv/kernel"] == (1, 7, 128, 128)
    assert params["conv5_2_3x3_2b_conv/kernel"] == (3, 1, 384, 384)


@pytest.mark.wide
@pytest.mark.parametrize("sides", [(74, 74), (74, 300), (300, 3)])
def test_inception_v3_names_the_smallest_image_it_can_see(sides):
    with pytest.raises(
        ConfigError, match=rf"'inception_v3' needs .* 75 x 75 .* {sides[0]} x {sides[1]}\. .*image_size"
    ):
        shapes("inception_v3", sides)
    assert shapes("inception_v3", (75, 75))[2]["conv5"] == (1, 1, 2048)


def test_alexnet_pools_to_27_13_and_6_at_224_pixels():
    net = network("alexnet")
    x = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    variables = born(net, x)
    program = str(jax.make_jaxpr(net.apply)(variables, x))
    for side, channels in ((27, 96), (13, 256), (6, 256)):
        assert f"f32[1,{side},{side},{channels}] = max" in program
    assert "f32[1,9216] = reshape" in program


def test_vgg16_has_the_published_shapes():
    params, feature, maps = shapes("vgg16", (224, 224))
    sizes = [(224, 64)] * 2 + [(112, 128)] * 2 + [(56, 256)] * 3 + [(28, 512)] * 3 + [(14, 512)] * 3
    assert maps == {f"conv{n}": (side, side, channels) for n, (side, channels) in enumerate(sizes, 1)}
    assert all(params[f"conv{n}_conv/kernel"][:2] == (3, 3) and f"conv{n}_conv/bias" in params for n in range(1, 14))
    assert params["dense/kernel"] == (25088, 4096) and params["feature/kernel"] == (4096, 4096)
    assert feature == (2, 4096)


@pytest.mark.parametrize("side, sides", [(96, (49, 25, 13, 7)), (64, (33, 17, 9, 5)), (32, (17, 9, 5, 3))])
def test_clusterresnet_has_the_published_shapes(side, sides):
    params, feature, maps = shapes("clusterresnet", (side, side))
    channels = (64, 64, 128, 256, 512)
    assert maps == {f"conv{n}": (s, s, c) for n, (s, c) in enumerate(zip((side, *sides), channels, strict=True), 1)}
    assert params["conv1_conv/kernel"] == (3, 3, 3, 64) and feature == (2, 512)


@pytest.mark.parametrize("name, side, sides, widths", [
    ("wrn28_2", 32, (32, 32, 16, 8), (16, 32, 64, 128)),
    ("wrn28_8", 32, (32, 32, 16, 8), (16, 128, 256, 512)),
    ("wrn37_2", 96, (96, 48, 24, 12, 6), (16, 32, 64, 128, 256)),
])  # fmt: skip
def test_wide_resnets_have_the_published_shapes(name, side, sides, widths):
    params, feature, maps = shapes(name, (side, side))
    assert maps == {f"conv{n}": (s, s, c) for n, (s, c) in enumerate(zip(sides, widths, strict=True), 1)}
    assert feature == (2, widths[-1]) and not any(key.endswith("_conv/bias") for key in params)


@pytest.mark.parametrize(("name", "expansion"), [("resnet18", 1), ("resnet34", 1), ("resnet50", 4)])
@pytest.mark.parametrize(("stem", "side", "sides"), [
    ("imagenet", 224, (112, 56, 28, 14, 7)), ("small", 32, (32, 32, 16, 8, 4)),
])  # fmt: skip
def test_resnet_has_the_published_shapes(name, expansion, stem, side, sides):
    params, feature, maps = shapes(name, (side, side), stem=stem)
    channels = (64, *(expansion * c for c in (64, 128, 256, 512)))
    assert maps == {f"conv{n}": (s, s, c) for n, (s, c) in enumerate(zip(sides, channels, strict=True), 1)}
    assert params["conv1_conv/kernel"][0] == (7 if stem == "imagenet" else 3)
    assert feature == (2, 512 * expansion) and not any(key.endswith("_conv/bias") for key in params)


def conv_count(kernel, before, after, bias):
    return kernel * kernel * before * after + after * bias + 2 * after


def dense_count(before, after):
    return before * after + after


def alexnet_count():
    convs = [(11, 3, 96), (5, 96, 256), (3, 256, 384), (3, 384, 384), (3, 384, 256)]
    return sum(conv_count(*c, bias=True) for c in convs) + dense_count(9216, 4096) + dense_count(4096, 4096)


def alexnet_owt_count():
    convs = [(11, 3, 64), (5, 64, 192), (3, 192, 384), (3, 384, 256), (3, 256, 256)]
    return sum(k * k * a * b + b for k, a, b in convs) + dense_count(9216, 4096) + dense_count(4096, 4096)


def inception_count():
    """Convolutions as (height * width, channels before, after), each with two numbers of its batch norm."""
    stem = [(9, 3, 32), (9, 32, 32), (9, 32, 64), (1, 64, 80), (9, 80, 192)]
    total = [*stem]
    for before, pool in ((192, 32), (256, 64), (288, 64)):
        total += [(1, before, 64), (1, before, 48), (25, 48, 64), (1, before, 64), (9, 64, 96), (9, 96, 96)]
        total += [(1, before, pool)]
    total += [(9, 288, 384), (1, 288, 64), (9, 64, 96), (9, 96, 96)]
    for c in (128, 160, 160, 192):
        total += [(1, 768, 192), (1, 768, c), (7, c, c), (7, c, 192)]
        total += [(1, 768, c), (7, c, c), (7, c, c), (7, c, c), (7, c, 192), (1, 768, 192)]
    total += [(1, 768, 192), (9, 192, 320), (1, 768, 192), (7, 192, 192), (7, 192, 192), (9, 192, 192)]
    for before in (1280, 2048):
        total += [(1, before, 320), (1, before, 384), (3, 384, 384), (3, 384, 384), (1, before, 448), (9, 448, 384)]
        total += [(3, 384, 384), (3, 384, 384), (1, before, 192)]
    return sum(area * before * after + 2 * after for area, before, after in total)


def vgg16_count():
    channels = [3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    convs = sum(conv_count(3, a, b, True) for a, b in zip(channels, channels[1:], strict=False))
    return convs + dense_count(25088, 4096) + dense_count(4096, 4096)


def wide_count(groups, widen):
    total, before = 9 * 3 * 16, 16
    for group in range(groups):
        after = 16 * widen * 2**group
        total += before * after + sum(2 * a + 9 * a * after for a in [before, *[after] * 7])  # 4 blocks of 2
        before = after
    return total + 2 * before


def resnet_count(blocks, kernels, expansion, stem=7):
    total, before = conv_count(stem, 3, 64, False), 64
    for stage, count in enumerate(blocks):
        width = 64 * 2**stage
        widths = [width] * (len(kernels) - 1) + [width * expansion]
        for block in range(count):
            for kernel, source, after in zip(kernels, [before, *widths], widths, strict=False):
                total += conv_count(kernel, source, after, False)
            if block == 0 and before != widths[-1]:
                total += conv_count(1, before, widths[-1], False)
            before = widths[-1]
    return total


@pytest.mark.wide
@pytest.mark.parametrize(("name", "formula", "known"), [
    ("alexnet", alexnet_count(), 58_284_096),
    ("alexnet_owt", alexnet_owt_count(), 61_100_840 - dense_count(4096, 1000)),
    ("inception_v3", inception_count(), 21_785_568),
    ("vgg16", vgg16_count(), 138_365_992 - dense_count(4096, 1000)),
    ("resnet18", resnet_count((2, 2, 2, 2), (3, 3), 1), 11_176_512),
    ("resnet34", resnet_count((3, 4, 6, 3), (3, 3), 1), 21_284_672),
    ("resnet50", resnet_count((3, 4, 6, 3), (1, 3, 1), 4), 23_508_032),
    ("clusterresnet", resnet_count((3, 4, 6, 3), (3, 3), 1, stem=3), 21_284_672 - (49 - 9) * 3 * 64),
    ("wrn28_2", wide_count(3, 2), 1_467_610 - dense_count(128, 10)),
    ("wrn28_8", wide_count(3, 8), None),
    ("wrn37_2", wide_count(4, 2), None),
])  # fmt: skip
def test_full_size_networks_have_as_many_parameters_as_published(name, formula, known):
    params, _, _ = shapes(name, (224, 224))
    assert sum(int(np.prod(shape)) for shape in params.values()) == formula
    assert known in (formula, None)


@pytest.mark.wide
@every_network
def test_width_and_dim_scale_a_network_in_proportion(name):
    sides = (75, 75) if name == "inception_v3" else (64, 64)
    own, _, _ = shapes(name, sides)
    first = {"convnet": "block1_conv/kernel", "inception_v3": "conv1_1_conv/kernel"}.get(name, "conv1_conv/kernel")
    half, feature, _ = shapes(name, sides, width=own[first][-1] // 2, dim=20)
    assert feature == (2, 20)
    for key, shape in half.items():
        if "conv" in key or "norm" in key:
            assert shape[-1] * 2 == own[key][-1], key
    if not averages(name):
        assert half["feature/kernel"][-1] == 20 and own["feature/kernel"][-1] == (128 if name == "convnet" else 4096)


def test_widths_of_alexnet_are_rounded():
    params, _, _ = shapes("alexnet", (32, 32), width=10, dim=8)
    assert [params[f"conv{n}_conv/kernel"][-1] for n in range(1, 6)] == [10, 27, 40, 40, 27]


@pytest.mark.wide
@settings(max_examples=6)
@given(
    st.sampled_from(list(WIDTHS)), st.integers(16, 64), st.integers(16, 64), st.sampled_from([1, 3]),
    st.sampled_from(["imagenet", "small", "pooled"]),
)  # fmt: skip
def test_images_of_any_size_give_features_of_one_size(name, height, width, channels, stem):
    options = {"width": WIDTHS[name], "dim": 5, "stem": stem}
    params, feature, maps = shapes(name, (height, width), channels, **options)
    assert feature == (2, 5) and all(min(shape) >= 1 for shape in maps.values())
    if name != "convnet":  # its dense layer takes the last map as it is
        assert params == shapes(name, (64, 64), channels, **options)[0]


@every_file
@pytest.mark.parametrize("sides", [(8, 8), (16, 41)])
def test_features_of_small_images_are_finite_and_differ(name, sides):
    net, x = tiny(name), images(*sides)
    feature, maps = outputs(net, drawn(net, x), x)
    assert np.isfinite(feature).all() and (feature[0] != feature[1]).any()
    for value in maps.values():
        assert ((value >= 0).all() or name == "wrn28_2") and (value > 0).any() and np.isfinite(value).all()


@pytest.mark.parametrize("sides", [(6, 6), (6, 40), (40, 3)])
def test_alexnet_names_the_smallest_image_it_can_see(sides):
    with pytest.raises(ConfigError, match=rf"'alexnet' needs .* 7 x 7 .* {sides[0]} x {sides[1]}\. .*image_size"):
        shapes("alexnet", sides)
    assert shapes("alexnet", (7, 7))[1] == (2, 4096)


# Initialisation, batch norm, dropout


@pytest.mark.wide
def test_clusterresnet_and_multilayer_heads_are_drawn_as_pytorch_does():
    net = network("clusterresnet", width=16).clone(blocks=(1, 1, 1, 1))
    params = jax.jit(net.init)(jax.random.key(0), images(8))["params"]
    head = MLP(2, 40, jnp.float32).init(jax.random.key(1), np.zeros((1, 900), np.float32))["params"]
    checked = 0
    for leaf in jax.tree.leaves((params, head)):
        kernel = np.asarray(leaf)
        bound = 1 / np.sqrt(900 if kernel.ndim == 1 else np.prod(kernel.shape[:-1]))
        if kernel.size > 2000 or kernel.size == 900:
            assert np.abs(kernel).max() <= bound and np.abs(kernel).max() > 0.99 * bound
            assert kernel.std() == pytest.approx(bound / np.sqrt(3), rel=0.06)
            assert abs(kernel.mean()) < 4 * bound / np.sqrt(3 * kernel.size)
            checked += 1
    assert checked == 8 + 2 + 3, "of the blocks, of the two larger shortcuts, of the head"
    assert set(head) == {"hidden1", "embedding"}


@pytest.mark.wide
@pytest.mark.parametrize(("name", "width"), [("alexnet", 48), ("vgg16", 32), ("resnet18", 32), ("wrn28_2", 0)])
def test_parameters_are_drawn_as_published(name, width):
    net = network(name, dim=128, width=width)  # half as wide, with enough numbers for their spread
    params = jax.jit(net.init)(jax.random.key(0), images(16))["params"]
    for layer, leaves in jax.tree.map(np.asarray, params).items():
        np.testing.assert_array_equal(leaves.get("bias", 0), 0)
        np.testing.assert_array_equal(leaves.get("scale", 1), 1)
        kernel = leaves.get("kernel")
        if kernel is not None and kernel.size > 8000:  # else the estimate itself is off by 2 %
            k, _, _, after = kernel.shape if kernel.ndim == 4 else (0, 0, 0, 0)
            expected = np.sqrt(2 / (k * k * after)) if kernel.ndim == 4 else 0.01
            assert kernel.std() == pytest.approx(expected, rel=0.02), layer
            assert abs(kernel.mean()) < 4 * expected / np.sqrt(kernel.size), layer
            assert np.abs(kernel).max() > 3 * expected, "the tails are not cut"


def test_batch_norm_has_the_published_constants():
    x = (0.05 + 0.01 * images(5, batch=4)).astype(np.float32)  # epsilon is a tenth of the variance
    norm = layers.batch_norm(True)
    variables = layers.batch_norm(False).init(jax.random.key(0), x)
    apply = jax.vmap(lambda x: norm.apply(variables, x, mutable=["batch_stats"]), axis_name=AXIS)
    y, updated = apply(x[None])
    mean, var = x.mean(axis=(0, 1, 2), dtype=np.float64), x.var(axis=(0, 1, 2), dtype=np.float64)
    np.testing.assert_allclose(y[0], (x - mean) / np.sqrt(var + 1e-5), atol=1e-3)
    np.testing.assert_allclose(updated["batch_stats"]["mean"][0], 0.1 * mean, rtol=1e-4)
    np.testing.assert_allclose(updated["batch_stats"]["var"][0], 0.9 + 0.1 * var, rtol=1e-6)


def test_batch_norm_of_wide_resnets_keeps_more_of_its_statistics():
    net, x = tiny("wrn28_2"), images(8)
    variables = drawn(net, x)
    before, (_, stats) = variables["batch_stats"]["conv2_1_1_norm"]["var"], trained(net, variables, x)
    y = jax.lax.conv_general_dilated(
        x, variables["params"]["conv1_conv"]["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    expected = 0.999 * before + 0.001 * y.var(axis=(0, 1, 2))
    assert np.abs(expected / before - 1).max() > 1e-3
    np.testing.assert_allclose(stats["conv2_1_1_norm"]["var"], expected, rtol=1e-5)


@every_file
def test_batch_norm_may_be_of_the_given_images_alone_without_an_axis_of_devices(name):
    net, x = tiny(name, dropout=0.0), images(16)
    variables = born(net, x)
    apply = functools.partial(net.clone(axis=None).apply, train=True, mutable=["batch_stats"])
    found, updated = jax.eval_shape(apply, variables, x)
    assert updated["batch_stats"].keys() == variables["batch_stats"].keys()
    with pytest.raises(NameError, match=AXIS):
        jax.eval_shape(functools.partial(net.apply, train=True, mutable=["batch_stats"]), variables, x)


@pytest.mark.wide
@every_file
def test_training_uses_the_batch_and_evaluation_the_running_statistics(name):
    net, x = tiny(name, dropout=0.0), images(32, batch=4)
    variables = drawn(net, x)
    feature, stats = trained(net, variables, x)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), stats, variables["batch_stats"])
    assert all(jax.tree.leaves(moved))
    neighbours = np.concatenate([x[:2], 2 * x[2:]])
    assert not np.allclose(trained(net, variables, neighbours)[0][:2], feature[:2], rtol=1e-2)
    np.testing.assert_array_equal(outputs(net, variables, neighbours)[0][:2], outputs(net, variables, x)[0][:2])
    assert not np.allclose(outputs(net, {**variables, "batch_stats": stats}, x)[0], outputs(net, variables, x)[0])


@pytest.mark.medium
@every_file
def test_gradient_reaches_every_parameter_that_can_matter(name):
    net, x = tiny(name, dropout=0.0, sobel=True), images(32, batch=4)
    variables = drawn(net, x)

    def loss(params, x):
        feature, _ = net.apply({**variables, "params": params}, x, train=True, mutable=["batch_stats"])
        return jax.lax.pmean(jnp.tanh(feature).sum(), AXIS)

    gradient = jax.jit(jax.vmap(jax.grad(loss), (None, 0), axis_name=AXIS))(variables["params"], x[None])
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        key = "/".join(part.key for part in path)
        assert np.isfinite(leaf).all(), key
        assert key.endswith("_conv/bias") or np.abs(leaf).max() > 0, key


def dropped(name, **settings):
    """Widths of what is dropped in training, in order."""
    net, x = tiny(name, **settings), images(32)
    variables = drawn(net, x)

    def program(x):
        return net.apply(
            variables, x, train=True, mutable=["batch_stats", "intermediates"], rngs={"dropout": jax.random.key(0)},
            capture_intermediates=lambda module, _: isinstance(module, nn.Dropout) and module.rate > 0,
        )[1].get("intermediates", {})  # fmt: skip

    found = jax.eval_shape(jax.vmap(program, axis_name=AXIS), jnp.asarray(x[None]))
    return [value["__call__"][0].shape[-1] for _, value in sorted(found.items())]


def test_dropout_is_where_each_network_has_it():
    assert dropped("alexnet") == [6 * 6 * 16, 10]  # before both dense layers
    assert dropped("vgg16") == [10]  # before the second
    assert dropped("convnet") == dropped("resnet18") == []
    assert dropped("convnet", dropout=0.3) == [4 * 4 * 16] and dropped("resnet18", dropout=0.3) == [8 * 3]
    assert dropped("alexnet", dropout=0.0) == []


@pytest.mark.parametrize("name", ["alexnet", "vgg16"])
def test_dropout_acts_in_training_only_and_follows_its_key(name):
    net, x = tiny(name), images(32, batch=4)
    assert net.dropout == network(name, dropout=0.5).dropout == 0.5
    variables = drawn(net, x)
    first, again, other = (trained(net, variables, x, seed)[0] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    np.testing.assert_array_equal(outputs(net, variables, x)[0], outputs(net, variables, x)[0])  # needs no key


@pytest.mark.parametrize("name", ["alexnet", "convnet", "vgg16"])
def test_feature_is_the_dense_output_before_its_relu(name):
    net, x = tiny(name), images(32, batch=4)
    feature, _ = outputs(net, drawn(net, x), x)
    assert 0.2 < (feature < 0).mean() < 0.8


def test_feature_of_resnet_is_the_mean_of_the_last_map_with_a_dense_layer_on_demand():
    net, dense, x = tiny("resnet18"), tiny("resnet18", dim=7), images(32, batch=4)
    more = drawn(dense, x)
    feature, maps = outputs(net, more, x)
    np.testing.assert_allclose(feature, maps["conv5"].mean(axis=(1, 2)), rtol=1e-5)
    kernel, bias = more["params"]["feature"]["kernel"], more["params"]["feature"]["bias"]
    assert kernel.shape == (24, 7) and "feature" not in born(net, x)["params"]
    expected = feature @ kernel + bias
    np.testing.assert_allclose(outputs(dense, more, x)[0], expected, rtol=1e-4, atol=1e-4)
    assert (expected < 0).any()


@every_file
def test_bfloat16_computes_in_it_and_keeps_parameters_in_float32(name):
    net, x = tiny(name, "bfloat16"), images(32, batch=4)
    variables = drawn(net, x)
    feature, maps = outputs(net, variables, x.astype(jnp.bfloat16))
    assert feature.dtype == jnp.bfloat16 and all(value.dtype == jnp.bfloat16 for value in maps.values())
    assert {leaf.dtype for leaf in jax.tree.leaves(born(net, x))} == {jnp.dtype("float32")}
    expected = outputs(tiny(name), variables, x)[0]
    assert np.abs(feature.astype(np.float32) - expected).max() < 0.05 * np.abs(expected).max()


@every_file
def test_float64_is_float64_throughout(name, float64):
    net, x = tiny(name, "float64"), images(32, dtype=np.float64)
    variables = born(net, x)
    found = jax.eval_shape(lambda v, x: net.apply(v, x, mutable=["maps"]), variables, x)
    updated = jax.eval_shape(functools.partial(_trained, net), variables, x, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves((variables, found, updated))} == {jnp.dtype("float64")}


# Names


@pytest.mark.wide
def test_every_network_is_found_by_its_name_and_traces_at_full_size():
    assert list(models.networks()) == NAMES
    for name in NAMES:
        for use_sobel in (False, True)[: 1 if name == "inception_v3" else 2]:  # it is long to trace
            _, feature, maps = shapes(name, (224, 224), sobel=use_sobel)
            assert feature[1] >= 128 and len(maps) == {"convnet": 3, "vgg16": 13, "wrn28_2": 4, "wrn28_8": 4}.get(
                name, 5
            )


@pytest.mark.parametrize(
    ("name", "meant"),
    [("vgg", "vgg16"), ("vgg19", "vgg16"), ("resnet20", "resnet50"), ("alexnet8", "alexnet"), ("layers", None)],
)
def test_an_unknown_network_is_refused_with_all_there_are(name, meant):
    hint = f"; did you mean '{meant}'?" if meant else "."
    expected = f"config.model.name='{name}' is unknown{hint} There is: {', '.join(NAMES)}."
    with pytest.raises(ConfigError, match=re.escape(expected)):
        network(name)
