"""What a method is: a tuple of pure functions, made by `make(config, info)` in a file of its own."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from jaxclust.cluster.reduce import Matrix

Tree = Any  # a pytree of arrays
Metrics = dict[str, jax.Array]
Batch = dict[str, Any]
"""What `loss` and `update` get, B rows on each device.

views: {name: uint8 [B, H, W, C] or float32 [B, D]}, [B, n, ...] where the view has a number n > 1; id, position: int32
[B]; target: int32 [B, *Method.target_shape]; weight: float32 [B]; step: int32 scalar. `position` counts images over the
whole stage and host, so randomness drawn from it does not depend on the number of devices.
"""


class DataInfo(NamedTuple):
    """What a method may know of the data before it starts; never a label."""

    size: int
    image_shape: tuple[int, ...]  # [H, W, C], or [D] for vectors
    num_classes: int | None = None  # in training, with labels 0 to one less; for methods with labels="class" or "group"
    files: Mapping[str, Path] = {}  # folders that earlier stages left, such as "checkpoints/moco"
    parts: tuple[int, ...] = ()  # sizes of the splits that make it up, in their order, if it is known
    fingerprint: Callable[[int], str] | None = None  # of the names of the first so many images
    begun: bool = False  # whether the stage has a checkpoint, so that what it starts with is needed no more


class Aux(NamedTuple):
    """What a loss returns beside its scalar."""

    extra: Tree  # the next `extra`, identical on all devices
    metrics: Metrics = {}  # scalars, averaged over devices and over the steps between two logs
    rows: dict[str, jax.Array] = {}  # [B, ...] per image, written by position to rows/<stage>/ (but see Method.memory)


class TrainState(NamedTuple):
    """All that is on the devices; replicated."""

    step: jax.Array  # int32: updates done
    params: Tree
    extra: Tree
    opt_state: Tree
    sums: dict[str, jax.Array]  # metrics added up since the last log (see train/step.py)


class Targets(NamedTuple):
    """What the last refresh decided, and what was remembered since, by id, on the host."""

    target: np.ndarray  # int32 [N, *Method.target_shape]
    weight: np.ndarray  # float32 [N]
    ids: np.ndarray  # int32 [M]: the ids to train on
    refreshed_at: np.ndarray  # int32 scalar: step of that refresh; -1: none yet
    memory: np.ndarray = np.zeros((0, 0), np.float32)
    """[N, D]: what the loss said of each image since then (`Method.memory`), zeros of those that it has not met."""

    @property
    def cluster(self) -> np.ndarray:
        """The target of each image, or the first of several, int32 [N]."""
        return self.target.reshape(len(self.target), -1)[:, 0]


class Refreshed(NamedTuple):
    """What a refresh returns."""

    params: Tree
    extra: Tree
    target: np.ndarray  # int32 [N, *Method.target_shape]
    weight: np.ndarray  # float32 [N]
    ids: np.ndarray  # int32 [M]
    cluster: np.ndarray | None = None  # int32 [N]: the assignment, for the cluster log
    distance: np.ndarray | None = None  # float32 [N]
    metrics: Mapping[str, float] = {}
    record: Mapping[str, np.ndarray] = {}  # further arrays [N] for the cluster log


class Method(NamedTuple):
    """A method; the optional functions are None where it has no use for them.

    Parameters are a dict whose top-level keys name the optimiser groups (`config.optimizer.<key>`).
    """

    init: Callable[[jax.Array, Batch], tuple[Tree, Tree]]  # (rng, batch) -> params, extra
    loss: Callable[[Tree, Tree, Batch, jax.Array], tuple[jax.Array, Aux]]
    """(params, extra, batch, rng) -> mean over the device's rows, Aux."""
    embed: Callable[..., Any]
    """(params, extra, images, layers=()) -> features [B, D], or {layer: map [B, H, W, C]}; evaluation mode.

    The layer "feature" is the feature [B, D]. ConfigError on a layer that does not exist."""
    predict: Callable[[Tree, Tree, jax.Array], dict[str, jax.Array]] | None = None
    """(params, extra, images) -> {"cluster": int32 [B], "score": [B], ...}; evaluation mode. A method that says of each
    image how probable every cluster is adds "log_probs" [B, K]."""
    refresh: Callable[[TrainState, Targets, Matrix, jax.Array], Refreshed] | None = None
    """(state, targets, rows, rng) -> Refreshed; on the host, between rounds."""
    update: Callable[[TrainState, Batch, jax.Array], tuple[TrainState, Aux]] | None = None
    """(state, batch, rng) -> state, Aux; replaces the gradient step. `aux.extra` is not used."""
    after: Callable[[Tree, Tree], Tree] | None = None
    """(params after the gradient step, extra) -> extra, such as their moving average; not with `update`."""
    accept: Callable[[jax.Array, Tree, Metrics], tuple[jax.Array, Metrics]] | None = None
    """(loss, gradient, metrics, all of the whole batch) -> whether the step is taken, and metrics in place of these,
    which must be finite. Without it parameters, `extra` and optimiser state stay as they are. Not with `update`."""
    optimizer: Callable[[], optax.GradientTransformation] | None = None  # replaces `config.optimizer`
    views: tuple[str, ...] = ("train",)  # named augmentations (`config.views.<name>`)
    copies: bool = False  # whether a view may be several copies of an image (its `number`)
    fresh: tuple[str, ...] = ()
    """Top-level keys of params that refresh renews, with their optimiser state, and keys of `extra` like them: whatever
    stands under these names may change its shape."""
    given: tuple[str, ...] = ()  # keys of params and extra that `init_from` must bring whole, beside the body
    num_clusters: int | None = None  # how many clusters `predict` tells apart; None: as many as are found
    target_shape: tuple[int, ...] = ()  # of one image's target
    memory: str | None = None
    """The entry [B, D] of `Aux.rows` that is the row of each image in the next refresh; `look` then makes only those of
    the first one. It is kept by id in the checkpoint; an image that the round did not meet has zeros."""
    labels: str | None = None  # None, "group" or "class": what may reach loss and refresh as `target`
    class_size: int = 1  # images of smaller classes are not trained on (labels="class")
    class_count: int = 1  # how many classes there must be to train on (labels="class")
    look: Callable[[Tree, Tree, jax.Array], jax.Array] | None = None
    """(params, extra, images) -> [B, D], what `refresh` sees of the images; None: what `embed` gives."""
    layers: tuple[str, ...] | None = None
    """Names of the maps that `embed` knows, beside "feature"; None: those of the network of `config.model`."""
    body: Callable[[Tree, Tree, jax.Array], jax.Array] | None = None
    """(params, extra, images) -> [B, D], the features of a frozen body that are kept; None: what `embed` gives."""
    points: Callable[[TrainState], tuple[int, int]] | None = None
    """(state or its shapes) -> how many clusterings by `config.cluster` a refresh makes, and the length of the points
    that each of them sees; None: it makes none."""
    experts: Callable[[Tree, Tree, jax.Array], dict[str, jax.Array]] | None = None
    """(params, extra, images) -> of a mixture of K experts "choice" [B, K], of the gate; "input" [B, K, ...], what each
    expert sees of an image then; and their maps "conv1" [B, K, H, W, C], "conv2", ...; evaluation mode."""
    reconstruct: Callable[[Tree, Tree, jax.Array], jax.Array] | None = None
    """(params, extra, images) -> the images [B, H, W, C] that a decoder makes of their codes, of 0 to 255 but for
    errors; evaluation mode."""


def contiguous(labels: np.ndarray) -> tuple[np.ndarray, int]:
    """Labels int [N] renumbered 0, 1, ... in increasing order without gaps (int32), and how many there are."""
    found, renumbered = np.unique(labels, return_inverse=True)
    return renumbered.astype(np.int32), len(found)


def merge(tree: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """A copy of a dict with some values replaced."""
    return {**tree, **changes}
