"""Files of scores, one for each epoch: what ClustNet says of each image beside its class (section 2.8 of our
specification).

A line is a class, its group (1 for P, 0 for N; -1 where unknown), ln P of N and of P, and the gate's probabilities
before it chooses an expert. `FOLDER` in a workdir holds epoch0.csv (the new network), epoch1.csv, … of the test images,
or where there are none of the training images, and epoch1_train.csv, … of those trained on, as they were then.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from jaxclust.errors import DataError
from jaxclust.files import replacing

FOLDER = "scores"
DIGITS = "%.9g"  # which float32 survives


class Scores(NamedTuple):
    """The lines of a file, in its order."""

    label: NDArray[np.int32]  # [N]
    group: NDArray[np.int32]  # [N]
    log_probs: NDArray[np.float64]  # [N, 2]: of N, of P
    gate: NDArray[np.float64]  # [N, K]
    id: NDArray[np.int32] | None = None  # [N], if the file has it


def path_of(workdir: Path, epoch: int, train: bool = False) -> Path:
    """The file of an epoch, from 0."""
    return workdir / FOLDER / f"epoch{epoch}{'_train' if train else ''}.csv"


def header(k: int, with_id: bool = False) -> str:
    """The first line of a file of `k` experts."""
    return f"#origTarg,targ,pred[2],clust[{k}]{',sampleIdx' if with_id else ''}"


def write(path: Path, scores: Scores) -> None:
    """Writes a file, whole or not at all."""
    k = scores.gate.shape[1]
    columns = [scores.label[:, None], scores.group[:, None], scores.log_probs, scores.gate]
    kinds = ["%d", "%d", *[DIGITS] * (2 + k)]
    if scores.id is not None:
        columns, kinds = [*columns, scores.id[:, None]], [*kinds, "%d"]
    table = np.concatenate([np.asarray(column, np.float64) for column in columns], axis=1)
    with replacing(path) as temporary:
        np.savetxt(temporary, table, kinds, ",", header=header(k, scores.id is not None), comments="")


def read(path: Path) -> Scores:
    """Reads what `write` wrote; DataError names a file that is damaged, and what is wrong with it."""
    try:
        first, *lines = path.read_text(encoding="utf-8").splitlines() or [""]
        table = np.loadtxt(lines or ["0"], np.float64, delimiter=",", ndmin=2)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    with_id = first.endswith(",sampleIdx")
    k = table.shape[1] - 4 - with_id
    if k < 1 or first != header(k, with_id):
        raise DataError(f"{path} is no file of scores: its first line is {first[:80]!r}, of {table.shape[1]} columns")
    label, group = table[:, :2].astype(np.int32).T
    gate, log_probs = table[:, 4 : 4 + k], table[:, 2:4]
    sums = np.stack([gate.sum(axis=1), np.exp(log_probs).sum(axis=1)])
    if not np.allclose(sums, 1, atol=1e-3):
        line = int(np.flatnonzero(~np.isclose(sums, 1, atol=1e-3).all(axis=0))[0]) + 2
        raise DataError(f"{path}: the probabilities of line {line} do not add up to 1")
    return Scores(label, group, log_probs, gate, table[:, -1].astype(np.int32) if with_id else None)
