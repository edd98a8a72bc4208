"""Pictures of a sample: as a row names or holds them, below their folder or in the data file; decoded as a whole."""

from __future__ import annotations

import base64
import hashlib
import importlib
import importlib.util
import io
import logging
import os
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol, cast, runtime_checkable

import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError, features
from PIL.TiffImagePlugin import IMAGELENGTH, IMAGEWIDTH, PHOTOMETRIC_INTERPRETATION, TiffImageFile

from dora_vl.errors import DECODING_ERRORS, ON_THE_WEB, BadSample, UserError, shown
from dora_vl.files import NoRegularFile, open_regular

if TYPE_CHECKING:
    import datasets


# Limits that everything opened for a person holds to; docs/data.md says the same to people. A header's numbers are
# compared before anything is decoded, so that a small file cannot ask for all memory; nothing but Pillow's own decoders
# ever runs.

MEBIBYTE = 2**20
PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "AVIF")
"""Pillow's names of what is read; it knows formats that start other programs (EPS: Ghostscript), and rarer decoders.
HEIC is read beside them where pillow-heif is installed."""
PICTURE_ENDINGS = (
    "jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "jpe", "jfif", "apng", "mpo",
    "jp2", "j2k", "jpc", "jpf", "jpx", "j2c", "avif", "avifs", "heic", "heif", "hif",
)  # fmt: skip
"""How files of these formats end."""
VIDEO_ENDINGS = (
    "mp4", "mkv", "webm", "avi", "mov", "m4v", "ts", "m2ts", "flv", "mpg", "mpeg", "vob", "wmv", "asf", "mxf",
)  # fmt: skip
PICTURE_PIXELS = 178_956_970
"""Most of a picture: the number from which Pillow itself refuses. Decoding it takes 0.6 to 2.2 GB, and seconds."""
PICTURE_ELONGATION = 500
"""How many times longer than the other a picture's side may be: some models bring the shorter one to their own size."""
PICTURE_SIDE = 8_192
"""Pixels of the longer side above which a picture is shrunk when it is read, since many models pad it to a square."""
PICTURE_BYTES = 512 * MEBIBYTE
HEADER_READS_TIMES_BYTES = 10**11
"""Most of what precedes the pixels: 40 MB of EXIF or 4 MB of comment, of which real pictures have some KB."""

FRAME_PIXELS = 36_000_000
"""Most of a video's frame: 8K is 33 million."""
VIDEO_FRAMES = 2_000_000
"""Most of a video: nine hours at 60 a second."""
VIDEO_SECONDS = 60.0
"""Longest time that one file may take its decoder."""
VIDEO_MEMORY = 4_096 * MEBIBYTE
"""Most bytes that the decoder's process may take for one file, beyond what its libraries have."""


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
    """A picture decoded whole, RGB, as `open_image` says; raises as `opened_picture`.

    What Pillow refuses for a flaw that leaves no pixel in doubt is read all the same (`_without_flaw`).
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
    """A picture from a file or from memory; `name` and `where` are what the messages say."""
    try:
        return load_picture(source, as_published=as_published)
    except FileNotFoundError:
        reason = f"is missing in {where}"
    except NoPicture as error:
        reason = f"in {where} {error}"
    except NoRegularFile as error:
        reason = f"in {where} cannot be read: {error}"
    except NOT_DECODED as error:
        reason = f"in {where} cannot be decoded: {in_one_line(error)}"
    raise BadSample(name, f"picture {name} {reason}")


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


TRUNCATED, BROKEN = "truncated media", "broken media"


@dataclass(frozen=True)
class Trouble:
    """Why a file cannot be used; `kind` is the same for all files with that trouble."""

    kind: str
    detail: str


def decoding_trouble(source: Path | BytesIO) -> Trouble | None:
    """What is wrong with a picture that is decoded whole, within the limits of training; None where nothing is."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load_picture(source)
    except NoPicture as error:
        return Trouble(BROKEN, str(error))
    except NOT_DECODED as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        return Trouble(TRUNCATED if "truncated" in reason or "cut off" in reason else BROKEN, reason)
    return None


_BEGINNINGS = {
    b"\xff\xd8\xff": ".jpg",
    b"\x89PNG\r\n\x1a\n": ".png",
    b"GIF8": ".gif",
    b"BM": ".bmp",
    b"II*\0": ".tif",
    b"MM\0*": ".tif",
}


