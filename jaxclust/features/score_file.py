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
