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

    number: int = 1
    size: int = 0
    crop_area: float = 0.0
    crop_area_max: float = 1.0
    crop_aspect: float = 0.75
    crop_shift: float = 0.0
    flip: float = 0.0
    rotate: float = 0.0
    scale: float = 0.0
    shear: float = 0.0
    translate: float = 0.0
    jitter: float = 1.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    grey: float = 0.0
    blur: float = 0.0
    randaugment: int = 0
    randaugment_set: str = "scan"
    pad: int = 0
    erase: float = 0.0
    erase_fill: tuple[float, ...] = ()
    noise: float = 0.0


def make_view(fields: Mapping[str, Any]) -> View:
    """The view of a section `config.views.<name>`."""
    kinds = {name: type(default) for name, default in View._field_defaults.items()}
    return View(**{name: kinds[name](value) for name, value in fields.items()})


def shape(view: View, image_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of one image in a view, where the images of a split have `image_shape`, [S, S, C] or [D]."""
    return (view.size, view.size, image_shape[2]) if view.size and len(image_shape) == 3 else image_shape


def copies(view: View) -> tuple[int, ...]:
    """The axis of a view's copies of an image, behind that of the images: none for a single one."""
    return (view.number,) if view.number > 1 else ()


def philox_key(*numbers: int) -> np.uint64:
    """A key for `uniforms` from numbers such as seed, stage and view."""
    return np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]


def uniforms(key: Tensor, first: Tensor, count: int | Tensor, blocks: tuple[int, ...], copy: int = 0) -> Tensor:
    """float32 [count, sum(blocks)] in [0, 1) for positions first … first + count - 1.

    Row i depends only on `key` (uint64), its position and `copy`: Philox counts on from a position's
    own counter (Salmon et al. 2011), so any slice equals that slice of the whole. A block is a number
    of columns, which must divide by 4; a further block leaves the numbers of the others as they were.
    """
    tf = tensorflow()

    def block(index: int, columns: int) -> Tensor:
        counter = tf.cast(first, tf.uint64) * (columns // PER_COUNTER)
        return tf.raw_ops.StatelessRandomUniformV2(
            shape=[count, columns],
            key=tf.reshape(key, [1]),
            counter=tf.stack([counter, tf.constant(copy + (index << 32), tf.uint64)]),
            alg=PHILOX,
        )

    return tf.concat([block(index, columns) for index, columns in enumerate(blocks)], axis=1)
