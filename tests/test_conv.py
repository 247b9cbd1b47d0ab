"""The convolution of every network: XLA's own, with a gradient of the kernel that CPUs take another way."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import export, lax
from jax.sharding import PartitionSpec as P

from jaxclust.ops import conv as convs
from jaxclust.ops.conv import conv

LAYOUT = ("NHWC", "HWIO", "NHWC")


@pytest.fixture(autouse=True, scope="module")
def small_maps():
    """As if they were large."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convs, "FEW_PIXELS", 0)
        yield


def arrays(batch=5, side=6, kernel=(3, 3), channels=(2, 4), seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    shapes = (batch, side, side + 1, channels[0]), (*kernel, *channels)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def gradients(function, x, kernel, strides, pads):
    """Of a sum of squares, by images and by the kernel."""
    return jax.jit(jax.grad(lambda x, k: jnp.sum(function(x, k, strides, pads) ** 2), argnums=(0, 1)))(x, kernel)


def xlas(x, kernel, strides, pads):
    return lax.conv_general_dilated(x, kernel, strides, pads, dimension_numbers=LAYOUT)


sizes = st.integers(1, 3)
margins = st.tuples(st.integers(0, 2), st.integers(0, 2))


@settings(max_examples=12)
@given(st.sampled_from([1, 15, 16, 33]), st.tuples(sizes, sizes), st.tuples(sizes, sizes), st.tuples(margins, margins))
def test_value_and_gradients_are_those_of_xla(batch, kernel, strides, pads):
    with jax.enable_x64(True):
        x, k = arrays(batch, 5, kernel)
        np.testing.assert_array_equal(conv(x, k, strides, pads), xlas(x, k, strides, pads))
        for found, expected in zip(
            gradients(conv, x, k, strides, pads), gradients(xlas, x, k, strides, pads), strict=True
        ):
            np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_kernels_and_images_may_be_of_a_vmap(float64):
    x, k = (jnp.stack(pair) for pair in zip(arrays(seed=1), arrays(seed=2), strict=True))
    settings = (1, 1), ((1, 1), (1, 1))
    for axes in ((0, 0), (None, 0), (0, None)):
        args = [array if axis == 0 else array[0] for array, axis in zip((x, k), axes, strict=True)]
        found, expected = (
            jax.vmap(lambda x, k, f=f: gradients(f, x, k, *settings), in_axes=axes)(*args) for f in (conv, xlas)
        )
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), found, expected)


@pytest.mark.parametrize("shared", ["kernel", "images"])
def test_what_all_devices_share_gets_the_gradients_of_all(shared, float64):
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    settings = (1, 1), ((1, 1), (0, 0))
    x, k = arrays(batch=8) if shared == "kernel" else arrays(kernel=(3, 3), channels=(4, 4))
    specs = (P("d"), P()) if shared == "kernel" else (P(), P(None, None, None, "d"))
    mapped = jax.shard_map(
        lambda x, k: jax.grad(lambda x, k: jnp.sum(conv(x, k, *settings) ** 2), argnums=(0, 1))(x, k),
        mesh=mesh, in_specs=specs, out_specs=specs,
    )  # fmt: skip
    for found, expected in zip(jax.jit(mapped)(x, k), gradients(xlas, x, k, *settings), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_a_gradient_in_bfloat16_is_summed_in_float32():
    x, k = arrays(batch=64, side=9, dtype=jnp.bfloat16)
    settings = (1, 1), ((1, 1), (1, 1))
    exact = gradients(xlas, x.astype(jnp.float32), k.astype(jnp.float32), *settings)[1]
    found = gradients(conv, x, k, *settings)[1]
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), exact, rtol=0.05, atol=0.02 * float(jnp.abs(exact).max()))


@pytest.mark.parametrize(("platform", "products"), [("cpu", True), ("tpu", False), ("cuda", False)])
def test_only_a_cpu_takes_products(platform, products):
    x, k = arrays(dtype=np.float32)
    program = jax.jit(lambda x, k: gradients(conv, x, k, (1, 1), ((1, 1), (1, 1))))
    text = export.export(program, platforms=[platform])(x, k).mlir_module()
    assert ("dot_general" in text) == products
    assert text.count("stablehlo.convolution") == (2 if products else 3)


def test_kernels_of_many_places_and_small_maps_are_xlas_and_groups_are_refused(monkeypatch):
    monkeypatch.setattr(convs, "FEW_PIXELS", 6 * 7 + 1)
    x, k = arrays(dtype=np.float32)
    assert "dot_general" not in str(jax.make_jaxpr(lambda x, k: gradients(conv, x, k, (1, 1), ((1, 1), (1, 1))))(x, k))
    x, k = arrays(kernel=(4, 4), dtype=np.float32)
    text = str(jax.make_jaxpr(lambda x, k: conv(x, k, (1, 1), ((1, 1), (1, 1))))(x, k))
    assert convs.MOST_PLACES < 4 * 4 and "custom_vjp" not in text
    with pytest.raises(ValueError, match="feature_group_count=2"):
        conv(x, k, (1, 1), ((0, 0), (0, 0)), feature_group_count=2)
