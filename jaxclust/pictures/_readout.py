"""The spectral read-out of the features of a split: rows of the left singular vectors (DSCL, section 7)."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from jaxclust.cluster import spectral
from jaxclust.data.source import Source
from jaxclust.errors import DataError
from jaxclust.features.extract import extract
from jaxclust.pictures import Seen
from jaxclust.pictures._epochs import split_of


class ReadOut(NamedTuple):
    """Some images of a split with N: their ids [n], rows of U_r of all N [n, r], and labels [n], -1 where unknown."""

    name: str  # of the split
    size: int  # N
    ids: NDArray[np.int64]
    rows: NDArray[np.float64]
    labels: NDArray[np.int64]


def read_out(seen: Seen, source: Source, count: int, folder: Path) -> ReadOut:
    """The read-out of `count` images drawn by the seed; DataError where features span all that there can be."""
    stage, state = seen.stage, seen.state
    name, split = split_of(seen, source)
    of = (split, stage.config, stage.mesh, folder, f"features of {name}")
    features = extract(stage.embed, state.params, state.extra, *of)["features"]
    basis = spectral.fit(features, center=stage.config.evaluate.spectral_center)
    rank = basis.projection.shape[1]
    if split.size <= rank:
        raise DataError(f"{split.size} images of {name} span {rank} dimensions: their read-out tells none from another")
    ids = np.sort(np.random.default_rng((stage.config.seed, 8)).permutation(split.size)[:count])
    start, rows = 0, []
    for chunk in features.chunks():
        own = ids[(ids >= start) & (ids < start + len(chunk))] - start
        rows.append((chunk[own] - basis.mean) @ basis.projection)
        start += len(chunk)
    labels = np.full(len(ids), -1) if split.labels is None else split.labels[ids].astype(np.int64)
    return ReadOut(name, split.size, ids, np.concatenate(rows), labels)
