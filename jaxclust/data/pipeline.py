"""Batches by tf.data: augmented ones in a drawn order, or every image once in the order of ids.

Nothing here can see a label: targets come as an argument, and of a split only `load` and `gather`
are used. The graphs are traced once for a split and its views; order, targets and weights of a
round are fed to them, so that a new round costs no new trace.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from jaxclust.data import transforms, vectors
from jaxclust.data.split import Split
from jaxclust.data.view import PER_COUNTER, View, copies, make_view, philox_key, uniforms
from jaxclust.data.view import shape as view_shape
from jaxclust.errors import DataError
from jaxclust.runtime import tensorflow

if TYPE_CHECKING:
    from tensorflow import Tensor
    from tensorflow.data import Dataset

Batch = dict[str, Any]

OF_COPIES = 1000  # in place of the number of a view's copy: draws that say which copy of an image is seen
PREFETCHED = 2  # batches that are ready before they are asked for


class _Round(NamedTuple):
    """What the graphs of training are fed: tensors that are the same for all batches of a round."""

    order: Tensor  # int32 [L], ids at positions start …
    start: Tensor  # int64
    targets: Tensor  # int32 [N, ...]
    weights: Tensor  # float32 [N]
    keys: Tensor  # uint64 [views]
    batch_size: Tensor  # int64, over all hosts
    offset: Tensor  # int64, where this host's slice of a batch begins


def train_batches(
    split: Split,
    views: Mapping[str, Mapping[str, Any]],
    order: NDArray[np.int32],
    targets: NDArray[np.int32],
    weights: NDArray[np.float32],
    *,
    start_position: int,
    first_step: int,
    last_step: int,
    batch_size: int,
    seed: int,
    stage_index: int,
    host: int = 0,
    hosts: int = 1,
) -> Iterator[Batch]:
    """This host's part of the batches of steps first_step … last_step - 1.

    Step s uses positions s·batch_size … of the run's sequence, of which `order` [L] gives the ids
    from `start_position` on; `targets` [N, ...] and `weights` [N] are by id. A batch is a dict of NumPy
    arrays: `views` {name: uint8 [b, S, S, C], or [b, n, S, S, C] where the view has a number n > 1}, `id` int32
    [b], `position` int64 [b], `target` int32 [b, ...], `weight` float32 [b], `step` int32, with
    b = batch_size / hosts.

    Augmentation depends on seed, stage, view and position alone: neither on where a run starts nor
    on the number of hosts. DataError, naming the file, if an image can no longer be decoded.
    """
    local = _local_size(batch_size, hosts)
    end_position = start_position + len(order)
    if (
        first_step < last_step
        and not start_position <= first_step * batch_size <= last_step * batch_size <= end_position
    ):
        raise ValueError(
            f"steps {first_step} to {last_step} of {batch_size} need positions {first_step * batch_size} to "
            f"{last_step * batch_size}; the order covers {start_position} to {end_position}"
        )
    tf = tensorflow()
    named = tuple((name, make_view(views[name])) for name in sorted(views))
    fed = _Round(
        tf.constant(order, tf.int32),
        tf.constant(start_position, tf.int64),
        tf.constant(targets, tf.int32),
        tf.constant(weights, tf.float32),
        tf.constant(np.array([philox_key(seed, stage_index, i) for i in range(len(named))], np.uint64)),
        tf.constant(batch_size, tf.int64),
        tf.constant(host * local, tf.int64),
    )
    fetch, finish = _train_graphs(split, named, local)
    per_step = 1 if split.gather else local
    dataset = tf.data.Dataset.range(first_step * per_step, last_step * per_step)
    dataset = _parallel(dataset, lambda index: fetch(index, *fed))
    if not split.gather:
        dataset = dataset.batch(local, drop_remainder=True)
    return _numpy(_parallel(dataset, lambda rows: finish(rows, *fed)))


def exact_batches(split: Split, batch_size: int, *, host: int = 0, hosts: int = 1) -> Iterator[Batch]:
    """Every image of this host (ids with id % hosts == host) once, in the order of ids.

    A batch is a dict of NumPy arrays: `image` uint8 [b, S, S, C] (the evaluation crop), `id` int32
    [b], `mask` bool [b], with b = batch_size / hosts. All hosts get equally many batches; rows with
    mask False fill them up. DataError as `train_batches`.
    """
    local = _local_size(batch_size, hosts)
    per_host = -(-split.size // hosts)
    batches = -(-per_host // local)
    tf = tensorflow()
    fetch = _exact_graph(split, local)
    first, stride = tf.constant(host, tf.int64), tf.constant(hosts, tf.int64)
    dataset = tf.data.Dataset.range(batches if split.gather else batches * local)
    dataset = _parallel(dataset, lambda index: fetch(index, first, stride))
    return _numpy(dataset if split.gather else dataset.batch(local, drop_remainder=True))


def images_at(split: Split, ids: NDArray[np.int32]) -> NDArray[np.uint8]:
    """The images of some ids as evaluation sees them, uint8 [M, S, S, C]."""
    tf = tensorflow()
    crop, shape = _kind(split).evaluation_crop, split.image_shape
    with _naming_the_file():
        images = [crop(split.load(tf.constant(int(i)))[None], shape)[0].numpy() for i in ids]
    return np.stack(images) if images else np.zeros((0, *split.image_shape), np.uint8)


def _kind(split: Split) -> ModuleType:
    """The functions that make views of what is in `split`: images or vectors."""
    return vectors if len(split.image_shape) == 1 else transforms


def _local_size(batch_size: int, hosts: int) -> int:
    if batch_size % hosts:
        raise ValueError(f"batch_size={batch_size} must divide by {hosts} hosts")
    return batch_size // hosts


@functools.lru_cache(maxsize=16)
def _train_graphs(split: Split, views: tuple[tuple[str, View], ...], local: int) -> tuple[Callable, Callable]:
    """`fetch(index, *round)` crops the images of a step, or where they differ in size of one row of it;
    `finish(rows, *round)` makes the batch of these crops."""
    tf = tensorflow()
    shape = split.image_shape
    kind = _kind(split)
    blocks, views = kind.columns(shape), tuple((name, kind.measured(view, split)) for name, view in views)

    def crops(first: Tensor, count: int, fed: _Round) -> Batch:
        position = first + tf.range(count, dtype=tf.int64)
        id = tf.gather(fed.order, position - fed.start)
        if split.draw:
            images = split.draw(id, uniforms(fed.keys[0], first, count, (PER_COUNTER,), OF_COPIES)[:, 0])
        else:
            images = split.gather(id) if split.gather else split.load(id[0])[None]
        cropped = {}
        for i, (name, view) in enumerate(views):
            u = _draws(fed.keys[i], first, count, blocks, view)
            each = tf.gather(images, np.repeat(np.arange(count), view.number)) if view.number > 1 else images
            made = kind.crop(each, u, view, view_shape(view, shape))
            cropped[name] = tf.reshape(made, [count, *copies(view), *view_shape(view, shape)])
        return {"views": cropped, "id": id, "position": position}

    @tf.function(autograph=False)
    def fetch(index: Tensor, *tensors: Tensor) -> Batch:
        fed = _Round(*tensors)
        if split.gather:
            return crops(index * fed.batch_size + fed.offset, local, fed)
        first = index // local * fed.batch_size + fed.offset + index % local
        return tf.nest.map_structure(lambda tensor: tensor[0], crops(first, 1, fed))

    @tf.function(autograph=False)
    def finish(rows: Batch, *tensors: Tensor) -> Batch:
        fed = _Round(*tensors)
        position, id = rows["position"], rows["id"]
        augmented = {}
        for i, (name, view) in enumerate(views):
            u, images = _draws(fed.keys[i], position[0], local, blocks, view), rows["views"][name]
            together = tf.reshape(images, [-1, *view_shape(view, shape)])
            augmented[name] = tf.reshape(kind.augment(together, u, view), tf.shape(images))
        return {
            "views": augmented,
            "id": id,
            "position": position,
            "target": tf.gather(fed.targets, id),
            "weight": tf.gather(fed.weights, id),
            "step": tf.cast(position[0] // fed.batch_size, tf.int32),
        }

    return fetch, finish


def _draws(key: Tensor, first: Tensor, count: int, blocks: tuple[int, ...], view: View) -> Tensor:
    """The numbers of a view, float32 [count · number, sum(blocks)]; those of an image's copies stand together."""
    tf = tensorflow()
    numbers = [uniforms(key, first, count, blocks, copy) for copy in range(view.number)]
    return tf.reshape(tf.stack(numbers, axis=1), [count * view.number, sum(blocks)])


