"""What a picture file may ask for: its format, its pixels and sides, its kind of file; nothing else ever starts."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dora_vl.data import media_limits, picture_decoding
from dora_vl.data.media import open_image
from dora_vl.errors import BadSample


def png(width: int, height: int) -> bytes:
    """A black one of one bit a pixel: a few hundred bytes for any size."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    row = bytes(1 + (width + 7) // 8)
    squeezed = zlib.compressobj(9)
    data = b"".join(squeezed.compress(row) for _ in range(height)) + squeezed.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 10 10
%%EndComments
newpath 0 0 moveto 10 10 lineto stroke
showpage
%%EOF
"""
OPENS = """
import sys
from pathlib import Path
from dora_vl.data.media import open_image
from dora_vl.errors import BadSample

def hook(event, arguments):
    if event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork"):
        print("STARTED", arguments)

sys.addaudithook(hook)
try:
    open_image(Path(sys.argv[1]), sys.argv[2])
except BadSample as error:
    print(error.reason)
"""


def test_a_picture_starts_no_other_program(tmp_path: Path) -> None:
    """Pillow's EPS plugin runs `gs`; one that is found here says that it was."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\nexit 1\n")
    (tmp_path / "gs").chmod(0o755)
    (tmp_path / "a.jpg").write_bytes(EPS)
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    command = [sys.executable, "-c", OPENS, str(tmp_path), "a.jpg"]
    done = subprocess.run(
        command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True
    )
    assert "is no picture of PNG, JPEG, WEBP, GIF, BMP, TIFF: it begins with b'%!PS-Ado'" in done.stdout
    assert "STARTED" not in done.stdout
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["PPM", "TGA", "ICO", "PCX", "JPEG2000"])
def test_formats_beside_the_list_are_named(tmp_path: Path, kind: str) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png", kind)
    with pytest.raises(BadSample, match=r"picture a\.png in .* is no picture of PNG, JPEG, WEBP, GIF, BMP, TIFF"):
        open_image(tmp_path, "a.png")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("size", "why"),
    [
        ((1, 100_000), "has 1 x 100,000 pixels; a side may be 200 times the other"),
        ((100_000, 1), "has 100,000 x 1 pixels; a side may be 200 times the other"),
        ((14_000, 13_000), r"182000000 pixels\) exceeds limit of 178956970"),
        ((2**31 - 1, 2**31 - 1), "pixels"),
    ],
)
def test_too_many_pixels_are_refused_by_the_header(tmp_path: Path, size: tuple[int, int], why: str) -> None:
    content = bytearray(png(1, 1))
    content[16:24] = struct.pack(">II", *size)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(BadSample, match=rf"a\.png in .*{why}"):
        open_image(tmp_path, "a.png")


def test_a_long_picture_is_shrunk_to_the_largest_side(tmp_path: Path) -> None:
    ramp = np.linspace(0, 255, 12_000).astype(np.uint8)
    Image.fromarray(np.repeat(ramp[:, None, None], 1080, 1).repeat(3, 2)).save(tmp_path / "a.png")
    found = open_image(tmp_path, "a.png")
    assert found.size == (737, media_limits.PICTURE_SIDE)
    expected = np.linspace(0, 255, media_limits.PICTURE_SIDE)
    np.testing.assert_allclose(np.asarray(found)[:, 300, 1], expected, atol=1.5)
    Image.new("RGB", (8192, 100)).save(tmp_path / "b.png")
    assert open_image(tmp_path, "b.png").size == (8192, 100)


def test_pipes_sockets_devices_and_folders_are_no_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket.png")
        for name, kind in {"pipe.png": "a named pipe", "zero.png": "a device", ".": "a folder"}.items():
            started = time.monotonic()
            with pytest.raises(BadSample, match=f"cannot be read: it is {kind}, no file"):
                open_image(tmp_path, name, follow_links=True)
            assert time.monotonic() - started < 1
        with pytest.raises(BadSample, match="cannot be"):
            open_image(tmp_path, "socket.png")


@pytest.mark.parametrize("name", ["\ud83d.png", "a" * 5_000, "a/" * 3_000, "a\0b"])
@pytest.mark.parametrize("follow_links", [False, True])
def test_names_that_no_file_system_takes_are_bad_samples(tmp_path: Path, name: str, follow_links: bool) -> None:
    with pytest.raises(BadSample) as raised:
        open_image(tmp_path, name, follow_links=follow_links)
    assert str(raised.value).isprintable()


def test_a_file_of_too_many_bytes_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picture_decoding, "PICTURE_BYTES", 1000)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 30, 3), np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(BadSample, match=r"has 2,\d\d\d bytes; at most 1,000 are read"):
        open_image(tmp_path, "a.png")


def gif_of_comment(blocks: int) -> bytes:
    """One white pixel behind a comment of so many blocks of a byte."""
    picture = BytesIO()
    Image.new("L", (1, 1), 255).save(picture, "GIF")
    whole = picture.getvalue()
    frame = whole.index(b"!\xf9") if b"!\xf9" in whole else whole.index(b",")
    return whole[:frame] + b"!\xfe" + b"\x01x" * blocks + b"\0" + whole[frame:]


def jpeg_of_exif(segments: int) -> bytes:
    """A white one behind so many segments of EXIF, each as long as can be."""
    picture = BytesIO()
    Image.new("L", (1, 1), 255).save(picture, "JPEG")
    whole = picture.getvalue()
    return whole[:2] + (b"\xff\xe1\xff\xffExif\0\0" + bytes(65_527)) * segments + whole[2:]


@pytest.mark.parametrize(
    ("file", "few", "many"), [(gif_of_comment, 50_000, 1_000_000), (jpeg_of_exif, 400, 2_000)]
)  # Pillow takes the square of them: 11 s and 70 s
def test_a_header_in_too_many_pieces_is_not_read_on(
    tmp_path: Path, file: Callable[[int], bytes], few: int, many: int
) -> None:
    (tmp_path / "few").write_bytes(file(few))
    assert open_image(tmp_path, "few").getpixel((0, 0)) == (255, 255, 255)
    (tmp_path / "many").write_bytes(file(many))
    with pytest.raises(BadSample, match=r"has a header of more than [\d,]+ pieces and [\d,]+ bytes"):
        open_image(tmp_path, "many")


def test_pixels_in_many_pieces_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 301, 3), np.uint8))
    noise.save(tmp_path / "a.png")
    monkeypatch.setattr(picture_decoding, "HEADER_READS_TIMES_BYTES", 5_000)
    assert np.array_equal(np.asarray(open_image(tmp_path, "a.png")), np.asarray(noise))


def test_too_little_memory_is_a_bad_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")

    def none_left(image: Image.Image) -> None:
        raise MemoryError

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", none_left)
    with pytest.raises(BadSample, match="cannot be decoded: MemoryError"):
        open_image(tmp_path, "a.png")


def test_a_picture_of_cameras_with_several_in_it_is_its_first(tmp_path: Path) -> None:
    first, second = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    first.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[second])
    with Image.open(BytesIO((tmp_path / "a.jpg").read_bytes())) as image:
        assert image.format == "MPO"
    assert np.asarray(open_image(tmp_path, "a.jpg"))[4, 4, 0] > 250
