"""Image files of a split: scanned once, then decoded into memory or whenever they are needed."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from jaxclust.data.decode import Header, Unreadable, decode, reduced, scan
from jaxclust.data.split import Skipped, Split, aligned, from_array, from_files, from_ragged
from jaxclust.errors import DataError
from jaxclust.progress import progress

T = TypeVar("T")

GROUP = 32  # files that a thread takes at a time, since a small one takes no longer than a handover
WINDOW = 16  # groups under way, so that too many bad files stop the scan soon


class Form(NamedTuple):
    """What images are brought to: C channels, a short side of at most R, and S x S in a batch."""

    side: int
    reduced_side: int
    channels: int
    max_pixels: int


class Skips:
    """Collects files that are left out and raises DataError when they are more than `limit`."""

    def __init__(self, root: Path, limit: int) -> None:
        self.root, self.limit = root, limit
        self.files: list[Skipped] = []

    def add(self, split: str, path: str, reason: Unreadable) -> None:
        """Leaves out one file of `split`."""
        self.files.append(Skipped(split, path, str(reason)))
        if len(self.files) > self.limit:
            raise DataError(
                f"{str(self.root)!r}: more than config.data.max_skipped={self.limit} files cannot be used:\n"
                f"{self.first()}\nRepair or remove them, or raise config.data.max_skipped."
            )

    def first(self, count: int = 5) -> str:
        """The first few, one a line."""
        return "\n".join(f"  {file.path!r}: {file.reason}" for file in self.files[:count])


def scan_files(root: Path, split: str, paths: Sequence[str], max_pixels: int, skips: Skips) -> dict[str, Header]:
    """The headers of the readable files among `paths`, in their order."""
    one = partial(scan, max_pixels=max_pixels)
    headers: dict[str, Header] = {}
    for path, header in zip(paths, _in_threads(one, root, paths, f"scanning {split}"), strict=True):
        if isinstance(header, Unreadable):
            skips.add(split, path, header)
        else:
            headers[path] = header
    return headers


def decoded_sizes(headers: Sequence[Header], form: Form) -> NDArray[np.int32]:
    """Heights and widths int32 [N, 2] after the reduction."""
    return np.array([reduced(h.height, h.width, form.reduced_side) for h in headers], np.int32).reshape(-1, 2)


def cached_split(root: Path, split: str, headers: dict[str, Header], form: Form, skips: Skips) -> Split | None:
    """A split of all files decoded into memory; one that fails is left out, None if all do."""
    paths, sizes = list(headers), decoded_sizes(list(headers.values()), form)
    lengths = sizes.astype(np.int64).prod(axis=1) * form.channels
    starts = np.cumsum(lengths) - lengths
    pixels = aligned(int(lengths.sum()))
    one = partial(decode, channels=form.channels, side=form.reduced_side, max_pixels=form.max_pixels)
    good = np.ones(len(paths), bool)
    for i, image in enumerate(_in_threads(one, root, paths, f"decoding {split}")):
        if not isinstance(image, Unreadable) and image.shape[:2] != tuple(sizes[i]):
            image = Unreadable(f"its header promises {sizes[i]} pixels, {image.shape[:2]} were decoded")
        if isinstance(image, Unreadable):
            skips.add(split, paths[i], image)
            good[i] = False
        else:
            pixels[starts[i] : starts[i] + lengths[i]] = image.ravel()
    if not good.all():
        pixels, sizes = pixels[np.repeat(good, lengths)], sizes[good]
        paths = [path for path, kept in zip(paths, good, strict=True) if kept]
    if not paths:
        return None
    shape = (form.side, form.side, form.channels)
    if (sizes == sizes[0]).all():
        images = pixels.reshape(len(paths), *sizes[0], form.channels)
        return from_array(images, shape, paths.__getitem__, paths)
    return from_ragged(pixels, sizes, shape, paths.__getitem__, paths)


def lazy_split(root: Path, paths: list[str], form: Form) -> Split:
    """A split whose files are decoded when they are needed; one gone bad is a DataError naming it."""

    def load(id: int) -> NDArray[np.uint8]:
        try:
            return decode(os.path.join(root, paths[id]), form.channels, form.reduced_side, form.max_pixels)
        except Unreadable as error:
            raise DataError(
                f"image {paths[id]!r} of {str(root)!r} cannot be decoded: {error}. It could be opened when the run "
                "began; repair it, or remove it and begin a new run"
            ) from error

    return from_files(load, len(paths), (form.side, form.side, form.channels), paths.__getitem__, paths)


def _in_threads(function: Callable[[str], T], root: Path, paths: Sequence[str], title: str) -> Iterator[T | Unreadable]:
    """`function` of every path below `root`, in order; Unreadable is a result."""

    def attempt(group: Sequence[str]) -> list[T | Unreadable]:
        results: list[T | Unreadable] = []
        for path in group:
            try:
                results.append(function(os.path.join(root, path)))
            except Unreadable as error:
                results.append(error)
        return results

    def results() -> Iterator[T | Unreadable]:
        groups = [paths[start : start + GROUP] for start in range(0, len(paths), GROUP)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for start in range(0, len(groups), WINDOW):
                for done in pool.map(attempt, groups[start : start + WINDOW]):
                    yield from done

    return progress(results(), len(paths), title, "images")
