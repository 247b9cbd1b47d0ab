"""Splits made of another: some of its images, or all with the border that evaluation cuts off."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from jaxclust.data import transforms
from jaxclust.data.split import Split, reduced_side
from jaxclust.runtime import tensorflow

if TYPE_CHECKING:
    from tensorflow import Tensor


def subset(split: Split, ids: NDArray[np.int64]) -> Split:
    """The images `ids` [M] of a split, in this order, as images 0 … M-1."""
    table = tensorflow().constant(ids)

    def load(id: Tensor) -> Tensor:
        return split.load(tensorflow().gather(table, id))

    def gather(ids: Tensor) -> Tensor:
        assert split.gather is not None
        return split.gather(tensorflow().gather(table, ids))

    return replace(
        split,
        size=len(ids),
        name_of=lambda id: split.path(int(ids[id])),
        load=load,
        gather=gather if split.gather else None,
        images=None if split.images is None else split.images[ids],
        paths=None if split.paths is None else [split.paths[i] for i in ids],
        labels=None if split.labels is None else split.labels[ids],
    )


def hold_out(labels: NDArray[np.int32], share: float, seed: tuple[int, ...]) -> NDArray[np.bool_]:
    """Which images bool [N] are held out: about `share` of those of each class, and none of a class of one image."""
    rng = np.random.default_rng(seed)
    held = np.zeros(len(labels), bool)
    for label in np.unique(labels[labels >= 0]):
        members = rng.permutation(np.flatnonzero(labels == label))
        held[members[: min(max(1, round(share * len(members))), len(members) - 1)]] = True
    return held


def with_border(split: Split) -> Split:
    """The split with images [R, R, C] (R = 8/7 S) of which evaluation sees the middle [S, S, C].

    Where all images are S x S already there is no border, and they stay as they are.
    """
    side, channels = split.image_shape[0], split.image_shape[2]
    if split.images is not None and split.images.shape[1:3] == (side, side):
        return split
    shape = (reduced_side(side), reduced_side(side), channels)

    def load(id: Tensor) -> Tensor:
        return transforms.border_crop(split.load(id)[None], shape)[0]

    def gather(ids: Tensor) -> Tensor:
        assert split.gather is not None
        return transforms.border_crop(split.gather(ids), shape)

    return replace(split, image_shape=shape, load=load, gather=gather if split.gather else None, images=None)
