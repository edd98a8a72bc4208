"""Pictures come from inside their folder, decoded whole, as plain RGB; anything else is a named bad sample."""

from __future__ import annotations

import io
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dora_vl.data.media import open_image
from dora_vl.errors import BadSample


def noise(height: int, width: int, channels: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    (folder / "coco").mkdir(parents=True)
    Image.fromarray(noise(5, 7, 3)).save(folder / "coco" / "a.png")
    Image.fromarray(noise(5, 7, 3)).save(tmp_path / "outside.png")
    return folder


def test_pixels_are_those_of_the_file(root: Path) -> None:
    image = open_image(root, "coco/a.png")
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), noise(5, 7, 3))


@pytest.mark.parametrize("path", ["../outside.png", "coco/../../outside.png", "coco/..", "", "a\0b", "/etc/hostname"])
def test_paths_that_leave_the_folder_are_refused(root: Path, path: str) -> None:
    with pytest.raises(BadSample, match=r"must (be relative to|not leave)"):
        open_image(root, path)


def test_an_absolute_path_is_taken_below_the_folder_alone(root: Path, tmp_path: Path) -> None:
    assert open_image(root, str(root / "coco" / "a.png")).size == (7, 5)
    (tmp_path / "linked").symlink_to(root)
    assert open_image(tmp_path / "linked", str(root / "coco" / "a.png")).size == (7, 5)
    (root / "file.png").symlink_to(tmp_path / "outside.png")
    for outside in (tmp_path / "outside.png", root / ".." / "outside.png", root / "file.png"):
        with pytest.raises(BadSample, match=r"must (be relative to .*, or lie in it|not leave)|leads out of"):
            open_image(root, str(outside))


def test_a_link_out_of_the_folder_is_refused_unless_links_are_followed(root: Path, tmp_path: Path) -> None:
    (root / "file.png").symlink_to(tmp_path / "outside.png")
    (root / "folder").symlink_to(tmp_path)
    for path in ("file.png", "folder/outside.png"):
        with pytest.raises(BadSample, match="is a link that leads out of"):
            open_image(root, path)
        assert open_image(root, path, follow_links=True).size == (7, 5)


def test_links_inside_the_folder_and_a_linked_folder_itself_are_fine(root: Path, tmp_path: Path) -> None:
    (root / "b.png").symlink_to(root / "coco" / "a.png")
    (tmp_path / "linked").symlink_to(root)
    assert open_image(root, "b.png").size == open_image(tmp_path / "linked", "b.png").size == (7, 5)


def test_a_link_to_itself_is_named(root: Path) -> None:
    (root / "loop.png").symlink_to(root / "loop.png")
    with pytest.raises(BadSample, match=r"loop\.png"):
        open_image(root, "loop.png")


def test_missing_empty_folder_and_text_are_named(root: Path) -> None:
    (root / "empty.png").write_bytes(b"")
    (root / "text.png").write_text("not a picture")
    with pytest.raises(BadSample, match=r"picture none\.png is missing in"):
        open_image(root, "none.png")
    for path in ("empty.png", "text.png", "coco"):
        with pytest.raises(BadSample, match=f"picture {path} in .* cannot be decoded"):
            open_image(root, path)


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
def test_palette_transparency_is_gone_and_its_pixels_keep_their_colour(root: Path, transparency: object) -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putdata([0, 1])
    palette.save(root / "p.png", transparency=transparency)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = open_image(root, "p.png")
    assert "transparency" not in image.info
    assert np.asarray(image).tolist() == [[[10, 20, 30], [200, 100, 50]]]


def test_alpha_is_dropped_and_not_blended(root: Path) -> None:
    Image.fromarray(noise(4, 6, 4), "RGBA").save(root / "alpha.png")
    np.testing.assert_array_equal(np.asarray(open_image(root, "alpha.png")), noise(4, 6, 4)[..., :3])


def test_exif_rotation_is_not_applied(root: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a viewer would turn it by a quarter
    Image.fromarray(noise(5, 7, 3)).save(root / "turned.jpg", exif=exif)
    assert open_image(root, "turned.jpg").size == (7, 5)


def test_sixteen_bit_grey_keeps_its_range(root: Path) -> None:
    Image.fromarray(np.array([[0, 256, 32768, 65535]], dtype=np.uint16)).save(root / "grey.png")
    assert np.asarray(open_image(root, "grey.png"))[0, :, 0].tolist() == [0, 1, 128, 255]
