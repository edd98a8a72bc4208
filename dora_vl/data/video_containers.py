"""Whether a video file is of a format that is read, and as long as it says itself.

A decoder shows what there is of a cut file, and thinks other frames are in its middle. Each container states lengths,
which are compared with the file's own: MP4's and MOV's boxes (ISO/IEC 14496-12, 4.2); Matroska's and WebM's segment, or
where that was written as a stream, without one, its elements, and the duration against the last block's time (RFC 9559,
RFC 8794); AVI's chunks (OpenDML 1.02); GIF's blocks up to the trailer (GIF89a, 27); WMV objects (ASF 01.20.03, 2);
MXF's triplets, and where its footer begins (SMPTE 377-1); FLV's tags (FLV 10.1); the packets of MPEG program streams
(ISO/IEC 13818-1, 2.5) and transport streams.

What a stream (`STREAMS`) lost at the very end of a block it cannot know, as its container has no length: there
`video_backends` looks whether the last picture is whole. FFmpeg's other formats, playlists among them, which name more
files and addresses, are not opened.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

from dora_vl.files import open_regular

FORMATS = "MP4, MOV, Matroska, WebM, AVI, GIF, FLV, WMV, MXF, MPEG program and transport streams"
STREAMS = ("mpegts", "mpeg")
MP4_BOXES = frozenset({b"ftyp", b"styp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot", b"uuid"})
SEGMENT, INFO, CLUSTER, BLOCK_GROUP = 0x18538067, 0x1549A966, 0x1F43B675, 0xA0
CLUSTER_TIME, SIMPLE_BLOCK, BLOCK, TIME_SCALE, DURATION = 0xE7, 0xA3, 0xA1, 0x2AD7B1, 0x4489
ASF = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
KLV_KEY, PACK, PROGRAM_END = b"\x06\x0e\x2b\x34", b"\0\0\1\xba", 0xB9
PACKET, TIMED_PACKET = 188, 192
SPARE_SECONDS = 2.0
"""How far before the stated duration the last block may begin: it is itself shown for a while."""
MOST_PARTS = 2_000_000
"""Boxes, chunks, blocks or tags that are walked through: 0.5 GB of GIF, and no file that costs minutes."""
MOST_ELEMENTS = 500_000
"""Likewise of a Matroska stream, where each takes longer: the blocks of four hours."""

Check = Callable[[BinaryIO, int], None]
"""Of a file and its size."""


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
        name, check = _container(file)
        try:
            check(file, size)
        except NotWhole:
            raise
        except (EOFError, ValueError, struct.error):
            raise NotWhole(f"is cut off or damaged: one of its lengths is none, within {size:,} bytes") from None
        return name


def container_of(path: Path) -> str:
    """FFmpeg's name of the file's container, by its first bytes.

    Raises:
        NoVideoFormat: it is none of `FORMATS`.
    """
    with open_regular(path) as file:
        return _container(file)[0]


def _container(file: BinaryIO) -> tuple[str, Check]:
    beginning = file.read(2 * TIMED_PACKET + 8)
    file.seek(0)
    if beginning[4:8] in MP4_BOXES:
        return "mov", _check_mp4
    for start, container in _BY_START.items():
        if beginning.startswith(start):
            return container
    if beginning[:4] == b"RIFF" and beginning[8:12] == b"AVI ":
        return "avi", _check_avi
    for length, offset in ((PACKET, 0), (TIMED_PACKET, 4)):
        if beginning[offset : offset + 1] == beginning[offset + length : offset + length + 1] == b"G":
            return "mpegts", _packets(length)
    raise NoVideoFormat(f"begins with {beginning[:8]!r}, which is no known video format ({FORMATS})")


def _cut(size: int, stated: int) -> NotWhole:
    return NotWhole(f"is cut off: it has {size:,} of {stated:,} bytes")


def _damaged(position: int) -> NotWhole:
    return NotWhole(f"is cut off or damaged: at byte {position:,} begins nothing that its format has")


def _too_many(most: int) -> NotWhole:
    return NotWhole(f"has more than {most:,} parts, and so many are not looked through")


def _walk(file: BinaryIO, size: int, length_of: Callable[[bytes, int], int], position: int = 0) -> None:
    """Follows a file's parts, one behind the other, to its end.

    Args:
        length_of: a part's length, of its first 32 bytes and its position; raises IndexError or struct.error where they
            are cut, ValueError where no part begins.
    """
    for _ in range(MOST_PARTS):
        if position >= size:
            return
        file.seek(position)
        try:
            length = length_of(file.read(32), position)
        except (IndexError, struct.error):
            raise _cut(size, size + 1) from None
        except ValueError as error:
            raise error if isinstance(error, NotWhole) else _damaged(position) from None
        position += length
        if position > size:
            raise _cut(size, position)
    raise _too_many(MOST_PARTS)


def _check_mp4(file: BinaryIO, size: int) -> None:
    names: set[bytes] = set()

    def length_of(head: bytes, position: int) -> int:
        length, name = struct.unpack(">I4s", head[:8])
        names.add(name)
        if length == 1:
            length = int(struct.unpack(">Q", head[8:16])[0])
        elif length == 0:  # to the end of the file
            length = size - position
        if length < 8:
            raise ValueError("no box")
        return length

    _walk(file, size, length_of)
    if b"moov" not in names:
        raise NotWhole("is cut off: it has no index (moov box)")


def _check_avi(file: BinaryIO, size: int) -> None:
    """RIFF chunks with chunks in them; each part of a large file is a RIFF of its own."""
    end = 0

    def length_of(head: bytes, position: int) -> int:
        nonlocal end
        if len(head) < 8:
            return size - position
        name, length = struct.unpack("<4sI", head[:8])
        whole = 8 + length + (length % 2 if position + 8 + length < size else 0)
        if position < end:
            return min(whole, end - position) if position + 8 > end else whole
        if name not in (b"RIFF", b"JUNK", b"idx1"):
            if position:
                return size - position  # what others append
            raise ValueError("no chunk")
        if length in (0, 0xFFFFFFFF):
            raise NotWhole(f"was not written to its end: it states no length for its {size:,} bytes")
        if name != b"RIFF" or position + whole > size:
            return whole
        end = position + whole
        return 12

    _walk(file, size, length_of)


def _flv_tag(head: bytes, _: int) -> int:
    if len(head) < 4:
        raise IndexError
    return 11 + int.from_bytes(head[1:4], "big") + 4


def _check_flv(file: BinaryIO, size: int) -> None:
    beginning = file.read(4_096)
    _, _, stated = beginning.partition(b"\x00\x08filesize\x00")  # FFmpeg and servers note it, as a double
    if len(stated) >= 8 and (length := struct.unpack(">d", stated[:8])[0]) > size:
        raise NotWhole(f"is cut off: it has {size:,} of {length:,.0f} bytes")
    _walk(file, size, _flv_tag, int.from_bytes(beginning[5:9], "big") + 4)


def _asf_object(head: bytes, _: int) -> int:
    length = struct.unpack("<16xQ", head[:24])[0]
    if length < 24:
        raise ValueError("no object")
    return length


def _klv_triplet(head: bytes, _: int) -> int:
    if not KLV_KEY.startswith(head[:4]):
        raise ValueError("no triplet")
    more = max(0, head[16] - 128)  # a short length, or how many bytes a long one has
    return 17 + more + (int.from_bytes(head[17 : 17 + more], "big") if more else head[16])


def _check_mxf(file: BinaryIO, size: int) -> None:
    head = file.read(64)
    footer = int.from_bytes(head[17 + max(0, head[16] - 128) :][24:32], "big")
    if footer >= size:
        raise _cut(size, footer + 1)
    _walk(file, size, _klv_triplet)


def _pack(head: bytes, _: int) -> int:
    if head[:3] != b"\0\0\1"[: len(head)]:
        raise ValueError("no packet")
    if head[3] == PACK[3]:
        return 14 + (head[13] & 7) if head[4] >> 6 == 1 else 12  # MPEG-2's, or MPEG-1's
    return 4 if head[3] == PROGRAM_END else 6 + int.from_bytes(bytes([head[4], head[5]]), "big")


def _packets(length: int) -> Check:
    def check(_: BinaryIO, size: int) -> None:
        if size % length:
            raise _cut(size, size + length - size % length)

    return check


def _check_gif(file: BinaryIO, size: int) -> None:
    def colours(flags: int) -> int:
        return 3 << (flags & 7) + 1 if flags & 0x80 else 0

    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        try:
            position, inside = 13 + colours(content[10]), False
            for _ in range(MOST_PARTS):
                kind = content[position]
                if inside or kind == 0:  # a sub-block; some programs write one terminator too many
                    inside = inside and kind != 0
                    position += 1 + kind
                elif kind == 0x3B:
                    return
                elif kind in (0x21, 0x2C):
                    position += 2 if kind == 0x21 else 11 + colours(content[position + 9])
                    inside = True
                else:
                    raise _damaged(position)
            raise _too_many(MOST_PARTS)
        except IndexError:
            raise NotWhole(f"is cut off: its {size:,} bytes end before its last picture does") from None


def _ebml_number(file: BinaryIO, *, keep_marker: bool) -> int | None:
    """EBML's variable-length number; None where all its bits are one, which stands for "unknown"."""
    first = file.read(1)
    if not first:
        raise EOFError
    length = 9 - first[0].bit_length()
    if length > 8:
        raise ValueError("no number")
    rest = file.read(length - 1)
    if len(rest) < length - 1:
        raise EOFError
    value, all_ones = int.from_bytes(first + rest, "big"), (1 << 7 * length) - 1
    if keep_marker:
        return value
    return None if value & all_ones == all_ones else value & all_ones


