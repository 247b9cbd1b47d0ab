"""Several heads on a network that stays as it is: what they say of images, and which one is selected (SPICE, 6.5)."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxclust import hosts
from jaxclust.cluster import Chunked, reduce, warn_once
from jaxclust.cluster.reduce import Matrix
from jaxclust.methods import classifier
from jaxclust.methods.base import Refreshed, Targets, TrainState, merge
from jaxclust.methods.classifier import Classifier, Extra, Params
from jaxclust.models.heads import MLP
from jaxclust.ops.distances import normalize, whiten
from jaxclust.ops.losses import double_softmax
from jaxclust.ops.prototypes import Rule, coverage, log_probabilities, pseudo_labels


class Heads(NamedTuple):
    """f, one head, and how many there are; their parameters are stacked along a first axis."""

    f: Classifier
    head: MLP
    number: int
    whiten_power: float = 0.0


class Columns(NamedTuple):
    """The first columns of rows, to be read in pieces."""

    rows: Chunked
    width: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.rows.shape[0], self.width

    def chunks(self) -> Iterator[np.ndarray]:
        return (chunk[:, : self.width] for chunk in self.rows.chunks())


def feature(h: Heads, params: Params, extra: Extra, drift: Any, images: jax.Array) -> jax.Array:
    """What heads see of images, [B, D], with batch statistics that have drifted; evaluation mode."""
    found: jax.Array = classifier.embed(h.f, params, {"batch_stats": drifted(extra, drift)}, images)
    return seen(extra, found, directed=images.ndim == 2)


def seen(extra: Extra, rows: jax.Array, directed: bool = False) -> jax.Array:
    """What heads see of features [B, D]: these, or those that are `directed` or whitened at the length sqrt(D).

    So vectors are seen: heads start with weights of one size, and should not care for the unit of vectors.
    """
    if not (directed or extra["whitening"]):
        return rows
    unit = normalize(rows)
    if extra["whitening"]:
        unit = whiten(unit, extra["whitening"]["mean"], extra["whitening"]["projection"], l2=True).astype(rows.dtype)
    return unit * np.sqrt(rows.shape[1]).astype(rows.dtype)


def unfitted(h: Heads, width: int) -> dict[str, jax.Array]:
    """`extra["whitening"]` before the first refresh, which leaves the direction of rows [B, width] as it is."""
    eye = {"mean": jnp.zeros(width, h.f.dtype), "projection": jnp.eye(width, dtype=h.f.dtype)}
    return {**eye, "fitted": jnp.zeros((), jnp.int32)} if h.whiten_power else {}


def fitted(h: Heads, rows: Chunked, width: int) -> dict[str, Any]:
    """`extra["whitening"]` of embeddings, the first `width` columns of rows; of fewer rows than that some are zero."""
    found, _ = reduce.fit(Columns(rows, width), min(width, rows.shape[0] - 1), power=h.whiten_power)
    projection = np.pad(found.projection, ((0, 0), (0, width - found.projection.shape[1])))
    arrays = {"mean": found.mean.astype(h.f.dtype), "projection": projection.astype(h.f.dtype)}
    return {**arrays, "fitted": np.int32(1)}


def drifted(extra: Extra, drift: Any) -> Any:
    """The batch statistics that f came with and `drift`, which is empty where they stay."""
    return jax.tree.map(jnp.add, extra["batch_stats"], drift) if drift else extra["batch_stats"]


def embedding(h: Heads, params: Params, extra: Extra, images: jax.Array) -> jax.Array:
    """The feature as unit rows [B, D], with the statistics that f came with."""
    return normalize(feature(h, params, extra, {}, images))


def scores(h: Heads, head: Params, rows: jax.Array) -> jax.Array:
    """The logits [B, K] of one head for features [B, D]."""
    with jax.default_matmul_precision("highest"):
        return jnp.asarray(h.head.apply({"params": head}, rows))


def all_scores(h: Heads, heads: Params, rows: jax.Array) -> jax.Array:
    """The logits of all heads for features [B, D], [B, H, K]."""
    return jax.vmap(lambda head: scores(h, head, rows), out_axes=1)(heads)


def in_chunks(function: Callable[[jax.Array], jax.Array], images: jax.Array, size: int) -> jax.Array:
    """`function` of images [B, ...], of `size` at a time to bound memory."""
    if len(images) <= size:
        return function(images)
    whole = len(images) // size * size
    made = jax.lax.map(function, images[:whole].reshape(-1, size, *images.shape[1:]))
    made = made.reshape(whole, *made.shape[2:])
    return made if whole == len(images) else jnp.concatenate([made, function(images[whole:])])


def nobody(heads: Params, drift: Any) -> dict[str, Any]:
    """`extra["selected"]` before any selection: a head, with its number, loss and the drift of its time."""
    return {
        "head": jax.tree.map(lambda leaf: leaf[0], heads),
        "index": jnp.full((), -1, jnp.int32),
        "loss": jnp.full((), jnp.inf, jnp.float32),
        "drift": drift,
    }


def look(h: Heads, params: Params, extra: Extra, images: jax.Array) -> jax.Array:
    """Side by side: the embedding, the log-probabilities of each head, and those of the selected one."""
    now, kept = _now_and_kept(h, params, extra, images)
    logs = log_probabilities(jnp.concatenate([now, kept[:, None]], axis=1))
    return jnp.concatenate([embedding(h, params, extra, images), logs.reshape(len(images), -1)], axis=1)


def parts(h: Heads, rows: Matrix) -> tuple[np.ndarray, np.ndarray]:
    """What `look` made of all images: embeddings [N, D] and log-probabilities [N, H + 1, K], the selected head last.

    All of it is in the memory of every host.
    """
    seen = hosts.whole(rows.array(), rows.shape[0])
    width = (h.number + 1) * h.head.dim
    return seen[:, :-width], seen[:, -width:].reshape(len(seen), h.number + 1, h.head.dim)


def predict(h: Heads, params: Params, extra: Extra, images: jax.Array) -> dict[str, jax.Array]:
    """The cluster of the selected head and its probability as `score`; what it says of all clusters, [B, K], as
    `log_probs`; the cluster of each head, [B, H], as `heads`."""
    now, kept = _now_and_kept(h, params, extra, images)
    return {
        "cluster": jnp.argmax(kept, axis=1).astype(jnp.int32),
        "score": jnp.max(jax.nn.softmax(kept), axis=1),
        "log_probs": log_probabilities(kept),
        "heads": jnp.argmax(now, axis=2).astype(jnp.int32),
    }


def _now_and_kept(h: Heads, params: Params, extra: Extra, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The logits of all heads [B, H, K], and those [B, K] of the selected one as it was when it was selected."""
    now, selected = feature(h, params, extra, extra["drift"], images), extra["selected"]
    then = feature(h, params, extra, selected["drift"], images) if selected["drift"] else now
    return all_scores(h, params["heads"], now), scores(h, selected["head"], then)


