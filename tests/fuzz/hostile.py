"""Inputs that somebody thought out: other formats under a picture's name, headers that lie, bombs, pipes, names."""

from __future__ import annotations

import io
import os
import socket
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image, features

from dora_vl.data.video_containers import ASF, KLV_KEY, PACK
from tests.fuzz.media import write_clip

PNG, GIF = b"\x89PNG\r\n\x1a\n", b"GIF89a"

OTHER_FORMATS: Mapping[str, bytes] = {
    "EPS that runs a program": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(%pipe%id) (r) file\n",
    "EPS with a DOS head": b"\xc5\xd0\xd3\xc6" + struct.pack("<6IH", 32, 60, 0, 0, 0, 0, 65_535) + b"\0\0%!PS-Adobe",
    "PDF": b"%PDF-1.7\n1 0 obj<</Type/Catalog>>endobj\ntrailer<</Root 1 0 R>>\n%%EOF",
    "SVG that includes a file": b'<!DOCTYPE s [<!ENTITY x SYSTEM "file:///etc/passwd">]><svg>&x;</svg>',
    "XML entity bomb": b'<!DOCTYPE s [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;&a;">]><svg>&b;</svg>',
    "WMF": b"\xd7\xcd\xc6\x9a\0\0" + bytes(34),
    "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(60),
    "PSD": b"8BPS\0\x01" + bytes(6) + struct.pack(">HIIHH", 3, 9, 9, 8, 3) + bytes(20),
    "ICO": b"\0\0\1\0\1\0\x10\x10\0\0\1\0\x18\0" + struct.pack("<II", 40, 22) + bytes(40),
    "PPM": b"P6\n2 2\n255\n" + bytes(12),
    "PPM of words": b"P3\n9000 9000\n255\n" + b"1 " * 5000,
    "TGA": b"\0\0\2" + bytes(9) + struct.pack("<HHBB", 2, 2, 24, 0) + bytes(12),
    "SGI": b"\x01\xda\0\x01" + struct.pack(">HHHH", 3, 2, 2, 3) + bytes(500),
    "OLE, FlashPix": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600),
    "JPEG 2000": b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(60),
    "AVIF": b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf" + bytes(60),
    "HEIC": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(60),
    "MPEG": b"\0\0\x01\xba" + bytes(60),
    "HTML": b"<!doctype html><title>404</title>",
    "a ZIP archive": b"PK\x03\x04" + bytes(40),
    "a pickle": b"\x80\x04\x95\x1a\0\0\0\0\0\0\0\x8c\x05posix\x8c\x06system\x93\x8c\x02id\x85R.",
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
}
"""All of these are refused."""


