"""How sure a gate is of its choice: each image's probabilities of the experts from the largest down (--cludis).

Section 2.9 of our specification of ClustNet.
"""

import csv
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from jaxclust.errors import DataError
from jaxclust.pictures import Draw
from jaxclust.pictures._plots import Bars, bars, save
from jaxclust.report import experiment
from jaxclust.report.experiment import Net
from jaxclust.report.gallery import Gallery

Array = NDArray[np.float64]


def read(net: Net) -> Draw:
    """DataError where the net has no scores."""
    if not experiment.files(net.workdir, experiment.of_split(net.config)):
        raise DataError(experiment.missing(net))
    return partial(draw, net)


def draw(net: Net, folder: Path) -> Gallery:
    """certainty.png, a bar for each epoch, and certainty.csv."""
    found, skipped = experiment.of_epochs(net, lambda _, scores: ranked(scores.gate))
    write(folder / "certainty.csv", found)
    heights = np.stack(list(found.values()), axis=1)
    series = ["the largest", *(f"number {rank}" for rank in range(2, len(heights) + 1))]
    plot = Bars("probability of an image's experts, largest first", heights, series, [*map(str, found)], True, (0, 1))
    caption = (
        f"Means over images, by the files of {experiment.of_split(net.config)} in scores/. A gate that is sure of "
        f"every image has a first bar of 1, one that knows nothing {len(heights)} equal ones."
    )
    shown = save(partial(bars, [plot]), folder, "certainty")
    return Gallery("Certainty of the gate", caption, [shown], skipped=skipped)


def ranked(gate: Array) -> Array:
    """The mean over images of probabilities [N, K] from the largest down: [K]."""
    falling: Array = np.sort(gate, axis=1)[:, ::-1].mean(axis=0)
    return falling


def write(path: Path, found: Mapping[int, Array]) -> None:
    """A row for each epoch: epoch, and the means from the largest down."""
    with path.open("w", newline="", encoding="utf-8") as table:
        writer = csv.writer(table)
        writer.writerow(("epoch", *(f"rank{rank}" for rank in range(1, len(next(iter(found.values()))) + 1))))
        writer.writerows((epoch, *(f"{p:.8g}" for p in means)) for epoch, means in found.items())
