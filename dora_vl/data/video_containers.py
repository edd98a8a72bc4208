"""Whether a video file is of a format that is read, and as long as it says itself.

A decoder shows what there is of a cut file, and thinks other frames are in its middle. Each container states lengths,
which are compared with the file's own:

- MP4 and MOV: every box's (ISO/IEC 14496-12, 4.2);
- Matroska and WebM: the segment's; where that was written as a stream, without one, every element's, and the
  duration against the last block's time (RFC 9559, RFC 8794);
- AVI: every RIFF chunk's, and those of the index beyond them (OpenDML AVI 1.02);
- GIF: its blocks, up to the trailer (GIF89a, 27);
- WMV: its objects (ASF 01.20.03, 2); MXF: its triplets, and where its footer begins (SMPTE 377-1);
- FLV: its tags (FLV 10.1); MPEG program streams: their packets (ISO/IEC 13818-1, 2.5); transport streams: whole ones.

What a stream (`STREAMS`) lost at the very end of a block it cannot know, as its container has no length: there
`video_backends` looks whether the last picture is whole. FFmpeg's other formats,
playlists among them, which name further files and addresses, are not opened.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from dora_vl.files import open_regular

FORMATS = "MP4, MOV, Matroska, WebM, AVI, GIF, FLV, WMV, MXF, MPEG program and transport streams"
STREAMS = ("mpegts", "mpeg")
MP4_BOXES = frozenset({b"ftyp", b"styp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot", b"uuid"})
EBML, SEGMENT, INFO, CLUSTER, BLOCK_GROUP = 0x1A45DFA3, 0x18538067, 0x1549A966, 0x1F43B675, 0xA0
CLUSTER_TIME, SIMPLE_BLOCK, BLOCK, TIME_SCALE, DURATION = 0xE7, 0xA3, 0xA1, 0x2AD7B1, 0x4489
SPARE_SECONDS = 2.0
"""How far before the stated duration the last block may begin: it is itself shown for a while."""
PACKET, TIMED_PACKET = 188, 192
BEGINNING = 2 * TIMED_PACKET + 8
MOST_PARTS = 2_000_000
"""Boxes, chunks, blocks or tags that are walked through: 0.5 GB of GIF, and no file that costs minutes."""
MOST_ELEMENTS = 500_000
"""Likewise of a Matroska stream, where each takes longer: the blocks of four hours."""


class NotWhole(ValueError):
    """A video file that is shorter than it says; the message has the numbers."""


class NoVideoFormat(ValueError):
    """The beginning is that of no format that is read."""


def check_whole_video(path: Path) -> str:
    """FFmpeg's name of the file's container, after comparing all lengths in it with the file's.

    Raises:
        NoVideoFormat: it is none of `FORMATS`.
        NotWhole: it is cut off, or damaged where its lengths stand.
        FileNotFoundError, NoRegularFile, OSError: see `open_regular`.
    """
    with open_regular(path) as file:
        size = file.seek(0, 2)
        file.seek(0)
        if not size:
            raise NotWhole("is empty")
        name, check = _container(file.read(BEGINNING))
        file.seek(0)
        try:
            check(file, size)
        except (EOFError, ValueError, struct.error) as error:
            if isinstance(error, NotWhole):
                raise
            raise NotWhole(f"is cut off or damaged: one of its lengths is none, within {size:,} bytes") from None
        return name


def container_of(path: Path) -> str:
    """FFmpeg's name of the file's container, by its first bytes.

    Raises:
        NoVideoFormat: it is none of `FORMATS`.
    """
    with open_regular(path) as file:
        return _container(file.read(BEGINNING))[0]


def _container(beginning: bytes) -> tuple[str, Callable[[BinaryIO, int], None]]:
    if beginning[4:8] in MP4_BOXES:
        return "mov", _check_boxes
    for start, found in _BY_START.items():
        if beginning.startswith(start):
            return found
    if beginning[:4] == b"RIFF" and beginning[8:12] == b"AVI ":
        return "avi", _check_riff
    for length, offset in ((PACKET, 0), (TIMED_PACKET, 4)):
        if beginning[offset : offset + 1] == beginning[offset + length : offset + length + 1] == b"G":
            return "mpegts", _packets(length)
    raise NoVideoFormat(f"begins with {beginning[:8]!r}, which is no known video format ({FORMATS})")


def _cut(size: int, wanted: int) -> NotWhole:
    return NotWhole(f"is cut off: it has {size:,} of {wanted:,} bytes")


def _damaged(place: int) -> NotWhole:
    return NotWhole(f"is cut off or damaged: at byte {place:,} begins nothing that its format has")


def _parts(most: int | None = None) -> Iterator[int]:
    """Counts them.

    Raises:
        NotWhole: there are too many.
    """
    most = MOST_PARTS if most is None else most
    yield from range(most)
    raise NotWhole(f"has more than {most:,} parts, and so many are not looked through")


# -- MP4 -----------------------------------------------------------------------------------------------------


def _check_boxes(file: BinaryIO, size: int) -> None:
    place, names = 0, set[bytes]()
    for _ in _parts():
        if place >= size:
            break
        file.seek(place)
        head = file.read(16)
        if len(head) < 8:
            raise _cut(size, place + 8)
        length, name = struct.unpack(">I4s", head[:8])
        if length == 1 and len(head) == 16:
            length = int.from_bytes(head[8:], "big")
        elif length == 0:  # to the end of the file
            length = size - place
        if length < 8:
            raise _damaged(place)
        if place + length > size:
            raise _cut(size, place + length)
        names.add(name)
        place += length
    if b"moov" not in names:
        raise NotWhole("is cut off: it has no index (moov box)")


# -- Matroska, WebM ------------------------------------------------------------------------------------------


def _number(file: BinaryIO, *, keep_marker: bool) -> int | None:
    """EBML's variable-length number; None where all its bits are one, which stands for "unknown".

    Raises:
        EOFError: the file ends in it.
        ValueError: it begins with a byte that begins none.
    """
    first = file.read(1)
    if not first:
        raise EOFError
    length = 9 - first[0].bit_length()
    if length > 8:
        raise ValueError("no number")
    rest = file.read(length - 1)
    if len(rest) < length - 1:
        raise EOFError
    value = int.from_bytes(first + rest, "big")
    if keep_marker:
        return value
    value &= (1 << 7 * length) - 1
    return None if value == (1 << 7 * length) - 1 else value


def _element(file: BinaryIO, place: int, size: int) -> tuple[int, int, int | None]:
    """An element's id, where its content begins, and its length."""
    file.seek(place)
    try:
        name, length = _number(file, keep_marker=True), _number(file, keep_marker=False)
    except EOFError:
        raise _cut(size, size + 1) from None
    except ValueError:
        raise _damaged(place) from None
    return name or 0, file.tell(), length