def chunk(name: bytes, data: bytes) -> bytes:
    """Of a PNG."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, *, before: bytes = b"", rows: int | None = None, bits: int = 1) -> bytes:
    """A black grey PNG; `before` are chunks before its pixels, of which there are `rows`."""
    squeezed = zlib.compressobj(9)
    row = bytes(1 + (min(width, 1 << 20) * bits + 7) // 8)
    data = b"".join(squeezed.compress(row) for _ in range(min(height, 20_000) if rows is None else rows))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0))
    return PNG + head + before + chunk(b"IDAT", data + squeezed.flush()) + chunk(b"IEND", b"")


def gif(width: int, height: int, frames: bytes) -> bytes:
    """A GIF of two colours."""
    return GIF + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6) + frames + b";"


def gif_frame(width: int, height: int, data: bytes = b"\x02\x44\x01\0") -> bytes:
    """One of its pictures."""
    return b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02" + data


def bmp(width: int, height: int, *, bits: int = 24, compression: int = 0) -> bytes:
    """A BMP of 64 bytes of pixels."""
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, 64, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 118, 0, 0, 54) + info + bytes(64)


def tiff(entries: list[tuple[int, int, int, int]], following: int = 0, rest: bytes = bytes(64)) -> bytes:
    """A little-endian TIFF of one directory: (tag, type, count, value)."""
    listed = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + listed + struct.pack("<I", following) + rest


def grey_tiff(width: int, height: int, *more: tuple[int, int, int, int], following: int = 0) -> bytes:
    """One of 8 bits, whose pixels would begin behind its directory."""
    plain = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)]
    plain += [(273, 4, 1, 200), (277, 3, 1, 1), (278, 4, 1, height), (279, 4, 1, 64)]
    changed = {entry[0]: entry for entry in (*plain, *more)}
    return tiff(sorted(changed.values()), following)


def webp(width: int, height: int) -> bytes:
    """An extended WebP of this canvas without a frame."""
    canvas = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + canvas
    return b"RIFF" + struct.pack("<I", len(body)) + body


def jpeg(width: int, height: int) -> bytes:
    """A small JPEG whose header says another size."""
    content = bytearray(saved("JPEG"))
    place = content.index(b"\xff\xc0") + 5
    content[place : place + 4] = struct.pack(">HH", height, width)
    return bytes(content)


def saved(form: str, size: tuple[int, int] = (16, 16), **options: object) -> bytes:
    """A grey picture as Pillow writes it."""
    stream = io.BytesIO()
    Image.new("RGB", size, (90, 90, 90)).save(stream, form, **options)
    return stream.getvalue()


def scans(count: int) -> bytes:
    """A progressive JPEG whose last scan is repeated, each of which a decoder goes through whole."""
    content = saved("JPEG", (2048, 2048), progressive=True)
    last = content.rindex(b"\xff\xda")
    return content[:-2] + content[last:-2] * count + b"\xff\xd9"


def lying_and_bursting() -> Iterator[tuple[str, bytes]]:
    """Headers that lie, and small files that stand for much: refused, or read within the limits."""
    for width, height in ((1, 100_000), (100_000, 1), (2**31 - 1, 1), (2**31 - 1,) * 2):
        yield f"PNG of {width} x {height}", png(width, height, rows=1)
    for width, height in ((0, 0), (0, 10), (65_535,) * 2, (9_500, 9_400), (200, 1)):
        yield f"PNG that says {width} x {height}", png(width, height, rows=3)
    yield "PNG of 88 million black pixels", png(9_400, 9_400)
    yield "PNG with notes of 200 MB", png(9, 9, before=chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2 * 10**8), 1)))
    yield "PNG with a profile of 100 MB", png(9, 9, before=chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(10**8), 9)))
    yield "PNG with 100,000 notes", png(9, 9, before=chunk(b"tEXt", b"a\0b") * 100_000)
    yield "PNG with a chunk of 2 GB", PNG + struct.pack(">I4s", 2**31 - 1, b"IHDR") + bytes(20)
    yield "PNG with a wrong sum", png(9, 9).replace(b"IHDR\0\0\0\x09", b"IHDR\0\0\0\x0a")
    yield "PNG that says a million frames", png(9, 9, before=chunk(b"acTL", struct.pack(">II", 10**6, 0)))
    for width, height in ((65_535, 65_535), (65_500, 1), (0, 9), (9_000, 9_000)):
        yield f"JPEG that says {width} x {height}", jpeg(width, height)
    yield "JPEG of 200 scans more", scans(200)
    yield "JPEG of markers alone", b"\xff\xd8" + b"\xff\xe0\0\x02" * 50_000
    yield "JPEG whose EXIF directory is its own next", saved("JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\0\0\x08\0\0\0")
    exif = (b"\xff\xe1\xff\xffExif\0\0" + bytes(65_527)) * 2_000
    yield "JPEG of 131 MB of EXIF", b"\xff\xd8" + exif + saved("JPEG")[2:]
    yield "JPEG of pictures that point at themselves", saved("JPEG") + b"\xff\xe2\0\x10MPF\0II*\0\x08\0\0\0"
    for side in (2_000, 13_000):
        yield f"JPEG of {side} x {side} without its end", saved("JPEG", (side, side))[:-2]
    yield "nothing at all", b""
    yield "one byte", b"\x89"


def lying_and_bursting_in_other_formats() -> Iterator[tuple[str, bytes]]:
    """Likewise."""
    for width, height in ((65_535, 65_535), (0, 0)):
        yield f"GIF that says {width} x {height}", gif(width, height, gif_frame(1, 1))
    yield "GIF whose frame is larger than its screen", gif(1, 1, gif_frame(65_535, 65_535))
    yield "GIF of 100,000 frames", gif(1, 1, gif_frame(1, 1) * 100_000)
    yield "GIF of a million empty blocks", gif(1, 1, b"!\xfe" + b"\x01x" * 10**6 + b"\0" + gif_frame(1, 1))
    yield "GIF without an end to its codes", gif(99, 99, gif_frame(99, 99, b"\xff" + b"\x84" * 255))
    for width, height in ((2**31 - 1, 2**31 - 1), (5, -(2**31)), (0, 0), (9_000, 9_000)):
        yield f"BMP that says {width} x {height}", bmp(width, height)
    for bits, compression in ((33, 0), (8, 1), (24, 5), (24, 99)):
        yield f"BMP of {bits} bits, compression {compression}", bmp(5, 5, bits=bits, compression=compression)
    for width, height in ((2**32 - 1, 2**32 - 1), (0, 0), (9_000, 9_000)):
        yield f"TIFF that says {width} x {height}", grey_tiff(width, height)
    yield "TIFF whose directory is its own next", grey_tiff(4, 4, following=8)
    yield "TIFF of 4 billion samples", grey_tiff(4, 4, (277, 3, 1, 65_535), (258, 3, 2**31, 200))
    yield "TIFF of 4 billion strips", grey_tiff(4, 4, (273, 4, 2**32 - 1, 8))
    tiles = ((322, 4, 1, 2**31 - 16), (323, 4, 1, 2**31 - 16), (324, 4, 1, 8))
    yield "TIFF of tiles of 2 billion", grey_tiff(4, 4, *tiles)
    for compression in (2, 5, 7, 8, 32_773, 50_000, 65_000):
        yield f"TIFF of noise, compression {compression}", grey_tiff(4, 4, (259, 3, 1, compression))
    yield "TIFF of an endless number of entries", b"II*\0\x08\0\0\0\xff\xff" + bytes(1000)
    for width, height in ((16_384, 16_384), (2**24, 2**24)):
        yield f"WebP that says {width} x {height}", webp(width, height)
    yield "WebP that says 4 GB", b"RIFF\xff\xff\xff\xffWEBPVP8 \xff\xff\xff\xff" + bytes(60)
    stream = saved("JPEG2000", no_jp2=True)
    for side in (2**31 - 1, 13_000, 0):
        size = struct.pack(">II", side, side)
        yield f"JPEG 2000 of {side} x {side}", stream[:8] + size + stream[16:]
        tile = struct.pack(">II", 1, 1)
        yield f"JPEG 2000 of tiles of a pixel, {side} x {side}", stream[:8] + size + stream[16:24] + tile + stream[32:]
    if features.check("avif"):
        avif = saved("AVIF")
        start = avif.index(b"ispe") + 8
        for side in (2**31 - 1, 13_000, 0):
            yield f"AVIF of {side} x {side}", avif[:start] + struct.pack(">II", side, side) + avif[start + 8 :]


EBML = bytes.fromhex("1a45dfa3")
SEGMENT = bytes.fromhex("18538067")
ENDLESS = b"\x01" + b"\xff" * 7

OTHER_VIDEOS: Mapping[str, bytes] = {
    "a playlist that names a file": b"#EXTM3U\n#EXTINF:1,\n/etc/passwd\n#EXT-X-ENDLIST\n",
    "a playlist that names an address": b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n",
    "a playlist that names itself": b"#EXTM3U\n#EXTINF:1,\nhostile\n",
    "a playlist with a key elsewhere": b'#EXTM3U\n#EXT-X-KEY:METHOD=AES-128,URI="file:///etc/passwd"\n#EXTINF:1,\na.ts\n',
    "a script that joins files": b"ffconcat version 1.0\nfile /etc/passwd\n",
    "a DASH manifest": b'<?xml version="1.0"?><MPD><Period><BaseURL>http://127.0.0.1:9/</BaseURL></Period></MPD>',
    "SDP": b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=a\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
    "ASX": b'<asx version="3.0"><entry><ref href="file:///etc/passwd"/></entry></asx>',
    "ASF": bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c") + bytes(60),
    "WAV": b"RIFF\x24\0\0\0WAVEfmt " + bytes(28),
    "MP3": b"ID3\x04\0\0\0\0\0\0\xff\xfb\x90\0" + bytes(400),
    "MXF": bytes.fromhex("060e2b34020501010d0102010102") + bytes(60),
    "YUV4MPEG": b"YUV4MPEG2 W9999999 H9999999 F25:1\nFRAME\n",
    "raw H.264": b"\0\0\0\x01\x67\x42\0\x0a" + bytes(60),
    "MPEG program stream": b"\0\0\x01\xba\x44" + bytes(60),
    "subtitles": b"1\n00:00:00,000 --> 00:00:01,000\na\n",
    "a PNG": b"\x89PNG\r\n\x1a\n" + bytes(40),
    **{f"{name}, as a video": OTHER_FORMATS[name] for name in ("HTML", "a pickle", "EPS with a DOS head", "AVIF")},
}
"""All of these are refused."""


def element(name: str, data: bytes) -> bytes:
    """Of EBML, with a length of eight bytes."""
    return bytes.fromhex(name) + (len(data) | 1 << 56).to_bytes(8, "big") + data


def matroska(segment: bytes, length: bytes = ENDLESS) -> bytes:
    """A file of this segment."""
    return element("1a45dfa3", element("4282", b"webm")) + SEGMENT + length + segment


def box(name: bytes, data: bytes) -> bytes:
    """Of an MP4."""
    return struct.pack(">I4s", 8 + len(data), name) + data


def nested(depth: int) -> bytes:
    """Boxes in boxes."""
    content = b""
    for _ in range(depth):
        content = box(b"moov", content)
    return content


def riff(form: bytes, data: bytes) -> bytes:
    """One chunk with lists."""
    return b"RIFF" + struct.pack("<I", len(data) + 4) + form + data


def lying_and_endless() -> Iterator[tuple[str, bytes]]:
    """Containers: refused, or read within the limits."""
    mxf = KLV_KEY + bytes.fromhex("020501010d0102010102040000")
    yield "ASF of three million empty objects", (ASF + struct.pack("<Q", 24)) * 3_000_000
    yield "ASF of an object of 2^64 - 1 bytes", ASF + b"\xff" * 8 + bytes(20)
    yield "MXF of three million empty triplets", mxf + (KLV_KEY + bytes(13)) * 3_000_000
    yield "MXF of a triplet of 2^56 bytes", mxf + KLV_KEY + bytes(12) + b"\x87" + b"\xff" * 7
    yield "MPEG program of three million ends", PACK + b"\x44" + bytes(9) + b"\0\0\1\xb9" * 3_000_000
    head = box(b"ftyp", b"isom\0\0\0\0isom")
    yield "MP4 of three million empty boxes", head + box(b"free", b"") * 3_000_000
    yield "MP4 of boxes nested 5,000 deep", head + nested(5_000)
    yield "MP4 of a box of 2^64 - 1 bytes", head + struct.pack(">I4sQ", 1, b"mdat", 2**64 - 1)
    yield "MP4 of a box of 3 bytes", head + struct.pack(">I4s", 3, b"moov") + bytes(40)
    yield "MP4 whose last box has no length", head + struct.pack(">I4s", 0, b"moov") + bytes(400)
    yield "MP4 with an empty index", head + box(b"moov", b"")
    yield "MP4 whose frames are in another file", head + box(b"moov", box(b"dref", b"url \0\0\0\0file:///etc/passwd"))
    sizes = box(b"trak", box(b"stsz", struct.pack(">III", 0, 1, 2**32 - 1)))
    yield "MP4 of 4 billion samples", head + box(b"moov", sizes)
    packed = box(b"cmov", box(b"cmvd", struct.pack(">I", 2**32 - 1)))
    yield "MP4 with a packed index of 4 GB", head + box(b"moov", packed)
    yield "Matroska of an empty endless segment", matroska(b"")
    yield "Matroska of three million voids", matroska(b"\xec\x80" * 3_000_000)
    yield "Matroska of clusters in clusters", matroska((bytes.fromhex("1f43b675") + ENDLESS) * 10_000)
    for name, number in (("no number", b"\x7f\xf8"), ("infinity", b"\x7f\xf0"), ("300 bytes", bytes(294))):
        duration = element("1549a966", element("4489", number + bytes(6)))
        yield f"Matroska of a duration of {name}", matroska(duration)
    yield "Matroska of an element of 2^56 bytes", matroska(bytes.fromhex("1f43b67501fffffffffffffe"))
    yield "Matroska of zeros", EBML + bytes(4_000)
    yield "AVI of nothing", riff(b"AVI ", b"")
    yield "AVI of 200,000 empty chunks", riff(b"AVI ", (b"JUNK" + bytes(4)) * 200_000)
    yield "AVI of an endless list", riff(b"AVI ", b"LIST\xff\xff\xff\xffmovi")
    yield "AVI that says 4 GB", b"RIFF\xfe\xff\xff\xffAVI " + bytes(60)
    yield "GIF of 100,000 frames, as a video", gif(1, 1, gif_frame(1, 1) * 100_000)
    yield "GIF of a screen of 65,535, as a video", gif(65_535, 65_535, gif_frame(1, 1))
    yield "FLV of empty tags", b"FLV\x01\x01\0\0\0\x09" + bytes(4) + bytes(15) * 100_000
    yield "FLV whose first tag is 4 GB on", b"FLV\x01\x01\xff\xff\xff\xff" + bytes(60)
    yield "transport packets of nothing", (b"G\x1f\xff\x10" + bytes(184)) * 20_000


def large_frames(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Whole files of frames that are too large, and of very many that are small."""
    for name, size, frames in (
        ("12000x4000", (12_000, 4_000), 1),
        ("16000x16", (16_000, 16), 2),
        ("16x16", (16, 16), 3_000),
    ):
        yield (
            f"Matroska of {frames} frames of {name}",
            write_clip(folder / "large.mkv", "ffv1", {}, size=size, frames=frames).read_bytes(),
        )


