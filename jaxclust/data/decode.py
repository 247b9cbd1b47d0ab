"""The one conversion of any picture to the pixels that everything else works on.

In order: first frame of an animation or of several pages; palettes to RGB or RGBA; transparency
laid over white; CMYK and other colour spaces to RGB; deep pixels to 8 bits (16-bit integers divided
by 257 and rounded; other integers and floats from 0…65535 and 0…1 where they fit there, else from
the image's own least and greatest value); grey replicated, or for one channel the luminance of
ITU-R 601 as Pillow computes it; short side reduced to R (antialiased bilinear, aspect kept, smaller
images stay); EXIF orientation applied. Pillow reads 16-bit colour as its upper 8 bits. Of an image with a box only
what is in it is kept, cut out of the upright image before the short side is reduced. With data.stretch images become
squares in place of that.
"""

import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff"})
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF")  # no format that runs another program
TAIL = 2**16  # bytes at the end of a file in which its end marker is looked for

_T = Image.Transpose
_UPRIGHT = {
    2: _T.FLIP_LEFT_RIGHT,
    3: _T.ROTATE_180,
    4: _T.FLIP_TOP_BOTTOM,
    5: _T.TRANSPOSE,
    6: _T.ROTATE_270,
    7: _T.TRANSVERSE,
    8: _T.ROTATE_90,
}

_GREY = frozenset({"1", "L", "LA", "La", "I", "F"})

Image.MAX_IMAGE_PIXELS = None  # data.max_pixels, checked here before decoding, takes its place
warnings.filterwarnings("ignore", module=r"PIL\.")  # a broken EXIF block is not worth a line per image


class Unreadable(Exception):
    """A file is no image that can be used; the message says why."""


class Header(NamedTuple):
    """What a file says of its image without decoding it: upright size in pixels, whether grey."""

    height: int
    width: int
    grey: bool


class Box(NamedTuple):
    """Part of an upright image in whole pixels, from its left upper corner up to, but without, the right lower one."""

    left: int
    top: int
    right: int
    bottom: int


def within(box: Box, height: int, width: int) -> Box:
    """The part of `box` that lies in an image of this size; Unreadable if there is none."""
    part = Box(max(box.left, 0), max(box.top, 0), min(box.right, width), min(box.bottom, height))
    if part.left >= part.right or part.top >= part.bottom:
        raise Unreadable(f"its box {tuple(box)} has no pixel in the image of {width} x {height}")
    return part


def scan(file: str | IO[bytes], max_pixels: int) -> Header:
    """The header of the image in `file`, a path or an open binary file; nothing is decoded.

    Unreadable if it is no image, has more than `max_pixels` pixels or ends before its end.
    """
    with _opened(file) as (stream, image):
        height, width = image.size[::-1]
        if height * width > max_pixels:
            raise Unreadable(f"{width} x {height} pixels are more than data.max_pixels={max_pixels}")
        if _orientation(image) >= 5:
            height, width = width, height
        _check_end(stream, str(image.format))
        return Header(height, width, is_grey(image))


def decode(
    file: str | IO[bytes], channels: int, side: int, max_pixels: int, box: Box | None = None, stretch: bool = False
) -> NDArray[np.uint8]:
    """The image in `file`, or what of it is in `box`, converted and reduced: uint8 [h, w, channels]; Unreadable as
    `scan`."""
    with _opened(file) as (_, image):
        if image.width * image.height > max_pixels:  # the file is not the one that was scanned
            raise Unreadable(f"more pixels than data.max_pixels={max_pixels}")
        return convert(image if box is None else _cut(image, box), channels, side, stretch)


def _cut(image: Image.Image, box: Box) -> Image.Image:
    """What of an image is in `box`, upright and without anything else that its file says."""
    orientation, image = _orientation(image), _plain(image)
    if orientation in _UPRIGHT:
        image = image.transpose(_UPRIGHT[orientation])
    if within(box, image.height, image.width) != box:  # the file is not the one that was scanned
        raise Unreadable(f"its box {tuple(box)} reaches out of the image of {image.width} x {image.height}")
    return Image.fromarray(np.asarray(image.crop(box)))


