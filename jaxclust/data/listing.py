"""Which files of a folder are images, and what its subfolders mean."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from jaxclust.data.decode import EXTENSIONS
from jaxclust.errors import DataError

HELD_OUT = ("test", "val", "validation")  # the first that is there becomes the split "test"


def list_images(root: Path) -> list[str]:
    """Paths below `root` with an image's extension, relative, with slashes, in the order of their bytes.

    Links to folders are followed, each folder is read once (so loops end), hidden names are left
    out. The order depends on nothing but the names. DataError if a folder cannot be read.
    """
    found: list[str] = []
    seen: set[tuple[int, int]] = set()
    pending = [""]
    while pending:
        folder = pending.pop()
        try:
            info = os.stat(root / folder)
            with os.scandir(root / folder) as scan:
                entries = sorted(scan, key=lambda e: os.fsencode(e.name))
        except OSError as error:
            raise DataError(f"folder {str(root / folder)!r} cannot be read: {error.strerror}") from error
        if (info.st_dev, info.st_ino) in seen:
            continue
        seen.add((info.st_dev, info.st_ino))
        names = [(e.name, f"{folder}{e.name}", _is_folder(e)) for e in entries if not e.name.startswith(".")]
        pending.extend(f"{path}/" for _, path, is_dir in reversed(names) if is_dir)
        found.extend(path for name, path, is_dir in names if not is_dir and _has_extension(name))
    return sorted(found, key=os.fsencode)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _has_extension(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in EXTENSIONS


def split_folders(paths: Sequence[str], asked: Sequence[str] = ()) -> dict[str, str]:
    """The folder ("" or with a slash at its end) of each split.

    A folder `train` is the split "train", and `test`, `val` or `validation` beside it is "test"; others are splits
    where they are `asked` for by name. Without such a neighbour but beside other images it is a class (of trains,
    say). With no folder `train` everything is the split "train".
    """
    tops = {path.partition("/")[0] for path in paths if "/" in path}
    held_out = next((name for name in HELD_OUT if name in tops), None)
    if "train" not in tops:
        return {"train": ""}
    folders = {"train": "train/"} | ({"test": f"{held_out}/"} if held_out else {})
    folders |= {name: f"{name}/" for name in asked if name in tops and name not in folders}
    left_out = [path for path in paths if not path.startswith(tuple(folders.values()))]
    if left_out and len(folders) == 1:
        return {"train": ""}
    if left_out:
        logging.getLogger(__name__).warning(
            "%d images outside of %s are left out, such as %r",
            len(left_out),
            " and ".join(folders.values()),
            left_out[0],
        )
    return folders


def classes(paths: Sequence[str]) -> list[str] | None:
    """The class of each file, its first folder; None if a file lies in no folder."""
    parts = [path.partition("/") for path in paths]
    return [folder for folder, _, _ in parts] if all(slash for _, slash, _ in parts) else None