def _check_ebml(file: BinaryIO, size: int) -> None:
    _, begins, length = _element(file, 0, size)
    name, begins, length = _element(file, begins + (length or 0), size)
    if name != SEGMENT:
        raise _damaged(begins)
    if length is None:
        _check_stream(file, begins, size)
    elif begins + length > size:
        raise _cut(size, begins + length)


@dataclass
class _Times:
    """What a segment says of its duration, and when its last block begins; in its own unit."""

    scale: float = 1e-3
    duration: float = 0.0
    cluster: int = 0
    last: int = 0

    def take(self, name: int, length: int, file: BinaryIO) -> None:
        """Looks at an element; the file stands where its content begins."""
        if name in (SIMPLE_BLOCK, BLOCK):
            _number(file, keep_marker=False)
            self.last = max(self.last, self.cluster + int.from_bytes(file.read(2), "big", signed=True))
        elif name == TIME_SCALE:
            self.scale = int.from_bytes(file.read(min(8, length)), "big") / 1e9
        elif name == DURATION:
            self.duration = float(struct.unpack(">d" if length == 8 else ">f", file.read(min(8, length)))[0])
        elif name == CLUSTER_TIME:
            self.cluster = int.from_bytes(file.read(min(8, length)), "big")


def _check_stream(file: BinaryIO, place: int, size: int) -> None:
    """A segment without a length."""
    times = _Times()
    for _ in _parts(min(MOST_ELEMENTS, MOST_PARTS)):
        if place >= size:
            break
        name, begins, length = _element(file, place, size)
        if begins + (length or 0) > size:
            raise _cut(size, begins + (length or 0))
        if length is None and name != CLUSTER:
            raise _damaged(place)
        times.take(name, length or 0, file)
        # The parts of these are looked at one by one.
        place = begins if name in (INFO, CLUSTER, BLOCK_GROUP) else begins + (length or 0)
    there, stated = times.last * times.scale, times.duration * times.scale
    if stated > there + SPARE_SECONDS:
        raise NotWhole(f"is cut off: it has {there:.2f} of {stated:.2f} s")


# -- AVI -----------------------------------------------------------------------------------------------------


def _check_riff(file: BinaryIO, size: int) -> None:
    """One chunk after another; each part of a large file is a chunk of its own."""
    place = 0
    for _ in _parts():
        if place + 8 > size:
            return
        file.seek(place)
        name, length = struct.unpack("<4sI", file.read(8))
        if name not in (b"RIFF", b"JUNK", b"idx1"):
            if place:
                return  # what others append
            raise _damaged(place)
        if length in (0, 0xFFFFFFFF):
            raise NotWhole(f"was not written to its end: it states no length for its {size:,} bytes")
        _check_lists(file, place + 12, min(size, place + 8 + length), size)
        place += 8 + length + length % 2
        if place - length % 2 > size:
            raise _cut(size, place - length % 2)


