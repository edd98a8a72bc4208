"""Pictures as the tower's pixels: padded to a square, cropped or squashed, bit for bit as each was published."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from jaxtyping import Float
from PIL import Image
from PIL.Image import Resampling, new
from torch import Tensor
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from dora_vl.data.pictures import READING
from dora_vl.files import opening

Aspect = Literal["pad", "square", "squash"]
PADDED_SIDE = 4_096
"""Of the square up to which a picture is padded as a whole, as published; beyond, row by row, to the same pixels."""
ROWS = 256
"""How many are padded at once."""


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """The picture size (pixels along a side) and colour statistics that a network was trained with."""

    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"


def of_three_colours(values: Iterable[Any]) -> tuple[float, ...]:
    """A colour's three numbers; raises what Python does for anything else."""
    red, green, blue = (float(value) for value in values)
    return red, green, blue


def image_processor(preparation: Preparation, *, aspect: Aspect) -> LlavaImageProcessorPil:
    """transformers' processor with these values.

    It is the PIL one, whatever else is installed: only that equals the original bit for bit (torchvision's differs by
    up to 1/255).
    """
    side = preparation.image_size
    return LlavaImageProcessorPil(
        do_pad=aspect == "pad",
        size={"height": side, "width": side} if aspect == "squash" else {"shortest_edge": side},
        crop_size={"height": side, "width": side},
        resample=Resampling[preparation.interpolation.upper()],
        image_mean=list(preparation.mean),
        image_std=list(preparation.std),
    )


class ImagePreparation:
    """Turns a picture into pixels, in one of three published ways.

    `pad` (every LLaVA-1.5 recipe): the picture is centred on a square of the colour int(mean * 255), then resized.
    `square` (CLIP's own): the shorter side is resized to the tower's size and the middle is cut out.
    `squash` (VL-Adapter's grid features): both sides are resized to the tower's size.
    """

    def __init__(self, preparation: Preparation, *, aspect: Aspect) -> None:
        self.preparation = preparation
        self.aspect: Aspect = aspect
        self._processor = image_processor(preparation, aspect=aspect)

    @classmethod
    def from_folder(cls, folder_or_id: str, *, aspect: Aspect, revision: str | None = None) -> ImagePreparation:
        """The size and colours that a LLaVA folder's preprocessor states."""
        with opening(f"{folder_or_id!r} states no picture preparation"):
            stated = LlavaImageProcessorPil.from_pretrained(folder_or_id, revision=revision or "main")
            preparation = Preparation(
                image_size=int(stated.crop_size["height"]),
                mean=of_three_colours(stated.image_mean),
                std=of_three_colours(stated.image_std),
                interpolation=Resampling(int(stated.resample)).name.lower(),
            )
        return cls(preparation, aspect=aspect)

    def prepare(self, picture: Image.Image) -> Float[Tensor, "3 height width"]:
        """Normalised pixels of one RGB picture."""
        if self.aspect == "pad" and max(picture.size) > PADDED_SIDE:
            picture = self._padded_by_rows(picture)
        pixels = self._processor(images=picture, return_tensors="pt")["pixel_values"]
        return pixels[0]

    def _padded_by_rows(self, picture: Image.Image) -> Image.Image:
        """The padded square at its final size, without ever holding the square, which has gigabytes for long pictures.

        Pillow resizes rows first, each by itself, and rounds them to 8 bits before the columns; so does this, and
        rows that are padding alone keep their colour.
        """
        side, colour = self.preparation.image_size, tuple(int(value * 255) for value in self.preparation.mean)
        resample = Resampling[self.preparation.interpolation.upper()]
        length = max(picture.size)
        left, top = ((length - own) // 2 for own in picture.size)
        narrow = new("RGB", (side, length), colour)
        for start in range(0, picture.height, ROWS):
            rows = picture.crop((0, start, picture.width, min(start + ROWS, picture.height)))
            padded = new("RGB", (length, rows.height), colour)
            padded.paste(rows, (left, 0))
            narrow.paste(padded.resize((side, rows.height), resample), (0, top + start))
        return narrow.resize((side, side), resample)

    def fingerprint(self) -> str:
        """A hash of everything that changes the pixels."""
        stated = {"aspect": self.aspect, "reading": READING, **dataclasses.asdict(self.preparation)}
        return hashlib.sha256(json.dumps(stated, sort_keys=True).encode()).hexdigest()
