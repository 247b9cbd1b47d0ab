"""How much the maps of an expert differ over the images of a group that it is given (--feat_map_var).

Of each pixel of a layer's map, or of what the experts are given, the deviation over images; then its mean over pixels.
Only images for which the expert was chosen count, and of these only maps that are not all zero. Section 2.9 of our
specification of ClustNet.
"""

import csv
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jaxclust.data.source import Source
from jaxclust.errors import ConfigError, DataError
from jaxclust.features.extract import compile_for
from jaxclust.pictures import Draw, Seen
from jaxclust.pictures._epochs import found as found_in
from jaxclust.pictures._epochs import kept, split_of, states
from jaxclust.pictures._experts import Experts, layers, of_method
from jaxclust.pictures._plots import Bars, bars, save
from jaxclust.report.gallery import Gallery
from jaxclust.train.stage import seen_labels

Array = NDArray[np.float64]

GROUPS = {1: "p", 0: "n"}
STATS = {"std": "standard deviation", "var": "variance"}


def prepare(seen: Seen) -> Draw:
    """ConfigError if there is no such layer; DataError without experts, groups, images or checkpoints."""
    there, number = layers(seen), seen.stage.config.report.map_variance.layer
    if number >= len(there):
        raise ConfigError(
            f"config.report.map_variance.layer={number}: the experts have convolutions: {len(there) - 1}; 0 is what "
            "they are given"
        )
    source = seen.source()
    if groups(seen, source) is None:
        raise DataError("the images have no labels, or the method knows no groups of classes")
    return partial(draw, seen, kept(seen), source, there[number])


def groups(seen: Seen, source: Source) -> NDArray[Any] | None:
    """The group of each image that is pictured, 1: P, 0: N, negative where unknown."""
    stage = seen.stage
    return seen_labels(stage.method, stage.config, stage.info, split_of(seen, source)[1])


def draw(seen: Seen, epochs: Sequence[int], source: Source, layer: str, folder: Path) -> Gallery:
    """p-<layer>.png and n-<layer>.png, a bar for each epoch with a part for each expert, and <layer>.csv."""
    name, split = split_of(seen, source)
    stat, group = seen.stage.config.report.map_variance.stat, groups(seen, source)
    assert group is not None
    program = compile_for(partial(chosen_maps, of_method(seen), layer), seen.stage.mesh)
    k = seen.stage.method.num_clusters or 0
    found = {e: spread(found_in(seen, state, program, split, e), group, k, stat) for e, state in states(seen, epochs)}
    write(folder / f"{layer}.csv", found)
    top = 1.05 * max(float(np.nansum(of[g], axis=0)) for of in found.values() for g in GROUPS) or 1.0
    images = []
    for g, letter in GROUPS.items():
        heights = np.stack([of[g] for of in found.values()], axis=1)
        title = f"{STATS[stat]} of {layer} over images of {letter.upper()}, mean over pixels"
        plot = Bars(title, heights, [f"expert {i}" for i in range(k)], [*map(str, found)], True, (0, top))
        images.append(save(partial(bars, [plot]), folder, f"{letter}-{layer}"))
    caption = (
        f"Of the {name} images for which an expert was chosen; of an expert with fewer than two of the group there is "
        "no part."
    )
    return Gallery("Variance of the experts' maps", caption, images)


def chosen_maps(experts: Experts, layer: str, params: Any, extra: Any, images: jax.Array) -> dict[str, jax.Array]:
    """The likeliest expert of each image [B], and its map [B, ...]."""
    found = experts(params, extra, images)
    expert = jnp.argmax(found["choice"], axis=1)
    return {"expert": expert, "map": found[layer][jnp.arange(len(expert)), expert]}


def spread(batches: Iterable[Mapping[str, NDArray[Any]]], group: NDArray[Any], k: int, stat: str) -> dict[int, Array]:
    """The mean over pixels of the deviation (n - 1) over images, for each group of each expert: {group: [K]}.

    NaN where fewer than two maps are not all zero. Means and sums of squares are added up batch after batch (Chan,
    Golub, LeVeque 1983), so that no two maps are kept.
    """
    sums: dict[tuple[int, int], tuple[int, Array, Array]] = {}
    start = 0
    for batch in batches:
        maps = batch["map"].reshape(len(batch["map"]), -1).astype(np.float64)
        of_batch = group[start : start + len(maps)]
        start += len(maps)
        for expert in range(k):
            for g in GROUPS:
                members = maps[(batch["expert"] == expert) & (of_batch == g) & maps.any(axis=1)]
                sums[g, expert] = _added(sums.get((g, expert)), members)
    return {g: np.array([_deviation(sums[g, expert], stat) for expert in range(k)]) for g in GROUPS}


def _added(before: tuple[int, Array, Array] | None, rows: Array) -> tuple[int, Array, Array]:
    """(count, mean, sum of squares around it) of the rows before and these [n, D]."""
    zero = np.zeros(rows.shape[1])
    m, mean, squares = before or (0, zero, zero)
    if not len(rows):
        return m, mean, squares
    n, own = len(rows), rows.mean(axis=0)
    shift = own - mean
    squares = squares + np.square(rows - own).sum(axis=0) + np.square(shift) * m * n / (m + n)
    return m + n, mean + shift * n / (m + n), squares


def _deviation(found: tuple[int, Array, Array], stat: str) -> float:
    count, _, squares = found
    if count < 2:
        return float("nan")
    variance = squares / (count - 1)
    return float((np.sqrt(variance) if stat == "std" else variance).mean())


def write(path: Path, found: Mapping[int, Mapping[int, Array]]) -> None:
    """A row for each epoch, group and expert; empty where it has fewer than two maps."""
    with path.open("w", newline="", encoding="utf-8") as table:
        writer = csv.writer(table)
        writer.writerow(("epoch", "group", "expert", "value"))
        for epoch, of_epoch in found.items():
            for g, letter in GROUPS.items():
                for expert, value in enumerate(of_epoch[g].tolist()):
                    writer.writerow((epoch, letter, expert, "" if np.isnan(value) else f"{value:.8g}"))
