"""Videos made to do harm, written out: playlists that name other files, containers without an end, sizes that lie."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

from benchmarks.hostile_pictures import OTHER_FORMATS, gif, gif_frame
from benchmarks.media_files import written_clip
from dora_vl.data.video_containers import ASF, KLV_KEY, PACK

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
    "a Smooth Streaming manifest": b'<?xml version="1.0"?><SmoothStreamingMedia/>',
    "SDP": b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=a\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
    "ASX": b'<asx version="3.0"><entry><ref href="file:///etc/passwd"/></entry></asx>',
    "RealMedia": b".RMF\0\0\0\x12" + bytes(40),
    "ASF": bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c") + bytes(60),
    "WAV": b"RIFF\x24\0\0\0WAVEfmt " + bytes(28),
    "MP3": b"ID3\x04\0\0\0\0\0\0\xff\xfb\x90\0" + bytes(400),
    "Ogg": b"OggS\0\x02" + bytes(60),
    "MXF": bytes.fromhex("060e2b34020501010d0102010102") + bytes(60),
    "YUV4MPEG": b"YUV4MPEG2 W9999999 H9999999 F25:1\nFRAME\n",
    "IVF": b"DKIF\0\0\x20\0VP80" + bytes(40),
    "raw H.264": b"\0\0\0\x01\x67\x42\0\x0a" + bytes(60),
    "raw HEVC": b"\0\0\0\x01\x40\x01\x0c\x01" + bytes(60),
    "MPEG program stream": b"\0\0\x01\xba\x44" + bytes(60),
    "NUT": b"nut/multimedia container\0" + bytes(40),
    "subtitles": b"1\n00:00:00,000 --> 00:00:01,000\na\n",
    "text subtitles of mplayer": b"[SCRIPT]\n",
    "a rawvideo header of BRSTM": b"RSTM\xfe\xff" + bytes(60),
    "a PNG": b"\x89PNG\r\n\x1a\n" + bytes(40),
    "a JPEG": b"\xff\xd8\xff\xe0" + bytes(40),
    **{
        f"{name}, as a video": OTHER_FORMATS[name]
        for name in ("HTML", "a pickle", "EPS, which runs Ghostscript", "AVIF")
    },
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


def asf_mxf_and_mpeg() -> Iterator[tuple[str, bytes]]:
    """Likewise."""
    mxf = KLV_KEY + bytes.fromhex("020501010d0102010102040000")
    yield "ASF of three million empty objects", (ASF + struct.pack("<Q", 24)) * 3_000_000
    yield "ASF of its mark alone", ASF + struct.pack("<Q", 30) + bytes(6)
    yield "MXF of three million empty triplets", mxf + (KLV_KEY + bytes(13)) * 3_000_000
    yield "ASF of an object of 2^64 - 1 bytes", ASF + b"\xff" * 8 + bytes(20)
    yield "MXF of a triplet of 2^56 bytes", mxf + KLV_KEY + bytes(12) + b"\x87" + b"\xff" * 7
    yield "MXF of a length of 127 bytes", mxf + KLV_KEY + bytes(12) + b"\xff" * 40
    yield "MPEG program of three million ends", PACK + b"\x44" + bytes(9) + b"\0\0\1\xb9" * 3_000_000
    yield "MPEG program of zeros", PACK + b"\x44" + bytes(9) + bytes(100_000)


def lying_and_endless() -> Iterator[tuple[str, bytes]]:
    """Containers: refused, or read within the limits."""
    head = box(b"ftyp", b"isom\0\0\0\0isom")
    yield "MP4 of 200,000 empty boxes", head + box(b"free", b"") * 200_000
    yield "MP4 of three million empty boxes", head + box(b"free", b"") * 3_000_000
    yield "MP4 of boxes nested 5,000 deep", head + nested(5_000)
    yield "MP4 of a box of 2^64 - 1 bytes", head + struct.pack(">I4sQ", 1, b"mdat", 2**64 - 1)
    yield "MP4 of a box of 2^63 bytes", head + struct.pack(">I4sQ", 1, b"moov", 2**63)
    yield "MP4 of a box of 3 bytes", head + struct.pack(">I4s", 3, b"moov") + bytes(40)
    yield "MP4 whose last box has no length", head + struct.pack(">I4s", 0, b"moov") + bytes(400)
    yield "MP4 with an empty index", head + box(b"moov", b"")
    yield "MP4 whose frames are in another file", head + box(b"moov", box(b"dref", b"url \0\0\0\0file:///etc/passwd"))
    yield (
        "MP4 of 4 billion samples",
        head + box(b"moov", box(b"trak", box(b"stsz", struct.pack(">III", 0, 1, 2**32 - 1)))),
    )
    yield (
        "MP4 with a packed index of 4 GB",
        head + box(b"moov", box(b"cmov", box(b"cmvd", struct.pack(">I", 2**32 - 1)))),
    )
    yield "MP4 of its mark alone", head
    yield "Matroska of its mark alone", EBML
    yield "Matroska without a segment", element("1a45dfa3", b"")
    yield "Matroska of an empty endless segment", matroska(b"")
    yield "Matroska of 100,000 voids", matroska(element("ec", b"") * 100_000)
    yield "Matroska of three million voids", matroska(b"\xec\x80" * 3_000_000)
    yield "Matroska of clusters in clusters", matroska((bytes.fromhex("1f43b675") + ENDLESS) * 10_000)
    yield (
        "Matroska of a duration that is no number",
        matroska(element("1549a966", element("4489", b"\x7f\xf8" + bytes(6)))),
    )
    yield "Matroska of an endless duration", matroska(element("1549a966", element("4489", b"\x7f\xf0" + bytes(6))))
    yield "Matroska of a duration of 300 bytes", matroska(element("1549a966", element("4489", bytes(300))))
    yield "Matroska of an element of 2^56 bytes", matroska(bytes.fromhex("1f43b67501fffffffffffffe"))
    yield "Matroska of an endless void", matroska(b"\xec" + ENDLESS)
    yield "Matroska that says 2^55 bytes", matroska(b"", (1 << 55 | 1 << 56).to_bytes(8, "big"))
    yield "Matroska of zeros", EBML + bytes(4_000)
    yield "AVI of nothing", riff(b"AVI ", b"")
    yield "AVI of 200,000 empty chunks", riff(b"AVI ", (b"JUNK" + bytes(4)) * 200_000)
    yield "AVI of an endless list", riff(b"AVI ", b"LIST\xff\xff\xff\xffmovi")
    yield "AVI that says 4 GB", b"RIFF\xfe\xff\xff\xffAVI " + bytes(60)
    yield "AVI that says nothing", b"RIFF\0\0\0\0AVI " + bytes(60)
    yield "GIF of 100,000 frames, as a video", gif(1, 1, gif_frame(1, 1) * 100_000)
    yield "GIF of a screen of 65,535, as a video", gif(65_535, 65_535, gif_frame(1, 1))
    yield "GIF of blocks of one byte", gif(1, 1, b"!\xfe" + b"\x01x" * 3_000_000 + b"\0")
    yield "FLV of empty tags", b"FLV\x01\x01\0\0\0\x09" + bytes(4) + bytes(15) * 100_000
    yield "FLV whose first tag is 4 GB on", b"FLV\x01\x01\xff\xff\xff\xff" + bytes(60)
    yield "FLV of a file size that is no number", b"FLV\x01\x01\0\0\0\x09\0\0\0\0\0\x08filesize\0\x7f\xf8" + bytes(60)
    yield "transport packets of nothing", (b"G\x1f\xff\x10" + bytes(184)) * 20_000
    yield "transport packets of one table", (b"G\x40\0\x10" + b"\0\0\xb0\x0d" + bytes(180)) * 5_000


def large_frames(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Whole files of frames that are too large, and of very many that are small."""
    for name, size, frames in (
        ("12000x4000", (12_000, 4_000), 1),
        ("16000x16", (16_000, 16), 2),
        ("16x16", (16, 16), 3_000),
    ):
        yield (
            f"Matroska of {frames} frames of {name}",
            written_clip(folder / "large.mkv", "ffv1", {}, size=size, frames=frames).read_bytes(),
        )
