"""Bytes become a picture: of the formats and within the limits of `media_limits`, upright, RGB.

The header is read and compared first, so that a small file cannot ask for all memory; nothing but Pillow's own
decoders ever runs.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError, features
from PIL.TiffImagePlugin import IMAGELENGTH, IMAGEWIDTH, PHOTOMETRIC_INTERPRETATION, TiffImageFile

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

log = logging.getLogger(__name__)

HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"hevx")
YCBCR = 6
"""A TIFF's photometric interpretation."""
ROWS = 256
"""Of pixels that are looked at at once."""


class NoPicture(ValueError):
    """Not one of the formats, or over a limit: what stands behind "picture X in Y"."""


NOT_DECODED = (*DECODING_ERRORS, RuntimeError, MemoryError, Image.DecompressionBombError)
"""Whatever opening or decoding a picture raises; `NoPicture` and `NoRegularFile` are among them."""


def load_picture(source: Path | BytesIO, *, as_published: bool = False) -> Image.Image:
    """A picture decoded whole, RGB; see `media.open_image`.

    What Pillow refuses for a flaw that leaves no pixel in doubt is read all the same (`_without_flaw`).

    Raises:
        FileNotFoundError: nothing is at the path.
        NoPicture: it is of no format that is read, or over a limit; the message has the numbers.
        NOT_DECODED: anything that Pillow raises.
    """
    read = _published if as_published else _as_shown
    try:
        return _loaded(source, read)
    except NoRegularFile:
        raise
    except NOT_DECODED as error:
        with _stream(source) as stream:
            is_large = stream.seek(0, 2) > PICTURE_BYTES
            stream.seek(0)
            content = b"" if is_large else stream.read()
        mended = _without_flaw(content, over_a_limit=isinstance(error, NoPicture))
        if mended is None:
            raise
    return _loaded(BytesIO(mended), read)


def _loaded(source: Path | BytesIO, read: Callable[[Image.Image], Image.Image]) -> Image.Image:
    with opened_picture(source) as image:
        if image.format in {"JPEG", "JPEG2000"} and not _has_end_mark(image):
            raise OSError("it is cut off: its end mark is missing")
        image.load()
        return read(image)


def _has_end_mark(image: Image.Image) -> bool:
    """Behind the header; among what is compressed it never stands. Pillow misses it in some files and not in others."""
    file: Any = vars(image)["fp"]
    return END_MARK in file.read()


@contextmanager
def opened_picture(source: Path | BytesIO) -> Iterator[Image.Image]:
    """A picture whose header has been read and compared with the limits; nothing is decoded yet.

    Raises:
        FileNotFoundError: nothing is at the path.
        NoPicture: it is of no format that is read, or over a limit; the message has the numbers.
        NOT_DECODED: anything that Pillow raises.
    """
    with _stream(source) as stream:
        size = stream.seek(0, 2)
        stream.seek(0)
        if size > PICTURE_BYTES:
            raise NoPicture(f"has {size:,} bytes; at most {PICTURE_BYTES:,} are read")
        formats = _formats(stream)
        header = _HeaderReads(stream)
        try:
            image = Image.open(cast(BinaryIO, header), formats=formats)
        except UnidentifiedImageError:
            raise NoPicture(_no_format(stream, size, formats)) from None
        header.over = True
        with image:
            _refuse_size(*image.size)
            if isinstance(image, TiffImageFile):
                _read_colour_differences(image)
            yield image


@contextmanager
def _stream(source: Path | BytesIO) -> Iterator[BinaryIO | BytesIO]:
    """The file, to be closed; or what is in memory, which may be read again."""
    if isinstance(source, Path):
        with open_regular(source) as file:
            yield file
    else:
        source.seek(0)
        yield source


def _formats(stream: BinaryIO | BytesIO) -> tuple[str, ...]:
    """Those that are read here: AVIF where Pillow has its decoder, HEIC where pillow-heif is installed."""
    if _is_heic(stream) and importlib.util.find_spec("pillow_heif"):
        importlib.import_module("pillow_heif").register_heif_opener()
        return ("HEIF",)
    return tuple(name for name in PICTURE_FORMATS if name != "AVIF" or features.check("avif"))


