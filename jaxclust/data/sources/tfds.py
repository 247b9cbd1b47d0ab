"""A data set of TensorFlow Datasets: the prepared one on disk, else downloaded and prepared.

Only records are read here. The images in them are decoded like those of a folder (see `decode`), so
a data set means the same pixels in either form, and single records are read by id, which TFDS' own
pipeline over TFRecords cannot do.
"""

import io
import math
import os
import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
from ml_collections import ConfigDict

from jaxclust.data.decode import Box, Header, Unreadable, scan
from jaxclust.data.image_files import Files, Skips, make_splits, scan_parts
from jaxclust.data.listing import HELD_OUT
from jaxclust.data.records import Records, open_records
from jaxclust.data.sources import cars196
from jaxclust.data.split import Source
from jaxclust.errors import ConfigError, DataError
from jaxclust.hints import did_you_mean
from jaxclust.runtime import tensorflow

NAME = re.compile(r"\w+(/[^:]+)?(:(\*|\d+)\.(\*|\d+)\.(\*|\d+))?")
FILE_NAMES = ("file_name", "filename", "image/filename", "image/file_name")  # what data sets call it
HOSTS, SECONDS = 3, 10.0  # how many hosts are asked, and for how long, before a download begins


COUNTED = {"cars196": cars196.check_counts}  # data sets whose division by class is published with numbers


class Columns(NamedTuple):
    """Names of the features that are read; `classes` are what the numbers in `label` mean."""

    image: str
    label: str | None
    classes: tuple[str, ...]
    file: str | None
    box: str | None


class Record(NamedTuple):
    """One image as it is stored, its class (negative: unknown), the name of its file, if it has one, and its box: the
    top, left, bottom and right of what is meant, as shares of height and width; empty: all of it."""

    image: bytes
    label: int
    file: str
    box: Sequence[float]


def read(where: str, settings: ConfigDict) -> Source:
    """Scans every record, which fixes the ids, and decodes all images if they fit the cache."""
    builder = _builder(where, settings.data_dir)
    place = str(builder.data_dir)
    columns = _columns(builder.info, place, settings.label)
    columns = columns if settings.box_crop else columns._replace(box=None)
    if not builder.is_prepared():
        _prepare(builder, where)
    skips = Skips(place, settings.max_skipped)
    found = []
    for split, own in _splits(builder.info, columns, place, settings.train.split("+")).items():
        records = _records(builder.info, own)
        found.append(_scan(records, split, f"{builder.name}/{own}", columns, settings.max_pixels, skips))
    splits = make_splits(found, settings, skips)
    if "train" not in splits:
        raise DataError(f"{place!r} holds no images to train on; {len(skips.files)} cannot be used:\n{skips.first()}")
    if not columns.file:
        splits = {split: replace(made, paths=None) for split, made in splits.items()}
    labels = [made.labels for made in splits.values() if made.labels is not None]
    if labels and builder.name in COUNTED:
        COUNTED[builder.name](repr(place), np.concatenate(labels))
    labelled = bool(labels)
    return Source(builder.name, splits, columns.classes if labelled else None, skips.files)


# --- finding and preparing a data set


def _builder(where: str, data_dir: str) -> Any:
    """The builder of `where`: of the files on disk, in the newest version if it names none, else of TFDS' own code."""
    if not NAME.fullmatch(where):
        raise ConfigError(
            f"config.data.source='tfds:{where}' names no data set; write tfds:NAME, tfds:NAME/CONFIG or "
            "tfds:NAME/CONFIG:VERSION, with a VERSION such as 3.0.1"
        )
    if "://" in data_dir:
        raise ConfigError(f"config.data.data_dir={data_dir!r} is no folder of this machine; copy the data set to one")
    tensorflow()  # before TFDS imports it
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.constants import DATA_DIR
    from tensorflow_datasets.core.read_only_builder import builder_from_files

    root = Path(data_dir or DATA_DIR).expanduser()
    try:
        return builder_from_files(where, data_dir=root)
    except tfds.core.DatasetNotFoundError:
        pass
    except Exception as error:
        raise DataError(f"data set {where!r} below {root} cannot be opened: {_one_line(error)}") from error
    try:
        return tfds.builder(where, data_dir=root, try_gcs=False)
    except tfds.core.DatasetNotFoundError:
        hint = _hint(where, root, tfds.list_builders(with_community_datasets=False))
        raise ConfigError(
            f"config.data.source='tfds:{where}': neither {root} nor TFDS {tfds.__version__} has this data set{hint}"
        ) from None
    except Exception as error:  # no such configuration or version
        reason = re.split(r"\.\s", str(error).rpartition('}": ')[2])[0]  # between what was called and a long list
        configs = list(tfds.builder_cls(re.split("[/:]", where)[0]).builder_configs)
        there = f"; its configurations are {', '.join(configs)}" if configs else ""
        raise ConfigError(f"config.data.source='tfds:{where}': {reason}{there}") from error


