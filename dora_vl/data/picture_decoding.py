"""Bytes become a picture: of the formats and within the limits of `media_limits`, upright, RGB.

The header is read and compared first, so that a small file cannot ask for all memory; nothing but Pillow's own
decoders ever runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, cast

from PIL import ExifTags, Image, UnidentifiedImageError

from dora_vl.data.media_limits import (
    HEADER_READS_TIMES_BYTES,
    PICTURE_BYTES,
    PICTURE_ELONGATION,
    PICTURE_FORMATS,
    PICTURE_PIXELS,
    PICTURE_SIDE,
)
from dora_vl.data.regular_file import NoRegularFile, open_regular
from dora_vl.errors import DECODING_ERRORS, BadSample


class NoPicture(ValueError):
    """Not one of the formats, or over a limit: what stands behind "picture X in Y"."""


NOT_DECODED = (*DECODING_ERRORS, MemoryError, Image.DecompressionBombError)
"""Whatever opening or decoding a picture raises; `NoPicture` and `NoRegularFile` are among them."""


@contextmanager
def opened_picture(source: Path | BytesIO) -> Iterator[Image.Image]:
    """A picture whose header has been read and compared with the limits; nothing is decoded yet.

    Raises:
        FileNotFoundError: nothing is at the path.
        NoPicture: it is of no format that is read, or over a limit; the message has the numbers.
        NOT_DECODED: anything that Pillow raises.
    """
    with open_regular(source) if isinstance(source, Path) else source as stream:
        size = stream.seek(0, 2)
        stream.seek(0)
        if size > PICTURE_BYTES:
            raise NoPicture(f"has {size:,} bytes; at most {PICTURE_BYTES:,} are read")
        header = _HeaderReads(stream)
        try:
            image = Image.open(cast(BinaryIO, header), formats=PICTURE_FORMATS)
        except UnidentifiedImageError:
            raise NoPicture(_no_format(stream, size)) from None
        header.over = True
        with image:
            _refuse_size(*image.size)
            yield image


class _HeaderReads:
    """A picture's file that counts what Pillow reads of its header, piece by piece, until the header is `over`.

    Pillow joins the blocks of a GIF's comment, and of a JPEG's EXIF, one after the other, copying all before each: the
    square of their number. Without a limit a GIF of 20 MB took 37 s, a JPEG of 131 MB 70 s.
    """

    def __init__(self, stream: BinaryIO | BytesIO) -> None:
        self._stream = stream
        self._reads = self._bytes = 0
        self.over = False

    def read(self, size: int = -1) -> bytes:
        found = self._stream.read(size)
        if not self.over:
            self._reads, self._bytes = self._reads + 1, self._bytes + len(found)
            if self._reads * self._bytes > HEADER_READS_TIMES_BYTES:
                raise NoPicture(f"has a header of more than {self._reads:,} pieces and {self._bytes:,} bytes")
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _no_format(stream: BinaryIO | BytesIO, size: int) -> str:
    stream.seek(0)
    start = stream.read(16)
    for name in PICTURE_FORMATS:
        _, begins_as_one = Image.OPEN[name]
        if begins_as_one is not None and begins_as_one(start) is True:
            return f"begins as a {name} and is cut or damaged near its start"
    begins = f"it begins with {start[:8]!r}" if size else "it has 0 bytes"
    return f"is no picture of {', '.join(PICTURE_FORMATS)}: {begins}"


def _refuse_size(width: int, height: int) -> None:
    if width * height > PICTURE_PIXELS:
        raise NoPicture(f"has {width:,} x {height:,} pixels; at most {PICTURE_PIXELS:,} are read")
    if max(width, height) > PICTURE_ELONGATION * min(width, height):
        raise NoPicture(f"has {width:,} x {height:,} pixels; a side may be {PICTURE_ELONGATION} times the other")


def decode_image(source: Path | BytesIO, name: str, where: str) -> Image.Image:
    """A picture from a file or from memory; `name` and `where` are what the messages say. See `media.open_image`.

    Raises:
        BadSample: nothing is there, it is over a limit, or it cannot be decoded.
    """
    try:
        with opened_picture(source) as image:
            image.load()
            return _within_side(_plain_rgb(_upright(image)))
    except FileNotFoundError:
        raise BadSample(name, f"picture {name} is missing in {where}") from None
    except NoPicture as error:
        raise BadSample(name, f"picture {name} in {where} {error}") from None
    except NoRegularFile as error:
        raise BadSample(name, f"picture {name} in {where} cannot be read: {error}") from None
    except NOT_DECODED as error:
        raise BadSample(name, f"picture {name} in {where} cannot be decoded: {in_one_line(error)}") from None


def in_one_line(error: BaseException) -> str:
    """An error's kind and text."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


_TURNS: Mapping[object, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF's orientation -> what turns the stored pixels upright; 1, and whatever else stands there, turns nothing."""
LARGEST_NUMBER = 2**16 - 1
"""Of a picture of whole numbers: white."""
_WITH_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")
READING = "upright, transparency on white"
"""How files become pixels; features that were computed when this said something else are computed again."""


def _upright(image: Image.Image) -> Image.Image:
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except DECODING_ERRORS:  # damaged notes beside whole pixels
        return image
    return image if turn is None else image.transpose(turn)


def _plain_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise NoPicture("holds floating-point numbers, of which none is said to be white; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        if _brightest(image) > 255:
            image = image.point(lambda value: value / 256).convert("L")
    elif image.mode in _WITH_ALPHA or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image if image.mode == "RGBA" else image.convert("RGBA"))
        image = white
    image.info.pop("transparency", None)
    return image.convert("RGB")


def _brightest(image: Image.Image) -> int:
    """Of a picture of whole numbers; Pillow would make black and white of what 16 bits do not hold, without a word."""
    least, most = (int(end) for end in image.getextrema() if isinstance(end, int | float))
    if least < 0 or most > LARGEST_NUMBER:
        raise NoPicture(f"holds numbers from {least:,} to {most:,}; those from 0 to {LARGEST_NUMBER:,} are read")
    return most


def _within_side(image: Image.Image) -> Image.Image:
    if max(image.size) > PICTURE_SIDE:
        image.thumbnail((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.BICUBIC, reducing_gap=3.0)
    return image
