"""Pictures: where a row's paths lead, which files are read under which limits, and how they become pixels.

Training decodes in its own workers (`open_image`). What comes from elsewhere is decoded or looked at in a process that
can be ended (`limited_process`), by `decode_picture` and `picture_facts`. The limits are those of docs/data.md.
"""

from __future__ import annotations

import base64
import hashlib
import importlib
import importlib.util
import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from io import BufferedReader, BytesIO, RawIOBase
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast
from unicodedata import normalize

from PIL import ExifTags, Image, UnidentifiedImageError, features

from dora_vl.data.turns import Unusable
from dora_vl.errors import DECODING_ERRORS, ON_THE_WEB, BadSample, UserError, log_once, short_repr
from dora_vl.files import NoRegularFile, open_regular
from dora_vl.limited_process import ENDED, Budget, JobFailed, LimitedProcess, Part, one_process

if TYPE_CHECKING:
    import datasets

log = logging.getLogger(__name__)

MEBIBYTE = 2**20
PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "AVIF")
"""Only these of Pillow's formats are read: others start programs (EPS: Ghostscript) or have rarely used decoders.
HEIC is read beside them where pillow-heif is installed."""
PICTURE_PIXELS = 2**27
"""A picture of more pixels is refused: decoding this many takes 1 GB where it is plain."""
PLAIN_FORMATS, PLAIN_MODES = ("PNG", "JPEG", "MPO", "BMP", "TIFF"), ("1", "L", "P", "RGB")
OTHER_PIXELS = 50_000_000
"""The most pixels of other formats and modes, for which decoders and transparency take 12 to 17 bytes each."""
PICTURE_ELONGATION = 500
"""A side may be at most this many times the other: some models bring the shorter one to their own size."""
PICTURE_SIDE = 8_192
"""A picture with a longer side is shrunk to it when it is read, since many models pad to a square (pixels)."""
PICTURE_BYTES = 512 * MEBIBYTE
PICTURE_SECONDS = 10.0
"""Decoding a picture may take this many CPU seconds: a JPEG of 171 KB can be made of thousands of scans."""
PICTURE_MEMORY = 3_072 * MEBIBYTE  # of the process that looks at a picture

FRAME_PIXELS = 36_000_000  # 8K has 33 million
VIDEO_FRAMES = 2_000_000  # nine hours at 60 a second
VIDEO_SECONDS = 60.0  # of the processor for a file, and three times as many on the clock
VIDEO_MEMORY = 4_096 * MEBIBYTE  # of the decoder for a file, beyond what its libraries have

