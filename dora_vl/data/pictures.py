"""Pictures of a sample: as a row names or holds them, below their folder or in the data file; decoded as a whole.

The limits are those of docs/data.md. A header's numbers are compared before anything is decoded, so that a small file
cannot ask for all memory; nothing but Pillow's own decoders ever runs.
"""

from __future__ import annotations

import base64
import hashlib
import importlib
import importlib.util
import logging
import os
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, lru_cache
from io import BufferedReader, BytesIO, RawIOBase
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, cast

import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError, features
from PIL.TiffImagePlugin import IMAGELENGTH, IMAGEWIDTH, PHOTOMETRIC_INTERPRETATION, TiffImageFile

from dora_vl.errors import DECODING_ERRORS, ON_THE_WEB, BadSample, UserError, shown
from dora_vl.files import NoRegularFile, open_regular

if TYPE_CHECKING:
    import datasets


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
ROWS_AT_ONCE = 256
PNG_MARK = b"\x89PNG\r\n\x1a\n"
MOST_CHUNKS = 100_000
END_MARK, SCAN = b"\xff\xd9", b"\xff\xda"
MOST_MENDED = 2**26
"""Pixels of a JPEG that is decoded four times."""
RESTARTS = b"\xff\xdd"
"""The mark of a JPEG of parts, whose reader looks for the next one's mark instead of reading on."""
INSTEAD_OF_A_CUT = (b"", b"\x55" * 64, b"\xaa" * 64)
"""Bits that would be read as pixels where some are missing, and as nothing where none are."""

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


class NoPicture(ValueError):
    """Not one of the formats, or over a limit: what stands behind "picture X in Y"."""


NOT_DECODED = (*DECODING_ERRORS, RuntimeError, MemoryError, Image.DecompressionBombError)
"""Whatever opening or decoding a picture raises; `NoPicture` and `NoRegularFile` are among them."""


class _Header(BufferedReader):
    """A picture's file that counts what Pillow reads of its header, piece by piece, until the header is over.

    Pillow joins the blocks of a GIF's comment, and of a JPEG's EXIF, one after the other, copying all before each: the
    square of their number. Without a limit a GIF of 20 MB took 37 s, a JPEG of 131 MB 70 s.
    """

    reads = size = 0
    is_over = False

    def read(self, size: int | None = -1, /) -> bytes:
        content = super().read(size)
        if not self.is_over:
            self.reads, self.size = self.reads + 1, self.size + len(content)
            if self.reads * self.size > HEADER_READS_TIMES_BYTES:
                raise NoPicture(f"has a header of more than {self.reads:,} pieces and {self.size:,} bytes")
        return content


@contextmanager
def opened_picture(source: Path | BytesIO) -> Iterator[Image.Image]:
    """A picture whose header has been read and compared with the limits; nothing is decoded yet.

    Raises:
        FileNotFoundError: nothing is at the path.
        NoPicture: it is of no format that is read, or over a limit; the message has the numbers.
        NOT_DECODED: anything that Pillow raises.
    """
    raw = cast(RawIOBase, BytesIO(source.getvalue()) if isinstance(source, BytesIO) else open_regular(source))
    with _Header(raw) as stream:
        size = stream.seek(0, 2)
        if size > PICTURE_BYTES:
            raise NoPicture(f"has {size:,} bytes; at most {PICTURE_BYTES:,} are read")
        stream.seek(0)
        start = stream.peek(64)[:64]
        brands = start[8 : int.from_bytes(start[:4], "big")]  # which its first box lists
        is_heic = start[4:8] == b"ftyp" and any(brand in brands for brand in HEIC_BRANDS)
        formats = tuple(name for name in PICTURE_FORMATS if name != "AVIF" or features.check("avif"))
        if is_heic and importlib.util.find_spec("pillow_heif"):
            importlib.import_module("pillow_heif").register_heif_opener()
            formats = ("HEIF",)
        try:
            image = Image.open(stream, formats=formats)
        except UnidentifiedImageError:
            raise NoPicture(_why_no_picture(start[:16], formats, is_heic)) from None
        stream.is_over = True
        with image:
            width, height = image.size
            if width * height > PICTURE_PIXELS:
                raise NoPicture(f"has {width:,} x {height:,} pixels; at most {PICTURE_PIXELS:,} are read")
            if max(image.size) > PICTURE_ELONGATION * min(image.size):
                raise NoPicture(
                    f"has {width:,} x {height:,} pixels; a side may be {PICTURE_ELONGATION} times the other"
                )
            if (
                isinstance(image, TiffImageFile)
                and (tags := image.tag_v2).get(PHOTOMETRIC_INTERPRETATION) == YCBCR
                and not image.use_load_libtiff
            ):  # not compressed, of which Pillow's own reader makes nothing
                image.use_load_libtiff = True
                extents = (0, 0, tags[IMAGEWIDTH], tags[IMAGELENGTH])
                image.tile = [ImageFile._Tile("libtiff", extents, 0, ("RGBX", "raw", False, tags.offset))]
            yield image


