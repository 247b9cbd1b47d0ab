"""What a view is, and the uniform numbers that all its randomness comes from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxclust.runtime import tensorflow

if TYPE_CHECKING:
    from tensorflow import Tensor

PHILOX = 1
PER_COUNTER = 4  # one Philox counter makes four numbers


class View(NamedTuple):
    """One named augmentation, `config.views.<name>`; 0 is off (see `transforms` and `vectors`)."""

    crop_area: float = 0.0
    crop_aspect: float = 0.75
    crop_shift: float = 0.0
    flip: float = 0.0
    rotate: float = 0.0
    scale: float = 0.0
    shear: float = 0.0
    translate: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    grey: float = 0.0
    blur: float = 0.0
    erase: float = 0.0
    noise: float = 0.0


def make_view(fields: Mapping[str, Any]) -> View:
    """The view of a section `config.views.<name>`."""
    return View(**{name: float(value) for name, value in fields.items()})


def philox_key(*numbers: int) -> np.uint64:
    """A key for `uniforms` from numbers such as seed, stage and view."""
    return np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]


def uniforms(key: Tensor, first: Tensor, count: int | Tensor, columns: int) -> Tensor:
    """float32 [count, columns] in [0, 1) for positions first … first + count - 1.

    Row i depends only on `key` (uint64) and its position: Philox counts on from a position's own
    counter (Salmon et al. 2011), so any slice equals that slice of the whole. `columns` must
    divide by 4.
    """
    tf = tensorflow()
    counter = tf.cast(first, tf.uint64) * (columns // PER_COUNTER)
    return tf.raw_ops.StatelessRandomUniformV2(
        shape=[count, columns],
        key=tf.reshape(key, [1]),
        counter=tf.stack([counter, tf.zeros_like(counter)]),
        alg=PHILOX,
    )
