"""Prototypes of clusters: the mean feature of the images that each cluster is surest of, and the images near to it.

Niu, Shan, Wang, "SPICE", arXiv 2103.09382; steps 6.2.1 to 6.2.3 of our specification, on all training images.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from numpy.typing import NDArray

from jaxclust.data.source import Source, Split
from jaxclust.errors import DataError
from jaxclust.evaluation import clustering
from jaxclust.features.extract import Program, compile_for, extract
from jaxclust.ops import prototypes
from jaxclust.ops.distances import normalize
from jaxclust.ops.prototypes import Rule
from jaxclust.pictures import Seen
from jaxclust.report import figures
from jaxclust.report.gallery import Shown

ROWS = 25  # clusters on a sheet
COLUMNS = 10


class Prototypes(NamedTuple):
    """The prototypes [K, D], the ids [K, n] of the images most similar to each, and the cluster of each image [N]."""

    centre: NDArray[np.float32]
    ids: NDArray[np.int32]
    cluster: NDArray[np.int32]


def source_of(seen: Seen) -> Source:
    """The images; DataError if there are none, or the method does not say how probable each cluster is."""
    stage, predict, shape = seen.stage, seen.stage.method.predict, seen.stage.info.image_shape
    if len(shape) != 3:
        raise DataError("the run is on vectors, of which there are no images to show")
    images = jax.ShapeDtypeStruct((1, *shape), "uint8")
    said = jax.eval_shape(predict, stage.shapes.params, stage.shapes.extra, images) if predict else {}
    if "log_probs" not in said:
        raise DataError(
            f"method {stage.config.method!r} of stage {stage.name!r} does not predict how probable each cluster is, "
            "which prototypes are made of; another stage may: config.report.stage"
        )
    source = seen.source()
    size, k = source.splits["train"].size, said["log_probs"].shape[1]
    if _top(seen, size, k) < 1:
        raise DataError(f"{size} images for {k} clusters leave a prototype without an image")
    return source


def _top(seen: Seen, size: int, k: int) -> int:
    return int(prototypes.sizes(size, k, seen.stage.config.spice.center_ratio, [1.0])[0, 0])


def find(seen: Seen, split: Split, embed: Program, count: int, folder: Path) -> Prototypes:
    """Prototypes of the rows that `embed` makes of images, at unit length, and the `count` nearest images of each."""
    stage, state = seen.stage, seen.state
    predict = stage.method.predict
    assert predict is not None

    def program(params: Any, extra: Any, images: jax.Array) -> dict[str, jax.Array]:
        said = predict(params, extra, images)
        rows = normalize(embed(params, extra, images))
        return {"rows": rows, "log_probs": said["log_probs"], "cluster": said["cluster"]}

    compiled = compile_for(program, stage.mesh)
    found = extract(compiled, state.params, state.extra, split, stage.config, stage.mesh, folder, "prototypes")
    rows, logs = found["rows"].array(), found["log_probs"].array()
    rule = Rule(_top(seen, *logs.shape), min(count, split.size))
    centre, nearest = jax.device_get(_chosen(rows, logs, rule))
    return Prototypes(centre, nearest.reshape(len(centre), -1), found["cluster"].array())


@partial(jax.jit, static_argnums=2)
def _chosen(rows: jax.Array, logs: jax.Array, rule: Rule) -> tuple[jax.Array, jax.Array]:
    return prototypes.centres(rows, logs, rule, rule.top), prototypes.pseudo_labels(rows, logs, rule).image


def names_of(cluster: NDArray[np.int32], split: Split, classes: Sequence[str]) -> dict[int, str]:
    """The class that each cluster stands for, where labels are known."""
    known = np.zeros(split.size, bool) if split.labels is None else split.labels >= 0
    if split.labels is None or not known.any():
        return {}
    return {c: classes[label] for c, label in clustering.match(cluster[known], split.labels[known]).items()}


def sheets(
    images: Iterator[NDArray[np.uint8]], found: Prototypes, names: dict[int, str], note: str, folder: Path, stem: str
) -> list[Shown]:
    """<stem>.png, for many clusters also <stem>-2.png and so on; a row has the `images` [n, H, W, C] of a cluster."""
    k = len(found.ids)
    shares = np.bincount(found.cluster, minlength=k) / len(found.cluster)
    shown = []
    for number, first in enumerate(range(0, k, ROWS), 1):
        clusters = range(first, min(first + ROWS, k))
        rows = [
            figures.Row(
                next(images), f"cluster {c}", figures.printable(names.get(c, ""), 11), f"{shares[c]:.1%} of the images",
                shares[c],
            )
            for c in clusters
        ]  # fmt: skip
        title = f"clusters {clusters[0]} to {clusters[-1]}" if k > ROWS else f"{k} clusters"
        name = stem if number == 1 else f"{stem}-{number}"
        for suffix, theme in (("", figures.LIGHT), ("-dark", figures.DARK)):
            figures.save(figures.overview(rows, title, COLUMNS, note, theme), folder / f"{name}{suffix}.png")
        shown.append(Shown(f"{name}.png", title if k > ROWS else "", "", f"{name}-dark.png"))
    return shown