def _check_lists(file: BinaryIO, place: int, end: int, size: int) -> None:
    for _ in _parts():
        if place + 8 > end:
            return
        file.seek(place)
        length = struct.unpack("<4sI", file.read(8))[1]
        place += 8 + length
        if place > size:
            raise _cut(size, place)
        place += length % 2


# -- GIF -----------------------------------------------------------------------------------------------------


def _check_gif(file: BinaryIO, size: int) -> None:
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        try:
            _walk_gif(content)
        except IndexError:
            raise NotWhole(f"is cut off: its {size:,} bytes end before its last picture does") from None


def _walk_gif(content: mmap.mmap) -> None:
    """Up to the trailer.

    Raises:
        IndexError: the content ends before it.
        NotWhole: a block of an unknown kind.
    """
    place, parts = 13 + _colours(content[10]), _parts()
    while (kind := content[place]) != 0x3B:
        next(parts)
        if kind == 0x21:
            place += 2
        elif kind == 0x2C:
            place += 11 + _colours(content[place + 9])
        elif kind == 0:  # some programs write one terminator too many
            place += 1
            continue
        else:
            raise _damaged(place)
        while length := content[place]:
            next(parts)
            place += 1 + length
        place += 1


def _colours(flags: int) -> int:
    """Bytes of a colour table."""
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


# -- FLV, transport streams ----------------------------------------------------------------------------------


def _check_tags(file: BinaryIO, size: int) -> None:
    beginning = file.read(4_096)
    _, found, stated = beginning.partition(b"\x00\x08filesize\x00")  # FFmpeg and servers note it, as a double
    if found and len(stated) >= 8 and (whole := struct.unpack(">d", stated[:8])[0]) > size:
        raise NotWhole(f"is cut off: it has {size:,} of {whole:,.0f} bytes")
    place = int.from_bytes(beginning[5:9], "big") + 4
    for _ in _parts():
        if place >= size:
            return
        file.seek(place)
        head = file.read(4)
        place += 11 + int.from_bytes(head[1:], "big") + 4
        if len(head) < 4 or place > size:
            raise _cut(size, place)


# -- WMV, MXF, MPEG program streams: one part behind the other ----------------------------------------------


def _parts_of(length: Callable[[bytes], int]) -> Callable[[BinaryIO, int], None]:
    """A check of files that are such parts alone.

    Args:
        length: of a whole part, by its first 32 bytes; raises `ValueError` or `IndexError` where none begins.
    """

    def check(file: BinaryIO, size: int) -> None:
        place = 0
        for _ in _parts():
            if place >= size:
                return
            file.seek(place)
            try:
                place += length(file.read(32))
            except IndexError:
                raise _cut(size, size + 1) from None
            except ValueError:
                raise _damaged(place) from None
            if place > size:
                raise _cut(size, place)

    return check


def _asf_length(head: bytes) -> int:
    length = int.from_bytes(head[16:24], "little")
    if length < 24 <= len(head):
        raise ValueError("no object")
    return length if len(head) >= 24 else 24


def _klv_length(head: bytes) -> int:
    if not KLV_KEY.startswith(head[:4]):
        raise ValueError("no triplet")
    more = max(0, head[16] - 128)  # a short length, or how many bytes a long one has
    return 17 + more + (int.from_bytes(head[17 : 17 + more], "big") if more else head[16])


def _check_mxf(file: BinaryIO, size: int) -> None:
    head = file.read(64)
    footer = int.from_bytes(head[17 + max(0, head[16] - 128) :][24:32], "big")
    if footer >= size:
        raise _cut(size, footer + 1)
    _parts_of(_klv_length)(file, size)


def _pack_length(head: bytes) -> int:
    if head[:3] != b"\0\0\1"[: len(head)]:
        raise ValueError("no packet")
    if head[3] == PACK[3]:
        return 14 + (head[13] & 7) if head[4] >> 6 == 1 else 12  # MPEG-2's, or MPEG-1's
    return 4 if head[3] == PROGRAM_END else 6 + int.from_bytes(bytes([head[4], head[5]]), "big")


ASF = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
KLV_KEY, PACK, PROGRAM_END = b"\x06\x0e\x2b\x34", b"\0\0\1\xba", 0xB9


def _packets(length: int) -> Callable[[BinaryIO, int], None]:
    def check(file: BinaryIO, size: int) -> None:
        if size % length:
            raise _cut(size, size + length - size % length)

    return check


_BY_START: Mapping[bytes, tuple[str, Callable[[BinaryIO, int], None]]] = {
    b"\x1aE\xdf\xa3": ("matroska", _check_ebml),
    b"GIF87a": ("gif", _check_gif),
    b"GIF89a": ("gif", _check_gif),
    b"FLV\x01": ("flv", _check_tags),
    ASF: ("asf", _parts_of(_asf_length)),
    KLV_KEY: ("mxf", _check_mxf),
    PACK: ("mpeg", _parts_of(_pack_length)),
}