def _hint(where: str, root: Path, builders: list[str]) -> str:
    """What of the same name lies below `root`, else the nearest name."""
    found = [path.parent.relative_to(root) for depth in (2, 3) for path in root.glob("*/" * depth + "features.json")]
    names = {f"{folder.parent.as_posix()}:{folder.name}" for folder in found}
    same = sorted(name for name in names if re.split("[/:]", name)[0] == re.split("[/:]", where)[0])
    if same:
        return f"; there is {', '.join(same)}"
    return did_you_mean(where.partition(":")[0], [*builders, *(name.partition(":")[0] for name in names)])


def _prepare(builder: Any, where: str) -> None:
    """Downloads the data set and writes it to `builder.data_dir`; DataError if that does not succeed."""
    import tensorflow_datasets as tfds

    print(f"tfds:{where} is not yet in {builder.data_dir}: downloading and preparing it", flush=True)
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    try:
        _ask_hosts(builder.url_infos or {})
        with redirect_stdout(io.StringIO()):  # which says the same in its own words
            builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    except Exception as error:
        raise DataError(
            f"data set {where!r} is not in {builder.data_dir} and cannot be prepared: {_one_line(error)}\n"
            f"Where there is a network, run `tfds build {where} --data_dir=DIR`; then set config.data.data_dir to this "
            "DIR or to a copy of it"
        ) from error


def _ask_hosts(urls: Mapping[str, Any]) -> None:
    """ConnectionError if none of the hosts answers: TFDS itself would try again for minutes."""
    import requests

    hosts = [parts for parts in map(urlsplit, urls) if parts.scheme in ("http", "https")]
    asked = list(dict.fromkeys(f"{parts.scheme}://{parts.netloc}" for parts in hosts))[:HOSTS]
    for host in asked:
        try:
            requests.head(host, timeout=SECONDS)
            return
        except (requests.exceptions.ConnectionError, requests.exceptions.Timeout):
            continue
    if asked:
        raise ConnectionError(f"no connection to {' or '.join(asked)} (is there a network?)")


def _one_line(error: Exception) -> str:
    return textwrap.shorten(str(error), 400, placeholder=" …") or type(error).__name__


# --- what of a data set is read


def _records(info: Any, split: str) -> Records:
    """The records of a split by their number."""
    about = info.splits[split]
    return open_records(info.file_format.value, [*map(os.fspath, about.filepaths)], about.shard_lengths)


def _splits(info: Any, columns: Columns, place: str, asked: Sequence[str]) -> dict[str, str]:
    """TFDS' name of each split that is used; of those held out the first whose labels, hidden in some, are known.

    Splits of other names are used where they are `asked` for; ConfigError lists what there is.
    """
    there = [name for name, split in info.splits.items() if split.num_examples]
    if "train" not in there:
        raise DataError(f"{place!r} has no split 'train', only {', '.join(there) or 'empty ones'}")
    held_out = [name for name in HELD_OUT if name in there]
    if columns.label and len(held_out) > 1:
        held_out.sort(key=lambda name: not _labelled(_records(info, name).read(0), columns))
    used = {"train": "train"} | ({"test": held_out[0]} if held_out else {})
    for name in asked:
        if name not in used and name not in there:
            hint = did_you_mean(name, there)
            raise ConfigError(f"config.data.train: {place!r} has no split {name!r}{hint} There is: {', '.join(there)}.")
    return used | {name: name for name in asked if name not in used}


def _labelled(record: bytes, columns: Columns) -> bool:
    try:
        return _parse(record, columns).label >= 0
    except Unreadable:
        return False


