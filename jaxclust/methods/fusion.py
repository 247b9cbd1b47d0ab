"""Where UAD clusters images: low maps, pooled, beside the high feature (UAD, sections 2.1 and 2.2).

A row is [l, h]: l of the pooled maps of `low_layers`, h the feature. Blocks are normalised, weighted by sqrt(beta) and
sqrt(1 - beta), and reduced together or each on its own. What depends on the row alone is done on the device; what
depends on all rows is a scale and PCA-whitenings, fitted anew in every round.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxclust import hosts, models
from jaxclust.cluster import Points, reduce
from jaxclust.cluster.reduce import Matrix, Whitening
from jaxclust.errors import ConfigError
from jaxclust.methods import classifier
from jaxclust.methods.base import DataInfo
from jaxclust.methods.classifier import Classifier, Extra, Params
from jaxclust.methods.deepcluster import Space
from jaxclust.models.layers import adaptive_mean, cells
from jaxclust.ops.distances import normalize, whiten


class Blocks(NamedTuple):
    """What is fitted: rows [D] times `scale`, less the mean, times the projection; one whitening for each part."""

    scale: Any  # float32 [D]
    parts: tuple[Whitening, ...]


class Reduction(NamedTuple):
    """How fitted rows become points: `kind` is `fusion_pca`, `beta` the share of the low block."""

    kind: str
    beta: float
    l2: bool


class Columns:
    """The columns `start` to `end` of rows [N, D], times `scale` [D]."""

    def __init__(self, rows: Matrix, scale: np.ndarray, start: int, end: int):
        self.shape = (rows.shape[0], end - start)
        self._rows, self._scale, self._part = rows, scale[start:end], slice(start, end)

    def chunks(self) -> Iterator[np.ndarray]:
        """This host's rows."""
        for chunk in self._rows.chunks():
            yield chunk[:, self._part] * self._scale


def space(config: ConfigDict, c: Classifier, info: DataInfo) -> Space:
    """The fused space of `config.uad`; ConfigError if the network has no such layer, or no dimension is left."""
    u, total = config.uad, config.cluster.pca_dim
    if u.fusion_pca == "per_block" and 0 < total <= u.low_dim:
        raise ConfigError(
            f"config.uad.low_dim={u.low_dim} leaves the feature nothing of config.cluster.pca_dim={total}; choose "
            f"fewer, such as {max(1, total // 4)}"
        )
    layers = models.low_layers(config, info.image_shape)
    return Space(
        look=partial(look, u, layers, c),
        first=partial(first, config),
        fit=partial(fit, config),
        project=partial(project, reduction(config)),
    )


def reduction(config: ConfigDict) -> Reduction:
    """The reduction of `config.uad`."""
    return Reduction(config.uad.fusion_pca, config.uad.low_weight, config.cluster.l2)


def look(u: ConfigDict, layers: tuple[str, ...], c: Classifier, params: Params, extra: Extra, images: jax.Array) -> Any:
    """[l, h] of each image, float32 [B, D]; with `fusion_norm` "l2" each a unit vector."""
    maps = classifier.embed(c, params, extra, images, (*layers, "feature"))
    low, high = low_vector([maps[name] for name in layers], u.low_grid, u.low_pool), maps["feature"]
    if u.fusion_norm == "l2":
        low, high = normalize(low), normalize(high)
    return jnp.concatenate([low, high], axis=1)


def low_vector(maps: list[jax.Array], grid: int, kind: str) -> jax.Array:
    """Each map pooled, unit length and divided by sqrt(number of maps), side by side: a unit vector [B, d_l]."""
    parts = [normalize(pooled(x, grid, kind)) / len(maps) ** 0.5 for x in maps]
    return jnp.concatenate(parts, axis=1)


def pooled(x: jax.Array, grid: int, kind: str) -> jax.Array:
    """[B, H, W, C] over `grid` x `grid` cells, channel by channel: [B, C grid^2], twice that for "avgstd"."""
    if kind == "max":
        rows, columns = (cells(size, grid) > 0 for size in x.shape[1:3])
        cell = [
            [x[:, np.flatnonzero(row)][:, :, np.flatnonzero(column)].max(axis=(1, 2)) for column in columns]
            for row in rows
        ]
        return _by_channel(jnp.stack([jnp.stack(line, axis=1) for line in cell], axis=1))
    mean = adaptive_mean(x, grid)
    if kind == "avg":
        return _by_channel(mean)
    spread = jnp.sqrt(jnp.maximum(adaptive_mean(x * x, grid) - mean * mean, 0))
    return jnp.concatenate([_by_channel(mean), _by_channel(spread)], axis=1)


