"""What somebody may put where a picture or video is expected, to do harm."""

import io
import os
import stat
import struct
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

from PIL import Image


def saved(form: str, size: tuple[int, int] = (16, 16), **options: object) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, (90, 90, 90)).save(stream, form, **options)
    return stream.getvalue()


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


PICTURES: Mapping[str, bytes] = {
    "EPS that runs a program": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(%pipe%id) (r) file\n",
    "SVG that includes a file": b'<!DOCTYPE s [<!ENTITY x SYSTEM "file:///etc/passwd">]><svg>&x;</svg>',
    "HTML": b"<!doctype html><html></html>",
    "nothing at all": b"",
}
VIDEOS: Mapping[str, bytes] = {
    "a playlist that names a file": b"#EXTM3U\n#EXTINF:1,\n/etc/passwd\n#EXT-X-ENDLIST\n",
    "a playlist that names an address": b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n",
    "a script that joins files": b"ffconcat version 1.0\nfile /etc/passwd\n",
    "SDP": b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=a\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
}
"""Files of formats that are not read, since they start programs or name other files."""
NAMES = (
    "../outside", "../../etc/passwd", "/etc/passwd", "a/../../b", "./../x", "~/x", "~root/x", "", ".", "..", "a\0b",
    "a" * 5_000, "a/" * 3_000, "a\nerror: forged", "\x1b[2J\x1b[31mred", "\u202egnp", "\ud83d", "|id", "$(id)", "`id`",
    "; id", "-rf", "--help", "http://127.0.0.1:9/a", "https://example.invalid/a", "file:///etc/passwd", "ftp://a/b",
    "concat:a|b", "pipe:0", "data:image/png;base64,AAAA", "tcp://127.0.0.1:9", "s3://a/b", "%s%s%n", "{0.__class__}",
    "CON", "a:b", "a\\..\\b", "\u2028", "a\rb",
)  # fmt: skip
"""No file that may be read has such a name."""
DEVICES = ("/dev/zero", "/dev/urandom", "/dev/tty", "/dev/stdin", "/etc/passwd", "/proc/self/mem")
SPECIAL: dict[str, Callable[[Path], object]] = {
    "a named pipe": os.mkfifo,
    "a socket": lambda path: os.mknod(path, stat.S_IFSOCK),
    "a folder": Path.mkdir,
    "a link to itself": lambda path: path.symlink_to(path),
    "a link to a folder above": lambda path: path.symlink_to(".."),
    "a link that leads nowhere": lambda path: path.symlink_to("nowhere"),
    "a link to a pipe": lambda path: (os.mkfifo(path.with_name("p")), path.symlink_to("p")),
    **{f"a link to {target}": lambda path, target=target: path.symlink_to(target) for target in DEVICES},
}


def jpeg2000_of(side: int) -> bytes:
    """Some 250 bytes whose head says so many pixels: its decoder makes them all."""
    data = bytearray(saved("JPEG2000"))
    box, code = data.index(b"ihdr") + 4, data.index(b"\xff\x51") + 6
    for start in (box, code, code + 16):  # the box's sides, the code stream's, its tile's
        data[start : start + 8] = struct.pack(">II", side, side)
    return bytes(data)


def webp_of(side: int) -> bytes:
    """A lossless WebP whose head says so many pixels."""
    data = bytearray(saved("WEBP", lossless=True))
    start = data.index(b"VP8L") + 9
    bits = int.from_bytes(data[start : start + 4], "little") >> 28 << 28 | (side - 1) << 14 | (side - 1)
    data[start : start + 4] = bits.to_bytes(4, "little")
    return bytes(data)


def png_of(side: int) -> bytes:
    """A PNG with transparency whose head says so many pixels."""
    stream = io.BytesIO()
    Image.new("RGBA", (16, 16)).save(stream, "PNG")
    head = b"IHDR" + struct.pack(">II", side, side) + stream.getvalue()[24:29]
    return stream.getvalue()[:12] + head + struct.pack(">I", zlib.crc32(head)) + stream.getvalue()[33:]


def gif_with_comments(size: int) -> bytes:
    """A GIF of 16 x 16 pixels with a comment of so many bytes, which Pillow joins block by block."""
    data = saved("GIF")
    start = data.index(b"\x2c", 13)
    return data[:start] + b"\x21\xfe" + (b"\xff" + b"c" * 255) * (size // 255) + b"\0" + data[start:]
