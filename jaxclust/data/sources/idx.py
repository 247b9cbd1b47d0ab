"""The four files of MNIST (LeCun et al.), as they are distributed or unpacked."""

import gzip
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from numpy.typing import NDArray

from jaxclust.data.arrays import Arrays, check, make_source
from jaxclust.data.split import Source
from jaxclust.errors import ConfigError, DataError

PREFIXES = {"train": "train", "test": "t10k"}


def read(where: str, settings: ConfigDict) -> Source:
    """Splits `train` and, where its images are there, `test`; files of labels may be missing."""
    if not where:
        raise ConfigError("config.data.source='idx' names no folder; write 'idx:DIR'")
    folder = Path(where).expanduser()
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder (config.data.source=idx:DIR)")
    splits: dict[str, Arrays] = {}
    for split, prefix in PREFIXES.items():
        images, labels = _find(folder, prefix, "images", 3), _find(folder, prefix, "labels", 1)
        if images is not None:
            targets = None if labels is None else _parse(labels, 1)
            splits[split] = check(_parse(images, 3), targets, str(images), settings.max_pixels)
        elif split == "train" or labels is not None:
            raise DataError(
                f"{folder}: {prefix}-images-idx3-ubyte is missing; expected are train-images-idx3-ubyte, "
                "train-labels-idx1-ubyte, t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte, "
                "gzipped (.gz) or not"
            )
    return make_source(folder.resolve().name, splits, settings)


def _find(folder: Path, prefix: str, kind: str, dimensions: int) -> Path | None:
    for separator in "-.":
        for suffix in ("", ".gz"):
            path = folder / f"{prefix}-{kind}{separator}idx{dimensions}-ubyte{suffix}"
            if path.is_file():
                return path
    return None


def _parse(path: Path, dimensions: int) -> NDArray[Any]:
    """The uint8 array of an IDX file: magic 0 0 8 D, D big-endian int32 lengths, the values."""
    try:
        with open(path, "rb") as raw:
            zipped = raw.read(2) == b"\x1f\x8b"
        with gzip.open(path) if zipped else open(path, "rb") as file:
            content = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    head = 4 + 4 * dimensions
    magic = bytes([0, 0, 8, dimensions])
    if content[:4] != magic:
        raise DataError(f"{path}: begins with {content[:4].hex()}, not {magic.hex()} (IDX of unsigned bytes)")
    if len(content) < head:
        raise DataError(f"{path}: ends within its header of {head} bytes")
    shape = tuple(int(n) for n in np.frombuffer(content, ">u4", dimensions, 4))
    if len(content) != head + math.prod(shape):
        raise DataError(
            f"{path}: its header promises {math.prod(shape)} values {shape}, but {len(content) - head} follow"
        )
    return np.frombuffer(content, np.uint8, offset=head).reshape(shape)