def _by_channel(x: jax.Array) -> jax.Array:
    return jnp.moveaxis(x, -1, 1).reshape(len(x), -1)


def first(config: ConfigDict, size: int, width: int, high: int) -> Blocks:
    """What `fit` makes of [size, width] rows with features of length `high`, before there are any."""
    spans, dims = _spans(config, width, high)
    kept = (reduce.reduced_dim(size, end - start, dim) for (start, end), dim in zip(spans, dims, strict=True))
    parts = (
        Whitening(jnp.zeros(end - start, jnp.float32), jnp.zeros((end - start, dim), jnp.float32))
        for (start, end), dim in zip(spans, kept, strict=True)
    )
    return Blocks(jnp.ones(width, jnp.float32), tuple(parts))


def fit(config: ConfigDict, rows: Matrix, high: int) -> tuple[Blocks, Points, dict[str, float]]:
    """Scale and whitenings of rows [N, D] whose last `high` columns are the feature; and the points they give."""
    c, u, width = config.cluster, config.uad, rows.shape[1]
    spans, dims = _spans(config, width, high)
    weights = np.ones(2) if u.fusion_pca == "per_block" else np.sqrt([u.low_weight, 1 - u.low_weight])
    if u.fusion_norm == "standard":
        weights = weights / np.sqrt(np.maximum(_variances(rows, width - high), 1e-12))
    scale = np.repeat(weights, (width - high, high)).astype(np.float32)
    power = c.whiten_power if c.whiten else 0.0
    fitted = [reduce.fit(Columns(rows, scale, *span), dim, power=power) for span, dim in zip(spans, dims, strict=True)]
    blocks = Blocks(scale, tuple(whitening for whitening, _ in fitted))
    points, zero_rows = reduce.mapped(rows, partial(_project, reduction(config), jax.device_put(blocks)))
    metrics = {"features/zero_rows": float(zero_rows), "features/low_share": _low_share(blocks, width - high)}
    kept = {f"features/kept_variance{i or ''}": info["variance"] for i, (_, info) in enumerate(fitted)}
    return blocks, points, metrics | kept


def project(how: Reduction, blocks: Blocks, x: jax.Array) -> jax.Array:
    """Rows [B, D] in the space where they are clustered, [B, d]."""
    x = x * blocks.scale
    if how.kind == "none":
        return x
    if how.kind == "joint":
        return whiten(x, *blocks.parts[0], how.l2)
    low, high = blocks.parts
    split = len(low.mean)
    parts = whiten(x[:, :split], *low, True), whiten(x[:, split:], *high, True)
    return jnp.concatenate([how.beta**0.5 * parts[0], (1 - how.beta) ** 0.5 * parts[1]], axis=1)


_project = jax.jit(project, static_argnums=0)


def _spans(config: ConfigDict, width: int, high: int) -> tuple[list[tuple[int, int]], list[int]]:
    """Columns of each part that is reduced, and the dimensions it keeps."""
    total, low, u = config.cluster.pca_dim, width - high, config.uad
    if u.fusion_pca == "none":
        return [], []
    if u.fusion_pca == "joint":
        return [(0, width)], [total]
    return [(0, low), (low, width)], [u.low_dim, total - u.low_dim if total else 0]


def _variances(rows: Matrix, split: int) -> np.ndarray:
    """Total variance of the columns before and from `split` on, float64 [2], over all hosts."""
    width = rows.shape[1]
    sums, squares = np.zeros(width), np.zeros(width)
    for chunk in rows.chunks():
        sums += chunk.sum(axis=0, dtype=np.float64)
        squares += np.square(chunk, dtype=np.float64).sum(axis=0)
    mean, square = hosts.total(np.stack([sums, squares])) / rows.shape[0]
    variance = np.maximum(square - mean * mean, 0)
    return np.array([variance[:split].sum(), variance[split:].sum()])


def _low_share(blocks: Blocks, low: int) -> float:
    """Share of the kept directions that lies in the low block, from 0 to 1."""
    if not blocks.parts:
        return float(np.square(blocks.scale[:low]).sum() / np.square(blocks.scale).sum())
    if len(blocks.parts) == 2:
        low_dim, high_dim = (part.projection.shape[1] for part in blocks.parts)
        return low_dim / (low_dim + high_dim)
    loadings = np.square(blocks.parts[0].projection)
    return float((loadings[:low].sum(axis=0) / np.maximum(loadings.sum(axis=0), 1e-30)).mean())
