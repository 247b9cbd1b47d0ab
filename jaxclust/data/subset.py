"""Splits made of others: several joined, some images of one, or all with the border that evaluation cuts off."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from jaxclust.data import transforms
from jaxclust.data.split import Source, Split, aligned, from_array, reduced_side
from jaxclust.errors import ConfigError, DataError
from jaxclust.runtime import tensorflow

if TYPE_CHECKING:
    from tensorflow import Tensor


def joined(splits: Sequence[Split]) -> Split:
    """The images of several splits, one split after the other; where one has no labels they are unknown, -1.

    In one piece of memory if all lie in memory in one size. DataError if they are vectors of different lengths.
    """
    if len(splits) == 1:
        return splits[0]
    shapes = {split.image_shape for split in splits}
    if len(shapes) > 1:
        raise DataError(f"splits of different shapes cannot be trained on together: {sorted(shapes)}")
    sizes = np.array([split.size for split in splits])
    ends = np.cumsum(sizes)
    starts = ends - sizes

    def name_of(id: int) -> str:
        part = int(np.searchsorted(ends, id, side="right"))
        return splits[part].path(id - int(starts[part]))

    def load(id: Tensor) -> Tensor:
        tf = tensorflow()
        part = tf.searchsorted(tf.constant(ends, id.dtype), id[None], side="right")[0]
        branches = [partial(split.load, id - int(start)) for split, start in zip(splits, starts, strict=True)]
        image, shape = tf.switch_case(part, branches), splits[0].image_shape
        return tf.ensure_shape(image, (None, None, shape[2]) if len(shape) == 3 else shape)

    paths = [path for split in splits for path in split.paths or ()]
    images = _in_one_piece(splits)
    if images is None:
        made = Split(int(ends[-1]), splits[0].image_shape, name_of, load)
    else:
        made = from_array(images, splits[0].image_shape, name_of)
    return replace(made, paths=paths if len(paths) == made.size else None, labels=_labels(splits))


def _in_one_piece(splits: Sequence[Split]) -> NDArray[Any] | None:
    images = [split.images for split in splits if split.images is not None]
    if len(images) < len(splits) or len({(part.dtype, part.shape[1:]) for part in images}) > 1:
        return None
    memory = aligned(sum(part.nbytes for part in images)).view(images[0].dtype).reshape(-1, *images[0].shape[1:])
    return np.concatenate(images, out=memory)


def _labels(splits: Sequence[Split]) -> NDArray[np.int32] | None:
    if all(split.labels is None for split in splits):
        return None
    unknown = (np.full(split.size, -1, np.int32) for split in splits)
    return np.concatenate(
        [n if split.labels is None else split.labels for split, n in zip(splits, unknown, strict=True)]
    )


def first(split: Split, size: int) -> Split:
    """The first `size` images of a split, in the same memory."""
    return replace(
        split,
        size=size,
        images=None if split.images is None else split.images[:size],
        paths=None if split.paths is None else split.paths[:size],
        labels=None if split.labels is None else split.labels[:size],
    )


def subset(split: Split, ids: NDArray[np.int64]) -> Split:
    """The images `ids` [M] of a split, in this order, as images 0 … M-1; of images in one size a copy."""

    def name_of(id: int) -> str:
        return split.path(int(ids[id]))

    if split.images is not None:
        shape = len(ids), *split.images.shape[1:]
        memory = aligned(int(np.prod(shape)) * split.images.itemsize).view(split.images.dtype).reshape(shape)
        made = from_array(np.take(split.images, ids, axis=0, out=memory), split.image_shape, name_of)
    else:
        at = partial(_at, tensorflow().constant(ids))
        gather = at(split.gather) if split.gather else None
        made = Split(len(ids), split.image_shape, name_of, at(split.load), gather)
    return replace(
        made,
        paths=None if split.paths is None else [split.paths[i] for i in ids],
        labels=None if split.labels is None else split.labels[ids],
    )


def _at(table: Tensor, look_up: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`look_up` of the ids that `table` says."""
    return lambda id: look_up(tensorflow().gather(table, id))


def hold_out(labels: NDArray[np.int32], share: float, seed: tuple[int, ...]) -> NDArray[np.bool_]:
    """Which images bool [N] are held out: about `share` of those of each class, and none of a class of one image."""
    rng = np.random.default_rng(seed)
    held = np.zeros(len(labels), bool)
    for label in np.unique(labels[labels >= 0]):
        members = rng.permutation(np.flatnonzero(labels == label))
        held[members[: min(max(1, round(share * len(members))), len(members) - 1)]] = True
    return held


def with_validation(source: Source, share: float) -> Source:
    """The source where about `share` of the training images of each class are a split "val" of their own; 0: as it is.

    Which they are depends on the labels alone; images of unknown class are trained on. ConfigError if training images
    have no labels, or no two that are held out share a class, so that none could be found by another.
    """
    if not share:
        return source
    if "val" in source.splits:
        raise ConfigError(f"config.data.hold_out={share}: {source.name} has a split 'val' of its own; set it to 0")
    train = source.splits["train"]
    labels = np.full(train.size, -1, np.int32) if train.labels is None else train.labels
    held = hold_out(labels, share, (0,))
    if np.bincount(labels[held], minlength=1).max() < 2:
        raise ConfigError(
            f"config.data.hold_out={share} holds out {held.sum()} of the {train.size:,} training images of "
            f"{source.name}, of no class two: nothing can be found among them. Give a larger share"
            + ("; the images have no labels" if train.labels is None else "")
        )
    ends = np.cumsum([*source.parts.values()])
    kept = (int(part.sum()) for part in np.split(~held, ends[:-1]))
    train, val = subset(train, np.flatnonzero(~held)), subset(train, np.flatnonzero(held))
    splits = {"train": train, "val": val, **{name: split for name, split in source.splits.items() if name != "train"}}
    return source._replace(splits=splits, parts=dict(zip(source.parts, kept, strict=True)))


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