def convert(image: Image.Image, channels: int, side: int, stretch: bool = False) -> NDArray[np.uint8]:
    """`image` as uint8 [h, w, channels], upright, with a short side of at most `side`, or a square with `stretch`."""
    height, width = reduced(image.height, image.width, side, stretch)
    orientation = _orientation(image)
    image.draft(None, (2 * side, 2 * side))  # a JPEG is decoded at 1/2, 1/4 or 1/8 while ≥ 2 R
    image = _plain(image)
    if channels == 1:
        image = image.convert("L")
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=2.0)
    if orientation in _UPRIGHT:
        image = image.transpose(_UPRIGHT[orientation])
    pixels = np.atleast_3d(np.asarray(image))
    return pixels if pixels.shape[2] == channels else np.repeat(pixels, channels, axis=2)


def reduced(height: int, width: int, side: int, stretch: bool = False) -> tuple[int, int]:
    """(height, width) after the short side is reduced to `side`; a smaller image keeps its size.

    With `stretch` all sides become as long as the longest, at most `side`, whatever that does to the aspect.
    """
    short = min(height, width)
    if stretch:
        return (min(side, max(height, width)),) * 2
    if short <= side:
        return height, width
    return tuple(side if n == short else round(n * side / short) for n in (height, width))  # type: ignore[return-value]


def is_grey(image: Image.Image) -> bool:
    """Whether the image's mode has no colour (a palette counts as colour)."""
    return image.mode in _GREY or image.mode.startswith("I;16")


@contextmanager
def _opened(file: str | IO[bytes]) -> Iterator[tuple[IO[bytes], Image.Image]]:
    """The open file and its image; whatever goes wrong in the block is Unreadable."""
    try:
        if isinstance(file, str) and not stat.S_ISREG(os.stat(file).st_mode):  # a pipe would block
            raise Unreadable("not a regular file")
        with open(file, "rb") if isinstance(file, str) else file as stream:
            if stream.seek(0, os.SEEK_END) == 0:
                raise Unreadable("the file is empty")
            stream.seek(0)
            with Image.open(stream, formats=FORMATS) as image:
                yield stream, image
    except Unreadable:
        raise
    except Exception as error:
        raise Unreadable(_reason(error)) from error


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) to 8, from what precedes the pixels."""
    if image.format == "TIFF":  # turned by Pillow itself
        return 1
    try:  # Pillow's PNG class would decode the image in search of a block behind the pixels
        return int(Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1))
    except Exception:  # a broken EXIF block is no reason to lose the picture
        return 1


def _plain(image: Image.Image) -> Image.Image:
    """`image` in mode L or RGB."""
    image.load()
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return Image.fromarray(_to_8_bits(np.asarray(image)))
    if image.has_transparency_data:
        grey = image.mode in _GREY
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image.getchannel("A"))
        return white.convert("L") if grey else white
    if image.mode in ("1", "L"):
        return image.convert("L")
    return image.convert("RGB")


def _to_8_bits(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Grey values of any depth to 0…255 over the full range of their type (see the module)."""
    full = 1.0 if values.dtype.kind == "f" else 65535.0
    values = np.nan_to_num(values.astype(np.float64), posinf=0.0, neginf=0.0)
    low, high = 0.0, full
    if values.min() < low or values.max() > high:
        low, high = values.min(), values.max()
    return np.rint((values - low) * (255.0 / max(high - low, 1e-300))).astype(np.uint8)


def _check_end(file: IO[bytes], format: str) -> None:
    """Unreadable if a JPEG or PNG lacks its end; trailing bytes of a camera are allowed."""
    size = file.seek(0, os.SEEK_END)
    if format in ("JPEG", "MPO"):
        complete = b"\xff\xd9" in _tail(file, max(_jpeg_scan_start(file), size - TAIL))
    elif format == "PNG":
        complete = b"IEND\xaeB`\x82" in _tail(file, max(0, size - TAIL))
    else:
        complete = True
    if not complete:
        raise Unreadable("the file is truncated")


def _tail(file: IO[bytes], start: int) -> bytes:
    file.seek(start)
    return file.read()


def _jpeg_scan_start(file: IO[bytes]) -> int:
    """Offset of the pixels of a JPEG: what comes before may hold a thumbnail with its own end."""
    offset = 2
    while True:
        file.seek(offset)
        marker = file.read(4)
        if len(marker) < 4 or marker[0] != 0xFF:
            raise Unreadable("the file is truncated")
        if marker[1] == 0xFF:  # a fill byte
            offset += 1
            continue
        offset += 2 + int.from_bytes(marker[2:], "big")
        if marker[1] == 0xDA:
            return offset


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image of a known format"
    if isinstance(error, FileNotFoundError):
        return "no such file (or a broken link)"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return " ".join(str(error).split()) or type(error).__name__