def picture_ending(data: bytes) -> str | None:
    """The file name's ending for an encoded picture, by its first bytes; None for anything else."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return ".webp"
    return next((ending for beginning, ending in _BEGINNINGS.items() if data.startswith(beginning)), None)


def save_picture(data: bytes, folder: Path, sample_id: str) -> str:
    """Writes a picture that a table holds into `folder`/media, named by its content, unless it is there.

    It is decoded first, once for each distinct picture (4 ms for 500 x 375): a table that was cut inside a picture
    holds one that begins well, and one that is damaged in its middle ends well too.

    Returns:
        Its path relative to `folder`.
    """
    ending = picture_ending(data)
    if ending is None:
        raise BadSample(sample_id, f"its picture begins with {data[:8]!r}, which is no known picture format")
    relative = f"media/{hashlib.sha256(data).hexdigest()[:32]}{ending}"
    target = folder / relative
    if target.is_file() and target.stat().st_size == len(data):
        return relative
    trouble = decoding_trouble(BytesIO(data))
    if trouble is not None:
        raise BadSample(sample_id, f"its picture is {trouble.kind.removesuffix(' media')}: {trouble.detail}")
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(data)
        partial.replace(target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror or error}); free some space") from error
    finally:
        partial.unlink(missing_ok=True)
    return relative


ALLOW_LINKS = "data.follow_links: true (--follow-links) reads such links"


@dataclass(frozen=True)
class MediaFolder:
    """Where the paths of pictures or videos start, and how the files there are read.

    Attributes:
        root: the folder.
        follow_links: a file may be a link that leads out of it, as DVC and git-annex lay them (`data.follow_links`).
        as_published: pictures become pixels as in LLaVA's own code (`data.as_published`), see `open_image`.
    """

    root: Path
    follow_links: bool = False
    as_published: bool = False

    def __str__(self) -> str:
        return str(self.root)

    @classmethod
    def of(cls, root: Path | MediaFolder) -> MediaFolder:
        """A path alone is read as usual."""
        return root if isinstance(root, MediaFolder) else cls(root)


def open_image(root: Path | MediaFolder, relative: str) -> Image.Image:
    """The picture at `relative` under `root`, as RGB, decoded whole, as a viewer shows it.

    Turned as its EXIF orientation says, what is transparent laid on white, 16-bit grey scaled to 8 bits. LLaVA's own
    code does none of these (`convert("RGB")` in c121f04, `llava/train/train.py`): it reads a phone's photograph
    sideways, shows whatever colour is stored below transparency, and clips 16 bits to white; so does this
    `as_published`. Every other picture has the same pixels there and here, but for those with a side of more than
    `PICTURE_SIDE` pixels, which are shrunk to it.
    """
    folder = MediaFolder.of(root)
    return decode_image(path_inside(folder, relative), relative, str(folder), as_published=folder.as_published)


def path_inside(root: Path | MediaFolder, relative: str, *, kind: str = "picture") -> Path:
    """Where the file at `relative` is, if that is inside `root`; `kind` is what the messages call it."""
    folder = MediaFolder.of(root)
    parts = PurePosixPath(relative)
    absolute = parts.is_absolute() or Path(relative).is_absolute()
    if not relative or "\0" in relative or (absolute and not _is_below(folder.root, Path(relative))):
        raise BadSample(relative, f"{kind} path {relative!r} must be relative to {folder}, or lie in it")
    if ".." in parts.parts or ".." in Path(relative).parts:
        raise BadSample(relative, f"{kind} path {relative!r} must not leave {folder}")
    path = folder.root / relative
    if folder.follow_links:
        return path
    try:
        real, real_root = path.resolve(), folder.root.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle, a name too long, or of no encoding
        raise BadSample(relative, f"{kind} path {relative!r} cannot be followed: {in_one_line(error)}") from None
    if not real.is_relative_to(real_root):
        raise BadSample(relative, f"{kind} {relative} is a link that leads out of {folder}, to {real}; {ALLOW_LINKS}")
    return path


def any_is_there(names: Iterable[str], root: Path) -> bool:
    """Whether any of these paths leads to something from `root`; a root that is another one has none."""
    for name in names:
        try:
            if (root / name).exists():
                return True
        except (OSError, ValueError):  # a name that no file system takes
            continue
    return False


def _is_below(root: Path, path: Path) -> bool:
    """By their names alone; where links lead is seen afterwards."""
    return path.is_relative_to(root.absolute()) or path.is_relative_to(root.resolve())


@runtime_checkable
class HeldPictures(Protocol):
    """Bytes by the name that a row gives them."""

    def __contains__(self, name: str) -> bool: ...

    def read(self, name: str) -> bytes:
        """The bytes of a picture that is there."""
        ...


@dataclass(frozen=True)
class RowPictureBytes:
    """The pictures of one row."""

    held: Mapping[str, bytes]

    def __contains__(self, name: str) -> bool:
        return name in self.held

    def read(self, name: str) -> bytes:
        """The bytes of a picture that is there."""
        return self.held[name]


class StoredPictures:
    """Bytes by the name that a row gives them, which is made of their content; worker processes may have it.

    Args:
        tables: whole tables of `table.load_table`; each picture stands in the first row that has it.
    """

    def __init__(self, tables: Sequence[datasets.Dataset]) -> None:
        self._tables = [table.select_columns(["held_pictures"]) for table in tables]
        self._places: dict[str, tuple[int, int, int]] = {}
        for number, table in enumerate(self._tables):
            for chunk_number, chunk in enumerate(table.data.column("held_pictures").chunks):
                names = chunk.flatten().field("name").to_pylist()
                self._places |= {name: (number, chunk_number, place) for place, name in enumerate(names)}

    @classmethod
    def joined(cls, parts: Sequence[StoredPictures]) -> StoredPictures:
        """The pictures of several files."""
        return cls([table for part in parts for table in part._tables])

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def read(self, name: str) -> bytes:
        """The bytes of a picture that is there."""
        table, chunk, place = self._places[name]
        pictures = self._tables[table].data.column("held_pictures").chunk(chunk).flatten()
        return pictures.field("content")[place].as_py()


def open_picture(root: Path | MediaFolder, name: str, stored: HeldPictures | None = None) -> Image.Image:
    """A picture of the data file itself, or the file at `name` under `root`, as `open_image`."""
    if stored is not None and name in stored:
        as_published = MediaFolder.of(root).as_published
        return decode_image(io.BytesIO(stored.read(name)), name, "the data file", as_published=as_published)
    return open_image(root, name)


WEB, IN_PLACE, AS_URL = ("http://", "https://"), "data:", "file://"
"""What begins a picture's text where that is no path."""
BARE_BASE64 = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR")
"""How the bytes of PNG, JPEG, GIF and WebP begin in base64."""
STORED = "bytes:"


