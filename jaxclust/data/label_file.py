"""Labels of some images, by id, in a file: the cluster log of a stage, or an array that another program left."""

import zipfile
import zlib
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxclust.errors import DataError

UNLABELLED = (-1, -100)  # -100 is what SPICE's published code writes


def read_labels(
    path: Path, size: int, k: int, parts: Sequence[int] = (), fingerprint: Callable[[int], str] | None = None
) -> NDArray[np.int32]:
    """The labels int32 [size] below `k` of an .npy file, or of the array `cluster` of an .npz file; -1: none.

    They may be whole numbers of any dtype; -1 and -100 say that there is none. Where the images are of several splits,
    of sizes `parts`, the file may end after any of them: the images of the others have none. A file that says of which
    images it is must be of these (`fingerprint` of the first so many). DataError on anything else, and if no image has
    a label. Objects are never unpickled.
    """
    labels, of_images = _arrays(path)
    lengths = sorted({*accumulate(parts), size})
    if labels.ndim != 1 or len(labels) not in lengths:
        wanted = " or ".join(f"[{length}]" for length in lengths)
        raise DataError(f"{path}: has labels of shape {labels.shape} for {size} images; they must be {wanted}, by id")
    if fingerprint and of_images and fingerprint(len(labels)) != of_images:
        raise DataError(
            f"{path}: its {len(labels)} labels are of other images than the first ones of this run, or of these in "
            "another order; use labels of a run with the same config.data.source and config.data.train"
        )
    if labels.dtype.kind not in "iuf" or not np.array_equal(labels, np.round(labels)):
        raise DataError(f"{path}: labels must be whole numbers, and these are {labels.dtype} such as {labels[:3]}")
    given = ~np.isin(labels, UNLABELLED)
    wrong = np.flatnonzero(given & ((labels < 0) | (labels >= k)))
    if len(wrong):
        raise DataError(
            f"{path}: image {wrong[0]} has the label {labels[wrong[0]]:g}; it must be below {k} (config.cluster.k), or "
            "-1 or -100 for an image without one"
        )
    if not given.any():
        raise DataError(f"{path}: none of {size} images has a label, and at least one must")
    found = np.full(size, -1, np.int32)
    found[np.flatnonzero(given)] = labels[given]
    return found


def _arrays(path: Path) -> tuple[NDArray[Any], str]:
    """The labels, and the fingerprint of their images if there is one."""
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded, ""
        with loaded:
            if "cluster" not in loaded:
                raise DataError(f"{path}: there is no array 'cluster', only {', '.join(loaded) or 'nothing'}")
            return loaded["cluster"], str(loaded["fingerprint"]) if "fingerprint" in loaded else ""
    except (OSError, EOFError, ValueError, zlib.error, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: cannot be read as labels: {error}") from error