def _is_heic(stream: BinaryIO | BytesIO) -> bool:
    """By the brands that its first box lists."""
    start = stream.read(64)
    stream.seek(0)
    brands = start[8 : int.from_bytes(start[:4], "big")]
    return start[4:8] == b"ftyp" and any(brand in brands for brand in HEIC_BRANDS)


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


def _no_format(stream: BinaryIO | BytesIO, size: int, formats: tuple[str, ...]) -> str:
    stream.seek(0)
    if size and _is_heic(stream):
        return (
            "cannot be read as a HEIC"
            if "HEIF" in formats
            else "is a HEIC; its decoder is missing (pip install pillow-heif)"
        )
    start = stream.read(16)
    for name in formats:
        _, begins_as_one = Image.OPEN[name]
        if begins_as_one is not None and begins_as_one(start) is True:
            return f"begins as a {name} and is cut or damaged near its start"
    begins = f"it begins with {start[:12]!r}" if size else "it has 0 bytes"
    return f"is no picture of {', '.join(formats)}: {begins}"


def _refuse_size(width: int, height: int) -> None:
    if width * height > PICTURE_PIXELS:
        raise NoPicture(f"has {width:,} x {height:,} pixels; at most {PICTURE_PIXELS:,} are read")
    if max(width, height) > PICTURE_ELONGATION * min(width, height):
        raise NoPicture(f"has {width:,} x {height:,} pixels; a side may be {PICTURE_ELONGATION} times the other")


def _without_flaw(content: bytes, *, over_a_limit: bool) -> bytes | None:
    """A file's bytes so that Pillow reads them: a PNG without its notes, a JPEG with the end mark that it lacks.

    Other readers open both: a note above Pillow's limit, or with a wrong checksum, says nothing about a pixel, and no
    more does an end mark where all blocks are there.
    """
    if content.startswith(PNG_MARK):
        return _without_notes(content)
    if content.startswith(b"\xff\xd8\xff") and not over_a_limit:
        return _with_end_mark(content)
    return None


PNG_MARK = b"\x89PNG\r\n\x1a\n"
MOST_CHUNKS = 100_000


def _without_notes(content: bytes) -> bytes | None:
    """The chunks that decide pixels: critical ones, transparency, and the orientation where its checksum is right."""
    kept, place = [PNG_MARK], len(PNG_MARK)
    for _ in range(MOST_CHUNKS):
        if place >= len(content):
            return b"".join(kept)
        length, name = int.from_bytes(content[place : place + 4], "big"), content[place + 4 : place + 8]
        chunk = content[place : place + 12 + length]
        if name[:1].isupper() or name == b"tRNS" or (name == b"eXIf" and _is_intact(chunk)):
            kept.append(chunk)
        place += 12 + length
    return None


def _is_intact(chunk: bytes) -> bool:
    return zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")


END_MARK, SCAN = b"\xff\xd9", b"\xff\xda"
MOST_MENDED = 2**26
"""Pixels of a JPEG that is decoded four times."""
RESTARTS = b"\xff\xdd"
"""The mark of a JPEG of parts, whose reader looks for the next one's mark instead of reading on."""
INSTEAD_OF_A_CUT = (b"", b"\x55" * 64, b"\xaa" * 64)
"""Bits that would be read as pixels where some are missing, and as nothing where none are."""


def _with_end_mark(content: bytes) -> bytes | None:
    """Of a JPEG of one scan in one part that holds every block; None where pixels are missing, or may be."""
    content = content.rstrip(b"\xff")
    if content.endswith(bytes(4)):  # as a download leaves that was given its length beforehand
        content = content.rstrip(b"\0")
    try:
        with opened_picture(BytesIO(content)) as image:
            scan = content.rfind(SCAN, 0, vars(image)["fp"].tell())
            several_scans = image.info.get("progressive") or content[scan + 4] != len(image.getbands())
            if several_scans or RESTARTS in content or image.width * image.height > MOST_MENDED:
                return None
        sums = {_loaded_sum(content + instead + END_MARK) for instead in INSTEAD_OF_A_CUT}
    except NOT_DECODED:  # IndexError where it ends in its header
        return None
    return content + END_MARK if len(sums) == 1 else None


