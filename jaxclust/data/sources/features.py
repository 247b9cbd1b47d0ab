"""Vectors in place of images: `.npy` [N, D], or `.npz` with `features` and if wanted `labels`, `test_features`, …"""

import zipfile
from collections.abc import Collection
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from numpy.typing import NDArray

from jaxclust.data.numbering import say_renumbered
from jaxclust.data.split import Source, Split, from_array, prefixes
from jaxclust.errors import ConfigError, DataError


def read(where: str, settings: ConfigDict) -> Source:
    """Splits `train` and, where there is `test_features`, `test`, and what else `data.train` asks for.

    Object arrays are never unpickled.
    """
    if not where:
        raise ConfigError("config.data.source='features' names no file; write 'features:FILE'")
    path = Path(where).expanduser()
    begun = prefixes(settings.train)
    arrays = _load(path, {prefix + kind for prefix in begun.values() for kind in ("features", "labels")})
    found = [values for name, values in arrays.items() if name.endswith("labels")]
    classes = np.unique(np.concatenate(found)) if found else np.array([])
    say_renumbered(path, classes.tolist())
    splits = {}
    for split, prefix in begun.items():
        if prefix + "features" in arrays:
            name_of = partial("{}/{}/{}".format, path.stem, split)
            splits[split] = _split(path, arrays, prefix, name_of, classes)
    if "train" not in splits:
        raise DataError(f"{path}: there is no array 'features', only {', '.join(sorted(arrays)) or 'nothing'}")
    return Source(path.stem, splits, tuple(map(str, classes)) or None, [])


def _split(path: Path, arrays: dict[str, Any], prefix: str, name_of: Any, classes: NDArray[Any]) -> Split:
    rows, labels = arrays[prefix + "features"], arrays.get(prefix + "labels")
    if rows.ndim != 2 or rows.dtype.kind != "f" or 0 in rows.shape:
        raise DataError(f"{path}: {prefix}features are {rows.dtype} {rows.shape}; they must be floats [N, D]")
    rows = rows.astype(np.float32)
    finite = np.isfinite(rows).all(axis=1)
    if not finite.all():
        raise DataError(f"{path}: row {int(np.argmin(finite))} of {prefix}features holds NaN or infinity")
    if labels is not None:
        if labels.shape != (len(rows),) or labels.dtype.kind not in "iu":
            what = f"{path}: {prefix}labels are {labels.dtype} {labels.shape}"
            raise DataError(f"{what}; they must be {len(rows)} integers")
        labels = np.searchsorted(classes, labels).astype(np.int32)
    return replace(from_array(rows, (rows.shape[1],), name_of), labels=labels)


def _load(path: Path, names: Collection[str]) -> dict[str, NDArray[Any]]:
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return {"features": loaded}
        with loaded:
            return {name: loaded[name] for name in loaded.files if name in names}
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: cannot be read as .npy or .npz of plain arrays: {error}") from error
