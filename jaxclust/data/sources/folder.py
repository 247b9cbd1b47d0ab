"""A folder of image files, with or without subfolders for splits and classes."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from jaxclust.data.image_files import Skips, make_splits, scan_files
from jaxclust.data.listing import classes, list_images, split_folders
from jaxclust.data.split import Source, Split
from jaxclust.errors import ConfigError, DataError


def read(where: str, settings: ConfigDict) -> Source:
    """Scans every file, which fixes the ids, and decodes all of them if they fit the cache."""
    if not where:
        raise ConfigError("config.data.source='folder' names no folder; write 'folder:DIR'")
    root = Path(where).expanduser()
    if not root.is_dir():
        raise DataError(f"{where!r}: no such folder (config.data.source=folder:DIR)")
    listed = list_images(root)
    folders = split_folders(listed, settings.train.split("+"))
    skips = Skips(str(root), settings.max_skipped)
    found = [
        scan_files(root, split, [p for p in listed if p.startswith(folder)], settings.max_pixels, skips)
        for split, folder in folders.items()
    ]
    splits = make_splits(found, settings, skips)
    if "train" not in splits:
        skipped = f"; {len(skips.files)} cannot be used:\n{skips.first()}" if skips.files else ""
        what = "no images to train on" if splits else "no images"
        raise DataError(
            f"{str(root)!r} holds {what}; looked for are jpg, jpeg, png, bmp, gif, webp, tif and tiff "
            f"files, in subfolders too{skipped}"
        )
    splits, class_names = _label(splits, folders)
    return Source(root.resolve().name, splits, class_names, skips.files)


def _label(splits: Mapping[str, Split], folders: Mapping[str, str]) -> tuple[dict[str, Split], tuple[str, ...] | None]:
    """The splits with labels, and the names of the classes; a single class says nothing and is none.

    Classes are those of the splits train and test; a folder of another split may be none of them (label -1).
    """
    found = {
        split: classes([path.removeprefix(folders[split]) for path in made.paths or ()])
        for split, made in splits.items()
    }
    names = sorted({name for split in ("train", "test") for name in found.get(split) or ()})
    if len(names) < 2:
        return dict(splits), None
    index = {name: i for i, name in enumerate(names)}
    labels = {s: None if of is None else np.array([index.get(n, -1) for n in of], np.int32) for s, of in found.items()}
    return {s: replace(made, labels=labels[s]) for s, made in splits.items()}, tuple(names)
