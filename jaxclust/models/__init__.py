"""Networks, each found by its name: a file with `make(config) -> Flax module`, and NETWORKS if it makes several.

A network maps standardised images [B, H, W, C] to features [B, D] *before* their last ReLU, and records the
map of each convolution or stage (after ReLU, before pooling) under its name, `conv1` and so on, with
`sow("maps", ...)`. With `config.model.sobel` it sees the gradients of the images in place of their colours.
"""

import importlib
import re
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from jaxclust import plugins
from jaxclust.errors import ConfigError
from jaxclust.hints import did_you_mean


def networks() -> dict[str, ModuleType]:
    """The file that makes each network: its own name, or the names in its NETWORKS (a family of several depths)."""
    files = {file: importlib.import_module(f"{__name__}.{file}") for file in plugins.names(__name__)}
    makers = {file: module for file, module in files.items() if hasattr(module, "make")}
    return {name: module for file, module in makers.items() for name in getattr(module, "NETWORKS", (file,))}


def get(config: ConfigDict) -> nn.Module:
    """The network that `config.model.name` names; ConfigError lists what there is."""
    name, known = config.model.name, networks()
    if name not in known:
        there_is = f"There is: {', '.join(known)}."
        raise ConfigError(f"config.model.name={name!r} is unknown{did_you_mean(name, known)} {there_is}")
    network: nn.Module = known[name].make(config)
    return network


def asked(found: Mapping[str, Any], layers: Sequence[str], dtype: Any) -> Any:
    """Of all that `found` there is, "feature" among it, the maps {name: map} of `layers`, or without such the feature.

    ConfigError, which lists what there is, if a layer does not exist.
    """
    for name in layers:
        if name not in found:
            raise ConfigError(f"there is no layer {name!r}{did_you_mean(name, found)} There is: {', '.join(found)}")
    chosen = {name: jnp.asarray(found[name], dtype) for name in layers or ("feature",)}
    return chosen if layers else chosen["feature"]


def low_layers(config: ConfigDict, image_shape: tuple[int, ...]) -> tuple[str, ...]:
    """The maps of `config.uad.low_layers`, by default the network's own LOW_LAYERS or its first two; ConfigError
    lists what there is."""
    known = map_names(get(config), image_shape)
    own = ",".join(getattr(networks()[config.model.name], "LOW_LAYERS", known[:2]))
    chosen = tuple(name.strip() for name in (config.uad.low_layers or own).split(","))
    for name in chosen:
        if name not in known:
            there_is = f"There is: {', '.join(known)}."
            raise ConfigError(f"config.uad.low_layers: {name!r} is unknown{did_you_mean(name, known)} {there_is}")
    return chosen


def parameter_shapes(config: ConfigDict, image_shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters of the network of `config.model` on images of `image_shape` [H, W, C]."""
    images = jax.ShapeDtypeStruct((1, *image_shape), "float32")
    params = jax.eval_shape(get(config).init, jax.random.key(0), images)["params"]
    return {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def map_names(network: nn.Module, image_shape: tuple[int, ...]) -> tuple[str, ...]:
    """Names of the maps that a network records of images of `image_shape` [H, W, C], conv2 before conv10."""
    images = jax.ShapeDtypeStruct((1, *image_shape), "float32")
    maps = jax.eval_shape(network.init, jax.random.key(0), images)["maps"]
    return tuple(
        sorted(maps, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])
    )
