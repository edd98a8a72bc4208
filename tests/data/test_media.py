"""Pictures come from inside their folder, decoded whole, as plain RGB; anything else is a named bad sample."""

from __future__ import annotations

import io
import json
import random
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dora_vl.backbones.towers import ImagePreparation, Preparation
from dora_vl.backbones.vision_store import Media, Medium
from dora_vl.data.check import MediaCheck
from dora_vl.data.example import Clip
from dora_vl.data.order import places_of_largest_pictures
from dora_vl.data.pictures import MediaFolder, open_image
from dora_vl.data.samples import look_ahead
from dora_vl.data.table import load_rows
from dora_vl.data.video import Uniform, read_frames
from dora_vl.errors import BadSample, UserError
from tests.vision.video_files import write_clip


def noise(height: int, width: int, channels: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    (folder / "coco").mkdir(parents=True)
    Image.fromarray(noise(5, 7, 3)).save(folder / "coco" / "a.png")
    Image.fromarray(noise(5, 7, 3)).save(tmp_path / "outside.png")
    return folder


@pytest.mark.parametrize("path", ["../outside.png", "coco/../../outside.png", "coco/..", "", "a\0b", "/etc/hostname"])
def test_paths_that_leave_the_folder_are_refused(root: Path, path: str) -> None:
    with pytest.raises(BadSample):
        open_image(root, path)


def test_an_absolute_path_is_taken_below_the_folder_alone(root: Path, tmp_path: Path) -> None:
    assert open_image(root, str(root / "coco" / "a.png")).size == (7, 5)
    (tmp_path / "linked").symlink_to(root)
    assert open_image(tmp_path / "linked", str(root / "coco" / "a.png")).size == (7, 5)
    (root / "file.png").symlink_to(tmp_path / "outside.png")
    for outside in (tmp_path / "outside.png", root / ".." / "outside.png", root / "file.png"):
        with pytest.raises(BadSample):
            open_image(root, str(outside))


def test_a_link_out_of_the_folder_is_refused_unless_links_are_followed(root: Path, tmp_path: Path) -> None:
    (root / "file.png").symlink_to(tmp_path / "outside.png")
    (root / "folder").symlink_to(tmp_path)
    for path in ("file.png", "folder/outside.png"):
        with pytest.raises(BadSample):
            open_image(root, path)
        assert open_image(MediaFolder(root, follow_links=True), path).size == (7, 5)


def test_links_inside_the_folder_and_a_linked_folder_itself_are_fine(root: Path, tmp_path: Path) -> None:
    (root / "b.png").symlink_to(root / "coco" / "a.png")
    (tmp_path / "linked").symlink_to(root)
    assert open_image(root, "b.png").size == open_image(tmp_path / "linked", "b.png").size == (7, 5)


def test_a_link_to_itself_is_named(root: Path) -> None:
    (root / "loop.png").symlink_to(root / "loop.png")
    with pytest.raises(BadSample):
        open_image(root, "loop.png")


def test_missing_empty_folder_and_text_are_named(root: Path) -> None:
    (root / "empty.png").write_bytes(b"")
    (root / "text.png").write_text("not a picture")
    (root / "cut.png").write_bytes((root / "coco" / "a.png").read_bytes()[:14])
    for path in ("none.png", "empty.png", "text.png", "cut.png", "coco"):
        with pytest.raises(BadSample) as bad:
            open_image(root, path)
        assert bad.value.sample_id == path


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF"])
def test_cut_or_damaged_files_are_bad_samples_or_pictures_never_other_errors(root: Path, kind: str) -> None:
    buffer = io.BytesIO()
    Image.fromarray(noise(37, 23, 3)).save(buffer, kind)
    whole, chance = buffer.getvalue(), random.Random(kind)
    cut = whole[: len(whole) * 2 // 3]
    damaged = []
    for _ in range(60):
        content = bytearray(whole)
        for _ in range(4):
            content[chance.randrange(min(60, len(content)))] = chance.randrange(256)
        damaged.append(bytes(content))
    outcomes = []
    for content in [cut, *damaged]:
        (root / "x").write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns about what it repairs
            try:
                outcomes.append(open_image(root, "x").mode)
            except BadSample as error:
                outcomes.append(error.sample_id)
    assert outcomes[0] == "x"
    assert set(outcomes) <= {"x", "RGB"}


@pytest.mark.parametrize("transparency", [0, bytes([0, 128])])
def test_a_transparent_palette_stands_on_white(root: Path, transparency: int | bytes) -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putdata([0, 1])
    palette.save(root / "p.png", transparency=transparency)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = open_image(root, "p.png")
    assert "transparency" not in image.info
    half_white = [round((255 + part) / 2) for part in (200, 100, 50)]  # alpha 128 of 255
    second = [200, 100, 50] if transparency == 0 else half_white
    np.testing.assert_allclose(np.asarray(image), [[[255, 255, 255], second]], atol=1)


def test_alpha_is_blended_with_white_and_an_opaque_pixel_keeps_its_bits(root: Path) -> None:
    pixels = noise(4, 6, 4)
    pixels[0, :, 3], pixels[1, :, 3] = 255, 0
    Image.fromarray(pixels, "RGBA").save(root / "alpha.png")
    found = np.asarray(open_image(root, "alpha.png"))
    np.testing.assert_array_equal(found[0], pixels[0, :, :3])
    np.testing.assert_array_equal(found[1], np.full((6, 3), 255))
    share = pixels[..., 3:] / 255
    np.testing.assert_allclose(found, share * pixels[..., :3] + (1 - share) * 255, atol=1)


@pytest.mark.parametrize("mode", ["LA", "RGBA", "PA"])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_every_mode_with_alpha_shows_white_where_nothing_is(root: Path, mode: str, kind: str) -> None:
    whole = Image.new("RGBA", (3, 2), (40, 40, 40, 255))
    whole.putpixel((0, 0), (0, 0, 0, 0))
    whole.convert(mode).save(root / "x", kind) if (mode, kind) != ("PA", "PNG") else whole.save(root / "x", kind)
    found = np.asarray(open_image(root, "x"))
    assert found[0, 0].tolist() == [255, 255, 255]
    np.testing.assert_allclose(found[1, 2], [40, 40, 40], atol=1)


STORED_FOR = {
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.transpose(1, 0, 2),
    6: lambda pixels: np.rot90(pixels, 1),
    7: lambda pixels: pixels[::-1, ::-1].transpose(1, 0, 2),
    8: lambda pixels: np.rot90(pixels, -1),
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


def test_a_jpeg_of_a_phone_is_upright_and_one_with_damaged_notes_as_stored(root: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.fromarray(noise(5, 7, 3)).save(buffer, "JPEG", exif=exif)
    (root / "turned.jpg").write_bytes(buffer.getvalue())
    assert open_image(root, "turned.jpg").size == (5, 7)
    (root / "odd.jpg").write_bytes(buffer.getvalue().replace(b"Exif\0\0MM", b"Exif\0\0QQ"))
    assert open_image(root, "odd.jpg").size == (7, 5)


@pytest.mark.parametrize(
    ("numbers", "kind"),
    [
        ([[0.0, 0.25, 1.01]], np.float32),
        ([[-0.5, 0.25, 1.0]], np.float32),
        ([[0.5, np.nan, 0.5]], np.float32),
        ([[0, 70_000, 5]], np.int32),
        ([[-3, 20, 5]], np.int32),
    ],
)
def test_numbers_that_are_no_brightness_are_refused(root: Path, numbers: object, kind: type) -> None:
    """Pillow would read them as black and white."""
    Image.fromarray(np.array(numbers, dtype=kind)).save(root / "scan.tiff")
    with pytest.raises(BadSample):
        open_image(root, "scan.tiff")


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
            look_ahead(rows, pictures=folder, videos=None, max_bad_share=0.0, source="train.json")
        except UserError as error:
            return "data.follow_links" not in str(error)
        return True

    def features(folder: MediaFolder) -> bool:
        preparation = ImagePreparation(Preparation(image_size=8, mean=(0.5,) * 3, std=(0.5,) * 3), aspect="pad")
        return not Media(media=[Medium("a", "a.png")], root=folder, preparation=preparation)[0][0].broken

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