@functools.lru_cache(maxsize=16)
def _exact_graph(split: Split, local: int) -> Callable:
    """`fetch(index, first, stride)`: a batch, or where images differ in size one row of it."""
    tf = tensorflow()
    shape, kind = split.image_shape, _kind(split)

    @tf.function(autograph=False)
    def fetch(index: Tensor, first: Tensor, stride: Tensor) -> Batch:
        row = index * local + tf.range(local, dtype=tf.int64) if split.gather else index
        id = first + stride * row
        mask = id < split.size
        id = tf.minimum(id, split.size - 1)
        if split.gather:
            image = kind.evaluation_crop(split.gather(id), shape)
        else:
            image = tf.cond(
                mask,
                lambda: kind.evaluation_crop(split.load(id)[None], shape)[0],
                lambda: tf.zeros(shape, tf.uint8),
            )
        return {"image": image, "id": tf.cast(id, tf.int32), "mask": mask}

    return fetch


def _parallel(dataset: Dataset, function: Callable) -> Dataset:
    return dataset.map(function, num_parallel_calls=os.cpu_count() or 1, deterministic=True)


def _numpy(dataset: Dataset) -> Iterator[Batch]:
    """The batches, with one thread to an operation since batches are made side by side."""
    tf = tensorflow()
    options = tf.data.Options()
    options.deterministic = True
    options.autotune.enabled = False
    options.threading.max_intra_op_parallelism = 1
    batches = dataset.prefetch(PREFETCHED).with_options(options).as_numpy_iterator()

    def run() -> Iterator[Batch]:
        with _naming_the_file():
            yield from batches

    return run()


@contextmanager
def _naming_the_file() -> Iterator[None]:
    """Turns TensorFlow's report of a DataError back into one."""
    try:
        yield
    except tensorflow().errors.OpError as error:
        found = re.search(r"DataError: (.*)", error.message)
        if found is None:
            raise
        raise DataError(found[1]) from None
