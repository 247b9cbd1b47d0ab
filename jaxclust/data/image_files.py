"""Encoded images of a split: scanned once, then decoded into memory or whenever they are needed."""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO, NamedTuple, TypeVar

import numpy as np
from ml_collections import ConfigDict
from numpy.typing import NDArray

from jaxclust.data.decode import Box, Header, Unreadable, decode, reduced, scan, within
from jaxclust.data.split import Skipped, Split, aligned, from_array, from_files, from_ragged, image_side, reduced_side
from jaxclust.errors import DataError
from jaxclust.progress import progress

T = TypeVar("T")

_logger = logging.getLogger(__name__)

GROUP = 32  # images that a thread takes at a time, since a small one takes no longer than a handover
WINDOW = 16  # groups under way, so that too many bad files stop the scan soon


class Files(NamedTuple):
    """The readable images of a split, in the order of their ids.

    `names` say how each is called and `open` gives the one with an id, as a path or an open binary
    file; it may raise Unreadable. `labels` int32 [N] are negative where unknown. `boxes` say what of an image is meant,
    None: all of it; headers are then of that part.
    """

    split: str
    names: list[str]
    headers: list[Header]
    open: Callable[[int], str | IO[bytes]]
    labels: NDArray[np.int32] | None = None
    boxes: Sequence[Box | None] | None = None

    def decoded(self, id: int, form: "Form") -> NDArray[np.uint8]:
        """The pixels of image `id`, uint8 [h, w, C]; Unreadable if it cannot be decoded."""
        box = self.boxes[id] if self.boxes else None
        return decode(self.open(id), form.channels, form.reduced_side, form.max_pixels, box, form.stretch)


class Form(NamedTuple):
    """What images are brought to: C channels, a short side of at most R or R x R, and S x S in a batch."""

    side: int
    reduced_side: int
    channels: int
    max_pixels: int
    stretch: bool


class Skips:
    """Collects images of `place` that are left out and raises DataError when they are more than `limit`."""

    def __init__(self, place: str, limit: int) -> None:
        self.place, self.limit = place, limit
        self.files: list[Skipped] = []

    def add(self, split: str, path: str, reason: Unreadable) -> None:
        """Leaves out one image of `split`."""
        self.files.append(Skipped(split, path, str(reason)))
        if len(self.files) > self.limit:
            raise DataError(
                f"{self.place!r}: more than config.data.max_skipped={self.limit} files cannot be used:\n"
                f"{self.first()}\nRepair or remove them, or raise config.data.max_skipped."
            )

    def first(self, count: int = 5) -> str:
        """The first few, one a line."""
        return "\n".join(f"  {file.path!r}: {file.reason}" for file in self.files[:count])


def scan_files(root: Path, split: str, paths: Sequence[str], max_pixels: int, skips: Skips) -> Files:
    """The readable files among `paths`, which are relative to `root`, in their order."""
    headers = scan_images(split, paths, lambda i: scan(os.path.join(root, paths[i]), max_pixels), skips)
    names = [paths[i] for i in headers]
    return Files(split, names, list(headers.values()), lambda id: os.path.join(root, names[id]))


def scan_parts(
    split: str, names: Sequence[str], one: Callable[[int], tuple[Header, Box | None]], skips: Skips
) -> tuple[dict[int, Header], list[Box | None]]:
    """As `scan_images`, where `one` also says what of an image is meant: headers of these parts, and their boxes, cut
    where they reach out of their image."""
    boxes: dict[int, Box] = {}
    reaching_out: set[int] = set()

    def part(i: int) -> Header:
        header, box = one(i)
        if box is None:
            return header
        boxes[i] = inside = within(box, header.height, header.width)
        if inside != box:
            reaching_out.add(i)
        return header._replace(height=inside.bottom - inside.top, width=inside.right - inside.left)

    headers = scan_images(split, names, part, skips)
    if reaching_out:
        _logger.warning("%s: %d boxes reach out of their images and are cut there", split, len(reaching_out))
    return headers, [boxes.get(i) for i in headers]


def scan_images(split: str, names: Sequence[str], one: Callable[[int], Header], skips: Skips) -> dict[int, Header]:
    """What `one` finds for each place in `names`, in order, without those where it raises Unreadable."""
    headers: dict[int, Header] = {}
    for i, header in enumerate(_in_threads(one, len(names), f"scanning {split}")):
        if isinstance(header, Unreadable):
            skips.add(split, names[i], header)
        else:
            headers[i] = header
    return headers