def _loaded_sum(content: bytes) -> int:
    """A checksum of the pixels, row by row: a copy of a large picture takes half a gigabyte."""
    found = 0
    with opened_picture(BytesIO(content)) as image:
        image.load()
        for top in range(0, image.height, ROWS):
            found = zlib.crc32(image.crop((0, top, image.width, min(top + ROWS, image.height))).tobytes(), found)
    return found


def _read_colour_differences(image: TiffImageFile) -> None:
    """Has libtiff read YCbCr that is not compressed, of which Pillow's own reader makes nothing."""
    tags = image.tag_v2
    if tags.get(PHOTOMETRIC_INTERPRETATION) == YCBCR and not image.use_load_libtiff:
        image.use_load_libtiff = True
        extents = (0, 0, tags[IMAGEWIDTH], tags[IMAGELENGTH])
        image.tile = [ImageFile._Tile("libtiff", extents, 0, ("RGBX", "raw", False, tags.offset))]


def decode_image(source: Path | BytesIO, name: str, where: str, *, as_published: bool = False) -> Image.Image:
    """A picture from a file or from memory; `name` and `where` are what the messages say. See `media.open_image`.

    Raises:
        BadSample: nothing is there, it is over a limit, or it cannot be decoded.
    """
    try:
        return load_picture(source, as_published=as_published)
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
DEPTHS = (8, 10, 12, 14, 16)
"""Bits of a camera's or a scanner's numbers."""
_WITH_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")
READING = "upright, transparency on white, whole numbers by their depth"
"""How files become pixels; features that were computed when this said something else are computed again."""
AS_PUBLISHED = "as stored"


def _published(image: Image.Image) -> Image.Image:
    """As LLaVA's own code reads it."""
    return _within_side(image.convert("RGB"))


def _as_shown(image: Image.Image) -> Image.Image:
    turn = _turn(image)
    plain = _within_side(_plain_rgb(image))
    return plain if turn is None else plain.transpose(turn)


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What brings it upright."""
    try:
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except DECODING_ERRORS:  # damaged notes beside whole pixels
        return None


def _plain_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        image = _of_real_numbers(image)
    elif image.mode.startswith("I"):
        numbers = image if image.mode in {"I", "I;16"} else image.convert("I")
        bits = _depth(numbers, stated=not isinstance(image, TiffImageFile))
        image = numbers.point(lambda value: value / 2 ** (bits - 8)).convert("L")
    elif image.mode in _WITH_ALPHA or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image if image.mode == "RGBA" else image.convert("RGBA"))
        image = white
    image.info.pop("transparency", None)
    return image.convert("RGB")


def _of_real_numbers(image: Image.Image) -> Image.Image:
    """From black at 0 to white at 1; of others nothing says which is white."""
    numbers = np.asarray(image)
    if not bool(((numbers >= 0) & (numbers <= 1)).all()):
        least, most = float(numbers.min()), float(numbers.max())
        raise NoPicture(f"holds floating-point numbers from {least:g} to {most:g}; those from 0 to 1 are read")
    return image.point(lambda value: value * 255 + 0.5).convert("L")


def _depth(image: Image.Image, *, stated: bool) -> int:
    """How many bits the whole numbers of a picture have.

    Args:
        stated: its format uses all 16, as PNG and JPEG 2000 do; a TIFF stores those of 10, 12 and 14 bits in 16 and
            does not say so: they are as many as the brightest needs.
    """
    least, most = (int(end) for end in image.getextrema() if isinstance(end, int | float))
    if least < 0 or most >= 2 ** DEPTHS[-1]:
        # Pillow would make black and white of these, without a word.
        raise NoPicture(f"holds numbers from {least:,} to {most:,}; those from 0 to {2 ** DEPTHS[-1] - 1:,} are read")
    if stated:
        return DEPTHS[-1]
    bits = next(bits for bits in DEPTHS if most < 2**bits)
    if 8 < bits < DEPTHS[-1]:
        _say_depth(bits)
    return bits


@cache
def _say_depth(bits: int) -> None:
    """Once in a process."""
    log.warning("TIFFs of 16-bit numbers whose brightest is below %s are read as of %d bits", f"{2**bits:,}", bits)


def _within_side(image: Image.Image) -> Image.Image:
    if max(image.size) > PICTURE_SIDE:
        image.thumbnail((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.BICUBIC, reducing_gap=3.0)
    return image
