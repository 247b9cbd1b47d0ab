"""Which experts the classes of each group are given to, P and N by themselves and all classes, as matrices of an epoch.

Sections 1.1, 2.7 and 2.8 of our specification of ClustNet.
"""

import csv
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from jaxclust.errors import DataError
from jaxclust.evaluation import clustering, groups
from jaxclust.features.score_file import Scores
from jaxclust.pictures import Draw
from jaxclust.pictures._plots import save
from jaxclust.report import experiment, figures
from jaxclust.report.experiment import Net
from jaxclust.report.gallery import Gallery

COLUMN = "expert, in the order of its class"
ALL = f"{COLUMN} of P"


class Matrix(NamedTuple):
    """Counts [K, classes] of a group's images, rows in the order of the classes that their experts stand for."""

    counts: NDArray[np.int64]
    experts: list[int]  # of the rows
    classes: list[int]  # of the columns

    @property
    def shares(self) -> NDArray[np.float64]:
        """Where the images of each class go: columns add up to 1, those of a class without images are zero."""
        return self.counts / np.maximum(self.counts.sum(axis=0), 1)


def read(net: Net) -> Draw:
    """DataError where the net has no scores."""
    if not experiment.files(net.workdir, experiment.of_split(net.config)):
        raise DataError(experiment.missing(net))
    return partial(draw, net)


def draw(net: Net, folder: Path) -> Gallery:
    """p-, n- and all-epoch<e>.png, and the counts as CSV files; by default of the last epoch."""
    both = groups.judged(net.config)

    def matrices(_: int, scores: Scores) -> list[Matrix]:
        return [matrix(experiment.labelled(scores), of) for of in both]

    found, skipped = experiment.of_epochs(net, matrices, last=True)
    images = []
    for epoch, (p, n) in found.items():
        shown = {"p": ("P", p, COLUMN), "n": ("N", n, COLUMN), "all": ("all classes", beside(p, n), ALL)}
        for short, (what, of, words) in shown.items():
            name, title = f"{short}-epoch{epoch}", f"{what}, epoch {epoch}"
            write(folder / f"{name}.csv", of)
            images.append(save(partial(_figure, of, title, words), folder, name, title))
    caption = (
        f"Of the classes of P and of N, by the files of {experiment.of_split(net.config)} in scores/: columns add up "
        "to 1, experts are in the order of the class that they stand for under the best pairing within the group; "
        "all: those of P beside those of N, in the order of P."
    )
    return Gallery("Experts against the classes of each group", caption, images, skipped=skipped)


def matrix(scores: Scores, classes: Sequence[int]) -> Matrix:
    """Images of `classes` by expert and class, pairs on the diagonal; where there are fewer experts, classes that none
    stands for come last, else their places go to experts that stand for no class.
    """
    k, classes = scores.gate.shape[1], sorted(classes)
    of = np.isin(scores.label, classes)
    counts = np.zeros((k, len(classes)), np.int64)
    np.add.at(counts, (scores.expert[of], np.searchsorted(classes, scores.label[of])), 1)
    rows, columns = clustering.pair(counts)
    partner = dict(zip(columns.tolist(), rows.tolist(), strict=True))
    places = sorted(range(len(classes)), key=lambda column: k < len(classes) and column not in partner)
    left = iter([expert for expert in range(k) if expert not in rows])
    order = [partner[column] if column in partner else next(left) for column in places[:k]]
    order += left
    return Matrix(counts[order][:, places], order, [classes[column] for column in places])


def beside(p: Matrix, n: Matrix) -> Matrix:
    """All classes: the columns of P, then those of N, with the rows of P."""
    rows = [n.experts.index(expert) for expert in p.experts]
    return Matrix(np.hstack([p.counts, n.counts[rows]]), p.experts, p.classes + n.classes)


def _figure(of: Matrix, title: str, words: str, theme: figures.Theme) -> figures.Figure:
    names = [str(label) for label in of.classes]
    return figures.confusion(of.counts, of.experts, names, theme, of.shares, (title, words))


def write(path: Path, of: Matrix) -> None:
    """A row for each expert: expert, and how many images of each class it is given."""
    with path.open("w", newline="", encoding="utf-8") as table:
        writer = csv.writer(table)
        writer.writerow(("expert", *of.classes))
        writer.writerows((expert, *row) for expert, row in zip(of.experts, of.counts.tolist(), strict=True))