@dataclass
class RowPictures:
    """Pictures in order: `names` are paths, or made of the content where `held` has the bytes."""

    sample_id: str
    names: list[str] = field(default_factory=list)
    held: dict[str, bytes] = field(default_factory=dict)

    def add(self, value: object, key: str) -> None:
        """Takes a path, bytes, an object with `bytes`, `path` or `url`, or a data URL."""
        if isinstance(value, Mapping):
            value = next((part for name in ("bytes", "path", "url") if (part := value.get(name)) is not None), None)
        if isinstance(value, bytes | bytearray) and value:
            self._hold(bytes(value))
        elif isinstance(value, str) and value.startswith(IN_PLACE):
            self._hold(self._from_data_url(value))
        elif isinstance(value, str) and value.startswith(BARE_BASE64) and (data := _from_base64(value)) is not None:
            self._hold(data)
        elif isinstance(value, str) and value.startswith(WEB):
            reason = f"{key!r} is on the web, {shown(value)}; fetch it and name the file"
            raise BadSample(self.sample_id, reason, ON_THE_WEB)
        elif isinstance(value, str) and value:
            self.names.append(value.removeprefix(AS_URL).replace("\\", "/"))
        else:
            raise BadSample(self.sample_id, f"{key!r} must be a path or a list of paths, got {shown(value)}")

    def _hold(self, data: bytes) -> None:
        name = STORED + hashlib.sha256(data).hexdigest()[:32]
        self.names.append(name)
        self.held[name] = data

    def _from_data_url(self, url: str) -> bytes:
        header, _, content = url.partition(",")
        data = _from_base64(content) if header.endswith(";base64") else None
        if data is None:
            raise BadSample(self.sample_id, f"its data URL {shown(url)} cannot be read: it is not base64")
        return data


def _from_base64(text: str) -> bytes | None:
    """The bytes, or None where the text is no base64: a path may begin alike."""
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        return None


def row_pictures(fields: Mapping[str, object], sample_id: str) -> RowPictures:
    """The pictures among a row's fields; one that is no list counts as a list of one."""
    pictures = RowPictures(sample_id)
    value = fields.get("images")
    if value is None or value in ("", b"", []) or value != value:  # NaN: a table's empty cell
        return pictures
    for picture in value if isinstance(value, list | tuple) else [value]:
        pictures.add(picture, "images")
    return pictures
