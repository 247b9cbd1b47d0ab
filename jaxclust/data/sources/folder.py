"""A folder of image files, with or without subfolders for splits and classes."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from jaxclust.data.decode import Header
from jaxclust.data.image_files import Form, Skips, cached_split, decoded_sizes, lazy_split, scan_files
from jaxclust.data.listing import classes, list_images, split_folders
from jaxclust.data.split import Source, Split, image_side, reduced_side
from jaxclust.errors import ConfigError, DataError


def read(where: str, settings: ConfigDict) -> Source:
    """Scans every file, which fixes the ids, and decodes all of them if they fit the cache."""
    if not where:
        raise ConfigError("config.data.source='folder' names no folder; write 'folder:DIR'")
    root = Path(where).expanduser()
    if not root.is_dir():
        raise DataError(f"{where!r}: no such folder (config.data.source=folder:DIR)")
    listed = list_images(root)
    folders = split_folders(listed)
    skips = Skips(root, settings.max_skipped)
    headers = {
        split: scan_files(root, split, [p for p in listed if p.startswith(folder)], settings.max_pixels, skips)
        for split, folder in folders.items()
    }
    splits = _make_splits(root, {split: files for split, files in headers.items() if files}, settings, skips)
    if "train" not in splits:
        skipped = f"; {len(skips.files)} cannot be used:\n{skips.first()}" if skips.files else ""
        raise DataError(
            f"{str(root)!r} holds no images to train on; looked for are jpg, jpeg, png, bmp, gif, webp, tif and tiff "
            f"files, in subfolders too{skipped}"
        )
    splits, class_names = _label(splits, folders)
    return Source(root.resolve().name, splits, class_names, skips.files)


def _make_splits(
    root: Path, headers: Mapping[str, dict[str, Header]], settings: ConfigDict, skips: Skips
) -> dict[str, Split]:
    """In memory if all fit in `data.cache_bytes`, else decoded whenever they are needed."""
    if not headers:
        return {}
    all_headers = [header for files in headers.values() for header in files.values()]
    form = _form(all_headers, settings)
    size = int(decoded_sizes(all_headers, form).astype(np.int64).prod(axis=1).sum()) * form.channels
    if size <= settings.cache_bytes:
        cached = {split: cached_split(root, split, files, form, skips) for split, files in headers.items()}
        return {split: made for split, made in cached.items() if made}
    logging.getLogger(__name__).info(
        "decoded images would take %.3g GB, more than config.data.cache_bytes: they are decoded in every round",
        size / 1e9,
    )
    return {split: lazy_split(root, list(files), form) for split, files in headers.items()}


def _form(headers: Sequence[Header], settings: ConfigDict) -> Form:
    side = image_side(list({(h.height, h.width) for h in headers}), settings.image_size)
    channels = settings.channels or (1 if all(h.grey for h in headers) else 3)
    return Form(side, reduced_side(side), channels, settings.max_pixels)


def _label(splits: Mapping[str, Split], folders: Mapping[str, str]) -> tuple[dict[str, Split], tuple[str, ...] | None]:
    """The splits with labels, and the names of the classes; a single class says nothing and is none."""
    found = {
        split: classes([path.removeprefix(folders[split]) for path in made.paths or ()])
        for split, made in splits.items()
    }
    names = sorted({name for of_split in found.values() for name in of_split or ()})
    if len(names) < 2:
        return dict(splits), None
    index = {name: i for i, name in enumerate(names)}
    labels = {s: None if of is None else np.array([index[n] for n in of], np.int32) for s, of in found.items()}
    return {s: replace(made, labels=labels[s]) for s, made in splits.items()}, tuple(names)
