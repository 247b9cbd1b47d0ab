"""Stanford Cars (Krause et al. 2013) as it is distributed: `cars_annos.mat` beside `car_ims/`.

For retrieval of classes that were never seen, the classes 1 to 98 are trained on and 99 to 196 are the test; the
official train and test flags are of another task and are not looked at.
"""

import logging
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from scipy.io import loadmat
from scipy.io.matlab import MatReadError

from jaxclust.data.decode import Box
from jaxclust.data.listed import Row, make_source
from jaxclust.data.split import Source
from jaxclust.errors import ConfigError, DataError

TRAIN_CLASSES = "first:98"  # unless config.data.train_classes says otherwise

TABLE = "cars_annos.mat"
IMAGES, CLASSES = 16_185, 196
PARTS = (8_054, 8_131)  # images of the first 98 classes, and of the others
FIELDS = ("relative_im_path", "bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class")

_logger = logging.getLogger(__name__)


def read(where: str, settings: ConfigDict) -> Source:
    """All images with their classes and boxes, as one split; ids are in the order of the table.

    A table of another size than the official one is taken as it is, and said to be one.
    """
    if not where:
        raise ConfigError("config.data.source='cars196' names no folder; write 'cars196:DIR'")
    root = Path(where).expanduser()
    table = root / TABLE
    if not table.is_file():
        raise DataError(f"{str(root)!r} has no {TABLE}; expected is the official layout, {TABLE} beside car_ims/")
    annotations, names = _load(table)
    classes = np.array([int(row["class"]) for row in annotations]) - 1  # they count from 1
    _check(table, classes, len(names))
    rows = [
        Row(str(row["relative_im_path"]), int(label), Box(*(int(row[name]) for name in FIELDS[1:5])))
        for row, label in zip(annotations, classes, strict=True)
    ]
    return make_source(table, root, rows, names, settings)._replace(name="cars196")


def _load(table: Path) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    """The annotations and the names of the classes."""
    try:
        content = loadmat(table, simplify_cells=True)
    except (OSError, ValueError, TypeError, MatReadError, NotImplementedError) as error:
        raise DataError(f"{table}: cannot be read as a MATLAB file: {error}") from error
    annotations, names = content.get("annotations"), content.get("class_names", [])
    annotations = np.atleast_1d(np.asarray(annotations, dtype=object)).tolist()  # a single one is no list
    if not annotations or not all(isinstance(row, dict) and {*FIELDS} <= {*row} for row in annotations):
        raise DataError(f"{table}: has no structs 'annotations' with the fields {', '.join(FIELDS)}")
    highest = max(int(row["class"]) for row in annotations)
    named = [str(name).strip() for name in np.atleast_1d(names)]
    return annotations, tuple(named or map(str, range(1, highest + 1)))


def _check(table: Path, classes: np.ndarray, named: int) -> None:
    """DataError if a class does not exist or `check_counts` finds the table to be another."""
    wrong = np.flatnonzero((classes < 0) | (classes >= named))
    if len(wrong):
        raise DataError(f"{table}: image {wrong[0] + 1} is of class {classes[wrong[0]] + 1}; there are 1 to {named}")
    if len(classes) != IMAGES:
        _logger.warning(
            "%s lists %d images of %d classes, and the official one 16,185 of 196: it is taken as it is",
            table, len(classes), len(np.unique(classes)),
        )  # fmt: skip
    check_counts(table, classes)


def check_counts(place: object, classes: np.ndarray) -> None:
    """DataError if these classes, from 0 on, are of as many images as there are officially, and not the official
    ones."""
    if len(classes) != IMAGES:
        return
    found = len(np.unique(classes))
    parts = int((classes < 98).sum()), int((classes >= 98).sum())
    if parts != PARTS or found != CLASSES:
        raise DataError(
            f"{place}: of its {found} classes the first 98 have {parts[0]:,} images and the others {parts[1]:,}; "
            f"of the official 196 they have {PARTS[0]:,} and {PARTS[1]:,}"
        )