def judge(rule: Rule, embeddings: jax.Array, log_probs: jax.Array) -> dict[str, jax.Array]:
    """Of each head, [H]: the double softmax loss of its own labels, how many clusters it uses, overlap and coverage.

    Shapes: embeddings [N, D], log_probs [N, H, K].
    """

    def one(logs: jax.Array) -> dict[str, jax.Array]:
        found = pseudo_labels(embeddings, logs, rule)
        weight = found.kept / jnp.mean(found.kept, dtype=logs.dtype)
        used = jnp.zeros(logs.shape[1], bool).at[jnp.argmax(logs, axis=1)].set(True)
        overlap, covered = coverage(found, len(logs))
        return {
            "loss": double_softmax(logs[found.image], found.label, weight),  # log-probabilities are logits too
            "clusters": jnp.sum(used),
            "overlap": overlap,
            "coverage": covered,
        }

    return jax.lax.map(one, jnp.swapaxes(log_probs, 0, 1))


def refresh(
    h: Heads,
    judged: Callable[[np.ndarray, np.ndarray], dict[str, np.ndarray]],
    state: TrainState,
    targets: Targets,
    rows: Matrix,
    rng: jax.Array,
) -> Refreshed:
    """Selects the head with the lowest loss of its own labels of all images, unless an earlier one had a lower one.

    `judged` is `judge` of embeddings [N, D] and log-probabilities [N, H, K]. Nothing else changes, but that the first
    refresh fits the whitening, if there is to be one, by what it has seen without it, and selects nobody.
    """
    embeddings, logs = parts(h, rows)
    found = judged(embeddings, logs[:, :-1])
    best, selected = int(np.argmin(found["loss"])), state.extra["selected"]
    own, whitening = logs[:, -1], state.extra["whitening"]
    if whitening and not whitening["fitted"]:
        whitening = fitted(h, rows, embeddings.shape[1])
    elif found["loss"][best] < selected["loss"]:
        own = logs[:, best]
        selected = {
            "head": jax.tree.map(lambda leaf: leaf[best], state.params["heads"]),
            "index": np.int32(best),
            "loss": np.float32(found["loss"][best]),
            "drift": state.extra["drift"],
        }
    if state.step and found["clusters"].min() < h.head.dim:
        warn_once(
            f"a head uses fewer than {h.head.dim} clusters (heads/clusters in the metrics): the pool "
            "(config.batch_size) may be too small, or config.cluster.k wrong"
        )
    return Refreshed(
        params=state.params,
        extra=merge(state.extra, selected=selected, whitening=whitening),
        target=np.argmax(own, axis=1).astype(np.int32),
        weight=np.ones(len(own), np.float32),
        ids=np.arange(len(own), dtype=np.int32),
        cluster=np.argmax(own, axis=1).astype(np.int32),
        distance=1 - np.exp(own.max(axis=1)).astype(np.float32),
        metrics={"features/std": spread(embeddings), **_metrics(found, selected)},
    )


def spread(rows: np.ndarray) -> float:
    """Mean over dimensions of the standard deviation of rows [N, D], without a copy of them."""
    squares = np.einsum("nd,nd->d", rows, rows, dtype=np.float64) / len(rows)
    means = rows.mean(axis=0, dtype=np.float64)
    return float(np.sqrt(np.maximum(squares - np.square(means), 0)).mean())


def _metrics(found: dict[str, np.ndarray], selected: dict[str, Any]) -> dict[str, float]:
    return {
        **{f"heads/{name}": float(values.mean()) for name, values in found.items()},
        **{f"heads/loss{i}": float(value) for i, value in enumerate(found["loss"])},
        **{f"heads/clusters{i}": float(value) for i, value in enumerate(found["clusters"])},
        "selected/head": float(selected["index"]),
        "selected/loss": float(selected["loss"]),
    }
