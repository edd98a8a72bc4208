"""Pictures made to do harm, written out: other formats under their names, headers that lie, little that is much."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator, Mapping

from PIL import Image, features

PNG, GIF = b"\x89PNG\r\n\x1a\n", b"GIF89a"

OTHER_FORMATS: Mapping[str, bytes] = {
    "EPS, which runs Ghostscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n",
    "EPS with a DOS head": b"\xc5\xd0\xd3\xc6"
    + struct.pack("<6IH", 32, 60, 0, 0, 0, 0, 0xFFFF)
    + b"\0\0%!PS-Adobe-3.0",
    "EPS that reads a file": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(/etc/passwd)(r)file\n",
    "EPS that runs a program": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(%pipe%id) (r) file\n",
    "PostScript": b"%!PS\nshowpage\n",
    "PDF": b"%PDF-1.7\n1 0 obj<</Type/Catalog>>endobj\ntrailer<</Root 1 0 R>>\n%%EOF",
    "SVG with a script": b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
    "SVG that includes a file": b'<!DOCTYPE s [<!ENTITY x SYSTEM "file:///etc/passwd">]><svg>&x;</svg>',
    "XML entity bomb": b'<!DOCTYPE s [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;&a;">]><svg>&b;</svg>',
    "WMF": b"\xd7\xcd\xc6\x9a\0\0" + bytes(34),
    "EMF": b"\x01\0\0\0" + bytes(36) + b" EMF" + bytes(60),
    "FITS": b"SIMPLE  =                    T" + b" " * 2850,
    "GRIB": b"GRIB" + bytes(3) + b"\x01" + bytes(40),
    "BUFR": b"BUFR" + bytes(40),
    "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(60),
    "PSD": b"8BPS\0\x01" + bytes(6) + struct.pack(">HIIHH", 3, 9, 9, 8, 3) + bytes(20),
    "ICO": b"\0\0\1\0\1\0\x10\x10\0\0\1\0\x18\0" + struct.pack("<II", 40, 22) + bytes(40),
    "CUR": b"\0\0\2\0\1\0\x10\x10\0\0\1\0\x18\0" + struct.pack("<II", 40, 22) + bytes(40),
    "ICNS": b"icns" + struct.pack(">I4sI", 16, b"ic07", 8),
    "PPM": b"P6\n2 2\n255\n" + bytes(12),
    "PPM of words": b"P3\n9000 9000\n255\n" + b"1 " * 5000,
    "PGM": b"P5\n2 2\n255\n" + bytes(4),
    "PBM": b"P4\n8 2\n" + bytes(2),
    "PAM": b"P7\nWIDTH 2\nHEIGHT 2\nDEPTH 3\nMAXVAL 255\nTUPLTYPE RGB\nENDHDR\n" + bytes(12),
    "PFM": b"PF\n2 2\n-1.0\n" + bytes(48),
    "TGA": b"\0\0\2" + bytes(9) + struct.pack("<HHBB", 2, 2, 24, 0) + bytes(12),
    "PCX": b"\x0a\x05\x01\x08" + bytes(124),
    "DCX": struct.pack("<II", 0x3ADE68B1, 0),
    "DDS": b"DDS " + struct.pack("<I", 124) + bytes(120),
    "SGI": b"\x01\xda\0\x01" + struct.pack(">HHHH", 3, 2, 2, 3) + bytes(500),
    "XBM": b"#define a_width 8\n#define a_height 1\nstatic char a_bits[] = {0x00};",
    "XPM": b'/* XPM */\nstatic char *a[] = {"1 1 1 1", "a c #000000", "a"};',
    "IM": b"Image type: L image\r\nImage size (x*y): 1*1\r\n\x1a" + bytes(600),
    "MSP": b"DanM" + bytes(28),
    "OLE, FlashPix": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600),
    "FLI": struct.pack("<IHHHHH", 128, 0xAF11, 1, 9, 9, 8) + bytes(120),
    "GBR": struct.pack(">IIIII", 20, 1, 2, 2, 1) + bytes(8),
    "BLP": b"BLP2" + bytes(200),
    "QOI": b"qoif" + struct.pack(">IIBB", 2, 2, 3, 0) + bytes(8),
    "SUN": struct.pack(">8I", 0x59A66A95, 2, 2, 24, 12, 1, 0, 0) + bytes(12),
    "JPEG 2000": b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(60),
    "JPEG 2000 stream": b"\xff\x4f\xff\x51\0\x2f" + bytes(60),
    "AVIF": b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf" + bytes(60),
    "HEIC": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(60),
    "JPEG XL": b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(20),
    "MPEG": b"\0\0\x01\xba" + bytes(60),
    "WAL": bytes(32) + struct.pack("<II", 2, 2) + bytes(60),
    "Kodak PhotoCD": bytes(2048) + b"PCD_" + bytes(60),
    "MCIDAS": b"\0\0\0\0\0\0\0\x04" + bytes(250),
    "HTML": b"<!doctype html><title>404</title>",
    "JSON": b'{"error": "not found"}',
    "text": b"a picture of a cat",
    "a shell script": b"#!/bin/sh\nid\n",
    "an ELF program": b"\x7fELF\x02\x01\x01" + bytes(60),
    "a ZIP archive": b"PK\x03\x04" + bytes(40),
    "gzip": b"\x1f\x8b\x08" + bytes(40),
    "a pickle": b"\x80\x04\x95\x1a\0\0\0\0\0\0\0\x8c\x05posix\x8c\x06system\x93\x8c\x02id\x85R.",
    "safetensors": struct.pack("<Q", 2) + b"{}",
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
    yield from _png()
    yield from _jpeg_and_gif()
    yield from _bmp_tiff_and_webp()
    yield from _jpeg_2000_and_avif()
    yield "nothing at all", b""
    yield "one byte", b"\x89"


def _jpeg_2000_and_avif() -> Iterator[tuple[str, bytes]]:
    """Sizes that lie, and JPEGs that lack their end and would be decoded more than once."""
    stream = saved("JPEG2000", no_jp2=True)
    for width, height in ((2**31 - 1,) * 2, (13_000, 13_000), (1, 2**31 - 1), (0, 0)):
        yield f"JPEG 2000 of {width} x {height}", stream[:8] + struct.pack(">II", width, height) + stream[16:]
        tiles = stream[:24] + struct.pack(">II", 1, 1) + stream[32:]
        yield (
            f"JPEG 2000 of tiles of a pixel, {width} x {height}",
            (tiles[:8] + struct.pack(">II", width, height) + tiles[16:]),
        )
    if features.check("avif"):
        avif = saved("AVIF")
        place = avif.index(b"ispe") + 8
        for side in (2**31 - 1, 13_000, 0):
            yield f"AVIF of {side} x {side}", avif[:place] + struct.pack(">II", side, side) + avif[place + 8 :]
    for side in (2_000, 13_000):
        yield f"JPEG of {side} x {side} without its end", saved("JPEG", (side, side))[:-2]
    yield "JPEG that says 13,000 x 13,000 without its end", jpeg(13_000, 13_000)[:-2]


def _png() -> Iterator[tuple[str, bytes]]:
    for width, height in ((1, 100_000), (100_000, 1), (2**31 - 1, 1), (1, 2**31 - 1), (2**31 - 1,) * 2):
        yield f"PNG of {width} x {height}", png(width, height, rows=1)
    for width, height in ((0, 0), (0, 10), (10, 0), (65_535,) * 2, (9_500, 9_400), (9_400, 9_500), (200, 1)):
        yield f"PNG that says {width} x {height}", png(width, height, rows=3)
    yield "PNG of 88 million black pixels", png(9_400, 9_400)
    yield "PNG of 8 million pixels of 16 bits", png(2_900, 2_900, bits=16)
    yield "PNG with notes of 200 MB", png(9, 9, before=chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2 * 10**8), 1)))
    yield "PNG with a profile of 100 MB", png(9, 9, before=chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(10**8), 9)))
    yield "PNG with 100,000 notes", png(9, 9, before=chunk(b"tEXt", b"a\0b") * 100_000)
    yield "PNG with 100,000 empty IDAT", png(9, 9, before=chunk(b"IDAT", b"") * 100_000)
    yield "PNG with a chunk of 2 GB", PNG + struct.pack(">I4s", 2**31 - 1, b"IHDR") + bytes(20)
    yield "PNG with a wrong sum", png(9, 9).replace(b"IHDR\0\0\0\x09", b"IHDR\0\0\0\x0a")
    yield "PNG that says a million frames", png(9, 9, before=chunk(b"acTL", struct.pack(">II", 10**6, 0)))
    yield "PNG of the signature alone", PNG


def _jpeg_and_gif() -> Iterator[tuple[str, bytes]]:
    for width, height in ((65_535, 65_535), (65_500, 1), (1, 65_500), (0, 0), (0, 9), (9, 0), (9_000, 9_000)):
        yield f"JPEG that says {width} x {height}", jpeg(width, height)
    yield "JPEG of 200 scans more", scans(200)
    yield "JPEG of its first marker alone", b"\xff\xd8\xff"
    yield "JPEG of markers alone", b"\xff\xd8" + b"\xff\xe0\0\x02" * 50_000
    yield "JPEG whose EXIF directory is its own next", saved("JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\0\0\x08\0\0\0")
    yield (
        "JPEG of 131 MB of EXIF",
        b"\xff\xd8" + (b"\xff\xe1\xff\xffExif\0\0" + bytes(65_527)) * 2_000 + saved("JPEG")[2:],
    )
    yield (
        "JPEG with 64 KB of EXIF tags",
        saved("JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\x12" + b"\x12\x01\x03" * 9_000),
    )
    yield "JPEG of pictures that point at themselves", saved("JPEG") + b"\xff\xe2\0\x10MPF\0II*\0\x08\0\0\0"
    for width, height in ((65_535, 65_535), (65_535, 1), (0, 0), (9_000, 9_000)):
        yield f"GIF that says {width} x {height}", gif(width, height, gif_frame(1, 1))
    yield "GIF whose frame is larger than its screen", gif(1, 1, gif_frame(65_535, 65_535))
    yield "GIF of 100,000 frames", gif(1, 1, gif_frame(1, 1) * 100_000)
    yield "GIF of a million empty blocks", gif(1, 1, b"!\xfe" + b"\x01x" * 10**6 + b"\0" + gif_frame(1, 1))
    yield "GIF of a comment of 20 MB", gif(1, 1, b"!\xfe" + (b"\xff" + b"x" * 255) * 80_000 + b"\0" + gif_frame(1, 1))
    yield "GIF without an end to its codes", gif(99, 99, gif_frame(99, 99, b"\xff" + b"\x84" * 255))
    yield "GIF of its name alone", GIF


def _bmp_tiff_and_webp() -> Iterator[tuple[str, bytes]]:
    for width, height in (
        (2**31 - 1, 2**31 - 1),
        (-5, 5),
        (5, -5),
        (5, -(2**31)),
        (0, 0),
        (100_000, 1),
        (9_000, 9_000),
    ):
        yield f"BMP that says {width} x {height}", bmp(width, height)
    for bits, compression in ((0, 0), (33, 0), (8, 1), (4, 2), (24, 4), (24, 5), (24, 99)):
        yield f"BMP of {bits} bits, compression {compression}", bmp(5, 5, bits=bits, compression=compression)
    for width, height in ((2**32 - 1, 2**32 - 1), (0, 0), (100_000, 1), (9_000, 9_000)):
        yield f"TIFF that says {width} x {height}", grey_tiff(width, height)
    yield "TIFF whose directory is its own next", grey_tiff(4, 4, following=8)
    yield "TIFF of 4 billion samples", grey_tiff(4, 4, (277, 3, 1, 65_535), (258, 3, 2**31, 200))
    yield "TIFF of 4 billion strips", grey_tiff(4, 4, (273, 4, 2**32 - 1, 8))
    yield "TIFF of strips beyond its end", grey_tiff(4, 4, (273, 4, 1, 2**32 - 1))
    yield (
        "TIFF of tiles of 2 billion",
        grey_tiff(4, 4, (322, 4, 1, 2**31 - 16), (323, 4, 1, 2**31 - 16), (324, 4, 1, 8)),
    )
    for compression in (2, 3, 4, 5, 6, 7, 8, 32_773, 34_925, 50_000, 50_001, 65_000):
        yield f"TIFF of noise, compression {compression}", grey_tiff(4, 4, (259, 3, 1, compression))
    yield "TIFF of an endless number of entries", b"II*\0\x08\0\0\0\xff\xff" + bytes(1000)
    yield "big TIFF", b"II+\0\x08\0\0\0" + struct.pack("<QQ", 16, 2**63) + bytes(64)
    for width, height in ((16_384, 16_384), (2**24, 2**24), (1, 2**24), (9_000, 9_000)):
        yield f"WebP that says {width} x {height}", webp(width, height)
    yield "WebP that says 4 GB", b"RIFF\xff\xff\xff\xffWEBPVP8 \xff\xff\xff\xff" + bytes(60)
    yield "WebP of nothing", b"RIFF\0\0\0\0WEBP"