_TURNS: Mapping[object, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Maps EXIF's orientation to the turn that shows the stored pixels upright; any other value turns nothing."""
READING = "upright, transparency on white, 16 bits to 8"
"""Describes how files become pixels: features computed under another description are computed again."""
AS_PUBLISHED = "as stored"


class NoPicture(ValueError):
    """A picture is in none of the formats or over a limit; the message follows "picture X in Y"."""


class TooManyPixels(NoPicture):
    """A picture has more pixels than the request that shows it has left."""


NOT_DECODED = (*DECODING_ERRORS, RuntimeError, MemoryError, Image.DecompressionBombError)
"""Opening or decoding a picture raises these; `NoPicture` and `NoRegularFile` are among them."""


class _Timed(BufferedReader):
    """A picture's file that is read no further when its decoder has taken too long, which needs no other process."""

    def __init__(self, raw: RawIOBase) -> None:
        super().__init__(raw)
        self._end = time.thread_time() + PICTURE_SECONDS

    def read(self, size: int | None = -1, /) -> bytes:
        if time.thread_time() > self._end:
            raise NoPicture(f"takes more than {PICTURE_SECONDS:g} s of the processor to decode")
        return super().read(size)


@contextmanager
def opened_picture(source: Path | BytesIO) -> Iterator[Image.Image]:
    """Returns a picture whose header has been read and compared with the limits; nothing is decoded yet.

    Raises:
        FileNotFoundError: nothing is at the path.
        NoPicture: it is of no format that is read, or over a limit; the message has the numbers.
        NOT_DECODED: anything that Pillow raises.
    """
    raw = cast(RawIOBase, BytesIO(source.getvalue()) if isinstance(source, BytesIO) else open_regular(source))
    with _Timed(raw) as stream:
        size = stream.seek(0, 2)
        if size > PICTURE_BYTES:
            raise NoPicture(f"has {size:,} bytes; at most {PICTURE_BYTES:,} are read")
        stream.seek(0)
        start = stream.peek(16)[:16]
        formats = tuple(name for name in PICTURE_FORMATS if name != "AVIF" or features.check("avif"))
        if importlib.util.find_spec("pillow_heif"):
            importlib.import_module("pillow_heif").register_heif_opener()
            formats = (*formats, "HEIF")
        try:
            image = Image.open(stream, formats=formats)
        except UnidentifiedImageError:
            heic = start[4:8] == b"ftyp" and "HEIF" not in formats
            hint = "; a HEIC needs its decoder (pip install pillow-heif)" if heic else ""
            begins = f"it begins with {start[:12]!r}" if start else "it has 0 bytes"
            raise NoPicture(f"is not a whole picture of {', '.join(formats)}: {begins}{hint}") from None
        with image:
            width, height = image.size
            is_plain = image.format in PLAIN_FORMATS and image.mode in PLAIN_MODES and "transparency" not in image.info
            most = PICTURE_PIXELS if is_plain else OTHER_PIXELS
            if width * height > most:
                raise NoPicture(f"has {width:,} x {height:,} pixels; at most {most:,} are read of its format and mode")
            if max(image.size) > PICTURE_ELONGATION * min(image.size):
                message = f"has {width:,} x {height:,} pixels; a side may be {PICTURE_ELONGATION} times the other"
                raise NoPicture(message)
            pages = getattr(image, "n_frames", 1) if image.format in ("TIFF", "GIF") else 1
            if pages > 1:
                way = "name it under videos" if image.format == "GIF" else "write each page as a picture of its own"
                raise NoPicture(f"has {pages} pages or frames, of which one would be seen; {way}")
            yield image


def load_picture(source: Path | BytesIO, *, as_published: bool = False) -> Image.Image:
    """Returns a picture decoded whole, RGB, as `open_image` says; raises as `opened_picture`."""
    with opened_picture(source) as image:
        # After the header, compressed data never holds the end mark. Pillow misses its absence in some files.
        if image.format in {"JPEG", "JPEG2000"} and b"\xff\xd9" not in vars(image)["fp"].read():
            raise OSError("it is cut off: its end mark is missing")
        image.load()
        turn = None
        if not as_published:
            with suppress(*DECODING_ERRORS):  # damaged notes beside whole pixels
                turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
            if image.mode not in {"RGB", "L"} or "transparency" in image.info:
                image = _as_shown(image)
        image = image if image.mode == "RGB" else image.convert("RGB")
        if max(image.size) > PICTURE_SIDE:
            image.thumbnail((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.BICUBIC, reducing_gap=3.0)
        return image if turn is None else image.transpose(turn)


def _as_shown(image: Image.Image) -> Image.Image:
    """Returns a decoded picture as a viewer shows it."""
    if image.mode == "F" or image.mode.startswith("I"):
        if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
            raise NoPicture("holds real or 32-bit numbers, and nothing says which of them is white")
        image = image.convert("I").point(lambda value: value / 256).convert("L")  # greys of 16 bits
    elif image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image if image.mode == "RGBA" else image.convert("RGBA"))
        image = white
    image.info.pop("transparency", None)
    return image


def why_not_decoded(error: BaseException) -> str:
    """Says why a picture could not be decoded, as text that follows "picture X in Y"."""
    if isinstance(error, NoPicture):
        return str(error)
    if isinstance(error, NoRegularFile):
        return f"cannot be read: {error}"
    return f"cannot be decoded: {type(error).__name__}: {' '.join(str(error).split())}"


# -- in a process that can be ended: `read_picture` runs there

STRIP_BYTES = 4 * MEBIBYTE


def read_picture(content: bytes, path: str | None, most_pixels: int, decode: bool, send: bool) -> Iterator[Part]:
    """Runs as a job of `limited_process`: yields what a picture's header says, and the picture.

    Args:
        path: where the file is; None: `content` is the file.
        decode: True refuses a picture of which any part cannot be read.
        send: True yields the picture too.
    """
    source = BytesIO(content) if path is None else Path(path)
    try:
        with opened_picture(source) as image:
            facts, (width, height) = {"format": image.format, "size": image.size}, image.size
            turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
            facts["shown"] = (height, width) if turned else (width, height)
        if width * height > most_pixels:
            raise TooManyPixels(f"has {width:,} x {height:,} pixels; {most_pixels:,} are left of those allowed")
        picture = load_picture(source) if decode or send else None
    except (NoPicture, MemoryError):
        raise
    except NOT_DECODED as error:
        raise NoPicture(why_not_decoded(error)) from None
    yield facts, b""
    if send and picture is not None:
        yield from parts_of(picture)


def parts_of(image: Image.Image, **facts: Any) -> Iterator[Part]:
    """Yields an RGB picture in strips, the first with its size and `facts`."""
    rows = max(1, STRIP_BYTES // (3 * image.width))
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        yield {"size": image.size, **facts} if top == 0 else {}, strip.tobytes()


def picture_of(first: Part, others: Iterator[Part], budget: Budget) -> Image.Image:
    """Returns the picture that `parts_of` has sent; its pixels are taken from the budget before it has any memory."""
    width, height = map(int, first[0]["size"])
    budget.pixels -= width * height
    if budget.pixels < 0:
        raise JobFailed(TooManyPixels.__name__, f"has {width:,} x {height:,} pixels, more than are left")
    image, top, strip = Image.new("RGB", (width, height)), 0, first[1]
    while True:
        rows = len(strip) // (3 * width)
        image.paste(Image.frombytes("RGB", (width, rows), strip), (0, top))
        top += rows
        if top >= height:
            return image
        strip = next(others)[1]


def decode_picture(process: LimitedProcess, content: bytes, budget: Budget) -> Image.Image:
    """Returns a picture decoded in that process. Raises JobFailed: it cannot be, or costs more than the budget."""
    arguments = {"path": None, "most_pixels": budget.pixels, "decode": True, "send": True}
    with closing(process.run("read_picture", arguments, content, budget=budget)) as parts:
        next(parts)
        picture = picture_of(next(parts), parts, budget)
        for _ in parts:  # to its end, so that the process may go on
            raise JobFailed(ENDED, "is followed by more than itself")
    return picture


def picture_facts(source: Path | BytesIO, *, decode: bool) -> Mapping[str, Any]:
    """Returns a picture's format and size, by its header; to `decode`, all of it must be readable. Raises JobFailed."""
    content, path = (source.getvalue(), None) if isinstance(source, BytesIO) else (b"", str(source.absolute()))
    arguments = {"path": path, "most_pixels": PICTURE_PIXELS, "decode": decode, "send": False}
    budget = Budget(PICTURE_SECONDS, PICTURE_MEMORY)
    ((facts, _),) = one_process().run("read_picture", arguments, content, budget=budget)
    return facts


TRUNCATED, BROKEN = "truncated media", "broken media"


@dataclass(frozen=True)
class Trouble:
    """Says why a file cannot be used; `kind` is the same for all files with that trouble."""

    kind: str
    detail: str

    @classmethod
    def of(cls, error: JobFailed) -> Trouble:
        """Tells why a file could not be read in the process that can be ended."""
        reason = str(error)
        return cls(TRUNCATED if "truncated" in reason or "cut off" in reason else BROKEN, reason)


def decoding_trouble(source: Path | BytesIO) -> Trouble | None:
    """Returns what is wrong with a picture, decoded whole within the limits of training; None: nothing."""
    try:
        picture_facts(source, decode=True)
    except JobFailed as error:
        return Trouble.of(error)
    return None


PICTURE_ENDINGS = (
    "jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "jpe", "jfif", "apng", "mpo",
    "jp2", "j2k", "jpc", "jpf", "jpx", "j2c", "avif", "avifs", "heic", "heif", "hif",
)  # fmt: skip
VIDEO_ENDINGS = (
    "mp4", "mkv", "webm", "avi", "mov", "m4v", "ts", "m2ts", "flv", "mpg", "mpeg", "vob", "wmv", "asf", "mxf",
)  # fmt: skip
ENDINGS = {"JPEG": "jpg", "TIFF": "tif"}
"""Maps Pillow's names of formats to file endings, where they differ."""


def save_picture(data: bytes, folder: Path, sample_id: str) -> str:
    """Writes a picture that a table holds into `folder`/media, named by its content; returns its path from `folder`.

    It is decoded first: in a table that was cut or damaged, one may begin and end well.
    """
    try:
        kind = str(picture_facts(BytesIO(data), decode=False)["format"])
    except JobFailed as error:
        raise BadSample(sample_id, f"its picture {error}") from None
    relative = f"media/{hashlib.sha256(data).hexdigest()[:32]}.{ENDINGS.get(kind, kind.lower())}"
    target = folder / relative
    if target.is_file() and target.stat().st_size == len(data):
        return relative
    if trouble := decoding_trouble(BytesIO(data)):
        raise BadSample(sample_id, f"its picture is {trouble.kind.removesuffix(' media')}: {trouble.detail}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)  # one that a kill cuts short has another size, and is written again
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror or error}); free some space") from error
    return relative


STORED = "bytes:"
"""The name of a picture that the data file holds begins so."""
HeldPictures: TypeAlias = Mapping[str, bytes]
"""Maps names to the bytes of pictures that a data file holds."""


@dataclass(frozen=True)
class MediaFolder:
    """Says where the paths of pictures or videos start, and how the files there are read.

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
    """Returns the picture at `relative` under `root`, or among those that the data file holds, as a viewer shows it.

    It is RGB, decoded whole, turned as its EXIF orientation says, what is transparent laid on white, 16-bit grey scaled
    to 8 bits. LLaVA's own code does none of these (`convert("RGB")` in c121f04, `llava/train/train.py`): it reads a
    phone's photograph sideways, shows whatever colour is stored below transparency, and clips 16 bits to white; so does
    this `as_published`. Every other picture has the same pixels there and here, but for those with a side of more than
    `PICTURE_SIDE` pixels, which are shrunk to it.
    """
    folder = root if isinstance(root, MediaFolder) else MediaFolder(root)
    if stored is not None and relative in stored:
        source, where = BytesIO(stored[relative]), "the data file"
    else:
        source, where = path_inside(folder, relative), folder
    try:
        return load_picture(source, as_published=folder.as_published)
    except FileNotFoundError:
        raise BadSample(relative, f"picture {relative} is missing in {where}") from None
    except NOT_DECODED as error:
        raise BadSample(relative, f"picture {relative} in {where} {why_not_decoded(error)}") from None


def path_inside(root: Path | MediaFolder, relative: str, *, kind: str = "picture") -> Path:
    """Returns where the file at `relative` is, if that is inside `root`; `kind` is what the messages call it.

    Where nothing has exactly that name, it is the one file whose name differs only in upper and lower case, or in how
    Unicode writes an accent.
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
    """Returns the path below `root`, its file as the folder has it: `up.jpg` is `UP.JPG` where only that is there."""
    path = root / relative
    names = () if os.path.lexists(path) else _names_in(path.parent).get(_plain(path.name), ())
    if len(names) != 1:
        return path
    reason = "files whose names differ from the data's only in letter case or Unicode form are used"
    log_once(log, logging.WARNING, f"{root}: {reason}")
    return path.with_name(names[0])


@lru_cache(maxsize=64)
def _names_in(folder: Path) -> Mapping[str, Sequence[str]]:
    """Returns a folder's names, by what `_plain` makes of them, as they were when it was first asked for."""
    names: dict[str, list[str]] = {}
    with suppress(OSError, ValueError):
        for path in folder.iterdir():
            names.setdefault(_plain(path.name), []).append(path.name)
    return names


def _plain(name: str) -> str:
    """Returns a name in one case, its accents as parts of their letters: macOS writes them as characters."""
    return normalize("NFC", name).casefold()


def any_is_there(names: Iterable[str], root: Path) -> bool:
    """Tells whether any of these paths leads to something from `root`; a root that is another one has none."""
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
        """Returns the pictures of several files."""
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
"""A picture's text that begins so is not a path."""
BARE_BASE64 = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR")
"""PNG, JPEG, GIF and WebP begin so in base64."""


def picture_name(value: object, key: str, image_bytes: dict[str, bytes]) -> str:
    """Returns a picture's path, or a name made of its content, which goes into `image_bytes`.

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
            raise Unusable(f"its data URL {short_repr(value)} cannot be read: it is not base64")
        value = content
    elif isinstance(value, str) and value.startswith(BARE_BASE64):
        value = _from_base64(value) or value  # a path may begin alike
    if isinstance(value, bytes | bytearray) and value:
        name = STORED + hashlib.sha256(value).hexdigest()[:32]
        image_bytes[name] = bytes(value)
        return name
    if not isinstance(value, str) or not value:
        raise Unusable(f"{key!r} must be a path or a list of paths, got {short_repr(value)}")
    if value.startswith(WEB):
        raise Unusable(f"{key!r} is on the web, {short_repr(value)}; fetch it and name the file", ON_THE_WEB)
    return value.removeprefix(AS_URL).replace("\\", "/")


def _from_base64(text: str) -> bytes | None:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        return None