def _why_no_picture(start: bytes, formats: Sequence[str], is_heic: bool) -> str:
    if is_heic:
        missing = "is a HEIC; its decoder is missing (pip install pillow-heif)"
        return "cannot be read as a HEIC" if "HEIF" in formats else missing
    for name in formats:
        _, begins_as_one = Image.OPEN[name]
        if begins_as_one is not None and begins_as_one(start) is True:
            return f"begins as a {name} and is cut or damaged near its start"
    begins = f"it begins with {start[:12]!r}" if start else "it has 0 bytes"
    return f"is no picture of {', '.join(formats)}: {begins}"


def load_picture(source: Path | BytesIO, *, as_published: bool = False, mend: bool = True) -> Image.Image:
    """A picture decoded whole, RGB, as `open_image` says; raises as `opened_picture`.

    Args:
        mend: what Pillow refuses for a flaw that leaves no pixel in doubt is read all the same, see `_mended`.
    """
    try:
        with opened_picture(source) as image:
            # Behind the header the end mark never stands among what is compressed. Pillow misses it in some files only.
            if image.format in {"JPEG", "JPEG2000"} and END_MARK not in vars(image)["fp"].read():
                raise OSError("it is cut off: its end mark is missing")
            image.load()
            turn = None
            if not as_published:
                with suppress(*DECODING_ERRORS):  # damaged notes beside whole pixels
                    turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
                if image.mode not in {"RGB", "L"} or "transparency" in image.info:
                    image = _as_shown(image)
            image = image.convert("RGB")
            if max(image.size) > PICTURE_SIDE:
                image.thumbnail((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.BICUBIC, reducing_gap=3.0)
            return image if turn is None else image.transpose(turn)
    except (FileNotFoundError, NoRegularFile):
        raise
    except NOT_DECODED as error:
        mended = _mended(source, error) if mend else None
        if mended is None:
            raise
    return load_picture(BytesIO(mended), as_published=as_published, mend=False)


def _as_shown(image: Image.Image) -> Image.Image:
    """A decoded picture as a viewer shows it."""
    if image.mode == "F" or image.mode.startswith("I"):
        image = _eight_bits(image)
    elif image.mode in _WITH_ALPHA or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image if image.mode == "RGBA" else image.convert("RGBA"))
        image = white
    image.info.pop("transparency", None)
    return image


def _mended(source: Path | BytesIO, error: BaseException) -> bytes | None:
    """What other readers open too: a PNG without its notes, a JPEG with the end mark that it lacks."""
    with BytesIO(source.getvalue()) if isinstance(source, BytesIO) else open_regular(source) as stream:
        content = stream.read(PICTURE_BYTES + 1)
    if len(content) > PICTURE_BYTES:
        return None
    if content.startswith(PNG_MARK):
        return _without_notes(content)
    is_jpeg = content.startswith(b"\xff\xd8\xff") and not isinstance(error, NoPicture)
    return _with_end_mark(content) if is_jpeg else None


def _without_notes(content: bytes) -> bytes | None:
    """A PNG's chunks that decide pixels: critical ones, transparency, and the orientation if its checksum is right."""
    chunks, start = [PNG_MARK], len(PNG_MARK)
    for _ in range(MOST_CHUNKS):
        if start >= len(content):
            return b"".join(chunks)
        length, name = int.from_bytes(content[start : start + 4], "big"), content[start + 4 : start + 8]
        chunk = content[start : start + 12 + length]
        is_intact = name == b"eXIf" and zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")
        if name[:1].isupper() or name == b"tRNS" or is_intact:
            chunks.append(chunk)
        start += 12 + length
    return None


