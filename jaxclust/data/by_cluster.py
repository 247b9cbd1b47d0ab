"""Images sorted into one folder for each cluster: as links, copies, or drawn from pixels.

A file name is data from somebody else. Every name here begins with the image's id and has only letters that mean
nothing to a file system, so that no image can leave its folder or take the place of another.
"""

import os
import shutil
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from jaxclust.data.pipeline import exact_batches
from jaxclust.data.split import Split
from jaxclust.errors import DataError
from jaxclust.progress import progress

NAME_BYTES = 200  # of UTF-8; most file systems end at 255
SUFFIX_BYTES = 16
FORBIDDEN = frozenset('<>:"/\\|?*')  # to Windows or to a shell
BATCH = 32  # images in memory at a time

Place = Callable[[Path, Path], None]


def link(source: Path, target: Path) -> None:
    """A symbolic link at `target`, which must not exist."""
    os.symlink(source, target)


def copy(source: Path, target: Path) -> None:
    """The contents of `source` at `target`, which must not exist, be it a link to nowhere."""
    with source.open("rb") as old, target.open("xb") as new:
        shutil.copyfileobj(old, new, 2**20)


def place_files(place: Place, root: Path, split: Split, clusters: NDArray[np.int32], folder: Path, title: str) -> None:
    """`place`s every file of `split`, which lies below `root`, in `folder`/<cluster>/; DataError if one cannot be."""
    root = root.resolve()
    for id in progress(range(split.size), split.size, title, "images"):
        source = root / split.path(id)
        try:
            place(source, _home(folder, clusters[id]) / file_name(id, source.name))
        except OSError as error:
            raise DataError(f"{str(source)!r} cannot be exported: {error.strerror or error}") from error


def draw(split: Split, clusters: NDArray[np.int32], folder: Path, title: str) -> None:
    """Every image of `split` as evaluation sees it, as PNG in `folder`/<cluster>/."""
    for id, image in progress(_pixels(split), split.size, title, "images"):
        pixels = image[..., 0] if image.shape[-1] == 1 else image
        with (_home(folder, clusters[id]) / file_name(id, ".png")).open("xb") as file:
            Image.fromarray(pixels).save(file, "PNG")


def file_name(id: int, name: str) -> str:
    """<id>-<name>, <id>.png for ".png", fit for a file system as `marked` says."""
    return marked(f"{id:07}-", name)


def marked(mark: str, name: str) -> str:
    """`mark` and `name` with what could mean anything to a file system as "_", and not too long.

    Where nothing is left of the name the last letter of `mark`, which separates both, goes too.
    """
    clean = "".join("_" if _is_special(letter) else letter for letter in name).rstrip(". ")
    stem, dot, suffix = clean.rpartition(".")
    if not dot or len(suffix.encode()) >= SUFFIX_BYTES:
        stem, dot, suffix = clean, "", ""
    stem = stem.encode()[: NAME_BYTES - SUFFIX_BYTES].decode("utf-8", "ignore")
    return f"{mark if stem else mark[:-1]}{stem}{dot}{suffix}"


def _is_special(letter: str) -> bool:
    """Whether a letter is a separator, a wildcard, invisible, or no letter at all (a byte that is no UTF-8)."""
    return letter in FORBIDDEN or unicodedata.category(letter)[0] == "C" or unicodedata.category(letter) in ("Zl", "Zp")


def _home(folder: Path, cluster: int) -> Path:
    home = folder / f"{cluster:04}"
    home.mkdir(parents=True, exist_ok=True)
    return home


def _pixels(split: Split) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    for batch in exact_batches(split, BATCH):
        for id, image in zip(batch["id"][batch["mask"]], batch["image"][batch["mask"]], strict=True):
            yield int(id), image
