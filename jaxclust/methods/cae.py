"""The autoencoder that ClustNet's encoder may come from: `stage.clustnet.init_from=@cae` (section 2.10).

The decoder mirrors the encoder. Where pooling took maxima, unpooling puts them back: it is told the places by the
encoder. It does not come along into the training of gate and experts.

Departure: the last layer is linear, unless `clustnet.encoder.decoder_relu`; the published one ends with batch norm and
ReLU, and cannot make a background below 0.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from jaxclust import models, runtime
from jaxclust.errors import ConfigError
from jaxclust.methods import mixture
from jaxclust.methods.base import Aux, Batch, DataInfo, Method, merge
from jaxclust.models.experts import CNN, Decoder, map_shape, peaks, stack
from jaxclust.ops.images import WORST, pixels, standardize
from jaxclust.runtime import AXIS

Params = dict[str, Any]


class Net(NamedTuple):
    """Encoder and decoder, and what they expect of pixels."""

    encoder: CNN
    decoder: Decoder
    mean: tuple[float, ...]
    std: tuple[float, ...]
    dtype: Any


def make(config: ConfigDict, info: DataInfo) -> Method:
    """The autoencoder of `config.clustnet.encoder`; ConfigError if it has no layers or the images are too small."""
    net = network(config, info.image_shape)
    return Method(
        init=partial(init, net),
        loss=partial(loss, net),
        embed=partial(embed, net),
        reconstruct=partial(decoded, net),
        layers=tuple(f"encoder/conv{number}" for number in range(1, net.encoder.sizes.depth + 1)),
    )


def network(config: ConfigDict, shape: tuple[int, ...]) -> Net:
    """Encoder and decoder for images of `shape` [H, W, C]; ConfigError where they do not fit."""
    s = config.clustnet.encoder
    encoder, sizes = mixture.encoder(config), stack(s)
    last = map_shape(sizes, shape) if len(shape) == 3 else (0,)
    if encoder is None or 0 in last:
        raise ConfigError(
            "config.method='cae' needs images, and convolutions that fit them: config.clustnet.encoder.layers="
            f"{s.layers}, kernel={s.kernel}, pool={s.pool}, pool_out={s.pool_out}, and images of shape {shape}"
        )
    kinds: dict[str, Any] = {"dtype": runtime.compute_dtype(config), "param_dtype": runtime.param_dtype(config)}
    decoder = Decoder(sizes, (last[0], last[1], last[2]), shape[2], s.decoder_relu, **kinds)
    return Net(encoder, decoder, tuple(config.data.mean), tuple(config.data.std), kinds["param_dtype"])


def init(net: Net, rng: jax.Array, batch: Batch) -> tuple[Params, Any]:
    """New parameters {"body", "decoder"}."""
    x = standardize(jnp.asarray(batch["views"]["train"][:1]), net.mean, net.std, net.dtype)
    body_rng, decoder_rng = jax.random.split(rng)
    body = net.encoder.init(body_rng, x)
    places = _places(net, {"stack": body["maps"]["stack"]})
    decoder = net.decoder.init(decoder_rng, jnp.zeros((1, net.encoder.outputs), net.dtype), places)
    made = {"body": body, "decoder": decoder}
    stats = {name: variables.get("batch_stats", {}) for name, variables in made.items()}
    return {name: variables["params"] for name, variables in made.items()}, {"batch_stats": stats}


def reconstruct(
    net: Net, params: Params, stats: Any, x: jax.Array, train: bool, rng: jax.Array | None
) -> tuple[jax.Array, Any]:
    """Standardised images [B, H, W, C] through encoder and decoder, and new batch statistics."""
    code = mixture.run(net.encoder, params["body"], stats["body"], x, train, rng)
    variables = {"params": params["decoder"], "batch_stats": stats["decoder"]}
    made, found = net.decoder.apply(variables, code.output, _places(net, code.maps), train, mutable=["batch_stats"])
    new = {"body": code.stats, "decoder": found.get("batch_stats", {}) if train else stats["decoder"]}
    return made.astype(code.output.dtype), new


def decoded(net: Net, params: Params, extra: Any, images: jax.Array) -> jax.Array:
    """Images through encoder and decoder in evaluation mode, as pixels (`Method.reconstruct`)."""
    x = standardize(images, net.mean, net.std, net.dtype)
    made, _ = reconstruct(net, params, extra["batch_stats"], x, False, None)
    return pixels(made, net.mean, net.std)


def _places(net: Net, maps: Any) -> tuple[jax.Array, jax.Array]:
    """Where the encoder's two poolings found their maxima, in maps before them."""
    sizes, before = net.encoder.sizes, maps["stack"]
    half, end = (before[f"conv{number}"][0] for number in (sizes.depth // 2, sizes.depth))
    return peaks(half, sizes.pool), peaks(end, sizes.pool_out)


def loss(net: Net, params: Params, extra: Any, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Aux]:
    """Mean squared error over all pixels, standardised, and as a percentage of what the published code divides by."""
    x = standardize(batch["views"]["train"], net.mean, net.std, net.dtype)
    # Of each device from here on, so that gradients are summed in this dtype, whatever a layer computes in.
    made, stats = reconstruct(net, jax.lax.pcast(params, AXIS, to="varying"), extra["batch_stats"], x, True, rng)
    value = jnp.mean(jnp.square(made - x))
    return value, Aux(merge(extra, batch_stats=stats), {"error_percent": 100 * value / WORST})


def embed(net: Net, params: Params, extra: Any, images: jax.Array, layers: tuple[str, ...] = ()) -> Any:
    """The code [B, D] of images, or the maps of `layers`: "feature" (the code), "encoder/conv1", …; evaluation mode.

    ConfigError, which lists what there is, if a layer does not exist.
    """
    x = standardize(images, net.mean, net.std, net.dtype)
    code = mixture.run(net.encoder, params["body"], extra["batch_stats"]["body"], x, False, None)
    found = {f"encoder/{name}": maps[0] for name, maps in code.maps["stack"].items()} | {"feature": code.output}
    return models.asked(found, layers, net.dtype)