def _element(file: BinaryIO, position: int, size: int) -> tuple[int, int, int | None]:
    """An element's id, where its content begins, and its length."""
    file.seek(position)
    try:
        name, length = _ebml_number(file, keep_marker=True), _ebml_number(file, keep_marker=False)
    except EOFError:
        raise _cut(size, size + 1) from None
    except ValueError:
        raise _damaged(position) from None
    return name or 0, file.tell(), length


def _check_matroska(file: BinaryIO, size: int) -> None:
    _, begins, length = _element(file, 0, size)
    name, begins, length = _element(file, begins + (length or 0), size)
    if name != SEGMENT:
        raise _damaged(begins)
    if length is None:
        _check_stream(file, begins, size)
    elif begins + length > size:
        raise _cut(size, begins + length)


def _check_stream(file: BinaryIO, position: int, size: int) -> None:
    """A segment without a length: its elements, and whether its blocks reach its duration."""
    scale, duration, cluster, last = 1e-3, 0.0, 0, 0
    most = min(MOST_ELEMENTS, MOST_PARTS)
    for _ in range(most):
        if position >= size:
            break
        name, begins, length = _element(file, position, size)
        if begins + (length or 0) > size:
            raise _cut(size, begins + (length or 0))
        if length is None and name != CLUSTER:
            raise _damaged(position)
        if name in (SIMPLE_BLOCK, BLOCK):
            _ebml_number(file, keep_marker=False)
            last = max(last, cluster + int.from_bytes(file.read(2), "big", signed=True))
        elif name in (TIME_SCALE, CLUSTER_TIME, DURATION):
            content = file.read(min(8, length or 0))
            if name == DURATION:
                duration = float(struct.unpack(">d" if length == 8 else ">f", content)[0])
            elif name == TIME_SCALE:
                scale = int.from_bytes(content, "big") / 1e9
            else:
                cluster = int.from_bytes(content, "big")
        # the parts of these are looked at one by one
        position = begins if name in (INFO, CLUSTER, BLOCK_GROUP) else begins + (length or 0)
    else:
        raise _too_many(most)
    if duration * scale > last * scale + SPARE_SECONDS:
        raise NotWhole(f"is cut off: it has {last * scale:.2f} of {duration * scale:.2f} s")


_BY_START: Mapping[bytes, tuple[str, Check]] = {
    b"\x1aE\xdf\xa3": ("matroska", _check_matroska),
    b"GIF87a": ("gif", _check_gif),
    b"GIF89a": ("gif", _check_gif),
    b"FLV\x01": ("flv", _check_flv),
    ASF: ("asf", lambda file, size: _walk(file, size, _asf_object)),
    KLV_KEY: ("mxf", _check_mxf),
    PACK: ("mpeg", lambda file, size: _walk(file, size, _pack)),
}
