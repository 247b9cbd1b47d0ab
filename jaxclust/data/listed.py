"""Images that an annotation table lists: a path each, and if known a class, a box and a split."""

import logging
import operator
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from jaxclust.data.decode import Box, Header, scan
from jaxclust.data.image_files import Files, Skips, make_splits, scan_parts
from jaxclust.data.listing import HELD_OUT
from jaxclust.data.numbering import say_renumbered
from jaxclust.data.split import Source
from jaxclust.errors import ConfigError, DataError
from jaxclust.hints import did_you_mean

_logger = logging.getLogger(__name__)


class Row(NamedTuple):
    """One image: its file, relative to the folder of the table, its class (negative: unknown), what of it is meant
    (None: all), and the name of its split."""

    path: str
    label: int = -1
    box: Box | None = None
    split: str = "train"


def make_source(
    table: Path, root: Path, rows: Sequence[Row], class_names: tuple[str, ...] | None, settings: ConfigDict
) -> Source:
    """A source of the images that `table` lists in `rows`, whose files are below `root`; ids are in its order.

    What cannot be read, and an image whose box lies outside of it, is skipped and named. Of the splits test, val and
    validation the first that is there is "test"; others are used where `data.train` asks for them.
    """
    skips = Skips(str(table), settings.max_skipped)
    splits = {name: [row for row in rows if row.split == own] for name, own in _splits(table, rows, settings).items()}
    found = [_scan(root, name, own, settings, skips) for name, own in splits.items()]
    made = make_splits(found, settings, skips)
    if "train" not in made:
        skipped = f"; {len(skips.files)} cannot be used:\n{skips.first()}" if skips.files else ""
        raise DataError(f"{table}: lists no images to train on{skipped}")
    return Source(table.stem, made, class_names, skips.files)


def _splits(table: Path, rows: Sequence[Row], settings: ConfigDict) -> Mapping[str, str]:
    """The table's name of each split that is used."""
    there = dict.fromkeys(row.split for row in rows)
    if "train" not in there:
        raise DataError(f"{table}: no row is of the split 'train', only of {', '.join(there) or 'none'}")
    held_out = next((name for name in HELD_OUT if name in there), None)
    used = {"train": "train"} | ({"test": held_out} if held_out else {})
    for name in settings.train.split("+"):
        if name not in used and name not in there:
            hint = did_you_mean(name, there)
            raise ConfigError(f"config.data.train: {table} has no split {name!r}{hint} There is: {', '.join(there)}.")
        used.setdefault(name, name)
    if left := sum(row.split not in used.values() for row in rows):
        _logger.warning("%d images of other splits than %s are left out", left, " and ".join(used.values()))
    return used


def _scan(root: Path, split: str, rows: Sequence[Row], settings: ConfigDict, skips: Skips) -> Files:
    paths = [os.path.join(root, row.path) for row in rows]

    def one(i: int) -> tuple[Header, Box | None]:
        return scan(paths[i], settings.max_pixels), rows[i].box if settings.box_crop else None

    headers, boxes = scan_parts(split, [row.path for row in rows], one, skips)
    of = list(headers)
    labels = np.array([rows[i].label for i in of], np.int32)
    return Files(
        split,
        [rows[i].path for i in of],
        list(headers.values()),
        lambda id: paths[of[id]],
        labels if (labels >= 0).any() else None,
        boxes,
    )


def number_classes(table: Path, values: Sequence[Any]) -> tuple[list[int], tuple[str, ...] | None]:
    """Classes 0, 1, … of the labels of a table, None where unknown (then -1), and their names.

    Whole numbers are in their order, also those that are written as text; other labels in the order of their text. What
    was renumbered is said.
    """
    numbers = [None if value is None else _whole(value) for value in values]
    if any(number is None and value is not None for number, value in zip(numbers, values, strict=True)):
        texts = [None if value is None else str(value) for value in values]
        names = sorted({text for text in texts if text is not None})
        place = {text: i for i, text in enumerate(names)}
        return [-1 if text is None else place[text] for text in texts], tuple(names)
    order = sorted({number for number in numbers if number is not None})
    say_renumbered(table, order)
    places = {number: i for i, number in enumerate(order)}
    return [-1 if number is None else places[number] for number in numbers], tuple(map(str, order)) or None


def _whole(value: Any) -> int | None:
    """The whole number that a cell is, None if it is none."""
    try:
        number = int(value) if isinstance(value, str) else operator.index(value)
    except (TypeError, ValueError):
        return int(value) if isinstance(value, float) and value.is_integer() else None
    return number
