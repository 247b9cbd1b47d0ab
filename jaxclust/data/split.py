"""What a source gives: splits of images that are addressed by id, wherever the pixels lie."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from jaxclust.runtime import tensorflow

if TYPE_CHECKING:
    from tensorflow import Tensor

ALIGNMENT = 64  # bytes; TensorFlow shares memory with NumPy only from such an address


class Skipped(NamedTuple):
    """A file that is left out of `split`, and why; `path` is relative to the source."""

    split: str
    path: str
    reason: str


@dataclass(frozen=True, eq=False)
class Split:
    """Images with ids 0 … size-1; a dataclass because it is a cache key by identity.

    `load` maps an int scalar id to uint8 [h, w, C] and `gather` maps ids [B] to uint8 [B, H, W, C]
    (None unless all images lie in memory in one size); both are graph code. `images` is the memory
    behind `gather`. Where there are several copies of each image, `draw` takes the place of `gather`
    in training: it maps ids [B] and numbers [B] in [0, 1), which say what copies. `image_shape` is
    what the pipeline makes of every image, [S, S, C]; for vectors it is [D] and all the above is
    float32. `labels` are for evaluation only: nothing in `pipeline` reads them.
    """

    size: int
    image_shape: tuple[int, ...]
    name_of: Callable[[int], str]
    load: Callable[[Tensor], Tensor]
    gather: Callable[[Tensor], Tensor] | None = None
    images: NDArray[Any] | None = None
    paths: list[str] | None = None
    labels: NDArray[np.int32] | None = None
    draw: Callable[[Tensor, Tensor], Tensor] | None = None

    def path(self, id: int) -> str:
        """The file of image `id` relative to its source, or a name such as "digits/17"."""
        return self.name_of(int(id))


class Source(NamedTuple):
    """All splits of a data set; there is always a split "train", which may be several of the source's own.

    `parts` are the sizes of those, in their order. `trained` says how many of the classes, the first ones, training may
    meet; None: all.
    """

    name: str
    splits: dict[str, Split]
    class_names: tuple[str, ...] | None
    skipped: list[Skipped]
    parts: Mapping[str, int] = {}
    trained: int | None = None

    @property
    def num_classes(self) -> int | None:
        """Number of classes, None when no split has labels."""
        return None if self.class_names is None else len(self.class_names)

    @property
    def train_classes(self) -> int | None:
        """Number of classes in training, whose labels are 0 to one less; None when no split has labels."""
        return self.num_classes if self.trained is None else self.trained


@functools.lru_cache(maxsize=16)
def fingerprint(split: Split, count: int) -> str:
    """A digest of the names of the first `count` images, which tells whether a file with a row for each is of these."""
    names = "\0".join(split.path(id) for id in range(count))
    return hashlib.sha256(names.encode("utf-8", "surrogateescape")).hexdigest()


def sampled(split: Split, count: int = 32) -> NDArray[np.int64]:
    """The ids of up to `count` images, evenly spaced."""
    return np.linspace(0, split.size - 1, min(count, split.size)).astype(np.int64)


@functools.lru_cache(maxsize=16)
def sketch(split: Split) -> NDArray[np.float64]:
    """Means of the quarters of each of the `sampled` images or vectors, [n, 4].

    They tell other images of the same names apart; those of one image differ by less than 1 from decoder to decoder.
    """
    tf = tensorflow()
    rows = (split.load(tf.constant(id, tf.int32)).numpy().ravel() for id in sampled(split))
    return np.array([[part.mean() if len(part) else 0 for part in np.array_split(row, 4)] for row in rows], np.float64)


def prefixes(train: str) -> dict[str, str]:
    """What the names of each split's arrays begin with: nothing for train, test_ for test, and so on for those that
    `train` asks for."""
    return {name: "" if name == "train" else f"{name}_" for name in ("train", "test", *train.split("+"))}


def aligned(size: int) -> NDArray[np.uint8]:
    """An uninitialised uint8 [size] that TensorFlow can use in place."""
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size]


def _shared(array: NDArray[Any]) -> tuple[NDArray[Any], Tensor]:
    """`array` (copied only where its address demands it) and a tensor over the same memory."""
    if array.ctypes.data % ALIGNMENT or not (array.flags.c_contiguous and array.flags.writeable):
        copy = aligned(array.nbytes).view(array.dtype).reshape(array.shape)
        copy[...] = array
        array = copy
    tensor = tensorflow().experimental.dlpack.from_dlpack(array.__dlpack__())
    return array, tensor


def from_array(
    images: NDArray[Any],
    image_shape: tuple[int, ...],
    name_of: Callable[[int], str],
    paths: list[str] | None = None,
) -> Split:
    """A split over `images` uint8 [N, H, W, C], or vectors float32 [N, D]."""
    tf = tensorflow()
    images, memory = _shared(images)

    def gather(ids: Tensor) -> Tensor:
        return tf.gather(memory, ids)

    return Split(len(images), image_shape, name_of, gather, gather, images, paths)


def from_ragged(
    pixels: NDArray[np.uint8],
    sizes: NDArray[np.int32],
    image_shape: tuple[int, int, int],
    name_of: Callable[[int], str],
    paths: list[str] | None = None,
) -> Split:
    """A split over images of several sizes, one after the other in `pixels`.

    `sizes` int32 [N, 2] are heights and widths; the number of channels is that of `image_shape`.
    """
    tf = tensorflow()
    channels = image_shape[2]
    _, memory = _shared(pixels)
    lengths = sizes.astype(np.int64).prod(axis=1) * channels
    starts = tf.constant(np.cumsum(lengths) - lengths)
    shapes = tf.constant(np.column_stack([sizes, np.full(len(sizes), channels)]).astype(np.int32))

    def load(id: Tensor) -> Tensor:
        shape = tf.gather(shapes, id)
        count = tf.reduce_prod(tf.cast(shape, tf.int64))
        flat = tf.slice(memory, [tf.gather(starts, id)], [count])
        return tf.ensure_shape(tf.reshape(flat, shape), (None, None, channels))

    return Split(len(sizes), image_shape, name_of, load, paths=paths)


def from_files(
    decode: Callable[[int], NDArray[np.uint8]],
    size: int,
    image_shape: tuple[int, int, int],
    name_of: Callable[[int], str],
    paths: list[str] | None = None,
) -> Split:
    """A split whose images are decoded by `decode(id)` each time they are needed."""
    tf = tensorflow()

    def load(id: Tensor) -> Tensor:
        image = tf.numpy_function(lambda i: decode(int(i)), [id], tf.uint8, stateful=False)
        return tf.ensure_shape(image, (None, None, image_shape[2]))

    return Split(size, image_shape, name_of, load, paths=paths)


def reduced_side(image_size: int) -> int:
    """Short side R = round(8/7 of S) of a canonical image: 256 for 224, the evaluation's resize."""
    return round(image_size * 8 / 7)


def image_side(sizes: Sequence[tuple[int, int]], image_size: int) -> int:
    """`image_size`, or where that is 0 the images' own size if they share one of ≤ 64 px, else 64.

    `sizes` are the different (height, width) there are; of a shared one the short side counts.
    """
    if image_size:
        return image_size
    shared = len(sizes) == 1 and max(sizes[0]) <= 64
    return min(sizes[0]) if shared else 64
