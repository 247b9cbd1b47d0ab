"""ClustNet's small networks against loops in NumPy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxclust.models.experts import CNN, NO_STACK, ConvStack, Decoder, Stack, map_shape, peaks, unpool
from jaxclust.models.layers import max_pool

KINDS = {"dtype": jnp.float64, "param_dtype": jnp.float64}
SIZES = Stack(layers=2, channels=3, kernel=3, pool=2, pool_out=2, dropout=0.0, bn=True)


def shapes(network, *inputs, **named):
    """Shapes of the recorded maps of a network."""
    found = jax.eval_shape(partial(network.init, **named), jax.random.key(0), *inputs)["maps"]
    return {name: maps[0].shape for name, maps in found.items() if isinstance(maps, tuple)}


def slow_stack(sizes, variables, x):
    """What a stack should make of x [B, H, W, C] in evaluation mode, and its maps before pooling."""
    params, stats, maps = variables["params"], variables["batch_stats"], []
    for number in range(1, sizes.depth + 1):
        kernel, norm = np.asarray(params[f"conv{number}_conv"]["kernel"]), params[f"conv{number}_norm"]
        size, (batch, height, width, channels) = len(kernel), x.shape
        y = np.zeros((batch, height, width, kernel.shape[-1]))
        first = (size - 1) // 2
        for row in range(height - size + 1):
            for column in range(width - size + 1):
                window = x[:, row : row + size, column : column + size]
                value = np.tensordot(window, kernel, axes=3)
                seen = stats[f"conv{number}_norm"]
                value = (value - seen["mean"]) / np.sqrt(seen["var"] + 1e-5) * norm["scale"] + norm["bias"]
                y[:, row + first, column + first] = np.maximum(value, 0)
        x = y + x if channels == y.shape[-1] else y
        maps.append(x)
        window = sizes.pool if number == sizes.depth // 2 else sizes.pool_out if number == sizes.depth else 1
        rows, columns = x.shape[1] // window, x.shape[2] // window
        cells = x[:, : rows * window, : columns * window].reshape(batch, rows, window, columns, window, -1)
        x = cells.max(axis=(2, 4))
    return x, maps


@pytest.mark.parametrize(("layers", "kernel", "channels"), [(2, 3, 2), (3, 4, 3), (1, 5, 3)])
def test_a_stack_is_valid_convolutions_norm_relu_border_and_residual(float64, layers, kernel, channels):
    sizes = SIZES._replace(layers=layers, kernel=kernel)
    network, rng = ConvStack(sizes, **KINDS), np.random.default_rng(0)
    x = rng.standard_normal((2, 11, 12, channels))
    variables = network.init(jax.random.key(0), x)
    drawn = jax.tree.map(lambda leaf: rng.uniform(0.2, 1.5, leaf.shape), variables["batch_stats"])
    norms = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape) if leaf.ndim == 1 else leaf, variables["params"])
    variables = {"params": norms, "batch_stats": drawn}
    found, recorded = network.apply(variables, x, mutable=["maps"])
    expected, maps = slow_stack(sizes, variables, x)
    np.testing.assert_allclose(found, expected, atol=1e-10)
    assert len(recorded["maps"]) == len(maps) == max(layers, 2)
    for number, there in enumerate(maps, 1):
        np.testing.assert_allclose(recorded["maps"][f"conv{number}"][0], there, atol=1e-10)
    assert found.shape[1:] == map_shape(sizes, (11, 12, channels))
    before, border = (kernel - 1) // 2, np.asarray(recorded["maps"]["conv1"][0]) - (x if channels == 3 else 0)
    for edge in (border[:, :before], border[:, border.shape[1] - kernel // 2 :]):
        np.testing.assert_allclose(edge, 0, atol=1e-12)


@pytest.mark.parametrize(("layers", "pooled"), [(2, [8, 4]), (3, [8, 4, 4]), (5, [8, 8, 4, 4, 4]), (1, [8, 4])])
def test_pooling_comes_half_way_and_at_the_end(layers, pooled):
    sizes = SIZES._replace(layers=layers)
    maps = shapes(ConvStack(sizes, jnp.float32, jnp.float32), jnp.zeros((1, 8, 8, 1)))
    assert [maps[f"conv{number}"][1] for number in range(1, len(pooled) + 1)] == pooled
    assert map_shape(sizes, (8, 8, 1)) == (2, 2, 3)


def test_dropout_takes_whole_channels_before_every_convolution_but_the_first():
    sizes = SIZES._replace(channels=16, dropout=0.5, bn=False, pool=1)
    network, x = ConvStack(sizes, jnp.float32, jnp.float32), jax.random.normal(jax.random.key(1), (1, 6, 6, 1))
    params = network.init(jax.random.key(0), x)["params"]
    assert set(params) == {"conv1_conv", "conv2_conv"}  # without batch norm
    params["conv2_conv"]["kernel"] *= 0  # the second map is then what its convolution was given
    rngs = {"dropout": jax.random.key(2)}
    _, found = network.apply({"params": params}, x, train=True, mutable=["maps"], rngs=rngs)
    first, second = (np.asarray(found["maps"][name][0])[0] for name in ("conv1", "conv2"))
    kept = np.array([(second[..., c] != 0).any() for c in range(16)])
    lit = np.array([(first[..., c] != 0).any() for c in range(16)])
    assert 0 < kept.sum() < lit.sum()
    np.testing.assert_allclose(second[..., kept], 2 * first[..., kept], rtol=1e-6)


def test_weights_and_biases_are_drawn_as_pytorch_draws_them():
    network = CNN(NO_STACK, (300,), 400, jnp.float32, jnp.float32)
    params = network.init(jax.random.key(0), jnp.zeros((1, 4, 4, 1)))["params"]
    for layer, fan_in in (("hidden1", 16), ("output", 300)):
        bound = 1 / np.sqrt(fan_in)
        for leaf in params[layer].values():
            assert 0.95 * bound < np.abs(leaf).max() <= bound
            assert abs(float(leaf.std()) / (bound / np.sqrt(3)) - 1) < 0.1


def test_a_network_of_dense_layers_alone_flattens_and_has_relu_between_them(float64):
    network = CNN(NO_STACK, (5,), 3, **KINDS)
    x = np.random.default_rng(0).standard_normal((4, 2, 2, 1))
    variables = network.init(jax.random.key(0), x)
    hidden, output = variables["params"]["hidden1"], variables["params"]["output"]
    between = np.maximum(x.reshape(4, 4) @ hidden["kernel"] + hidden["bias"], 0)
    np.testing.assert_allclose(network.apply(variables, x), between @ output["kernel"] + output["bias"], atol=1e-12)


@pytest.mark.parametrize(("side", "window"), [(6, 2), (7, 3), (4, 5), (5, 1)])
def test_unpooling_puts_maxima_back_to_the_first_of_their_places(side, window):
    x = jnp.asarray(np.random.default_rng(0).integers(0, 3, (2, side, side + 1, 2)), jnp.float32)  # many are equal
    places = peaks(x, window)
    back = np.asarray(unpool(max_pool(x, window, window), places, window))
    size = window if side >= window else 1
    expected = np.zeros(x.shape)
    for image in range(2):
        for channel in range(2):
            for row in range(0, side - size + 1, size):
                for column in range(0, side + 1 - size + 1, size):
                    cell = np.asarray(x)[image, row : row + size, column : column + size, channel]
                    i, j = divmod(int(cell.argmax()), size)
                    expected[image, row + i, column + j, channel] = cell[i, j]
    np.testing.assert_array_equal(back, expected)


def test_a_decoder_is_drawn_as_pytorch_draws_transposed_convolutions():
    """From U(-a, a) with a = 1 / sqrt(k k C_out), so that the last one, of one channel, is the widest."""
    sizes = SIZES._replace(channels=8)
    shape = map_shape(sizes, (12, 12, 1))
    places = peaks(jnp.zeros((1, 12, 12, 8)), 2), peaks(jnp.zeros((1, 6, 6, 8)), 2)
    decoder = Decoder(sizes, shape, 1, False, jnp.float32, jnp.float32)
    params = decoder.init(jax.random.key(0), jnp.zeros((1, 6)), places)["params"]
    for name, channels in (("conv1_conv", 8), ("conv2_conv", 1)):
        widest = float(np.abs(params[name]["kernel"]).max())
        assert 0.9 < widest * np.sqrt(9 * channels) <= 1


def test_a_decoder_mirrors_its_stack_and_ends_without_a_relu_unless_asked():
    sizes, x = SIZES._replace(layers=3, kernel=4, pool=2, pool_out=3), jnp.zeros((2, 13, 12, 1))
    maps = shapes(ConvStack(sizes, jnp.float32, jnp.float32), x)
    places = [jnp.ones(maps[name]) for name in ("conv1", "conv3")]
    code = jax.random.normal(jax.random.key(0), (2, 5))
    for last_relu in (False, True):
        decoder = Decoder(sizes, map_shape(sizes, (13, 12, 1)), 1, last_relu, jnp.float32, jnp.float32)
        variables = decoder.init(jax.random.key(1), code, places)
        made = decoder.apply(variables, code, places)
        assert made.shape == x.shape and bool((made >= 0).all()) == last_relu
        assert ("conv3_norm" in variables["params"]) == last_relu
