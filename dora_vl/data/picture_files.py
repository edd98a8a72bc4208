"""Picture files: the formats that are read, their limits, and how they are decoded.

Training decodes in its own workers (`load_picture`). What comes from elsewhere is decoded or looked at in a process
that can be ended (`limited_process`), by `decoded` and `picture_facts`. The limits are those of docs/data.md.
"""

from __future__ import annotations

import importlib
import importlib.util
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from io import BufferedReader, BytesIO, RawIOBase
from pathlib import Path
from typing import Any, cast

from PIL import ExifTags, Image, UnidentifiedImageError, features

from dora_vl.errors import DECODING_ERRORS
from dora_vl.files import NoRegularFile, open_regular
from dora_vl.limited_process import ENDED, Budget, JobFailed, LimitedProcess, Part, one_process

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
        decode: whether all of it must be readable.
        send: whether the picture is wanted, if it has at most `most_pixels`.
    """
    source = BytesIO(content) if path is None else Path(path)
    try:
        with opened_picture(source) as image:
            facts, (width, height) = {"format": image.format, "size": image.size}, image.size
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