def _with_end_mark(content: bytes) -> bytes | None:
    """Of a JPEG of one scan in one part that holds every block; None where pixels are missing, or may be."""
    content = content.rstrip(b"\xff")
    if content.endswith(bytes(4)):  # as a download leaves that was given its length beforehand
        content = content.rstrip(b"\0")
    sums: set[int] = set()
    try:
        with opened_picture(BytesIO(content)) as image:
            scan = content.rfind(SCAN, 0, vars(image)["fp"].tell())
            several_scans = image.info.get("progressive") or content[scan + 4] != len(image.getbands())
            if several_scans or RESTARTS in content or image.width * image.height > MOST_MENDED:
                return None
        for instead in INSTEAD_OF_A_CUT:
            with opened_picture(BytesIO(content + instead + END_MARK)) as image:
                image.load()
                checksum = 0  # by rows: a copy of a large picture takes half a gigabyte
                for top in range(0, image.height, ROWS_AT_ONCE):
                    rows = image.crop((0, top, image.width, min(top + ROWS_AT_ONCE, image.height)))
                    checksum = zlib.crc32(rows.tobytes(), checksum)
                sums.add(checksum)
    except NOT_DECODED:  # IndexError where it ends in its header
        return None
    return content + END_MARK if len(sums) == 1 else None


def _eight_bits(image: Image.Image) -> Image.Image:
    """Greys of real numbers, from black at 0 to white at 1, or of whole ones, by as many bits as they have.

    PNG and JPEG 2000 use all 16. A TIFF stores those of 10, 12 and 14 bits in 16 and does not say so: they are as many
    as the brightest needs.
    """
    if image.mode == "F":
        numbers = np.asarray(image)
        if not bool(((numbers >= 0) & (numbers <= 1)).all()):  # nothing says which of them is white
            least, most = float(numbers.min()), float(numbers.max())
            raise NoPicture(f"holds floating-point numbers from {least:g} to {most:g}; those from 0 to 1 are read")
        return image.point(lambda value: value * 255 + 0.5).convert("L")
    says_its_depth = not isinstance(image, TiffImageFile)
    image = image if image.mode in {"I", "I;16"} else image.convert("I")
    least, most = (int(end) for end in image.getextrema() if isinstance(end, int | float))
    if least < 0 or most >= 2 ** DEPTHS[-1]:
        # Pillow would make black and white of these, without a word.
        raise NoPicture(f"holds numbers from {least:,} to {most:,}; those from 0 to {2 ** DEPTHS[-1] - 1:,} are read")
    bits = DEPTHS[-1] if says_its_depth else next(bits for bits in DEPTHS if most < 2**bits)
    if 8 < bits < DEPTHS[-1]:
        _log_depth(bits)
    return image.point(lambda value: value / 2 ** (bits - 8)).convert("L")


@cache
def _log_depth(bits: int) -> None:
    """Once in a process."""
    log.warning("TIFFs of 16-bit numbers whose brightest is below %s are read as of %d bits", f"{2**bits:,}", bits)


def bad_picture(error: BaseException, name: str, where: object) -> BadSample:
    """What `load_picture` raised, for a picture and a place as the message calls them."""
    if isinstance(error, FileNotFoundError):
        reason = f"is missing in {where}"
    elif isinstance(error, NoPicture):
        reason = f"in {where} {error}"
    elif isinstance(error, NoRegularFile):
        reason = f"in {where} cannot be read: {error}"
    else:
        reason = f"in {where} cannot be decoded: {type(error).__name__}: {' '.join(str(error).split())}"
    return BadSample(name, f"picture {name} {reason}")


TRUNCATED, BROKEN = "truncated media", "broken media"


@dataclass(frozen=True)
class Trouble:
    """Why a file cannot be used; `kind` is the same for all files with that trouble."""

    kind: str
    detail: str