def make_splits(found: Sequence[Files], settings: ConfigDict, skips: Skips) -> dict[str, Split]:
    """In memory if all decoded images fit in `data.cache_bytes`, else decoded whenever they are needed.

    A split without a readable image is left out.
    """
    found = [files for files in found if files.names]
    headers = [header for files in found for header in files.headers]
    if not headers:
        return {}
    form = _form(headers, settings)
    size = int(_decoded_sizes(headers, form).astype(np.int64).prod(axis=1).sum()) * form.channels
    if size <= settings.cache_bytes:
        cached = {files.split: _cached_split(files, form, skips) for files in found}
        return {split: made for split, made in cached.items() if made}
    _logger.info(
        "decoded images would take %.3g GB, more than config.data.cache_bytes: they are decoded in every round",
        size / 1e9,
    )
    return {files.split: _lazy_split(files, form, skips.place) for files in found}


def _form(headers: Sequence[Header], settings: ConfigDict) -> Form:
    side = image_side(list({(h.height, h.width) for h in headers}), settings.image_size)
    channels = settings.channels or (1 if all(h.grey for h in headers) else 3)
    return Form(side, reduced_side(side), channels, settings.max_pixels, settings.stretch)


def _decoded_sizes(headers: Sequence[Header], form: Form) -> NDArray[np.int32]:
    """Heights and widths int32 [N, 2] after the reduction."""
    sizes = [reduced(h.height, h.width, form.reduced_side, form.stretch) for h in headers]
    return np.array(sizes, np.int32).reshape(-1, 2)


def _cached_split(files: Files, form: Form, skips: Skips) -> Split | None:
    """A split of all images decoded into memory; one that fails is left out, None if all do."""
    sizes = _decoded_sizes(files.headers, form)
    lengths = sizes.astype(np.int64).prod(axis=1) * form.channels
    starts = np.cumsum(lengths) - lengths
    pixels = aligned(int(lengths.sum()))
    good = np.ones(len(sizes), bool)

    for i, image in enumerate(_in_threads(partial(files.decoded, form=form), len(sizes), f"decoding {files.split}")):
        if not isinstance(image, Unreadable) and image.shape[:2] != tuple(sizes[i]):
            image = Unreadable(f"its header promises {sizes[i]} pixels, {image.shape[:2]} were decoded")
        if isinstance(image, Unreadable):
            skips.add(files.split, files.names[i], image)
            good[i] = False
        else:
            pixels[starts[i] : starts[i] + lengths[i]] = image.ravel()
    if not good.any():
        return None
    names, labels = files.names, files.labels
    if not good.all():
        pixels, sizes = pixels[np.repeat(good, lengths)], sizes[good]
        names = [name for name, kept in zip(names, good, strict=True) if kept]
        labels = None if labels is None else labels[good]
    shape = (form.side, form.side, form.channels)
    if (sizes == sizes[0]).all():
        images = pixels.reshape(len(names), *sizes[0], form.channels)
        made = from_array(images, shape, names.__getitem__, names)
    else:
        made = from_ragged(pixels, sizes, shape, names.__getitem__, names)
    return replace(made, labels=labels)


def _lazy_split(files: Files, form: Form, place: str) -> Split:
    """A split whose images are decoded when they are needed; one gone bad is a DataError naming it."""
    names = files.names

    def load(id: int) -> NDArray[np.uint8]:
        try:
            return files.decoded(id, form)
        except Unreadable as error:
            raise DataError(
                f"image {names[id]!r} of {place!r} cannot be decoded: {error}. It could be opened when the run "
                "began; repair it, or remove it and begin a new run"
            ) from error

    made = from_files(load, len(names), (form.side, form.side, form.channels), names.__getitem__, names)
    return replace(made, labels=files.labels)


def _in_threads(function: Callable[[int], T], count: int, title: str) -> Iterator[T | Unreadable]:
    """`function` of 0 … count-1, in order, with progress; Unreadable is a result."""

    def attempt(group: range) -> list[T | Unreadable]:
        results: list[T | Unreadable] = []
        for i in group:
            try:
                results.append(function(i))
            except Unreadable as error:
                results.append(error)
        return results

    def results() -> Iterator[T | Unreadable]:
        groups = [range(count)[start : start + GROUP] for start in range(0, count, GROUP)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for start in range(0, len(groups), WINDOW):
                for done in pool.map(attempt, groups[start : start + WINDOW]):
                    yield from done

    return progress(results(), count, title, "images")