NAMES = (
    "../outside", "../../etc/passwd", "/etc/passwd", "a/../../b", "./../x", "~/x", "~root/x", "", ".", "..", "a\0b",
    "a" * 5_000, "a/" * 3_000, "a\nerror: forged", "\x1b[2J\x1b[31mred", "\u202egnp", "\ud83d", "|id", "$(id)", "`id`",
    "; id", "-rf", "--help", "http://127.0.0.1:9/a", "https://example.invalid/a", "file:///etc/passwd", "ftp://a/b",
    "concat:a|b", "pipe:0", "data:image/png;base64,AAAA", "tcp://127.0.0.1:9", "s3://a/b", "%s%s%n", "{0.__class__}",
    "CON", "a:b", "a\\..\\b", "\u2028", "a\rb",
)  # fmt: skip
"""Of files that are not there, or not to be had."""


def _hole(path: Path, beginning: bytes) -> None:
    path.write_bytes(beginning)
    os.truncate(path, 2**40)


DEVICES = ("/dev/zero", "/dev/urandom", "/dev/tty", "/dev/stdin", "/etc/passwd", "/proc/self/mem")
HOLES = {"zeros": b"", "a PNG": b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR", "an MP4": b"\0\0\0\x10ftypisom", "Matroska": EBML}
SPECIAL: dict[str, Callable[[Path], object]] = {
    "a named pipe": os.mkfifo,
    "a socket": lambda path: _listen(path),
    "a folder": lambda path: path.mkdir(),
    "a link to itself": lambda path: path.symlink_to(path),
    "a link to a folder above": lambda path: path.symlink_to(".."),
    "a link that leads nowhere": lambda path: path.symlink_to("nowhere"),
    "a link to a pipe": lambda path: (os.mkfifo(path.with_name("p")), path.symlink_to("p")),
    **{f"a hole of 1 TB of {name}": partial(_hole, beginning=beginning) for name, beginning in HOLES.items()},
    **{f"a link to {target}": lambda path, target=target: path.symlink_to(target) for target in DEVICES},
}


@dataclass(frozen=True)
class Hostile:
    """One input: `put` makes it in a folder and gives the name to read."""

    name: str
    video: bool
    put: Callable[[Path], str]
    must_fail: bool = True


def hostile_inputs(scratch: Path) -> Iterator[Hostile]:
    """All of them."""
    for contents, video in ((OTHER_FORMATS, False), (OTHER_VIDEOS, True)):
        for name, content in contents.items():
            yield Hostile(name, video, _written(content))
    for name, content in (*lying_and_bursting(), *lying_and_bursting_in_other_formats()):
        yield Hostile(name, video=False, put=_written(content), must_fail=False)
    for name, content in (*lying_and_endless(), *large_frames(scratch)):
        yield Hostile(name, video=True, put=_written(content), must_fail=False)
    for video, kind in ((False, "picture"), (True, "video")):
        for name, make in SPECIAL.items():
            yield Hostile(f"{name}, as a {kind}", video, _made(make))
        for name in NAMES:
            yield Hostile(f"the name {name[:40]!r}, of a {kind}", video, lambda _, name=name: name)
    for name in ("a\nb.png", "\x1b[31m.png", "-rf", "$(id).png", "\u202e.png", "%n.png", "a|id"):
        yield Hostile(f"a picture called {name!r}", video=False, put=_written(saved("PNG"), name), must_fail=False)


def _written(content: bytes, name: str = "hostile") -> Callable[[Path], str]:
    def put(folder: Path) -> str:
        (folder / name).write_bytes(content)
        return name

    return put


def _made(make: Callable[[Path], object]) -> Callable[[Path], str]:
    def put(folder: Path) -> str:
        make(folder / "hostile")
        return "hostile"

    return put


def _listen(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # a socket's path may have a hundred characters
    try:
        with socket.socket(socket.AF_UNIX) as opened:
            opened.bind(path.name)
    finally:
        os.chdir(here)
