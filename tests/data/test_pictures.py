"""Pictures come from inside their folder, decoded whole, as plain RGB; anything else is a named bad sample.

Names, special files and formats that could do harm, of videos too, are one printable line; nothing is opened.
"""

import io
import json
import struct
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dora_vl.backbones.feature_encoder import MediaDataset, Medium
from dora_vl.backbones.towers import ImagePreparation, Preparation
from dora_vl.data.check import MediaCheck
from dora_vl.data.example import Clip
from dora_vl.data.pictures import PICTURE_SIDE, MediaFolder, any_is_there, decoding_trouble, open_image, path_inside
from dora_vl.data.samplers import places_of_largest_pictures
from dora_vl.data.samples import check_files_early
from dora_vl.data.table import load_rows
from dora_vl.data.video import Uniform, VideoReader
from dora_vl.errors import BadSample, UserError
from tests.data.hostile import NAMES, SPECIAL, VIDEOS, gif_with_comments, jpeg2000_of, jpeg_of_scans, png_of, webp_of
from tests.data.hostile import PICTURES as HOSTILE
from tests.data.video_files import read_frames, write_clip


def noise(height: int, width: int, channels: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with a picture, and links in and out of it; `linked` beside it is a link to it."""
    folder = tmp_path / "pictures"
    (folder / "coco").mkdir(parents=True)
    Image.fromarray(noise(5, 7, 3)).save(folder / "coco" / "a.png")
    Image.fromarray(noise(5, 7, 3)).save(tmp_path / "outside.png")
    links = {"b.png": folder / "coco" / "a.png", "out.png": tmp_path / "outside.png", "up": tmp_path}
    for name, target in {**links, "../linked": folder}.items():
        (folder / name).symlink_to(target)
    return folder


def test_links_inside_a_linked_folder_and_absolute_paths_are_fine(root: Path, tmp_path: Path) -> None:
    for folder in (root, tmp_path / "linked"):
        for path in ("coco/a.png", "b.png", str(root / "coco" / "a.png")):
            assert open_image(folder, path).size == (7, 5)
    outside = (str(tmp_path / "outside.png"), str(root / ".." / "outside.png"), str(root / "out.png"))
    for path in (*outside, "../outside.png", "coco/../../outside.png", "out.png", "up/outside.png", "none.png"):
        with pytest.raises(BadSample) as bad:
            open_image(root, path)
        assert bad.value.sample_id == path
    for path in ("out.png", "up/outside.png"):
        assert open_image(MediaFolder(root, follow_links=True), path).size == (7, 5)


def test_alpha_is_blended_with_white_and_an_opaque_pixel_keeps_its_bits(root: Path) -> None:
    pixels = noise(4, 6, 4)
    pixels[0, :, 3], pixels[1, :, 3] = 255, 0
    Image.fromarray(pixels, "RGBA").save(root / "alpha.png")
    blended = np.asarray(open_image(root, "alpha.png"))
    np.testing.assert_array_equal(blended[0], pixels[0, :, :3])
    np.testing.assert_array_equal(blended[1], np.full((6, 3), 255))
    share = pixels[..., 3:] / 255
    np.testing.assert_allclose(blended, share * pixels[..., :3] + (1 - share) * 255, atol=1)


@pytest.mark.parametrize("mode", ["LA", "RGBA", "PA"])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_every_mode_with_alpha_shows_white_where_nothing_is(root: Path, mode: str, kind: str) -> None:
    whole = Image.new("RGBA", (3, 2), (40, 40, 40, 255))
    whole.putpixel((0, 0), (0, 0, 0, 0))
    whole.convert(mode).save(root / "x", kind) if (mode, kind) != ("PA", "PNG") else whole.save(root / "x", kind)
    pixels = np.asarray(open_image(root, "x"))
    assert pixels[0, 0].tolist() == [255, 255, 255]
    np.testing.assert_allclose(pixels[1, 2], [40, 40, 40], atol=1)


STORED_FOR = {
    3: lambda pixels: pixels[::-1, ::-1],
    5: lambda pixels: pixels.transpose(1, 0, 2),
    6: lambda pixels: np.rot90(pixels, 1),
}
"""EXIF's orientation -> what a camera stores of an upright picture (JEITA CP-3451, orientation)."""


@pytest.mark.parametrize("orientation", STORED_FOR)
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_a_turned_photograph_is_read_upright(root: Path, orientation: int, kind: str) -> None:
    upright, exif = noise(5, 7, 3), Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED_FOR[orientation](upright)))
    stored.save(root / "x", kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    np.testing.assert_array_equal(np.asarray(open_image(root, "x")), upright)


def test_a_jpeg_with_damaged_notes_is_read_as_stored(root: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.fromarray(noise(5, 7, 3)).save(buffer, "JPEG", exif=exif)
    (root / "odd.jpg").write_bytes(buffer.getvalue().replace(b"Exif\0\0MM", b"Exif\0\0QQ"))
    assert open_image(root, "odd.jpg").size == (7, 5)


def test_whatever_reads_files_follows_links_by_one_option(tmp_path: Path) -> None:
    """As DVC and git-annex lay them: training's start and batches, check-data and init, features, videos."""
    root = tmp_path / "linked"
    root.mkdir()
    for name in ("a.png", "a.mp4"):
        (root / name).symlink_to(tmp_path / f"stored_{name}")
    Image.fromarray(noise(5, 7, 3)).save(tmp_path / "stored_a.png")
    write_clip(tmp_path / "stored_a.mp4")
    row = {
        "id": "1",
        "image": "a.png",
        "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "b"}],
    }
    (tmp_path / "train.json").write_text(json.dumps([row]))
    rows = load_rows(str(tmp_path / "train.json"))

    def start(folder: MediaFolder) -> bool:
        try:
            check_files_early(rows, pictures=folder, videos=None, max_bad_share=0.0, source="train.json")
        except UserError as error:
            return "data.follow_links" not in str(error)
        return True

    def features(folder: MediaFolder) -> bool:
        preparation = ImagePreparation(Preparation(image_size=8, mean=(0.5,) * 3, std=(0.5,) * 3), aspect="pad")
        return not isinstance(
            MediaDataset(media=[Medium("a", "a.png")], root=folder, preparation=preparation)[0], BadSample
        )

    def video(folder: MediaFolder) -> bool:
        try:
            return len(read_frames(folder, Clip(path="a.mp4"), Uniform(2)).pictures) == 2
        except BadSample:
            return False

    readers: list[Callable[[MediaFolder], bool]] = [
        start,
        features,
        video,
        lambda folder: MediaCheck(folder, decode=False).trouble("a.png") is None,
        lambda folder: MediaCheck(folder, decode=True).trouble("a.mp4") is None,
        lambda folder: bool(places_of_largest_pictures(rows.rows, rows.stored, folder, 1)),
    ]
    for follow_links in (False, True):
        assert [read(MediaFolder(root, follow_links)) for read in readers] == [follow_links] * len(readers)


def test_a_picture_starts_no_other_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow's EPS plugin asks for `gs` and runs it."""
    started: list[object] = []
    monkeypatch.setattr("subprocess.Popen", lambda *command, **_: started.append(command))
    (tmp_path / "a.jpg").write_bytes(HOSTILE["EPS that runs a program"])
    with pytest.raises(BadSample):
        open_image(tmp_path, "a.jpg")
    assert started == []


def test_a_long_picture_is_shrunk_to_the_largest_side(tmp_path: Path) -> None:
    ramp = np.linspace(0, 255, 12_000).astype(np.uint8)
    Image.fromarray(np.repeat(ramp[:, None, None], 1080, 1).repeat(3, 2)).save(tmp_path / "a.png")
    shrunk = open_image(tmp_path, "a.png")
    assert shrunk.size == (737, PICTURE_SIDE)
    expected = np.linspace(0, 255, PICTURE_SIDE)
    np.testing.assert_allclose(np.asarray(shrunk)[:, 300, 1], expected, atol=1.5)
    Image.new("RGB", (8192, 100)).save(tmp_path / "b.png")
    assert open_image(tmp_path, "b.png").size == (8192, 100)


def test_a_file_of_too_many_bytes_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dora_vl.data.pictures.PICTURE_BYTES", 1000)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 30, 3), np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(BadSample):
        open_image(tmp_path, "a.png")


@pytest.mark.parametrize("make", [jpeg2000_of, webp_of, png_of])
def test_a_picture_is_bounded_by_its_head_before_it_is_decoded(tmp_path: Path, make: Callable[[int], bytes]) -> None:
    """In the process that trains: these decoders take 12 to 16 bytes a pixel, 3 GB here."""
    (tmp_path / "a").write_bytes(make(13_000))
    began = time.thread_time()
    with pytest.raises(BadSample, match="13,000 x 13,000"):
        open_image(tmp_path, "a")
    assert time.thread_time() - began < 1


@pytest.mark.parametrize("content", [lambda: jpeg_of_scans(4_000, 20_000), lambda: gif_with_comments(30_000_000)])
def test_a_picture_that_takes_its_decoder_too_long_is_not_decoded_on(tmp_path, monkeypatch, content) -> None:
    """In the process that trains too: a JPEG of thousands of scans, each of which goes through all of it."""
    monkeypatch.setattr("dora_vl.data.pictures.PICTURE_SECONDS", 0.3)
    (tmp_path / "a").write_bytes(content())
    began = time.thread_time()
    with pytest.raises(BadSample):
        open_image(tmp_path, "a")
    assert time.thread_time() - began < 5


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def heic() -> bytes:
    pillow_heif = pytest.importorskip("pillow_heif", reason="pip install pillow-heif")
    stream = BytesIO()
    pillow_heif.from_pillow(PHOTO).save(stream, quality=95)
    return stream.getvalue()


RAMP = np.linspace(0, 1, 48 * 36, dtype=np.float32).reshape(36, 48)
ROWS, COLUMNS = np.mgrid[0:36, 0:48]
PIXELS = np.stack([COLUMNS * 5, ROWS * 7, 255 - COLUMNS * 5], axis=2).astype(np.uint8)
PHOTO = Image.fromarray(PIXELS)
JPEG = saved(PHOTO, "JPEG", quality=95)


def greys(bits: int) -> np.ndarray:
    return np.round(RAMP * (2**bits - 1)).astype(np.uint16)


GREY = np.stack([RAMP * 255] * 3, axis=2)
ODD: Mapping[str, tuple[Callable[[], bytes], np.ndarray, float]] = {
    "a TIFF of 16 bits": (lambda: saved(Image.fromarray(greys(16)), "TIFF"), GREY, 1.01),
    "a dark PNG of 16 bits": (lambda: saved(Image.fromarray(greys(12)), "PNG"), GREY / 16, 1),
    "10 x 2,500 pixels": (lambda: saved(Image.new("RGB", (10, 2_500), "red"), "PNG"), np.array([[[255, 0, 0]]]), 0),
    "a HEIC": (heic, PIXELS, 12),
}
"""What others open: a file, its pixels, and how far each may be from them."""


@pytest.mark.parametrize("name", ODD)
def test_an_odd_but_valid_picture_has_its_pixels(tmp_path: Path, name: str) -> None:
    make, pixels, tolerance = ODD[name]
    (tmp_path / "a").write_bytes(make())
    decoded = np.asarray(open_image(tmp_path, "a"), dtype=np.float32)
    np.testing.assert_allclose(decoded, np.broadcast_to(pixels, decoded.shape), atol=tolerance, rtol=0)
    assert name.startswith("10 x") or decoded.shape == pixels.shape
    assert decoding_trouble(tmp_path / "a") is None


def png_of_size(width: int, height: int) -> bytes:
    """A PNG of one pixel whose header says another size."""
    content = bytearray(saved(Image.new("1", (1, 1)), "PNG"))
    content[16:24] = struct.pack(">II", width, height)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


FLAWED: Mapping[str, Callable[[], bytes]] = {
    "a JPEG without its end mark": lambda: JPEG[:-2],
    "a TIFF of 32-bit numbers": lambda: saved(Image.fromarray(greys(8).astype(np.int32)), "TIFF"),
    "a JPEG cut in its middle": lambda: JPEG[: len(JPEG) * 2 // 3],
    "a JPEG cut and filled up with zeros": lambda: JPEG[: len(JPEG) * 2 // 3] + bytes(9_000),
    **{f"a {kind}": lambda kind=kind: saved(PHOTO, kind) for kind in ("PPM", "ICO")},
    **{
        f"{width} x {height} pixels": lambda size=(width, height): png_of_size(*size)
        for width, height in ((1, 100_000), (100_000, 1), (14_000, 13_000), (2**31 - 1, 2**31 - 1))
    },
    **{  # Pillow would read these as black and white
        f"a TIFF of {numbers}": lambda row=numbers, kind=kind: saved(Image.fromarray(np.array([row], kind)), "TIFF")
        for numbers, kind in (([0.0, 0.25, 1.0], np.float32), ([0, 70_000, 5], np.int32), ([-3, 20, 5], np.int32))
    },
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", FLAWED)
def test_a_picture_that_lost_pixels_or_is_none_that_is_read_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "a").write_bytes(FLAWED[name]())
    with pytest.raises(BadSample):
        open_image(tmp_path, "a")
    assert decoding_trouble(tmp_path / "a") is not None


@pytest.mark.parametrize(
    "content",
    [
        saved(PHOTO, "JPEG", exif=bytes.fromhex("4578696600004d4d002a00000008000101120003000000010006000000000000")),
        saved(PHOTO.convert("LA"), "PNG"),
        saved(Image.merge("RGBA", (*PHOTO.split(), Image.new("L", PHOTO.size, 9))), "PNG"),
        saved(Image.fromarray(greys(16)), "PNG"),
    ],
)
def test_as_published_a_picture_is_what_pillow_makes_rgb_of(tmp_path: Path, content: bytes) -> None:
    """`Image.open(...).convert("RGB")`, as llava/train/train.py has it."""
    (tmp_path / "a").write_bytes(content)
    published = Image.open(BytesIO(content)).convert("RGB")
    opened = open_image(MediaFolder(tmp_path, as_published=True), "a")
    assert opened.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(opened), np.asarray(published))
    shown = np.asarray(open_image(tmp_path, "a"))
    assert np.array_equal(shown, np.asarray(opened)) == (Image.open(BytesIO(content)).mode == "LA")


def test_a_name_in_other_letters_is_the_one_file_that_fits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "Photos").mkdir()
    for name, colour in (("UP.JPG", 1), ("two.png", 2), ("TWO.png", 3), ("Two.PNG", 4), ("down.png", 5)):
        Image.new("RGB", (4, 4), (colour, 0, 0)).save(tmp_path / "Photos" / name, "PNG")
    (tmp_path / "Photos" / "e\u0301.png").touch()  # as macOS writes it
    for _ in range(2):
        assert path_inside(tmp_path, "Photos/up.jpg") == tmp_path / "Photos" / "UP.JPG"
    assert open_image(tmp_path, "Photos/up.jpg").getpixel((0, 0)) == (1, 0, 0)
    assert path_inside(tmp_path, "Photos/two.png").name == "two.png"  # its own name before any other
    assert path_inside(tmp_path, "Photos/TWO.PNG").name == "TWO.PNG"  # three would fit: it is missing
    assert path_inside(tmp_path, "Photos/\u00e9.png").name == "e\u0301.png"
    assert any_is_there(["Photos/DOWN.PNG"], tmp_path)
    assert [record.levelname for record in caplog.records] == ["WARNING"]  # once in a process


@pytest.fixture(scope="module")
def reader() -> Iterator[VideoReader]:
    with VideoReader() as reading:
        yield reading


def refused(reader: VideoReader, folder: Path | MediaFolder, name: str) -> None:
    for read in (lambda: open_image(folder, name), lambda: reader.read(folder, Clip(path=name), Uniform(2))):
        with pytest.raises(BadSample) as error:
            read()
        assert str(error.value).isprintable()
        assert len(str(error.value)) < 500


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_a_name_of_nothing_that_may_be_read(reader: VideoReader, tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "outside").write_bytes(b"")
    refused(reader, tmp_path / "folder", name)


FORMATS = {
    name: lambda path, content=content: path.write_bytes(content) for name, content in {**HOSTILE, **VIDEOS}.items()
}


@pytest.mark.parametrize("put", [*SPECIAL.values(), *FORMATS.values()], ids=[*SPECIAL, *FORMATS])
def test_no_regular_file_or_a_format_that_starts_programs_or_names_files(reader, tmp_path, put) -> None:
    put(tmp_path / "hostile")
    for follow_links in (False, True):
        refused(reader, MediaFolder(tmp_path, follow_links), "hostile")


@pytest.mark.parametrize("kind", ["TIFF", "GIF"])
def test_a_file_of_several_pages_is_refused(tmp_path: Path, kind: str) -> None:
    first, *others = [Image.new("RGB", (4, 4), colour) for colour in ("red", "green", "blue")]
    first.save(tmp_path / "a", format=kind, save_all=True, append_images=others)
    first.save(tmp_path / "b", format=kind)
    with pytest.raises(BadSample):
        open_image(tmp_path, "a")
    assert open_image(tmp_path, "b").size == (4, 4)
