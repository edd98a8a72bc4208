"""Pixels equal LLaVA's and CLIP's own preparation, written out with PIL and numpy, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dora_vl.backbones import towers
from dora_vl.backbones.towers import ImagePreparation, Preparation, image_processor
from dora_vl.errors import UserError

SIDE = 28
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CLIP = Preparation(image_size=SIDE, mean=CLIP_MEAN, std=CLIP_STD)
SHAPES = [(40, 20), (20, 41), (28, 28), (7, 100), (3, 5), (33, 32)]


def picture(width: int, height: int) -> Image.Image:
    values = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def padded(image: Image.Image) -> Image.Image:
    """`expand2square` of LLaVA c121f04 with the CLIP mean, (122, 116, 104)."""
    width, height = image.size
    side = max(width, height)
    square = Image.new("RGB", (side, side), (122, 116, 104))
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def clip_pixels(image: Image.Image) -> np.ndarray:
    """CLIP: shorter side to SIDE (bicubic), centre crop, 0 to 1, minus mean, over deviation."""
    width, height = image.size
    if width <= height:
        resized = image.resize((SIDE, int(SIDE * height / width)), Image.Resampling.BICUBIC)
    else:
        resized = image.resize((int(SIDE * width / height), SIDE), Image.Resampling.BICUBIC)
    values = np.asarray(resized).astype(np.float32)
    top, left = (values.shape[0] - SIDE) // 2, (values.shape[1] - SIDE) // 2
    # The product with 1/255 is taken in float64 and rounded once, as transformers 4.37 does.
    values = (values[top : top + SIDE, left : left + SIDE].astype(np.float64) * (1 / 255)).astype(np.float32)
    return ((values - np.float32(CLIP_MEAN)) / np.float32(CLIP_STD)).transpose(2, 0, 1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("aspect", ["pad", "square"])
def test_pixels_are_bit_exact(shape: tuple[int, int], aspect: Any) -> None:
    pixels = ImagePreparation(CLIP, aspect=aspect).prepare(picture(*shape))
    shown = padded(picture(*shape)) if aspect == "pad" else picture(*shape)
    np.testing.assert_array_equal(pixels.numpy(), clip_pixels(shown).astype(np.float32))


@pytest.mark.parametrize("mean", ["x", [0.1, 0.2, None], "no file"])
def test_a_preprocessor_without_three_colours(tmp_path: Path, mean: object) -> None:
    image_processor(CLIP, aspect="pad").save_pretrained(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "image_mean": mean}))
    if mean == "no file":
        file.unlink()
    with pytest.raises(UserError):
        ImagePreparation.from_folder(str(tmp_path), aspect="pad")


@pytest.mark.parametrize("size", [(701, 33), (37, 650), (400, 399)])
@pytest.mark.parametrize("side", [56, 336])
def test_a_long_picture_padded_row_by_row_is_the_same(monkeypatch, size, side) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8))
    preparation = Preparation(image_size=side, mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28))
    whole = ImagePreparation(preparation, aspect="pad").prepare(picture)
    monkeypatch.setattr(towers, "PADDED_SIDE", 100)
    monkeypatch.setattr(towers, "ROWS", 7)
    by_rows = ImagePreparation(preparation, aspect="pad").prepare(picture)
    assert torch.equal(whole, by_rows)
