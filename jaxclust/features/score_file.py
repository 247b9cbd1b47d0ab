"""Files of scores, one for each epoch: what ClustNet says of each image beside its class (section 2.8 of our
specification).

A line is a class, its group (1 for P, 0 for N; -1 where unknown), ln P of N and of P, and the gate's probabilities
before it chooses an expert. `FOLDER` in a workdir holds epoch0.csv (the new network), epoch1.csv, … of the test images,
or where there are none of the training images, and epoch1_train.csv, … of those trained on, as they were then.
"""

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from jaxclust.errors import DataError
from jaxclust.files import replacing

FOLDER = "scores"
DIGITS = "%.9g"  # which float32 survives
HEADER = re.compile(r"#origTarg,targ,pred\[2\],clust\[(\d+)\](,sampleIdx)?")
TOLERANCE = 1e-2  # of sums of probabilities, which bfloat16 rounds


class Scores(NamedTuple):
    """The lines of a file, in its order."""

    label: NDArray[np.int32]  # [N]
    group: NDArray[np.int32]  # [N]
    log_probs: NDArray[np.float64]  # [N, 2]: of N, of P
    gate: NDArray[np.float64]  # [N, K]
    id: NDArray[np.int32] | None = None  # [N], if the file has it

    @property
    def binary(self) -> NDArray[np.int64]:
        """The likelier group, [N]."""
        return self.log_probs.argmax(axis=1)

    @property
    def expert(self) -> NDArray[np.int64]:
        """The likeliest expert, [N]."""
        return self.gate.argmax(axis=1)


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


def read(path: Path, rows: int = 0, where: str = "") -> Scores:
    """Reads a file; DataError says what is wrong with it, also if it has not so many `rows` (0: any), as is known
    from `where`."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DataError(f"cannot be read: {error}") from None
    first, _, body = text.partition("\n")
    met = HEADER.fullmatch(first.strip())
    if met is None:
        raise DataError(f"begins with {first[:60]!r}, not with #origTarg,targ,pred[2],clust[K]")
    if not body.endswith("\n"):
        raise DataError("ends in the middle of a line" if body else "has no row")
    if rows and body.count("\n") != rows:
        raise DataError(f"has {body.count(chr(10)):,} rows, {where}")
    try:
        table = np.loadtxt(body.splitlines(), delimiter=",", ndmin=2, comments=None)
    except ValueError as error:
        raise DataError(f"is damaged: {error}") from None
    k = int(met[1])
    if table.shape[1] != 4 + k + bool(met[2]):
        raise DataError(f"has {table.shape[1]} columns where its first line says {4 + k + bool(met[2])}")
    return _checked(table, k)


def _checked(table: NDArray[np.float64], k: int) -> Scores:
    """The columns of a table [N, 4 + K] or [N, 5 + K]; DataError unless they can be what they are called."""
    whole = table[:, [0, 1, *range(4 + k, table.shape[1])]]
    sums = np.stack([np.exp(table[:, 2:4]).sum(axis=1), table[:, 4 : 4 + k].sum(axis=1)])
    wrong = (
        ~np.isfinite(table).all(axis=1)
        | ((whole != np.round(whole)) | (np.abs(whole) >= 2**31)).any(axis=1)
        | (table[:, 1] > 1)
    )
    wrong |= (np.abs(sums - 1) > TOLERANCE).any(axis=0) | (table[:, 4 : 4 + k] < 0).any(axis=1)
    if wrong.any():
        raise DataError(
            f"is damaged: line {int(wrong.argmax()) + 2} needs whole class numbers, and probabilities that add up to 1"
        )
    ids = table[:, 4 + k].astype(np.int32) if table.shape[1] > 4 + k else None
    label, group = table[:, :2].astype(np.int32).T
    return Scores(label, group, table[:, 2:4], table[:, 4 : 4 + k], ids)