def decoding_trouble(source: Path | BytesIO) -> Trouble | None:
    """What is wrong with a picture that is decoded whole, within the limits of training; None where nothing is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            load_picture(source)
        except NoPicture as error:
            return Trouble(BROKEN, str(error))
        except NOT_DECODED as error:
            reason = " ".join(str(error).split())[:120] or type(error).__name__
            return Trouble(TRUNCATED if "truncated" in reason or "cut off" in reason else BROKEN, reason)
    return None


ENDINGS = {"JPEG": "jpg", "TIFF": "tif"}
"""How files of a format are called where it is not by the format's own name."""


def save_picture(data: bytes, folder: Path, sample_id: str) -> str:
    """Writes a picture that a table holds into `folder`/media, named by its content; returns its path from `folder`.

    It is decoded first: in a table that was cut or damaged, one may begin and end well.
    """
    try:
        with opened_picture(BytesIO(data)) as image:
            kind = str(image.format)
    except NOT_DECODED as error:
        raise BadSample(sample_id, f"its picture cannot be read: {error}") from None
    relative = f"media/{hashlib.sha256(data).hexdigest()[:32]}.{ENDINGS.get(kind, kind.lower())}"
    target = folder / relative
    if target.is_file() and target.stat().st_size == len(data):
        return relative
    if trouble := decoding_trouble(BytesIO(data)):
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


STORED = "bytes:"
"""How the names of pictures begin that a data file holds itself."""
HeldPictures: TypeAlias = Mapping[str, bytes]
"""Those pictures by their names."""


@dataclass(frozen=True)
class MediaFolder:
    """Where the paths of pictures or videos start, and how the files there are read.

    Attributes:
        follow_links: a file may be a link that leads out of it, as DVC and git-annex lay them (`data.follow_links`).
        as_published: pictures become pixels as in LLaVA's own code (`data.as_published`), see `open_image`.
    """

    root: Path
    follow_links: bool = False
    as_published: bool = False

    def __str__(self) -> str:
        return str(self.root)


def open_image(root: Path | MediaFolder, relative: str, stored: HeldPictures | None = None) -> Image.Image:
    """The picture at `relative` under `root`, or among those that the data file holds, as a viewer shows it.

    It is RGB, decoded whole, turned as its EXIF orientation says, what is transparent laid on white, 16-bit grey scaled
    to 8 bits. LLaVA's own code does none of these (`convert("RGB")` in c121f04, `llava/train/train.py`): it reads a
    phone's photograph sideways, shows whatever colour is stored below transparency, and clips 16 bits to white; so does
    this `as_published`. Every other picture has the same pixels there and here, but for those with a side of more than
    `PICTURE_SIDE` pixels, which are shrunk to it.
    """
    folder = root if isinstance(root, MediaFolder) else MediaFolder(root)
    if relative.startswith(STORED) and stored is not None and relative in stored:
        source, where = BytesIO(stored[relative]), "the data file"
    else:
        source, where = path_inside(folder, relative), folder
    try:
        return load_picture(source, as_published=folder.as_published)
    except NOT_DECODED as error:
        raise bad_picture(error, relative, where) from None


def path_inside(root: Path | MediaFolder, relative: str, *, kind: str = "picture") -> Path:
    """Where the file at `relative` is, if that is inside `root`; `kind` is what the messages call it.

    Where nothing has exactly that name, it is the one file whose name differs in upper and lower case alone.
    """
    folder = root if isinstance(root, MediaFolder) else MediaFolder(root)
    parts = Path(relative)
    # An absolute one may lie below it by its name; where links lead is seen afterwards.
    is_outside = parts.is_absolute() and not any(
        parts.is_relative_to(start) for start in (folder.root.absolute(), folder.root.resolve())
    )
    if not relative or "\0" in relative or is_outside:
        raise BadSample(relative, f"{kind} path {relative!r} must be relative to {folder}, or lie in it")
    if ".." in parts.parts:
        raise BadSample(relative, f"{kind} path {relative!r} must not leave {folder}")
    path = as_spelled(folder.root, relative)
    if folder.follow_links:
        return path
    try:
        real, real_root = path.resolve(), folder.root.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle, a name too long, or of no encoding
        raise BadSample(relative, f"{kind} path {relative!r} cannot be followed: {error}") from None
    if not real.is_relative_to(real_root):
        remedy = "data.follow_links: true (--follow-links) reads such links"
        raise BadSample(relative, f"{kind} {relative} is a link that leads out of {folder}, to {real}; {remedy}")
    return path


