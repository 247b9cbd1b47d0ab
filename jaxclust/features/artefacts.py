"""A trained method without its code: programs that need only jax, and its arrays by name."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import numpy as safetensors

from jaxclust.errors import ConfigError

PLATFORMS = ("cpu", "cuda", "tpu")


def program(function: Callable[..., Any], params: Any, extra: Any, image_shape: tuple[int, ...]) -> bytes:
    """`function(params, extra, images)` with its arrays inside, serialised by `jax.export`.

    It takes uint8 [B, H, W, C], or float32 [B, D] where the data are vectors, for any B, on any of `PLATFORMS`. Floats
    come out as float32, so that a reader need not know in which precision it works. ConfigError if the network works
    for one B only.
    """
    params, extra = jax.device_get((params, extra))  # constants on no device

    def single(leaf: jax.Array) -> jax.Array:
        return leaf.astype(jnp.float32) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    def call(images: jax.Array) -> Any:
        return jax.tree.map(single, function(params, extra, images))

    (batch,) = jax.export.symbolic_shape("b")
    images = jax.ShapeDtypeStruct((batch, *image_shape), input_dtype(image_shape))
    try:
        with _no_source_lines():
            exported = jax.export.export(jax.jit(call), platforms=PLATFORMS)(images)
    except (jax.errors.InconclusiveDimensionOperation, TypeError) as error:
        raise ConfigError(
            "the network of config.model cannot be exported: it does not work for every batch size "
            f"({str(error).splitlines()[0]}). Sizes must be taken from `x.shape` and not be compared"
        ) from error
    return bytes(exported.serialize())


@contextmanager
def _no_source_lines() -> Iterator[None]:
    """Keeps the paths of this machine's source files out of what is exported."""
    name = "jax_traceback_in_locations_limit"
    before = jax.config.values[name]
    jax.config.update(name, 0)
    try:
        yield
    finally:
        jax.config.update(name, before)


def input_dtype(image_shape: tuple[int, ...]) -> Any:
    """uint8 for images [H, W, C], float32 for vectors [D]."""
    return jnp.uint8 if len(image_shape) == 3 else jnp.float32


def arrays(params: Any, extra: Mapping[str, Any], origin: Mapping[str, str]) -> bytes:
    """Every array as safetensors, named by its place, such as "params.body.conv1.kernel" or "whitening.mean".

    `origin` is metadata under the name "jaxclust", as JSON: safetensors writes several names in a random order.
    """
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get({"params": params, **extra}))
    named = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    # In the order of C, since safetensors writes memory as it lies.
    contiguous = {name: np.asarray(leaf, order="C") for name, leaf in named.items()}
    return safetensors.save(contiguous, {"jaxclust": json.dumps(origin)})
