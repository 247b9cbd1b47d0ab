"""A NumPy archive: `images`, and if wanted `labels`, `test_images`, `test_labels`, `unlabelled_images`, …"""

import zipfile
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from numpy.typing import NDArray

from jaxclust.data.arrays import check, make_source
from jaxclust.data.split import Source, prefixes
from jaxclust.errors import ConfigError, DataError


def read(where: str, settings: ConfigDict) -> Source:
    """Splits `train` and, where there is `test_images`, `test`, and what else `data.train` asks for.

    Object arrays are never unpickled.
    """
    if not where:
        raise ConfigError("config.data.source='npz' names no file; write 'npz:FILE'")
    path = Path(where).expanduser()
    found = prefixes(settings.train)
    arrays = _load(path, {prefix + kind for prefix in found.values() for kind in ("images", "labels")})
    if "images" not in arrays:
        raise DataError(f"{path}: there is no array 'images', only {', '.join(sorted(arrays)) or 'nothing'}")
    splits = {}
    for split, prefix in found.items():
        if prefix + "images" in arrays:
            what = f"{path} ({prefix}images)"
            images, labels = arrays[prefix + "images"], arrays.get(prefix + "labels")
            splits[split] = check(images, labels, what, settings.max_pixels)
    return make_source(path.stem, splits, settings)


def _load(path: Path, names: Collection[str]) -> dict[str, NDArray[Any]]:
    try:
        if not zipfile.is_zipfile(path):
            reason = "not an npz archive" if path.exists() else "no such file"
            raise DataError(f"{path}: {reason}; config.data.source=npz:FILE expects what numpy.savez writes")
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files if name in names}
    except ValueError as error:
        if "allow_pickle" in str(error):
            raise DataError(
                f"{path}: holds an array of Python objects, which could run code and is never loaded; "
                "save images as one uint8 array [N, H, W] or [N, H, W, C]"
            ) from error
        raise DataError(f"{path}: {error}") from error
    except (OSError, EOFError, MemoryError, RuntimeError, zlib.error, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
