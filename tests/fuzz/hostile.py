"""Inputs that somebody thought out: other formats under a picture's name, headers that lie, bombs, pipes, names."""

from __future__ import annotations

import io
import os
import stat
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image, features

from tests.data.video_files import write_clip

PNG = b"\x89PNG\r\n\x1a\n"
ASF = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
KLV_KEY, PACK = b"\x06\x0e\x2b\x34", b"\0\0\1\xba"
OTHER_PICTURES: Mapping[str, bytes] = {
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


def saved(form: str, size: tuple[int, int] = (16, 16), **options: object) -> bytes:
    """A grey picture as Pillow writes it."""
    stream = io.BytesIO()
    Image.new("RGB", size, (90, 90, 90)).save(stream, form, **options)
    return stream.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    """Of a PNG."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, *, before: bytes = b"", rows: int | None = None) -> bytes:
    """A black PNG of one bit a pixel; `before` are chunks before its pixels, of which there are `rows`."""
    squeezed = zlib.compressobj(9)
    row = bytes(1 + (min(width, 1 << 20) + 7) // 8)
    data = b"".join(squeezed.compress(row) for _ in range(min(height, 20_000) if rows is None else rows))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return PNG + head + before + chunk(b"IDAT", data + squeezed.flush()) + chunk(b"IEND", b"")


def gif(side: int, frames: bytes) -> bytes:
    """A GIF of two colours."""
    return b"GIF89a" + struct.pack("<HHBBB", side, side, 0x80, 0, 0) + bytes(6) + frames + b";"


def gif_frame(side: int, data: bytes = b"\x02\x44\x01\0") -> bytes:
    """One of its pictures."""
    return b"," + struct.pack("<HHHHB", 0, 0, side, side, 0) + b"\x02" + data


def tiff(*more: tuple[int, int, int, int], width: int = 4, height: int = 4, following: int = 0) -> bytes:
    """A little-endian TIFF of 8 bits, whose pixels would begin behind its directory: (tag, type, count, value)."""
    plain = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)]
    plain += [(273, 4, 1, 200), (277, 3, 1, 1), (278, 4, 1, height), (279, 4, 1, 64)]
    entries = sorted({entry[0]: entry for entry in (*plain, *more)}.values())
    listed = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + listed + struct.pack("<I", following) + bytes(64)


def stating(content: bytes, mark: bytes, offset: int, layout: str, *numbers: int) -> bytes:
    """A picture with other numbers so many bytes behind a mark, such as the size in its header."""
    changed = bytearray(content)
    struct.pack_into(layout, changed, changed.index(mark) + offset, *numbers)
    return bytes(changed)


def jpeg_of_scans(side: int, count: int) -> bytes:
    """A progressive JPEG of one scan of all its blocks, then so many that say of all blocks that nothing follows.

    Each takes some sixty bytes, and its decoder's way through the whole picture: 2.5 ms at 36 million pixels.
    """

    def segment(mark: int, data: bytes) -> bytes:
        return struct.pack(">BBH", 255, mark, 2 + len(data)) + data

    def packed(bits: str) -> bytes:
        bits += "1" * (-len(bits) % 8)
        return int(bits or "0", 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")

    def table(kind: int, symbol: int) -> bytes:  # of one code, the bit 0
        return segment(0xC4, bytes([kind, 1, *[0] * 15, symbol]))

    blocks = (-(-side // 8)) ** 2
    frame = segment(0xC2, struct.pack(">BHHB", 8, side, side, 1) + b"\x01\x11\0")
    first = segment(0xDA, b"\x01\x01\0\0\0\0") + bytes(blocks // 8) + packed("0" * (blocks % 8))
    runs = packed(("0" + "1" * 14) * -(-blocks // 32_767))  # the longest run of blocks that end where they begin
    more = segment(0xDA, b"\x01\x01\0\x01\x3f\0") + runs
    tables = segment(0xDB, bytes(1) + b"\x01" * 64) + frame + table(0x00, 0) + table(0x10, 0xE0)
    return b"\xff\xd8" + tables + first + more * count + b"\xff\xd9"


def lying_sizes() -> Iterator[tuple[str, bytes]]:
    """Small files whose header says another size: refused, or read within the limits."""
    for width, height in (
        (1, 100_000),
        (100_000, 1),
        (2**31 - 1, 1),
        (2**31 - 1,) * 2,
        (0, 0),
        (0, 10),
        (9_500, 9_400),
    ):
        yield f"PNG that says {width} x {height}", png(width, height, rows=3)
    webp, stream = b"RIFF\x16\0\0\0WEBPVP8X" + struct.pack("<I", 10) + bytes(10), saved("JPEG2000", no_jp2=True)
    for form, content, mark, offset, layout, sides in (
        ("JPEG", saved("JPEG"), b"\xff\xc0", 5, ">HH", (0, 9_000, 65_535)),
        ("GIF", gif(1, gif_frame(1)), b"GIF", 6, "<HH", (0, 65_535)),
        ("BMP", saved("BMP"), b"BM", 18, "<ii", (0, 9_000, -(2**31), 2**31 - 1)),
        ("TIFF", tiff(), struct.pack("<HHI", 256, 4, 1), 8, "<I8xI", (0, 9_000, 2**32 - 1)),
        ("WebP", webp, b"VP8X", 12, "<HxH", (16_383, 65_535)),
        ("JPEG 2000", stream, b"\xff\x4f", 8, ">II", (0, 13_000, 2**31 - 1)),
        *([("AVIF", saved("AVIF"), b"ispe", 8, ">II", (0, 13_000, 2**31 - 1))] if features.check("avif") else []),
    ):
        for side in sides:
            yield f"{form} that says {side} x {side}", stating(content, mark, offset, layout, side, side)
    for bits, compression in ((33, 0), (8, 1), (24, 5), (24, 99)):
        content = stating(saved("BMP"), b"BM", 28, "<HI", bits, compression)
        yield f"BMP of {bits} bits, compression {compression}", content
    for side in (13_000, 2**31 - 1):
        tiles = stating(stream, b"\xff\x4f", 24, ">II", 1, 1)
        yield f"JPEG 2000 of tiles of a pixel, {side}", stating(tiles, b"\xff\x4f", 8, ">II", side, side)
    for compression in (2, 5, 7, 8, 32_773, 50_000, 65_000):
        yield f"TIFF of noise, compression {compression}", tiff((259, 3, 1, compression))


def bursting() -> Mapping[str, bytes]:
    """Small files that stand for much, or without an end: likewise."""
    exif = (b"\xff\xe1\xff\xffExif\0\0" + bytes(65_527)) * 2_000
    return {
        "PNG of 88 million black pixels": png(9_400, 9_400),
        "PNG with notes of 200 MB": png(9, 9, before=chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2 * 10**8), 1))),
        "PNG with a profile of 100 MB": png(9, 9, before=chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(10**8), 9))),
        "PNG with 100,000 notes": png(9, 9, before=chunk(b"tEXt", b"a\0b") * 100_000),
        "PNG with a chunk of 2 GB": PNG + struct.pack(">I4s", 2**31 - 1, b"IHDR") + bytes(20),
        "PNG with a wrong sum": png(9, 9).replace(b"IHDR\0\0\0\x09", b"IHDR\0\0\0\x0a"),
        "PNG that says a million frames": png(9, 9, before=chunk(b"acTL", struct.pack(">II", 10**6, 0))),
        "JPEG of 500 scans more": jpeg_of_scans(2048, 500),
        "JPEG of markers alone": b"\xff\xd8" + b"\xff\xe0\0\x02" * 50_000,
        "JPEG whose EXIF directory is its own next": saved("JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\0\0\x08\0\0\0"),
        "JPEG of 131 MB of EXIF": b"\xff\xd8" + exif + saved("JPEG")[2:],
        "JPEG of pictures that point at themselves": saved("JPEG") + b"\xff\xe2\0\x10MPF\0II*\0\x08\0\0\0",
        "JPEG of 13,000 x 13,000 without its end": saved("JPEG", (13_000, 13_000))[:-2],
        "nothing at all": b"",
        "one byte": b"\x89",
        "GIF whose frame is larger than its screen": gif(1, gif_frame(65_535)),
        "GIF of 100,000 frames": gif(1, gif_frame(1) * 100_000),
        "GIF of a million empty blocks": gif(1, b"!\xfe" + b"\x01x" * 10**6 + b"\0" + gif_frame(1)),
        "GIF without an end to its codes": gif(99, gif_frame(99, b"\xff" + b"\x84" * 255)),
        "TIFF whose directory is its own next": tiff(following=8),
        "TIFF of 4 billion samples": tiff((277, 3, 1, 65_535), (258, 3, 2**31, 200)),
        "TIFF of 4 billion strips": tiff((273, 4, 2**32 - 1, 8)),
        "TIFF of tiles of 2 billion": tiff((322, 4, 1, 2**31 - 16), (323, 4, 1, 2**31 - 16), (324, 4, 1, 8)),
        "TIFF of an endless number of entries": b"II*\0\x08\0\0\0\xff\xff" + bytes(1000),
        "WebP that says 4 GB": b"RIFF\xff\xff\xff\xffWEBPVP8 \xff\xff\xff\xff" + bytes(60),
    }


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
    **{f"{name}, as a video": OTHER_PICTURES[name] for name in ("HTML", "a pickle", "EPS with a DOS head", "AVIF")},
}
"""All of these are refused."""
EBML, ENDLESS = bytes.fromhex("1a45dfa3"), b"\x01" + b"\xff" * 7
CLUSTER = bytes.fromhex("1f43b675")


def element(name: str, data: bytes) -> bytes:
    """Of EBML, with a length of eight bytes."""
    return bytes.fromhex(name) + (len(data) | 1 << 56).to_bytes(8, "big") + data


def matroska(segment: bytes) -> bytes:
    """A file of this segment, which says no length."""
    return element("1a45dfa3", element("4282", b"webm")) + bytes.fromhex("18538067") + ENDLESS + segment


def box(name: bytes, data: bytes, depth: int = 1) -> bytes:
    """Of an MP4, so many times in itself."""
    for _ in range(depth):
        data = struct.pack(">I4s", 8 + len(data), name) + data
    return data


def avi(data: bytes) -> bytes:
    """One chunk with lists."""
    return b"RIFF" + struct.pack("<I", len(data) + 4) + b"AVI " + data


def endless_videos(folder: Path) -> Mapping[str, bytes]:
    """Containers that lie or do not end, and frames that are too large or very many: likewise."""
    mxf = KLV_KEY + bytes.fromhex("020501010d0102010102040000")
    mp4 = box(b"ftyp", b"isom\0\0\0\0isom")
    durations = {"no number": b"\x7f\xf8", "infinity": b"\x7f\xf0", "300 bytes": bytes(294)}
    large = (((12_000, 4_000), 1), ((16_000, 16), 2), ((16, 16), 3_000))
    return {
        "ASF of three million empty objects": (ASF + struct.pack("<Q", 24)) * 3_000_000,
        "ASF of an object of 2^64 - 1 bytes": ASF + b"\xff" * 8 + bytes(20),
        "MXF of three million empty triplets": mxf + (KLV_KEY + bytes(13)) * 3_000_000,
        "MXF of a triplet of 2^56 bytes": mxf + KLV_KEY + bytes(12) + b"\x87" + b"\xff" * 7,
        "MPEG program of three million ends": PACK + b"\x44" + bytes(9) + b"\0\0\1\xb9" * 3_000_000,
        "MP4 of three million empty boxes": mp4 + box(b"free", b"") * 3_000_000,
        "MP4 of boxes nested 5,000 deep": mp4 + box(b"moov", b"", 5_000),
        "MP4 of a box of 2^64 - 1 bytes": mp4 + struct.pack(">I4sQ", 1, b"mdat", 2**64 - 1),
        "MP4 of a box of 3 bytes": mp4 + struct.pack(">I4s", 3, b"moov") + bytes(40),
        "MP4 whose last box has no length": mp4 + struct.pack(">I4s", 0, b"moov") + bytes(400),
        "MP4 with an empty index": mp4 + box(b"moov", b""),
        "MP4 whose frames are in another file": mp4 + box(b"moov", box(b"dref", b"url \0\0\0\0file:///etc/passwd")),
        "MP4 of 4 billion samples": mp4
        + box(b"moov", box(b"trak", box(b"stsz", struct.pack(">III", 0, 1, 2**32 - 1)))),
        "MP4 with a packed index of 4 GB": mp4 + box(b"moov", box(b"cmov", box(b"cmvd", b"\xff" * 4))),
        "Matroska of an empty endless segment": matroska(b""),
        "Matroska of three million voids": matroska(b"\xec\x80" * 3_000_000),
        "Matroska of clusters in clusters": matroska((CLUSTER + ENDLESS) * 10_000),
        "Matroska of an element of 2^56 bytes": matroska(CLUSTER + bytes.fromhex("01fffffffffffffe")),
        "Matroska of zeros": EBML + bytes(4_000),
        **{
            f"Matroska of a duration of {name}": matroska(element("1549a966", element("4489", number + bytes(6))))
            for name, number in durations.items()
        },
        "AVI of nothing": avi(b""),
        "AVI of 200,000 empty chunks": avi((b"JUNK" + bytes(4)) * 200_000),
        "AVI of an endless list": avi(b"LIST\xff\xff\xff\xffmovi"),
        "AVI that says 4 GB": b"RIFF\xfe\xff\xff\xffAVI " + bytes(60),
        "GIF of 100,000 frames, as a video": gif(1, gif_frame(1) * 100_000),
        "GIF of a screen of 65,535, as a video": gif(65_535, gif_frame(1)),
        "FLV of empty tags": b"FLV\x01\x01\0\0\0\x09" + bytes(4) + bytes(15) * 100_000,
        "FLV whose first tag is 4 GB on": b"FLV\x01\x01\xff\xff\xff\xff" + bytes(60),
        "transport packets of nothing": (b"G\x1f\xff\x10" + bytes(184)) * 20_000,
        **{
            f"Matroska of {frames} frames of {size}": write_clip(
                folder / "large.mkv", "ffv1", width=size[0], height=size[1], frames=frames
            ).read_bytes()
            for size, frames in large
        },
    }


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
    "a socket": lambda path: os.mknod(path, stat.S_IFSOCK),
    "a folder": Path.mkdir,
    "a link to itself": lambda path: path.symlink_to(path),
    "a link to a folder above": lambda path: path.symlink_to(".."),
    "a link that leads nowhere": lambda path: path.symlink_to("nowhere"),
    "a link to a pipe": lambda path: (os.mkfifo(path.with_name("p")), path.symlink_to("p")),
    **{f"a hole of 1 TB of {name}": partial(_hole, beginning=beginning) for name, beginning in HOLES.items()},
    **{f"a link to {target}": lambda path, target=target: path.symlink_to(target) for target in DEVICES},
}


@dataclass(frozen=True)
class Hostile:
    """One input: `put` makes it under a path, which is read as `name` says; without it nothing is there."""

    title: str
    video: bool
    put: Callable[[Path], object] = lambda path: None
    name: str = "hostile"
    must_fail: bool = True


def hostile_inputs(scratch: Path) -> Iterator[Hostile]:
    """All of them."""

    def content(data: bytes) -> Callable[[Path], object]:
        return lambda path: path.write_bytes(data)

    for contents, video in ((OTHER_PICTURES, False), (OTHER_VIDEOS, True)):
        for title, data in contents.items():
            yield Hostile(title, video, content(data))
    for title, data in (*lying_sizes(), *bursting().items()):
        yield Hostile(title, video=False, put=content(data), must_fail=False)
    for title, data in endless_videos(scratch).items():
        yield Hostile(title, video=True, put=content(data), must_fail=False)
    for video, kind in ((False, "picture"), (True, "video")):
        for title, make in SPECIAL.items():
            yield Hostile(f"{title}, as a {kind}", video, make)
        for name in NAMES:
            yield Hostile(f"the name {name[:40]!r}, of a {kind}", video, name=name)
    for name in ("a\nb.png", "\x1b[31m.png", "-rf", "$(id).png", "\u202e.png", "%n.png", "a|id"):
        yield Hostile(f"a picture called {name!r}", video=False, put=content(saved("PNG")), name=name, must_fail=False)
