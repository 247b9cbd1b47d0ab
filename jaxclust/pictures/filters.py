"""What a filter looks for: an image of noise that is changed until the filter answers to it more than all others.

Gradient ascent as in the published code of Caron et al. 2018 (DeepCluster), section 4.2; after Erhan et al.,
"Visualizing Higher-Layer Features of a Deep Network", 2009.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict
from numpy.typing import NDArray
from PIL import Image

from jaxclust import runtime
from jaxclust.errors import ConfigError
from jaxclust.features.extract import compile_for
from jaxclust.ops.images import gaussian_blur
from jaxclust.pictures import Draw, Seen
from jaxclust.pictures._layers import Layer, layers
from jaxclust.progress import progress
from jaxclust.report import figures
from jaxclust.report.gallery import Gallery, Shown

AT_ONCE = 16  # filters that are worked on together
STRIDE = 50  # steps between two looks at the clock
COLUMNS = 8

Embed = Callable[..., Any]


class Ascent(NamedTuple):
    """How an image is changed."""

    steps: int
    lr: float
    weight_decay: float
    every: int  # the image is blurred in the first step and after each so many
    sigma: float


def prepare(seen: Seen) -> Draw:
    """Checks `config.report.filters`."""
    chosen = layers(seen)
    return partial(draw, seen, list(zip(chosen, ascents(seen.stage.config, len(chosen)), strict=True)))


def ascents(config: ConfigDict, count: int) -> list[Ascent]:
    """The settings for each of `count` layers; ConfigError if there are neither one nor as many."""
    f = config.report.filters
    for name in ("steps", "lr"):
        if len(f[name]) not in (1, count):
            raise ConfigError(
                f"config.report.filters.{name}={f[name]} has {len(f[name])} values for {count} layers; "
                "give one, or one for each of config.report.layers"
            )
    steps, lr = ((values * count)[:count] for values in (f.steps, f.lr))
    return [Ascent(n, float(r), f.weight_decay, f.every, f.sigma) for n, r in zip(steps, lr, strict=True)]


def draw(seen: Seen, chosen: list[tuple[Layer, Ascent]], folder: Path) -> Gallery:
    """conv<l>/layer<l>-channel<c>.jpeg for each filter, and a sheet for each layer."""
    shown = []
    for layer, ascent in chosen:
        images = np.stack([saved(x) for x in ascended(seen, layer, ascent)])
        (folder / layer.folder()).mkdir()
        for channel, image in enumerate(images):
            picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
            picture.save(folder / layer.folder() / f"{layer.stem(channel)}.jpeg", quality=95)
        sheet = figures.contact_sheet(images, min(COLUMNS, len(images)), 132)
        Image.fromarray(sheet).save(folder / f"{layer.name}.png")
        about = f"{layer.words()}, in reading order; {ascent.steps:,} steps of length {ascent.lr:g}"
        shown.append(Shown(f"{layer.name}.png", layer.name, about))
    caption = (
        "Each image was noise, and was changed step by step so that one channel answers to it more than the others of "
        "its layer."
    )
    return Gallery("What filters look for", caption, shown)


def ascended(seen: Seen, layer: Layer, ascent: Ascent) -> Iterator[NDArray[np.float32]]:
    """The image [H, W, C] of each channel that is shown, on the scale of pixels; the devices share the channels."""
    stage, state = seen.stage, seen.state
    count = -(-min(AT_ONCE, layer.shown) // stage.mesh.size) * stage.mesh.size

    def program(params: Any, extra: Any, batch: Any) -> jax.Array:
        inner, first, last = extra
        score = partial(objective, stage.method.embed, params, inner, layer.name, ascent.weight_decay)
        return jax.vmap(lambda x, channel: ascend(score, ascent, x, channel, first, last))(*batch)

    run = compile_for(program, stage.mesh)
    key = runtime.key(stage.config.seed, "filters", layer.name)
    images = np.zeros(0, np.float32)
    parts = [(start, first) for start in range(0, layer.shown, count) for first in range(0, ascent.steps, STRIDE)]
    for start, first in progress(parts, len(parts), f"filters of {layer.name}", f"times {STRIDE} steps"):
        channels = np.minimum(np.arange(start, start + count), layer.shown - 1).astype(np.int32)
        last = min(first + STRIDE, ascent.steps)
        if first == 0:
            images = noise(key, channels, stage.info.image_shape)
        batch = runtime.put_batch((images, channels), stage.mesh)
        images = jax.device_get(run(state.params, (state.extra, np.int32(first), np.int32(last)), batch))
        if last == ascent.steps:
            yield from images[: layer.shown - start]


def noise(key: jax.Array, channels: NDArray[np.int32], shape: tuple[int, ...]) -> NDArray[np.float32]:
    """The image of each channel at first, N(128, 20^2), whatever other channels there are."""
    drawn = jax.vmap(lambda channel: jax.random.normal(jax.random.fold_in(key, channel), shape))(channels)
    return np.asarray(128 + 20 * drawn, np.float32)


def ascend(
    score: Callable[[jax.Array, jax.Array], jax.Array],
    ascent: Ascent,
    x: jax.Array,
    channel: jax.Array,
    first: jax.Array,
    last: jax.Array,
) -> jax.Array:
    """Steps `first` to `last` - 1 from the image x [H, W, C]: up the gradient of `score(x, channel)`, then a blur."""

    def step(i: jax.Array, x: jax.Array) -> jax.Array:
        slope = jax.grad(score)(x, channel)
        x = x + ascent.lr * slope / (jnp.linalg.norm(slope.ravel()) + 1e-8)
        return jnp.where(i % ascent.every == 0, gaussian_blur(x, ascent.sigma), x)

    return jax.lax.fori_loop(first, last, step, x)


def objective(
    embed: Embed, params: Any, extra: Any, layer: str, weight_decay: float, x: jax.Array, channel: jax.Array
) -> jax.Array:
    """log softmax over the channels of `layer` of their mean answer to x [H, W, C], at `channel`, less decay |x|^2.

    The network is given x as it is, neither scaled nor centred. Where the channel is zero everywhere after its ReLU,
    what the convolution gives takes the place of the map, for all channels.
    """
    after, before = maps(embed, params, extra, layer, x[None])
    answers = jnp.where(jnp.any(after[..., channel] != 0), after.mean(axis=(0, 1, 2)), before.mean(axis=(0, 1, 2)))
    return jax.nn.log_softmax(answers)[channel] - weight_decay * jnp.sum(x * x)


def maps(embed: Embed, params: Any, extra: Any, layer: str, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The map [B, H, W, C] of `layer`, and the last convolution that was computed before it was recorded.

    Where this has another shape (a network of another kind) the map stands for both.
    """
    last: list[jax.Array] = []

    def note(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        found = call(*args, **kwargs)
        parent = context.module.parent
        if isinstance(context.module, nn.Conv) and not (
            isinstance(parent, nn.Module) and parent.has_variable("maps", layer)
        ):
            last[:] = [found]
        return found

    with nn.intercept_methods(note):
        after = embed(params, extra, images, layers=(layer,))[layer]
    before = last[0] if last and last[0].shape == after.shape else after
    return after, before.astype(after.dtype)


def saved(x: NDArray[Any]) -> NDArray[np.uint8]:
    """An image [H, W, C] of any scale as uint8: its mean is grey, ten standard deviations are from black to white."""
    unit = (x - x.mean()) / (x.std() + 1e-5) * 0.1 + 0.5
    return np.round(np.clip(unit, 0, 1) * 255).astype(np.uint8)
