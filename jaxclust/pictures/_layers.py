"""The layers and channels that are pictured."""

from functools import partial
from typing import NamedTuple

import jax

from jaxclust.errors import ConfigError, DataError
from jaxclust.hints import did_you_mean
from jaxclust.pictures import Seen
from jaxclust.train.stage import layer_names


class Layer(NamedTuple):
    """A layer of the network, and the channels of its map that are pictured: the first `shown` of `channels`."""

    name: str
    number: int  # its place among the maps of the network, from 1
    channels: int
    shown: int

    def folder(self) -> str:
        """Where its files are."""
        return f"conv{self.number}"

    def stem(self, channel: int) -> str:
        """What the files of a channel are called."""
        return f"layer{self.number}-channel{channel}"

    def words(self) -> str:
        """Which channels are shown."""
        return f"channels 0 to {self.shown - 1} of {self.channels:,}"


def layers(seen: Seen) -> list[Layer]:
    """Those of `config.report.layers`, by default all; ConfigError lists what there is, DataError: there is none."""
    stage, settings = seen.stage, seen.stage.config.report
    shape = stage.info.image_shape
    if len(shape) != 3:
        raise DataError("the run is on vectors, which pass through no network")
    known = layer_names(stage)
    if not known:
        raise DataError("the network has no convolutions")
    asked = tuple(name.strip() for name in settings.layers.split(",") if name.strip()) or known
    for name in asked:
        if name not in known:
            there_is = f"There is: {', '.join(known)}."
            raise ConfigError(f"config.report.layers: {name!r} is unknown{did_you_mean(name, known)} {there_is}")
    images = jax.ShapeDtypeStruct((1, *shape), "float32")
    maps = jax.eval_shape(partial(stage.method.embed, layers=asked), stage.shapes.params, stage.shapes.extra, images)
    counts = {name: maps[name].shape[-1] for name in asked}
    return [
        Layer(name, known.index(name) + 1, count, min(settings.channels or count, count))
        for name, count in counts.items()
    ]