def _columns(info: Any, place: str, asked: str) -> Columns:
    """The image, label and file name among the features of a data set; DataError if the image is in doubt.

    The label is that `asked` for, else the data set's own; ConfigError lists what there is.
    """
    from tensorflow_datasets import features as kinds

    features = dict(sorted(info.features.items())) if isinstance(info.features, kinds.FeaturesDict) else {}
    given, target = [*(info.supervised_keys or ()), None, None][:2]
    images = [name for name, kind in features.items() if _is_image(kind)]
    image = next((name for name in ("image", given) if name in images), images[0] if len(images) == 1 else None)
    if image is None:
        what = f"several images and none called 'image': {', '.join(images)}"
        raise DataError(f"{place!r}: a record has {what if images else 'no image, only ' + ', '.join(features)}")
    labels = [n for n, kind in features.items() if isinstance(kind, kinds.ClassLabel) and (kind.num_classes or 0) > 1]
    if asked and asked not in labels:
        there_is = f"There is: {', '.join(labels) or 'none'}."
        raise ConfigError(
            f"config.data.label={asked!r} is no class of {place!r}{did_you_mean(asked, labels)} {there_is}"
        )
    label = asked or next((name for name in labels if name == target), labels[0] if len(labels) == 1 else None)
    classes = tuple(features[label].names) if label else ()
    file = next((name for name in FILE_NAMES if isinstance(features.get(name), kinds.Text)), None)
    boxes = [name for name, kind in features.items() if isinstance(kind, kinds.BBoxFeature)]
    return Columns(image, label, classes, file, boxes[0] if len(boxes) == 1 else None)


def _is_image(kind: Any) -> bool:
    """Whether a feature is a picture: no mask of labels, no float32 (which TFDS stores as four bytes of colour)."""
    from tensorflow_datasets import features as kinds

    return isinstance(kind, kinds.Image) and not isinstance(kind, kinds.LabeledImage) and kind.np_dtype != np.float32


def _scan(records: Records, split: str, prefix: str, columns: Columns, max_pixels: int, skips: Skips) -> Files:
    """The readable images among `records`, called PREFIX/<number>, or by their file's name if it is known."""
    names = [f"{prefix}/{i}" for i in range(records.size)]
    labels = np.full(records.size, -1, np.int32)

    def one(i: int) -> tuple[Header, Box | None]:
        record = _parse(records.read(i), columns)
        labels[i] = record.label
        if record.file:
            names[i] = f"{prefix}/{record.file}"
        header = scan(io.BytesIO(record.image), max_pixels)
        return header, _box(record, header)

    headers, boxes = scan_parts(split, names, one, skips)
    kept = list(headers)
    known = (labels[kept] >= 0).any()
    return Files(
        split,
        [names[i] for i in kept],
        list(headers.values()),
        lambda id: io.BytesIO(_parse(records.read(kept[id]), columns).image),
        labels[kept] if known else None,
        boxes,
    )


def _parse(record: bytes, columns: Columns) -> Record:
    """A serialised tf.train.Example; Unreadable if it is none or lacks what should be in it."""
    from google.protobuf.message import DecodeError

    try:
        values = tensorflow().train.Example.FromString(record).features.feature
    except DecodeError:
        raise Unreadable("the record is damaged") from None
    images = values[columns.image].bytes_list.value
    labels = values[columns.label].int64_list.value if columns.label else [-1]
    files = values[columns.file].bytes_list.value if columns.file else [b""]
    box = values[columns.box].float_list.value if columns.box else ()
    if not len(images) == len(labels) == len(files) == 1 or len(box) not in (0, 4):
        raise Unreadable("the record is damaged: its image, label, file name or box is missing")
    if columns.label and labels[0] >= len(columns.classes):
        raise Unreadable(f"its label {labels[0]} is none of the {len(columns.classes)} classes")
    return Record(images[0], int(labels[0]), files[0].decode("utf-8", "surrogateescape"), box)


def _box(record: Record, header: Header) -> Box | None:
    """The box of a record in the pixels of its image."""
    if not record.box:
        return None
    top, left, bottom, right = record.box
    if not all(map(math.isfinite, record.box)):
        raise Unreadable(f"its box {tuple(record.box)} is none")
    h, w = header.height, header.width
    return Box(round(left * w), round(top * h), round(right * w), round(bottom * h))