def as_spelled(root: Path, relative: str) -> Path:
    """The path below `root`, its file as the folder has it: `up.jpg` is `UP.JPG` where only that is there."""
    path = root / relative
    names = () if os.path.lexists(path) else _names_in(path.parent).get(path.name.casefold(), ())
    if len(names) != 1:
        return path
    _log_spelling(root)
    return path.with_name(names[0])


@lru_cache(maxsize=64)
def _names_in(folder: Path) -> Mapping[str, Sequence[str]]:
    """A folder's names, by what they are in one case, as they were when it was first asked for."""
    names: dict[str, list[str]] = {}
    with suppress(OSError, ValueError):
        for path in folder.iterdir():
            names.setdefault(path.name.casefold(), []).append(path.name)
    return names


@cache
def _log_spelling(root: Path) -> None:
    """Once in a process."""
    log.warning("%s: names of files that differ from the data's in upper and lower case alone are taken for them", root)


def any_is_there(names: Iterable[str], root: Path) -> bool:
    """Whether any of these paths leads to something from `root`; a root that is another one has none."""
    for name in names:
        try:
            if as_spelled(root, name).exists():
                return True
        except (OSError, ValueError):  # a name that no file system takes
            continue
    return False


class StoredPictures(HeldPictures):
    """Bytes by the name that a row gives them, which is made of their content; worker processes may have it."""

    def __init__(self, tables: Sequence[datasets.Dataset]) -> None:
        self._tables = [table.select_columns(["held_pictures"]) for table in tables]
        self._places: dict[str, tuple[int, int, int]] = {}
        for number, table in enumerate(self._tables):
            for chunk_number, chunk in enumerate(table.data.column("held_pictures").chunks):
                names = chunk.flatten().field("name").to_pylist()
                self._places |= {name: (number, chunk_number, index) for index, name in enumerate(names)}

    @classmethod
    def joined(cls, parts: Sequence[StoredPictures]) -> StoredPictures:
        """The pictures of several files."""
        return cls([table for part in parts for table in part._tables])

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __getitem__(self, name: str) -> bytes:
        table, chunk, index = self._places[name]
        pictures = self._tables[table].data.column("held_pictures").chunk(chunk).flatten()
        return pictures.field("content")[index].as_py()


WEB, IN_PLACE, AS_URL = ("http://", "https://"), "data:", "file://"
"""What begins a picture's text where that is no path."""
BARE_BASE64 = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR")
"""How the bytes of PNG, JPEG, GIF and WebP begin in base64."""


def picture_name(value: object, key: str, sample_id: str, image_bytes: dict[str, bytes]) -> str:
    """A picture's path, or a name made of its content, which goes into `image_bytes`.

    Args:
        value: a path, bytes, an object with `bytes`, `path` or `url`, or a data URL; no address on the web.
        key: what messages call it.
    """
    if isinstance(value, Mapping):
        value = next((part for name in ("bytes", "path", "url") if (part := value.get(name)) is not None), None)
    if isinstance(value, str) and value.startswith(IN_PLACE):
        header, _, text = value.partition(",")
        content = _from_base64(text) if header.endswith(";base64") else None
        if content is None:
            raise BadSample(sample_id, f"its data URL {shown(value)} cannot be read: it is not base64")
        value = content
    elif isinstance(value, str) and value.startswith(BARE_BASE64):
        value = _from_base64(value) or value  # a path may begin alike
    if isinstance(value, bytes | bytearray) and value:
        name = STORED + hashlib.sha256(value).hexdigest()[:32]
        image_bytes[name] = bytes(value)
        return name
    if not isinstance(value, str) or not value:
        raise BadSample(sample_id, f"{key!r} must be a path or a list of paths, got {shown(value)}")
    if value.startswith(WEB):
        raise BadSample(sample_id, f"{key!r} is on the web, {shown(value)}; fetch it and name the file", ON_THE_WEB)
    return value.removeprefix(AS_URL).replace("\\", "/")


def _from_base64(text: str) -> bytes | None:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        return None
